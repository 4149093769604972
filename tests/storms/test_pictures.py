"""Hostile and odd pictures through `irnb restore`: each comes out right, or is refused in one sentence that names it."""
import functools, io, json, lzma, os, resource, select, socket, struct, subprocess, sys, zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import skimage.data
import tifffile
from PIL import Image

from irnb.image_files import printable, read_array

ROOT = Path(__file__).resolve().parents[2]
HANG = 10              # seconds of processor time for one picture: a loop is a loop on any machine, however busy
WAIT = 90              # seconds on the clock: only what waits for something that never comes takes so long
GROWTH = 2**29         # bytes by which one small picture may raise the peak memory of the process

PHOTO = np.ascontiguousarray(skimage.data.chelsea()[60:80, 100:124])
GREY = PHOTO[..., :1]
DEEP = (PHOTO.astype(np.uint16) * 257) ^ np.random.default_rng(0).integers(0, 256, PHOTO.shape, dtype=np.uint16)
ALPHA = np.random.default_rng(1).integers(0, 256, GREY.shape, dtype=np.uint8)
RGBA = np.concatenate([PHOTO, ALPHA], 2)


@dataclass(frozen=True)
class Case:
    "A picture, and what may become of it."
    path: str                             # relative to the folder of the case
    want: np.ndarray | None = None        # the values of a right result; None: there is none
    refusal: bool = False                 # it may be refused, too
    near: float = 0                       # mean difference that the format costs
    any_values: bool = False              # damage that the format cannot notice: the size must be right


def refused(folder, name, data=None):
    "A case that must be refused."
    if data is not None:
        (folder / name).write_bytes(data)
    return Case(name)


def right(folder, name, data, want, **how):
    "A case with a right result."
    if data is not None:
        (folder / name).write_bytes(data)
    return Case(name, want, **how)


# ---- makers of files -------------------------------------------------------------------------------------------------

def chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(array, extra=b"", *, size=None, depth=None, colour=None, filters=0, interlaced=0, raw=None, end=True, after=b""):
    "A PNG written by hand, with any lie in its header."
    h, w, c = array.shape
    depth, colour = depth or 8 * array.dtype.itemsize, (0, 4, 2, 6)[c - 1] if colour is None else colour
    wide = lambda a: a.astype(f">u{a.dtype.itemsize}").tobytes()
    passes = [array] if not interlaced else [array[y::dy, x::dx] for y, x, dy, dx in
              ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))]
    if raw is None:
        raw = b"".join(bytes([filters]) + wide(row) for part in passes if part.size for row in part)
    head = struct.pack(">IIBBBBB", *(size or (w, h)), depth, colour, 0, 0, interlaced)
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + extra + chunk(b"IDAT", zlib.compress(raw))
            + chunk(b"IEND", b"") * end + after)


def packed(array, depth):
    "Rows of few bits per sample, as PNG packs them, behind their filter type."
    bits = np.unpackbits((array[..., 0] << (8 - depth)).astype(np.uint8)[..., None], axis=-1)[..., :depth]
    return b"".join(b"\0" + np.packbits(row).tobytes() for row in bits.reshape(len(array), -1))


@functools.cache
def bomb(engine=None):
    "A gigabyte of zeros, compressed to a megabyte."
    engine = engine or zlib.compressobj(1)
    return b"".join(engine.compress(bytes(2**20)) for _ in range(1024)) + engine.flush()


@functools.cache
def xz():
    "The same by LZMA."
    return bomb(lzma.LZMACompressor(preset=0))


def pillow(kind, image=PHOTO, mode=None, **options):
    "A file by Pillow."
    im = image if isinstance(image, Image.Image) else Image.fromarray(image[..., 0] if image.shape[2] == 1 else image)
    (im.convert(mode) if mode else im).save(file := io.BytesIO(), kind, **options)
    return file.getvalue()


