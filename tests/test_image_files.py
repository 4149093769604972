"""irnb.image_files: kinds of files, damage, atomic writes, the PNG codec against Pillow."""
import errno, io, lzma, os, socket, struct, subprocess, sys, threading, tracemalloc, warnings, zlib

import numpy as np
import pytest
import skimage.data
import tifffile
import torch
from hypothesis import given, settings, strategies as st
from PIL import Image, ImageFile

import irnb.decoders as decoders
import irnb.image_files as files
import irnb.png as png
from irnb.image_files import (ImageError, Picture, check_writable, image_files, read_array, read_image, read_picture,
                              write_array, write_image, write_picture)

rng = np.random.default_rng(0)
RGB8 = rng.integers(0, 256, (13, 17, 3), dtype=np.uint8)
RGB16 = rng.integers(0, 65536, (13, 17, 3), dtype=np.uint16)
ALPHA8 = rng.integers(0, 256, (13, 17, 1), dtype=np.uint8)
ALPHA16 = rng.integers(0, 65536, (13, 17, 1), dtype=np.uint16)


def as_array(tensor, bits=8):
    return (tensor.permute(1, 2, 0) * (2**bits - 1)).round().numpy().astype(np.uint8 if bits == 8 else np.uint16)


# ---- kinds -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("suffix", ["png", "tif", "tiff"])
@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_lossless_formats_round_trip_in_kind(tmp_path, suffix, bits, channels):
    colour, alpha = (RGB8, ALPHA8) if bits == 8 else (RGB16, ALPHA16)
    array = np.concatenate([colour[..., : 1 if channels < 3 else 3]] + [alpha] * (channels % 2 == 0), -1)
    write_array(tmp_path / f"a.{suffix}", array, icc=b"profile")
    back, icc = read_array(tmp_path / f"a.{suffix}")
    assert back.dtype == array.dtype and icc == b"profile"
    np.testing.assert_array_equal(back, array)
    picture = read_picture(tmp_path / f"a.{suffix}")
    assert picture.bits == bits and picture.pixels.shape[0] == (1 if channels < 3 else 3)
    assert (picture.alpha is None) == (channels % 2 == 1) and picture.rgb.shape[0] == 3
    write_picture(tmp_path / f"b.{suffix}", picture)
    np.testing.assert_array_equal(read_array(tmp_path / f"b.{suffix}")[0], array)


def test_written_files_are_what_other_programs_read(tmp_path):
    write_array(tmp_path / "a.tif", np.concatenate([RGB16, ALPHA16], -1))
    np.testing.assert_array_equal(tifffile.imread(tmp_path / "a.tif"), np.concatenate([RGB16, ALPHA16], -1))
    write_array(tmp_path / "g.png", RGB16[..., :1])
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "g.png")), RGB16[..., 0])  # Pillow: 16-bit grey only
    write_array(tmp_path / "c.png", RGB16)
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "c.png")), RGB16 >> 8)


@pytest.mark.parametrize("suffix", ["jpg", "bmp", "webp"])
@pytest.mark.parametrize("channels", [1, 3])
def test_other_formats(tmp_path, suffix, channels):
    ramp = np.linspace(20, 230, 32).astype(np.uint8)[:, None, None]
    smooth = np.ascontiguousarray(np.broadcast_to(ramp, (32, 40, channels)))
    write_array(tmp_path / f"a.{suffix}", smooth)
    back, _ = read_array(tmp_path / f"a.{suffix}")
    assert back.shape[2] == (3 if suffix == "webp" else channels)
    assert np.abs(back.astype(int) - smooth).max() <= (2 if suffix == "jpg" else 0)


def test_webp_keeps_alpha_and_the_colour_below_it(tmp_path):
    array = np.concatenate([RGB8, np.zeros_like(ALPHA8)], -1)
    array[0, 0, 3] = 255
    write_array(tmp_path / "a.webp", array)
    np.testing.assert_array_equal(read_array(tmp_path / "a.webp")[0], array)