def tiff(array, tags=(), blob=b"", **options):
    "A TIFF by tifffile, then tags (code, type, count, value) instead of its own; the value \"blob\" is the place of the blob."
    options = {"photometric": "rgb" if array.shape[-1] in (3, 4) else "minisblack", "byteorder": "<", **options}
    tifffile.imwrite(file := io.BytesIO(), array, metadata=None, **options)
    data = bytearray(file.getvalue())
    if not tags:
        return bytes(data)
    (at,) = struct.unpack_from("<I", data, 4)
    (n,) = struct.unpack_from("<H", data, at)
    entries = {struct.unpack_from("<H", data, i)[0]: data[i : i + 12] for i in range(at + 2, at + 2 + 12 * n, 12)}
    for code, kind, count, value in tags:
        entries[code] = struct.pack("<HHII", code, kind, count, len(data) if value == "blob" else value)
    struct.pack_into("<I", data, 4, len(data) + len(blob))
    return bytes(data) + blob + struct.pack("<H", len(entries)) + b"".join(entries[c] for c in sorted(entries)) + bytes(4)


def ring(pages=1, target=0, big=False, array=DEEP[..., 0]):
    "A TIFF whose last page leads back to the page `target`."
    tifffile.imwrite(file := io.BytesIO(), np.stack([array] * pages), photometric="minisblack", metadata=None, bigtiff=big,
                     byteorder="<")
    data, offsets = bytearray(file.getvalue()), []
    count, offset, entry, where = ("<Q", "<Q", 20, 8) if big else ("<H", "<I", 12, 4)
    while at := struct.unpack_from(offset, data, where)[0]:
        offsets.append(at)
        where = at + struct.calcsize(count) + entry * struct.unpack_from(count, data, at)[0]
    struct.pack_into(offset, data, where, offsets[target])
    return bytes(data)


def exif(code, value):
    "The body of an EXIF block with one tag that holds a long."
    return b"II*\0" + struct.pack("<IHHHIII", 8, 1, code, 4, 1, value, 0)