def test_palettes_and_named_transparent_colours(tmp_path):
    paletted = Image.fromarray(RGB8).quantize(8)
    paletted.save(tmp_path / "p.png")
    np.testing.assert_array_equal(read_array(tmp_path / "p.png")[0], np.asarray(paletted.convert("RGB")))
    paletted.save(tmp_path / "t.png", transparency=3)
    want = (np.asarray(paletted) != 3) * 255
    np.testing.assert_array_equal(read_array(tmp_path / "t.png")[0][..., 3], want)
    Image.fromarray(RGB8).save(tmp_path / "rgb.png", transparency=tuple(int(v) for v in RGB8[2, 3]))
    array, _ = read_array(tmp_path / "rgb.png")
    assert array.shape[2] == 4 and array[2, 3, 3] == 0 and array[..., 3].sum() == 255 * (13 * 17 - 1)
    Image.fromarray(RGB8[..., 0]).save(tmp_path / "l.png", transparency=int(RGB8[0, 0, 0]))
    array, _ = read_array(tmp_path / "l.png")
    np.testing.assert_array_equal(array[..., 1], (RGB8[..., 0] != RGB8[0, 0, 0]) * 255)


def test_one_bit_cmyk_and_ycck(tmp_path):
    bits = RGB8[..., 0] > 127
    Image.fromarray(bits).save(tmp_path / "one.png")
    np.testing.assert_array_equal(read_array(tmp_path / "one.png")[0][..., 0], bits * 255)
    smooth = np.broadcast_to(np.array([200, 100, 50], np.uint8), (32, 32, 3))
    cmyk = Image.fromarray(np.ascontiguousarray(smooth)).convert("CMYK")
    cmyk.save(tmp_path / "c.jpg", quality=100, icc_profile=b"cmyk")
    array, icc = read_array(tmp_path / "c.jpg")
    assert array.shape == (32, 32, 3) and np.abs(array.astype(int) - smooth).max() <= 3 and icc is None