def many_scans(scans, width=4000, height=3000):
    "A progressive JPEG of empty passes over a large picture."
    segment = lambda code, body: b"\xff" + bytes([code]) + struct.pack(">H", len(body) + 2) + body
    blocks = -(-width // 8) * -(-height // 8)
    bits = "".join("0" + format(max(0, min(32767, blocks - i) - 16384), "014b") for i in range(0, blocks, 32767))
    bits += "1" * (-len(bits) % 8)
    scan = segment(0xDA, bytes([1, 1, 0, 1, 63, 0])) + int(bits, 2).to_bytes(len(bits) // 8, "big").replace(b"\xff", b"\xff\0")
    return (b"\xff\xd8" + segment(0xDB, b"\0" + bytes([1] * 64)) + segment(0xC2, struct.pack(">BHHB", 8, height, width, 1)
            + bytes([1, 0x11, 0])) + segment(0xC4, b"\0" + bytes([1] + [0] * 16)) + segment(0xC4, b"\x10" + bytes([1] + [0] * 15)
            + b"\xe0") + scan * scans + b"\xff\xd9")


def flipped(data, at, mask=0x10):
    "One byte of the data changed."
    at %= len(data)
    return data[:at] + bytes([data[at] ^ mask]) + data[at + 1 :]


# ---- the storm -------------------------------------------------------------------------------------------------------

CASES = {}


def case(*names):
    "Enter a maker of cases, folder, name -> Case, under each of the names."
    def enter(make):
        for name in names:
            assert name not in CASES, name
            CASES[name] = lambda folder, make=make, name=name: make(folder, name)
        return make
    return enter


PNG8, PNG16, JPEG, BMP = png(PHOTO), png(DEEP), pillow("JPEG", quality=95), pillow("BMP")
WHOLE = {"png": PNG8, "png16": PNG16, "jpg": JPEG, "tif": tiff(DEEP), "tif8": pillow("TIFF"), "bmp": BMP,
         "webp": pillow("WEBP", lossless=True)}
KEEP = {"to nothing": 0.0, "to its first byte": 0.001, "to a third": 0.33, "to its last bytes": 0.97}


@case(*(f"{kind} cut {how}" for kind in WHOLE for how in KEEP))
def _(folder, name):
    kind, how = name.split(" cut ")
    data = WHOLE[kind]
    return refused(folder, f"a.{kind.rstrip('168')}", data[: min(len(data) - 3, max(int(KEEP[how] * len(data)), KEEP[how] > 0))])


@case(*(f"{kind} with a flipped bit {where}" for kind in ("png", "png16") for where in (1, 9, 18, 27, 30, 34, 60, -60, -14, -2)))
def _(folder, name):
    kind, where = name.split(" with a flipped bit ")
    return refused(folder, "a.png", flipped(WHOLE[kind], int(where)))


@case(*(f"{kind} with a flipped bit {where}" for kind in ("jpg", "webp", "bmp") for where in (0.2, 0.5, 0.8)))
def _(folder, name):
    kind, where = name.split(" with a flipped bit ")
    data = flipped(WHOLE[kind], int(float(where) * len(WHOLE[kind])))
    return right(folder, f"a.{kind}", data, PHOTO, refusal=True, any_values=True)


SIZE = struct.pack(">HH", 20, 24)      # as a JPEG states it
LIES = {
    "png that claims 2**62 pixels": lambda: png(PHOTO, size=(2**31 - 1, 2**31 - 1)),
    "png16 that claims 2**62 pixels": lambda: png(DEEP, size=(2**31 - 1, 2**31 - 1)),
    "png16 that claims a hundred million pixels": lambda: png(DEEP, size=(10000, 10000)),
    "png of no width": lambda: png(PHOTO, size=(0, 20)),
    "png16 of no height": lambda: png(DEEP, size=(24, 0)),
    "png with too long a chunk": lambda: flipped(PNG8, 34, 0x7F),
    "png with too short a chunk": lambda: flipped(PNG8, 36, 0x04),
    "png without a header": lambda: PNG8[:8] + PNG8[33:],
    "png16 without a header": lambda: PNG16[:8] + PNG16[33:],
    "png without an end": lambda: png(PHOTO, end=False),
    "png without pixels": lambda: PNG8[:33] + chunk(b"IEND", b""),
    "png16 without pixels": lambda: PNG16[:33] + chunk(b"IEND", b""),
    "png with too few rows": lambda: png(PHOTO, raw=bytes(73 * 9)),
    "png16 with too few rows": lambda: png(DEEP, raw=bytes(145 * 9)),
    "png16 with too many rows": lambda: png(DEEP, raw=bytes(145 * 21)),
    "png with an unknown filter": lambda: png(PHOTO, filters=7),
    "png16 with an unknown filter": lambda: png(DEEP, filters=7),
    "png16 interlaced": lambda: png(DEEP, interlaced=1),
    "png of 3 bits": lambda: png(GREY, depth=3),
    "png of colour type 5": lambda: png(PHOTO, colour=5),
    "png with a huge profile": lambda: png(PHOTO, chunk(b"iCCP", b"p\0\0" + bomb())),
    "png16 with a huge profile": lambda: png(DEEP, chunk(b"iCCP", b"p\0\0" + bomb())),
    "png with a profile of junk": lambda: png(PHOTO, chunk(b"iCCP", b"p\0\0junk")),
    "png16 with an empty profile": lambda: png(DEEP, chunk(b"iCCP", b"")),
    "png with two profiles": lambda: png(PHOTO, 2 * chunk(b"iCCP", b"p\0\0" + zlib.compress(b"profile"))),
    "png with a huge text": lambda: png(PHOTO, chunk(b"zTXt", b"k\0\0" + bomb())),
    "png with a huge international text": lambda: png(PHOTO, chunk(b"iTXt", b"k\0\1\0\0\0" + bomb())),
    "png animated": lambda: pillow("PNG", save_all=True, append_images=[Image.fromarray(255 - PHOTO)]),
    "webp animated": lambda: pillow("WEBP", save_all=True, append_images=[Image.fromarray(255 - PHOTO)]),
    "png that is text": lambda: b"hello, I am text\n" * 20,
    "png that is html": lambda: b"<!doctype html><title>404</title>",
    "png that is a gif": lambda: pillow("GIF", GREY),
    "png that is svg": lambda: b'<svg xmlns="http://www.w3.org/2000/svg"/>',
    "png that is a zip": lambda: b"PK\3\4" + bytes(200),
    "png of zeros": lambda: bytes(1000),
    "jpg that is a png with alpha": lambda: png(RGBA),
    "jpg that is a png16": lambda: PNG16,
    "gif": lambda: pillow("GIF", GREY),
    "a file without suffix": lambda: PNG8,
    "jpg of a thousand scans": lambda: many_scans(1000),
    "jpg that claims 65500 x 65500": lambda: JPEG.replace(SIZE, struct.pack(">HH", 65500, 65500), 1),
    "jpg of no height": lambda: JPEG.replace(SIZE, struct.pack(">HH", 0, 24), 1),
    "jpg of 9 bits": lambda: JPEG.replace(b"\x08" + SIZE, b"\x09" + SIZE, 1),
    "jpg of markers": lambda: b"\xff\xd8" + b"\xff" * 10**6,
    "tif of 14 bytes that leads to itself": lambda: b"II*\0" + struct.pack("<IHI", 8, 0, 8),
    "tif whose page leads to itself": lambda: ring(),
    "tif8 whose page leads to itself": lambda: ring(array=PHOTO[..., 0]),
    "tif whose third page leads to the second": lambda: ring(3, 1),
    "tif with 64-bit offsets whose page leads to itself": lambda: ring(big=True),
    "tif of a thousand pages": lambda: ring(1000, 999),
    "tif of no page": lambda: b"II*\0\0\0\0\0",
    "tif of two pages": lambda: tiff(np.stack([DEEP] * 2)),
    "tif of not-a-number": lambda: tiff(np.full((20, 24), np.nan, np.float32)),
    "tif of one not-a-number": lambda: tiff(np.where(np.arange(480).reshape(20, 24) == 99, np.nan, 0.5)),
    "tif of infinity": lambda: tiff(np.full((20, 24), np.inf, np.float32)),
    "tif of floats to 255": lambda: tiff(PHOTO.astype(np.float32)),
    "tif of 32-bit integers": lambda: tiff(DEEP.astype(np.uint32)),
    "tif of 64-bit integers": lambda: tiff(GREY[..., 0].astype(np.uint64)),
    "tif of signed integers": lambda: tiff((DEEP // 2).astype(np.int16)),
    "tif of complex numbers": lambda: tiff(np.ones((20, 24), np.complex64)),
    "tif that claims 2**62 pixels": lambda: tiff(DEEP, [(256, 4, 1, 2**31 - 1), (257, 4, 1, 2**31 - 1)]),
    "tif of no width": lambda: tiff(DEEP, [(256, 4, 1, 0)]),
    "tif with a strip behind its end": lambda: tiff(DEEP, [(273, 4, 1, 2**31)]),
    "tif with 2**32 strips": lambda: tiff(DEEP, [(273, 4, 2**32 - 1, 8)]),
    "tif of a million layers": lambda: tiff(DEEP, [(32997, 4, 1, 10**6)]),
    "tif of 60000 samples": lambda: tiff(DEEP, [(277, 3, 1, 60000)]),
    "tif of unknown compression": lambda: tiff(DEEP, [(259, 3, 1, 4711)]),
    "tif of 17 bits": lambda: tiff(DEEP, [(258, 3, 1, 17)]),
    "tif8 of unknown compression": lambda: tiff(PHOTO, [(259, 3, 1, 4711)]),
    "tif8 of 60000 samples": lambda: tiff(PHOTO, [(277, 3, 1, 60000)]),
    "tif with a huge strip": lambda: tiff(DEEP, [(259, 3, 1, 8), (273, 4, 1, "blob"), (279, 4, 1, len(bomb()))], bomb()),
    "tif with a huge strip by lzma": lambda: tiff(DEEP, [(259, 3, 1, 34925), (273, 4, 1, "blob"), (279, 4, 1, len(xz()))], xz()),
    "bmp that claims 2**60 pixels": lambda: BMP[:18] + struct.pack("<ii", 2**30, 2**30) + BMP[26:],
    "bmp of no width": lambda: BMP[:18] + struct.pack("<ii", 0, 20) + BMP[26:],
}


@case(*LIES)
def _(folder, name):
    kind = name.split()[0]
    suffix = {"a": ""}.get(kind, f".{kind.rstrip('168')}")
    return refused(folder, "a" + suffix, LIES[name]())


TURNED = np.rot90(PHOTO, -1)     # EXIF orientation 6: turn clockwise to look at it
RIGHT = {
    "png": lambda: (PNG8, PHOTO), "png16": lambda: (PNG16, DEEP), "png grey": lambda: (png(GREY), GREY),
    "png16 grey": lambda: (png(DEEP[..., :1]), DEEP[..., :1]), "png with alpha": lambda: (png(RGBA), RGBA),
    "png16 with alpha": lambda: (png(DEEP[..., [0, 1, 2, 0]]), DEEP[..., [0, 1, 2, 0]]),
    "png16 grey with alpha": lambda: (png(DEEP[..., :2]), DEEP[..., :2]),
    "png interlaced": lambda: (png(PHOTO, interlaced=1), PHOTO),
    "png of 1 bit": lambda: (png(GREY, depth=1, raw=packed(GREY >> 7, 1)), (GREY >> 7) * 255),
    "png of 2 bits": lambda: (png(GREY, depth=2, raw=packed(GREY >> 6, 2)), (GREY >> 6) * 85),
    "png of 4 bits": lambda: (png(GREY, depth=4, raw=packed(GREY >> 4, 4)), (GREY >> 4) * 17),
    "png of a palette": lambda: (png(GREY, chunk(b"PLTE", PALETTE.tobytes()), colour=3), PALETTE[GREY[..., 0]]),
    "png of a palette with alpha": lambda: (png(GREY, chunk(b"PLTE", PALETTE.tobytes()) + chunk(b"tRNS", bytes(range(256))),
                                                colour=3), np.dstack([PALETTE[GREY[..., 0]], GREY[..., 0]])),
    "png with a transparent colour": lambda: (png(PHOTO, chunk(b"tRNS", PHOTO[3, 4].astype(">u2").tobytes())), np.dstack(
        [PHOTO, (PHOTO != PHOTO[3, 4]).any(2) * np.uint8(255)])),
    "png turned": lambda: (png(PHOTO, chunk(b"eXIf", exif(274, 6))), TURNED),
    "png16 turned": lambda: (png(DEEP, chunk(b"eXIf", exif(274, 6))), np.rot90(DEEP, -1)),
    "png with something behind its end": lambda: (png(PHOTO, after=b"film" * 999), PHOTO),
    "png with too many rows": lambda: (png(PHOTO, raw=bytes(73 * 30)), 0 * PHOTO),
    "png with an unknown chunk": lambda: (png(PHOTO, chunk(b"prIV", bytes(999))), PHOTO),
    "png of one pixel": lambda: (png(PHOTO[:1, :1]), PHOTO[:1, :1]), "png of one row": lambda: (png(PHOTO[:1]), PHOTO[:1]),
    "png16 of one column": lambda: (png(DEEP[:, :1]), DEEP[:, :1]), "png that is a jpg": lambda: (JPEG, decoded(JPEG)),
    "png that is a tif16": lambda: (tiff(DEEP), DEEP), "tif that is a png16": lambda: (PNG16, DEEP),
    "tif": lambda: (tiff(DEEP), DEEP), "tif packed": lambda: (tiff(DEEP, compression="zlib", rowsperstrip=7), DEEP),
    "tif with a difference predictor": lambda: (tiff(DEEP, compression="zlib", predictor=True), DEEP),
    "tif in tiles": lambda: (tiff(DEEP, tile=(16, 16), compression="zlib"), DEEP),
    "tif in planes": lambda: (tiff(DEEP.transpose(2, 0, 1), planarconfig="separate", photometric="rgb"), DEEP),
    "tif of another byte order": lambda: (tiff(DEEP, byteorder=">"), DEEP),
    "tif large": lambda: (tiff(DEEP, bigtiff=True), DEEP), "tif of floats": lambda: (tiff((DEEP / 65535).astype(np.float32)), DEEP),
    "tif of doubles": lambda: (tiff(DEEP / 65535), DEEP), "tif white is zero": lambda: (
        tiff(65535 - DEEP[..., 0], photometric="miniswhite"), DEEP[..., :1]),
    "tif turned": lambda: (tiff(DEEP, [(274, 3, 1, 6)]), np.rot90(DEEP, -1)), "tif8": lambda: (pillow("TIFF"), PHOTO),
    "tif8 turned": lambda: (tiff(PHOTO, [(274, 3, 1, 6)]), TURNED),
    "tif8 packed": lambda: (pillow("TIFF", compression="tiff_lzw"), PHOTO), "tif8 with alpha": lambda: (pillow("TIFF", RGBA), RGBA),
    "tif whose sub-page is itself": lambda: (tiff(DEEP, [(330, 4, 1, 8)]), DEEP),
    "tif8 whose sub-page is itself": lambda: (tiff(PHOTO, [(330, 4, 1, 8)]), PHOTO),
    "tif whose EXIF is itself": lambda: (tiff(DEEP, [(34665, 4, 1, "blob")]), DEEP),
    "tif with a strip of 2**32 bytes": lambda: (tiff(DEEP, [(279, 4, 1, 2**32 - 1)]), DEEP),
    "tif8 whose EXIF is itself": lambda: (tiff(PHOTO, [(34665, 4, 1, "blob")]), PHOTO),
    "bmp": lambda: (BMP, PHOTO), "bmp upside down": lambda: (BMP[:22] + struct.pack("<i", -20) + BMP[26:], PHOTO[::-1]),
    "bmp grey": lambda: (pillow("BMP", GREY), GREY), "bmp of 1 bit": lambda: (pillow("BMP", GREY > 127), (GREY > 127) * np.uint8(255)),
    "webp": lambda: (WHOLE["webp"], PHOTO), "webp with alpha": lambda: (pillow("WEBP", RGBA, lossless=True, exact=True), RGBA),
    "jpg": lambda: (JPEG, decoded(JPEG)), "jpg grey": lambda: (pillow("JPEG", GREY), GREY),
    "jpg in passes": lambda: (pillow("JPEG", progressive=True, quality=95), PHOTO),
    "jpg of four inks": lambda: (pillow("JPEG", mode="CMYK", quality=95), PHOTO), "jpg that is a png": lambda: (PNG8, PHOTO),
    "jpg turned": lambda: (pillow("JPEG", quality=95, exif=b"Exif\0\0" + exif(274, 6)), TURNED),
    "jpg whose EXIF is itself": lambda: (pillow("JPEG", quality=95, exif=b"Exif\0\0" + exif(34665, 8)), PHOTO),
    "jpg with a film behind it": lambda: (JPEG + b"\xff\xda\0\2" * 9999, decoded(JPEG)),
}
PALETTE = np.random.default_rng(2).integers(0, 256, (256, 3), dtype=np.uint8)
MAY_REFUSE = {"tif whose EXIF is itself", "tif8 whose EXIF is itself", "jpg whose EXIF is itself", "tif with a strip of 2**32 bytes",
              "png with too many rows"}


def decoded(data):
    "The values of a JPEG by Pillow alone."
    return np.asarray(Image.open(io.BytesIO(data)))


@case(*(f"good {name}" for name in RIGHT))
def _(folder, name):
    name = name.removeprefix("good ")
    suffix, (data, want) = name.split()[0].rstrip("168"), RIGHT[name]()
    return right(folder, f"a.{suffix}", data, want, refusal=name in MAY_REFUSE, near=4 if suffix == "jpg" else 0)


NAMES = ["two\nlines.png", "\x1b[2J\x1b[31mred.png", "back\rwards.png", "bell\x07.png", "\x9b31m.png", "turn\u202egnp.png",
         os.fsdecode(b"latin-\xe9.png"), os.fsdecode(b"\xff\xfe.png"), " .png", "a  b.png", "-o.png", "--help.png", "%s%n.png",
         "{path}.png", "x" * 250 + ".png", "\N{SNOWMAN}.png", "CON.png", "a.png.png", "\u2028.png", "a;b.png", "A.PNG"]


@case(*(f"{fate} named {name!a}" for name in NAMES for fate in ("good", "bad")))
def _(folder, name):
    fate, name = name.split(" named ")
    name = next(n for n in NAMES if ascii(n) == name)
    return right(folder, name, PNG8, PHOTO) if fate == "good" else refused(folder, name, PNG8[:-9])


@case("pipe", "link to a pipe", "socket", "device that never ends", "terminal", "link to itself", "link to nothing", "links in a ring",
      "missing", "a name that is too long", "a file of a terabyte", "png file of a terabyte", "empty folder.png", "folder in a ring",
      "a file below a file")
def _(folder, name):
    os.mkfifo(folder / "pipe")
    links = {"link to a pipe": "pipe", "device that never ends": "/dev/zero", "terminal": "/dev/ptmx", "link to itself": "a.png",
             "link to nothing": "nothing.png", "links in a ring": "b.png"}
    if name in links:
        os.symlink(links[name], folder / "a.png")
        os.symlink("a.png", folder / "b.png")
    elif name == "pipe":
        os.rename(folder / "pipe", folder / "a.png")
    elif name == "socket":
        with socket.socket(socket.AF_UNIX) as s:
            here = os.getcwd()
            os.chdir(folder)             # the name of a socket may have 107 bytes
            s.bind("a.png")
            os.chdir(here)
    elif name.endswith("terabyte"):
        (folder / "a.png").write_bytes(PNG8 if name.startswith("png") else b"")
        os.truncate(folder / "a.png", 2**40)
    elif name == "empty folder.png":
        (folder / "a.png").mkdir()
    elif name == "folder in a ring":
        (folder / "a.png").mkdir()
        os.symlink("..", folder / "a.png/b.png")
    elif name == "a file below a file":
        (folder / "file").touch()
        return Case("file/a.png")
    return Case("a.png" if name != "a name that is too long" else "x" * 300 + ".png")


@case("link to a picture", "folder with a picture", "folder named as a picture with one")
def _(folder, name):
    (folder / "real").mkdir()
    (folder / "real/p.png").write_bytes(PNG8)
    os.symlink("real/p.png", folder / "p.png")
    os.symlink("real", folder / "p.tif")
    return Case({"link to a picture": "p.png", "folder with a picture": "real"}.get(name, "p.tif"), PHOTO)


# ---- one process that restores, watched --------------------------------------------------------------------------------

def work(model):
    "Restore what each line of stdin names; answer with a line of JSON. Everything that reaches the terminal is caught."
    import torch
    from irnb.restore import main
    torch.set_num_threads(1)
    answers, peak = os.fdopen(os.dup(1), "w"), lambda: 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    caught = [os.open(f"{model}.{name}", os.O_RDWR | os.O_CREAT) for name in ("out", "err")]
    for target, file in zip((1, 2), caught):
        os.dup2(file, target)
    for line in sys.stdin:
        for file in caught:
            os.ftruncate(file, 0), os.lseek(file, 0, os.SEEK_SET)
        used = resource.getrusage(resource.RUSAGE_SELF)
        soft = int(used.ru_utime + used.ru_stime) + HANG
        resource.setrlimit(resource.RLIMIT_CPU, (soft, resource.getrlimit(resource.RLIMIT_CPU)[1]))
        before, raised = peak(), ""
        try:
            code = main([*json.loads(line), "--model", model])
        except BaseException as e:
            code, raised = -1, repr(e)
        sys.stdout.flush(), sys.stderr.flush()
        out, err = (os.pread(file, 2**20, 0).decode() for file in caught)
        print(json.dumps(dict(code=code, raised=raised, out=out, err=err, growth=peak() - before)), file=answers, flush=True)


class Worker:
    "The process; a new one after a hang."
    def __init__(self, model):
        self.model, self.process = str(model), None

    def restore(self, *arguments):
        "What became of one command; None if it hung or died."
        if self.process is None:
            self.process = subprocess.Popen([sys.executable, "-m", "tests.storms.test_pictures", self.model], cwd=ROOT, text=True,
                                            env={**os.environ, "PYTHONPATH": str(ROOT)}, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        print(json.dumps(arguments), file=self.process.stdin, flush=True)
        if select.select([self.process.stdout], [], [], WAIT)[0] and (answer := self.process.stdout.readline()):
            return json.loads(answer)
        self.close()
        return None

    def close(self):
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
            self.process = None


def verdict(case, picture, out, answer):
    "What is wrong with a result, or None; then whether it was restored."
    if answer is None:
        return "hang", False
    lines, written = answer["err"].splitlines(), [p for p in out.rglob("*") if p.is_file()]
    if answer["raised"] or "Traceback" in answer["err"] + answer["out"]:
        return "traceback", False
    if not all(c.isprintable() for c in (answer["err"] + answer["out"]).replace("\n", "")):
        return "raw characters on the terminal", False
    if answer["growth"] > GROWTH:
        return f"{answer['growth'] / 2**30:.1f} GiB", False
    if answer["code"] != 0:
        named = any(printable(path) in answer["err"] for path in (picture, out / picture.name))
        said = named and len(lines) == 1 and lines[0].startswith("irnb restore: ")
        wrong = "refused" if case.want is not None and not case.refusal else None if said else "not one sentence that names the file"
        return wrong or ("something was written" if written else None), False
    if lines or len(written) != 1 or f"restored 1 of 1 pictures into {printable(out)}\n" != answer["out"]:
        return "more or less than one result", False
    if case.want is None:
        return "silently wrong", False
    got = read_array(written[0])[0]
    same = got.shape == case.want.shape and got.dtype == case.want.dtype and (
        case.any_values or np.abs(got.astype(float) - case.want).mean() <= case.near)
    return None if same else "silently wrong", True


def identity(path):
    "A model file whose network gives back its input."
    import torch
    from irnb.networks import build, save_model
    spec = {"network": {"name": "NAFNet", "options": {"preset": "tiny", "width": 4}}}
    net = build("NAFNet", **spec["network"]["options"])
    torch.nn.init.zeros_(net.ending.weight), torch.nn.init.zeros_(net.ending.bias)
    save_model(path, net, spec)
    return path


def storm(folder, names):
    "Run the named cases; what went wrong, and the counts."
    worker, wrong, restored = Worker(identity(folder / "model.safetensors")), {}, 0
    for i, name in enumerate(names):
        (folder / f"{i}").mkdir()
        made = CASES[name](folder / f"{i}")
        picture, out = folder / f"{i}" / made.path, folder / f"{i} out"
        answer = worker.restore(str(picture), "-o", str(out))
        problem, done = verdict(made, picture, out, answer)
        restored += done
        if problem:
            wrong[name] = (problem, answer)
    worker.close()
    count = lambda what: sum(problem == what for problem, _ in wrong.values())
    print(f"\nstorm of pictures: {len(names)} run, {restored} restored, {len(names) - restored - len(wrong)} refused in a sentence; "
          f"{count('traceback')} tracebacks, {count('silently wrong')} silently wrong, {count('hang')} hangs, {len(wrong)} wrong in all")
    return wrong


SAMPLE = ["png cut to a third", "png16 with a flipped bit 60", "jpg with a flipped bit 0.5", "png with a huge profile", "pipe",
          "tif of 14 bytes that leads to itself", "tif with a huge strip", "tif of one not-a-number", "links in a ring",
          "good png interlaced", "good jpg of four inks", f"bad named {NAMES[1]!a}", f"good named {NAMES[6]!a}"]


def test_a_sample_of_pictures(tmp_path):
    assert not storm(tmp_path, SAMPLE)


@pytest.mark.slow
@pytest.mark.storm
def test_storm_of_pictures(tmp_path):
    assert len(CASES) >= 80 and not storm(tmp_path, list(CASES))


if __name__ == "__main__":
    work(sys.argv[1])