@pytest.mark.parametrize("code", range(1, 9))
@pytest.mark.parametrize("kind", ["jpg", "tif16", "png16"])
def test_orientation_is_applied(tmp_path, code, kind):
    picture = np.zeros((16, 24, 3), np.uint8)
    picture[:8, :8], picture[8:, 16:, 0] = 255, 255
    exif = Image.Exif()
    exif[0x0112] = code
    Image.fromarray(picture).save(tmp_path / "a.jpg", quality=100, subsampling=0, exif=exif)
    from PIL import ImageOps
    want = np.asarray(ImageOps.exif_transpose(Image.open(tmp_path / "a.jpg")))  # the independent reference
    path = tmp_path / "a.jpg"
    if kind == "tif16":
        path = tmp_path / "a.tif"
        tifffile.imwrite(path, np.asarray(Image.open(tmp_path / "a.jpg")).astype(np.uint16) * 257, photometric="rgb",
                         extratags=[(274, "H", 1, code, True)], metadata=None)
    if kind == "png16":
        path = tmp_path / "a.png"
        write_array(path, np.asarray(Image.open(tmp_path / "a.jpg")).astype(np.uint16) * 257)
        path.write_bytes(add_chunk(path.read_bytes(), b"eXIf", exif.tobytes()[6:]))
    array, _ = read_array(path)
    np.testing.assert_array_equal(array if kind == "jpg" else array // 257, want)


def test_tiff_variants(tmp_path):
    tifffile.imwrite(tmp_path / "planes.tif", RGB16.transpose(2, 0, 1), photometric="rgb", planarconfig="separate")
    np.testing.assert_array_equal(read_array(tmp_path / "planes.tif")[0], RGB16)
    tifffile.imwrite(tmp_path / "white.tif", RGB16[..., 0], photometric="miniswhite")
    np.testing.assert_array_equal(read_array(tmp_path / "white.tif")[0][..., 0], 65535 - RGB16[..., 0])
    tifffile.imwrite(tmp_path / "big.tif", RGB16, byteorder=">", bigtiff=True, photometric="rgb")
    np.testing.assert_array_equal(read_array(tmp_path / "big.tif")[0], RGB16)
    unit = rng.random((9, 8)).astype(np.float32)
    tifffile.imwrite(tmp_path / "float.tif", unit)
    np.testing.assert_array_equal(read_picture(tmp_path / "float.tif").pixels[0].numpy(), unit)
    assert read_picture(tmp_path / "float.tif").bits == 16
    Image.fromarray(RGB8).save(tmp_path / "lzw.tif", compression="tiff_lzw")
    np.testing.assert_array_equal(read_array(tmp_path / "lzw.tif")[0], RGB8)


@pytest.mark.parametrize("bad", [np.full((4, 4), 1.5, np.float32), np.full((4, 4), -0.1, np.float32),
                                 np.full((4, 4), np.nan, np.float32), np.zeros((4, 4), np.uint32),
                                 np.zeros((4, 4), np.int16)])
def test_tiff_values_without_a_known_scale_are_refused(tmp_path, bad):
    tifffile.imwrite(tmp_path / "a.tif", bad)
    with pytest.raises(ImageError, match=r"a\.tif: .*(rescale|save it as)"):
        read_picture(tmp_path / "a.tif")


def test_several_pictures_in_one_file_are_refused_but_not_a_phones_preview(tmp_path):
    frames = [Image.fromarray(RGB8), Image.fromarray(255 - RGB8)]
    for name in ("a.tif", "a.webp", "a.png"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
        with pytest.raises(ImageError, match=f"{name}: .* 2 pictures"):
            read_picture(tmp_path / name)
    frames[0].save(tmp_path / "a.jpg", format="MPO", save_all=True, append_images=frames[1:])
    assert read_picture(tmp_path / "a.jpg").pixels.shape == (3, 13, 17)


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("suffix", ["png", "tif", "jpg", "bmp", "webp"])
def test_one_pixel_is_a_picture(tmp_path, suffix, bits):
    if bits == 16 and suffix not in ("png", "tif"):
        pytest.skip("8 bits only")
    write_image(tmp_path / f"a.{suffix}", torch.full((3, 1, 1), 0.5), bits=bits)
    assert (read_image(tmp_path / f"a.{suffix}") - 0.5).abs().max() < 0.01


# ---- the PNG codec ---------------------------------------------------------------------------------------------------

def add_chunk(data, kind, body):
    "Insert a chunk behind IHDR."
    return b"".join([data[:33], struct.pack(">I", len(body)), kind, body, struct.pack(">I", zlib.crc32(kind + body)), data[33:]])


def filtered_png(array, kinds):
    "An obvious pixel-by-pixel PNG encoder with a given filter type per row."
    height, width, channels = array.shape
    step = channels * array.dtype.itemsize
    raw = np.frombuffer(array.astype(f">u{array.dtype.itemsize}").tobytes(), np.uint8).reshape(height, -1).astype(int)
    rows = b""
    for y in range(height):
        out = []
        for i in range(raw.shape[1]):
            a = raw[y, i - step] if i >= step else 0
            b = raw[y - 1, i] if y else 0
            c = raw[y - 1, i - step] if y and i >= step else 0
            nearest = min((abs(v - (a + b - c)), k) for k, v in enumerate((a, b, c)))[1]
            out.append((raw[y, i] - [0, a, b, (a + b) // 2, (a, b, c)[nearest]][kinds[y]]) % 256)
        rows += bytes([kinds[y], *out])
    head = struct.pack(">IIBBBBB", width, height, 8 * array.dtype.itemsize, (0, 4, 2, 6)[channels - 1], 0, 0, 0)
    chunk = lambda k, b: struct.pack(">I", len(b)) + k + b + struct.pack(">I", zlib.crc32(k + b))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@settings(deadline=None, max_examples=40)
@given(height=st.integers(1, 9), width=st.integers(1, 9), channels=st.integers(1, 4), seed=st.integers(0, 99),
       kinds=st.lists(st.integers(0, 4), min_size=9, max_size=9))
def test_png_decoder_undoes_every_filter(height, width, channels, seed, kinds):
    for dtype in (np.uint8, np.uint16):
        top = np.iinfo(dtype).max + 1
        array = np.random.default_rng(seed).integers(0, top, (height, width, channels), dtype=dtype)
        data = filtered_png(array, kinds)
        np.testing.assert_array_equal(png.png_pixels(data, 10**6), array)
        if dtype == np.uint8:  # Pillow judges the encoder of this test
            np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(data))).reshape(array.shape), array)


@pytest.mark.parametrize("name", ["chelsea", "camera", "logo"])
def test_png_decoder_agrees_with_pillow_on_photographs(name):
    array = getattr(skimage.data, name)()
    (buffer := io.BytesIO(), Image.fromarray(array).save(buffer, "PNG"))
    got = png.png_pixels(buffer.getvalue(), 10**7)
    np.testing.assert_array_equal(got, array.reshape(got.shape))


@settings(deadline=None, max_examples=25)
@given(height=st.integers(1, 150), width=st.integers(1, 40), channels=st.integers(1, 4), sixteen=st.booleans())
def test_png_writer_is_read_by_pillow_and_by_us(height, width, channels, sixteen):
    array = np.random.default_rng(height).integers(0, 65536 if sixteen else 256, (height, width, channels))
    array = np.cumsum(array, 0).astype(np.uint16 if sixteen else np.uint8)
    png.write_png(buffer := io.BytesIO(), array)
    np.testing.assert_array_equal(png.png_pixels(buffer.getvalue(), 10**7), array)
    seen = np.asarray(Image.open(buffer)).reshape(height, width, -1)
    seen = seen[..., [0, -1]] if channels == 2 else seen  # Pillow opens 16-bit grey + alpha as RGBA
    np.testing.assert_array_equal(seen, array >> 8 if sixteen and channels > 1 else array)


def test_sixteen_bit_transparent_colour(tmp_path):
    write_array(tmp_path / "a.png", RGB16)
    data = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(add_chunk(data, b"tRNS", RGB16[1, 2].astype(">u2").tobytes()))
    array, _ = read_array(tmp_path / "a.png")
    assert array[1, 2, 3] == 0 and array[0, 0, 3] == 65535 and array.shape[2] == 4


@pytest.mark.parametrize("harm", ["no checksum", "wrong checksum", "too many rows", "too few rows", "filter 5"])
def test_sixteen_bit_png_whose_chunks_are_fine_but_not_its_data(tmp_path, harm):
    rows = b"".join((b"\5" if harm == "filter 5" else b"\0") + r.astype(">u2").tobytes() for r in RGB16)
    rows = {"too many rows": rows + rows[:103], "too few rows": rows[103:]}.get(harm, rows)
    body = zlib.compress(rows)
    body = {"no checksum": body[:-4], "wrong checksum": body[:-1] + bytes([body[-1] ^ 1])}.get(harm, body)
    chunk = lambda k, b: struct.pack(">I", len(b)) + k + b + struct.pack(">I", zlib.crc32(k + b))
    head = struct.pack(">IIBBBBB", 17, 13, 16, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b"")
    with pytest.raises(png.FormatError):
        png.png_pixels(data, 10**6)
    (tmp_path / "a.png").write_bytes(data)
    with pytest.raises(ImageError, match="a.png: "):
        read_array(tmp_path / "a.png")


def test_interlaced_sixteen_bit_png_is_refused(tmp_path):
    write_array(tmp_path / "a.png", RGB16)
    data = bytearray((tmp_path / "a.png").read_bytes())
    data[28] = 1
    data[29:33] = struct.pack(">I", zlib.crc32(bytes(data[12:29])))
    (tmp_path / "a.png").write_bytes(data)
    with pytest.raises(ImageError, match="a.png: .*interlaced.*save"):
        read_picture(tmp_path / "a.png")


# ---- damage ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["a.png", "a16.png", "a.jpg", "a.tif", "a16.tif", "a.bmp", "a.webp"])
@pytest.mark.parametrize("keep", [0, 1, 9, 40, 0.5, 0.9, -5])
def test_truncated_files_are_refused(tmp_path, name, keep):
    photo = skimage.data.chelsea()[:60, :80]
    path = tmp_path / name
    write_array(path, photo.astype(np.uint16) * 257 if "16" in name else photo)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep) if isinstance(keep, float) else keep])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ImageError) as e:
            read_picture(path)
    assert str(path) in str(e.value) and ";" in str(e.value)
    assert keep != 0 or "zero bytes" in str(e.value)


def test_truncated_files_are_refused_even_if_another_package_told_pillow_otherwise(tmp_path, monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    write_array(tmp_path / "a.jpg", skimage.data.chelsea())
    (tmp_path / "a.jpg").write_bytes((tmp_path / "a.jpg").read_bytes()[:-5000])
    np.asarray(Image.open(tmp_path / "a.jpg"))  # Pillow accepts it
    with pytest.raises(ImageError, match="a.jpg: .*truncated"):
        read_picture(tmp_path / "a.jpg")
    assert ImageFile.LOAD_TRUNCATED_IMAGES is True


@pytest.mark.parametrize("sixteen", [False, True])
def test_every_flipped_byte_of_a_png_is_noticed(tmp_path, sixteen):
    write_array(tmp_path / "a.png", RGB16[:4, :4] if sixteen else RGB8[:4, :4])
    data = (tmp_path / "a.png").read_bytes()
    for i in range(len(data)):
        (tmp_path / "b.png").write_bytes(data[:i] + bytes([data[i] ^ 16]) + data[i + 1 :])
        with pytest.raises(ImageError, match=r"b\.png: "):
            read_picture(tmp_path / "b.png")


def test_what_is_no_picture(tmp_path):
    (tmp_path / "a.png").write_text("hello, I am text")
    (tmp_path / "b.png").mkdir()
    for path, words in [("a.png", "not a readable"), ("b.png", "is a folder"), ("c.png", "no such file")]:
        with pytest.raises(ImageError, match=words) as e:
            read_picture(tmp_path / path)
        assert str(tmp_path / path) in str(e.value)
    with pytest.raises(ImageError, match="/nowhere: "):
        image_files(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="mode.*'grey'"):
        read_image(tmp_path / "a.png", mode="grey")


@pytest.mark.parametrize("kind", ["pipe", "link to a pipe", "socket", "device"])
def test_what_is_no_file_is_not_waited_for(tmp_path, kind):
    path = tmp_path / "a.png"
    os.mkfifo(tmp_path / "pipe")
    if kind == "socket":
        socket.socket(socket.AF_UNIX).bind(str(path))
    else:
        os.symlink({"pipe": "pipe", "link to a pipe": "pipe", "device": "/dev/zero"}[kind], path)
    with pytest.raises(ImageError, match="a.png: .*pipe"):
        read_array(path)


def profile_png(body, sixteen=False):
    "A PNG with an iCCP chunk of a given body."
    return add_chunk(filtered_png(RGB16 if sixteen else RGB8, [0] * 13), b"iCCP", body)


@pytest.mark.parametrize("sixteen", [False, True])
def test_a_profile_is_unfolded_to_a_limit(tmp_path, sixteen):
    engine = zlib.compressobj(9)
    bomb = b"".join(engine.compress(bytes(2**20)) for _ in range(256)) + engine.flush()      # a quarter of a megabyte
    good = b"p\0\0" + zlib.compress(b"profile")
    for body, words in [(b"p\0\0" + bomb, "b'p'.*16777216"),
                        (b"p\0\0" + zlib.compress(bytes(999))[:-6], "damaged.*b'p'"),
                        (b"p\0\0junk", "damaged.*b'p'")]:
        (tmp_path / "a.png").write_bytes(profile_png(body, sixteen))
        tracemalloc.start()
        with pytest.raises(ImageError, match=words):
            read_array(tmp_path / "a.png")
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 5 * png.MAX_PROFILE
    (tmp_path / "a.png").write_bytes(add_chunk(profile_png(good, sixteen), b"iCCP", good))
    with pytest.raises(ImageError, match="a.png: .*more than one"):
        read_array(tmp_path / "a.png")
    (tmp_path / "a.png").write_bytes(profile_png(good, sixteen))
    assert read_array(tmp_path / "a.png")[1] == b"profile"


@pytest.mark.parametrize("kind, prefix", [(b"zTXt", b"k\0\0"), (b"iTXt", b"k\0\1\0\0\0")])
def test_texts_are_not_unfolded_to_gigabytes(tmp_path, kind, prefix):
    engine = zlib.compressobj(9)
    bomb = b"".join(engine.compress(bytes(2**20)) for _ in range(256)) + engine.flush()
    for sixteen in (False, True):
        png = filtered_png(RGB16 if sixteen else RGB8, [0] * 13)
        (tmp_path / "a.png").write_bytes(add_chunk(png, kind, prefix + bomb))
        tracemalloc.start()
        try:
            np.testing.assert_array_equal(read_array(tmp_path / "a.png")[0], RGB16 if sixteen else RGB8)
        except ImageError as e:
            assert str(tmp_path / "a.png") in str(e)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 2**26


def chained(array, target, pages=1, big=False):
    "A TIFF whose last page points at its page `target`, or at the byte ~target."
    tifffile.imwrite(file := io.BytesIO(), np.stack([array] * pages), photometric="minisblack", metadata=None, bigtiff=big,
                     byteorder="<")
    data, offsets = bytearray(file.getvalue()), []
    count, offset, entry, first = ("<Q", "<Q", 20, 8) if big else ("<H", "<I", 12, 4)
    where = first
    while at := struct.unpack_from(offset, data, where)[0]:
        offsets.append(at)
        where = at + struct.calcsize(count) + entry * struct.unpack_from(count, data, at)[0]
    struct.pack_into(offset, data, where, ~target if target < 0 else offsets[target])
    return bytes(data)


@pytest.mark.parametrize("big", [False, True])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_the_pages_of_a_tiff_come_to_an_end(tmp_path, monkeypatch, dtype, big):
    array, path = RGB16[..., 0].astype(dtype), tmp_path / "a.tif"
    for data, words in [(b"II*\0" + struct.pack("<IHI", 8, 0, 8), "byte 8"), (chained(array, 0, 1, big), "returns"),
                        (chained(array, 0, 2, big), "returns"), (chained(array, 1, 3, big), "returns"),
                        (chained(array, ~10**6, 1, big), "truncated"), (chained(array, 0, 300, big), "256 pages")]:
        path.write_bytes(data)
        with pytest.raises(ImageError, match=words) as e:
            read_array(path)
        assert str(path) in str(e.value)
    path.write_bytes(chained(array, ~0, 1, big))
    np.testing.assert_array_equal(read_array(path)[0][..., 0], array)


@pytest.mark.parametrize("code", [8, 32946, 34925])
def test_the_strips_of_a_tiff_are_unfolded_to_a_limit(tmp_path, code):
    engine = lzma.LZMACompressor(preset=0) if code == 34925 else zlib.compressobj(9)
    bomb = b"".join(engine.compress(bytes(2**20)) for _ in range(256)) + engine.flush()
    for blob, good in ((bomb, False), (lzma.compress(RGB16.tobytes()) if code == 34925 else zlib.compress(RGB16.tobytes()), True)):
        tifffile.imwrite(file := io.BytesIO(), RGB16, photometric="rgb", metadata=None, byteorder="<")
        data = bytearray(file.getvalue())
        (at,) = struct.unpack_from("<I", data, 4)
        for i in range(at + 2, at + 2 + 12 * struct.unpack_from("<H", data, at)[0], 12):
            values = {259: code, 273: len(data), 279: len(blob)}      # compression, place and length of the strip
            if (tag := struct.unpack_from("<H", data, i)[0]) in values:
                struct.pack_into("<HII", data, i + 2, 4, 1, values[tag])
        (tmp_path / "a.tif").write_bytes(bytes(data) + blob)
        tracemalloc.start()
        if good:
            np.testing.assert_array_equal(read_array(tmp_path / "a.tif")[0], RGB16)
        else:
            with pytest.raises(ImageError, match=f"a.tif: .* {RGB16.nbytes} bytes"):
                read_array(tmp_path / "a.tif")
        assert tracemalloc.get_traced_memory()[1] < 2**26
        tracemalloc.stop()


def test_an_eight_bit_png_that_ends_too_early_is_not_filled_with_black(tmp_path):
    data = filtered_png(RGB8[:5], [0] * 5)
    head = struct.pack(">IIBBBBB", 17, 13, 8, 2, 0, 0, 0)
    (tmp_path / "a.png").write_bytes(data[:8] + add_chunk(data[:8] + bytes(25), b"IHDR", head)[33:58] + data[33:])
    with pytest.raises(ImageError, match=f"a.png: .* {8 * 52} bytes"):
        read_array(tmp_path / "a.png")


@pytest.mark.parametrize("make", [lambda: b"II*\0\0\0\0\0", lambda: chained(RGB16[..., 0], 0)])
def test_decoders_do_not_write_to_the_terminal(tmp_path, make):
    (tmp_path / "a.tif").write_bytes(make())
    code = "import sys, irnb.image_files as i\ntry: i.read_array(sys.argv[1])\nexcept i.ImageError: print('refused')"
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "a.tif"], capture_output=True, text=True)
    assert done.stdout == "refused\n" and done.stderr == ""


def test_passes_over_a_jpeg_are_counted(tmp_path):
    Image.fromarray(skimage.data.chelsea()).save(tmp_path / "a.jpg", progressive=True)
    data = (tmp_path / "a.jpg").read_bytes()
    scan = bytes.fromhex("ffda 0008 01 0100 013f00 5a")
    (tmp_path / "b.jpg").write_bytes(data[:-2] + scan * 1000 + data[-2:])
    with pytest.raises(ImageError, match="b.jpg: .*100 scans"):
        read_array(tmp_path / "b.jpg")
    comment = b"\xff\xfe" + struct.pack(">H", 2 + 500 * len(scan)) + scan * 500
    (tmp_path / "c.jpg").write_bytes(data[:2] + comment + data[2:] + scan * 1000)      # a comment; what follows the end
    np.testing.assert_array_equal(read_array(tmp_path / "c.jpg")[0], read_array(tmp_path / "a.jpg")[0])
    assert decoders._check_scans(b"\xff\xd8" + b"\xff" * 2**20) is None      # linear in the size of the file


def test_a_file_larger_than_its_pixels_is_not_read(tmp_path):
    write_array(tmp_path / "a.png", RGB8)
    os.truncate(tmp_path / "a.png", 2**40)                                              # sparse: takes no place
    with pytest.raises(ImageError, match="a.png: .*1099511627776"):
        read_array(tmp_path / "a.png")


def test_size_limits_are_ours_and_local(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)
    write_array(tmp_path / "a.png", RGB8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # Pillow's warning would raise
        assert read_picture(tmp_path / "a.png").pixels.shape == (3, 13, 17)
    assert Image.MAX_IMAGE_PIXELS == 20
    write_array(tmp_path / "b.png", RGB16)
    write_array(tmp_path / "c.tif", RGB16)
    for name in ("a.png", "b.png", "c.tif"):
        with pytest.raises(ImageError, match=f"{name}.*17x13.*100.*max_pixels"):
            read_picture(tmp_path / name, max_pixels=100)


def test_reading_in_threads_restores_pillows_switches(tmp_path, monkeypatch):
    write_array(tmp_path / "a.jpg", skimage.data.chelsea())
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 77)
    threads = [threading.Thread(target=lambda: [read_array(tmp_path / "a.jpg") for _ in range(8)]) for _ in range(4)]
    [t.start() for t in threads], [t.join() for t in threads]
    assert Image.MAX_IMAGE_PIXELS == 77 and not decoders._pillow_users


# ---- writing ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, channels, bits, words", [
    ("a.gif", 3, 8, r"cannot write \.gif"), ("a", 3, 8, "without suffix"), ("a.png", 5, 8, "5 channels"),
    ("a.png", 3, 12, "12 bits"), ("a.jpg", 3, 16, "16 bits"), ("a.webp", 1, 16, "16 bits"),
    ("a.jpg", 4, 8, "hold alpha"), ("a.bmp", 2, 8, "hold alpha")])
def test_what_a_format_cannot_hold_is_refused(tmp_path, name, channels, bits, words):
    with pytest.raises(ImageError, match=words):
        check_writable(tmp_path / name, channels, bits)


@pytest.mark.parametrize("picture, words", [
    (Picture(torch.zeros(2, 4, 4)), r"shape \(2, 4, 4\)"), (Picture(torch.zeros(4, 4)), r"shape \(4, 4\)"),
    (Picture(torch.zeros(3, 0, 4)), "shape"), (Picture(torch.zeros(3, 4, 4), torch.zeros(1, 4, 5)), "alpha of shape"),
    (Picture(torch.full((3, 4, 4), float("nan"))), "channel 0.*NaN"),
    (Picture(torch.full((1, 4, 4), float("inf"))), "infinite"), (Picture(torch.zeros(3, 4, 4), bits=12), "12 bits")])
def test_bad_pictures_are_not_written(tmp_path, picture, words):
    with pytest.raises(ImageError, match=words):
        write_picture(tmp_path / "a.png", picture)
    assert not list(tmp_path.iterdir())


def test_values_are_clamped_and_rounded(tmp_path):
    write_image(tmp_path / "a.png", torch.tensor([[[-0.5, 1.5, 0.5, 100.4 / 255]]]))
    assert read_array(tmp_path / "a.png")[0].ravel().tolist() == [0, 255, 128, 100]


@pytest.mark.parametrize("image, words", [
    (torch.full((3, 4, 4), 255, dtype=torch.uint8), "type torch.uint8"), (torch.ones(1, 4, 4).bool(), "type torch.bool"),
    (torch.zeros(3, 4, 4, dtype=torch.int64), "type torch.int64"), (torch.ones(3, 4, 4) * 1j, "type torch.complex64"),
    (np.zeros((3, 4, 4), np.float32), "type ndarray"), (torch.full((3, 4, 4), 255.0), "from 255 to 255"),
    (torch.linspace(0, 255, 48).view(3, 4, 4), "from 0 to 255"), (torch.linspace(-2, 1, 48).view(3, 4, 4), "from -2 to 1"),
    (torch.full((3, 4, 4), 128.0).half(), "from 128 to 128")])
def test_another_scale_is_not_clamped_to_white(tmp_path, image, words):
    with pytest.raises(ImageError, match=f"a.png: pixels .*{words}"):
        write_image(tmp_path / "a.png", image)
    with pytest.raises(ImageError, match="a.png: alpha .*(type|not in)"):
        write_picture(tmp_path / "a.png", Picture(torch.zeros(3, 4, 4), image[:1]))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("where", ["fsync", "replace", "open", "encode"])
@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.jpg"])
def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, where, name):
    write_image(tmp_path / name, torch.zeros(3, 8, 8))
    before = (tmp_path / name).read_bytes()

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    if where == "open":
        monkeypatch.setattr(files, "open", full, raising=False)
    elif where == "encode":
        monkeypatch.setattr(files, "_pillow_write", full)
    else:
        monkeypatch.setattr(os, where, full)
    with pytest.raises(ImageError, match=f"{name}: .*No space.*free space"):
        write_image(tmp_path / name, torch.ones(3, 8, 8))
    assert os.listdir(tmp_path) == [name] and (tmp_path / name).read_bytes() == before


@pytest.mark.parametrize("parent", ["a file", "a loop"])
def test_a_folder_that_is_none_names_the_file(tmp_path, parent):
    (tmp_path / "d").touch() if parent == "a file" else os.symlink("d", tmp_path / "d")
    for name in ("d/a.png", "d/e/a.png"):
        with pytest.raises(ImageError, match="another folder") as e:
            write_image(tmp_path / name, torch.ones(3, 8, 8))
        assert str(tmp_path / name) in str(e.value)


class Full(io.BytesIO):
    "A file on a disk that is full: nothing can be written, not even by C code."
    def fileno(self): raise OSError("no descriptor")
    def write(self, data): raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("name, bits", [("a.png", 8), ("a.png", 16), ("a.tif", 8), ("a.tif", 16), ("a.jpg", 8), ("a.bmp", 8),
                                        ("a.webp", 8)])
def test_every_encoder_on_a_full_disk_names_the_file(tmp_path, monkeypatch, name, bits):
    monkeypatch.setattr(files, "open", lambda *_: Full(), raising=False)
    with pytest.raises(ImageError, match="free space") as e:
        write_image(tmp_path / name, torch.ones(3, 8, 8), bits=bits)
    assert str(tmp_path / name) in str(e.value) and not list(tmp_path.iterdir())


def test_an_interrupt_leaves_nothing(tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt
    monkeypatch.setattr(files, "write_png", stop)
    with pytest.raises(KeyboardInterrupt):
        write_image(tmp_path / "a.png", torch.zeros(3, 8, 8), bits=16)
    assert not list(tmp_path.iterdir())


def test_image_files_are_sorted_nested_and_visible(tmp_path):
    for name in ("b.PNG", "a.jpg", "d/c.tif", "d/.hidden.png", ".git/x.png", "notes.txt", "d/e/f.webp"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert [str(p.relative_to(tmp_path)) for p in image_files(tmp_path)] == ["a.jpg", "b.PNG", "d/c.tif", "d/e/f.webp"]


def test_read_image_modes(tmp_path):
    write_array(tmp_path / "g.png", RGB8[..., :1])
    write_array(tmp_path / "c.png", RGB8)
    assert read_image(tmp_path / "g.png").shape == (3, 13, 17)
    assert read_image(tmp_path / "g.png", mode="keep").shape == (1, 13, 17)
    assert read_image(tmp_path / "c.png", mode="gray").shape == (1, 13, 17)
