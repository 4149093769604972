"""The model storm: hostile and odd model files, each of which loads to the right network or ends in one sentence that names it."""
import contextlib
import io
import json
import os
import pickle
import signal
import struct
import sys
import time
import zipfile
from pathlib import Path
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from irnb.networks import EDSR, NAFNet, RRDB, FFANet, ModelError, build, load_model, save_model
from irnb.networks.checkpoints import CheckpointError, load_weights
from tests.nets import awake

OPTIONS = dict(width=4, enc_blk_nums=[1], middle_blk_num=1, dec_blk_nums=[1])
SPEC = {"network": {"name": "NAFNet", "options": OPTIONS}}
LIMIT, FOREVER = 10, 120  # seconds of computing after which a file counts as a hang; seconds of waiting that are too many


class Payload:
    "Unpickling this makes a folder called `pwned` in the current one."
    def __reduce__(self): return os.mkdir, ("pwned",)


class Evaluated:
    "The same through `eval`."
    def __reduce__(self): return eval, ("__import__('os').mkdir('pwned')",)


def net(): return awake(NAFNet(**OPTIONS)).eval()


def state(): return {k: v.clone() for k, v in net().state_dict().items()}


def put(**changes): return {**state(), **{k.replace("__", "."): v for k, v in changes.items()}}


def model(path, spec=SPEC, tensors=None, text=None, **more):
    "A safetensors file that `save_model` would not write."
    save_file(state() if tensors is None else tensors, str(path), metadata={"irnb": json.dumps(spec) if text is None else text, **more})


def saved(path): save_model(path, net(), SPEC)


def content():
    "The bytes of a good file."
    saved("good")
    return Path("good").read_bytes()


def cut(part): return lambda p: p.write_bytes(content()[:int(part * len(content()))])


def flip(part, bit=0):
    "A file with one bit flipped at a fraction of its length."
    def make(p):
        data = bytearray(content())
        data[min(int(part * len(data)), len(data) - 1)] ^= 1 << bit
        p.write_bytes(data)
    return make


def header(change):
    "A good file with its header changed by a function from text to text; the lengths are set right."
    def make(p):
        data = content()
        length = struct.unpack("<Q", data[:8])[0]
        text = change(data[8:8 + length].decode()).encode()
        p.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length:])
    return make


def entry(**changes):
    "A good file whose first tensor's entry in the header is changed."
    def change(text):
        parsed = json.loads(text)
        name = next(k for k in parsed if k != "__metadata__")
        parsed[name].update(changes)
        return json.dumps(parsed)
    return header(change)


def options(**changes): return lambda p: model(p, {"network": {"name": "NAFNet", "options": {**OPTIONS, **changes}}})


def named(name, **chosen): return lambda p: model(p, {"network": {"name": name, "options": chosen}})


def strategy(dotted, **chosen): return lambda p: model(p, {**SPEC, "strategy": {"name": "s", "class": dotted, "options": chosen}})


def pickled(value, protocol): return lambda p: p.write_bytes(pickle.dumps(value, protocol=protocol))


def checkpoint(make, **how): return lambda p: torch.save(make(), p, **how)


def packed(p):
    "A zip bomb: an archive of PyTorch, deflated."
    torch.save({"a": torch.zeros(4_000_000)}, "plain.pth")
    with zipfile.ZipFile("plain.pth") as old, zipfile.ZipFile(p, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist(): new.writestr(name, old.read(name))


def overlapping(p):
    "A zip whose table of contents lists one part ten thousand times."
    with zipfile.ZipFile(p, "w") as archive:
        archive.writestr("a/data.pkl", b"\0" * 100_000)
        archive.filelist *= 10_000


def damaged_archive(p):
    torch.save(state(), p)
    data = bytearray(p.read_bytes())
    data[len(data) // 2] ^= 4
    p.write_bytes(data)


def endless(): value = {"w": torch.zeros(1)}; value["again"] = value; return value


def laughs():
    value = {"w": torch.zeros(1)}
    for _ in range(60): value = {"a": value, "b": value}
    return value


def real_esrgan(blocks, inputs=3):
    "An official layout: names and shapes of the enlarging network."
    return awake(RRDB(num_feat=6, growth=4, num_block=blocks, scale={3: 4, 12: 2, 48: 1}[inputs])).state_dict()


def old_edsr(mean):
    "The layout of 2017, with its mean colour."
    new = awake(EDSR(8, 1, 2)).state_dict()
    names = {"conv_first": "head.0", "body.0.conv1": "body.0.body.0", "body.0.conv2": "body.0.body.2", "conv_after_body": "body.1", "upsample.0": "tail.0.0", "conv_last": "tail.1"}
    old = {f"{names[k.rpartition('.')[0]]}.{k.rpartition('.')[2]}": v for k, v in new.items()}
    return {**old, "sub_mean.weight": torch.eye(3).view(3, 3, 1, 1), "sub_mean.bias": -mean * torch.tensor([0.4488, 0.4371, 0.4040])}


def real_esrgan_net(inputs):
    "The network of that layout, with its weights."
    net = RRDB(num_feat=6, growth=4, num_block=2, scale={3: 4, 12: 2, 48: 1}[inputs])
    net.load_state_dict(real_esrgan(2, inputs))
    return net


def rounded(dtype):
    "The good network with weights of another precision."
    other = net()
    other.load_state_dict({k: v.to(dtype).float() for k, v in state().items()})
    return other


# Files that must open, with the network that they must open to.
GOOD = {
    "as saved": (saved, net),
    "without a checksum": (model, net),
    "half precision": (lambda p: model(p, tensors={k: v.half() for k, v in state().items()}), lambda: rounded(torch.float16)),
    "bfloat16": (lambda p: model(p, tensors={k: v.bfloat16() for k, v in state().items()}), lambda: rounded(torch.bfloat16)),
    "double precision": (lambda p: model(p, tensors={k: v.double() for k, v in state().items()}), net),
    "more entries of text": (lambda p: model(p, more="text"), net),
    "supervised": (strategy("irnb.strategies.Supervised"), net),
    "checkpoint": (checkpoint(lambda: {"params": state()}), net),
    "checkpoint of old": (checkpoint(state, _use_new_zipfile_serialization=False), net),
    "checkpoint beside an optimizer": (checkpoint(lambda: {"params": state(), "optimizer": {"state": {0: {"exp_avg": torch.zeros(2)}}}, "epoch": 3, "score": np.float64(30)}), net),
    "average beside the last": (checkpoint(lambda: {"params": {k: v + 1 for k, v in state().items()}, "params_ema": state()}), net),
    "RealESRGAN_x4plus": (checkpoint(lambda: {"params_ema": real_esrgan(2)}), lambda: real_esrgan_net(3)),
    "RealESRGAN_x2plus": (checkpoint(lambda: {"params_ema": real_esrgan(2, 12)}), lambda: real_esrgan_net(12)),
    "RealESRGAN x1": (checkpoint(lambda: real_esrgan(2, 48)), lambda: real_esrgan_net(48)),
    "EDSR of 2017": (checkpoint(lambda: old_edsr(255)), lambda: awake(EDSR(8, 1, 2))),
    "FFA-Net with what no version uses": (checkpoint(lambda: {"model": {**awake(FFANet(3, 1, 16)).state_dict(), "g1.la.gamma": torch.zeros(1)}}), lambda: awake(FFANet(3, 1, 16))),
    "contrastive training beside": (checkpoint(lambda: {**awake(build("ConStyleNAFNet", preset="tiny")).state_dict(), "ConStyle.queue": torch.zeros(4, 9), "ConStyle.encoder_k.mlp1.0.weight": torch.zeros(2, 2)}),
                                    lambda: awake(build("ConStyleNAFNet", preset="tiny"))),
}

# Files that must be refused.
BAD = {
    **{f"cut to {part}": cut(part) for part in (0.0, 0.001, 0.02, 0.3, 0.9, 0.999)},
    **{f"bit flipped at {part}": flip(part, bit) for part, bit in ((0.3, 0), (0.5, 7), (0.9, 3), (0.9999, 6))},
    "header of 2^60 bytes": lambda p: p.write_bytes(struct.pack("<Q", 2**60) + b'{"a":1}'),
    "header beyond the file": lambda p: p.write_bytes(struct.pack("<Q", 10_000) + b"{}" + bytes(100)),
    "header of five million blanks": lambda p: p.write_bytes(struct.pack("<Q", 5_000_002) + b"{" + b" " * 5_000_000 + b"}"),
    "header nested deeply": lambda p: p.write_bytes(struct.pack("<Q", 400_005) + b'{"a":' + b"[" * 400_000),
    "header of nonsense": header(lambda text: '{"a": nonsense}' + text),
    "header is a list": header(lambda text: "[" + text + "]"),
    "overlapping offsets": entry(data_offsets=[8, 16]),
    "negative offsets": entry(data_offsets=[-8, 0]),
    "shape of negative numbers": entry(shape=[-4]),
    "shape of huge numbers": entry(shape=[2**62, 2**62, 0]),
    "shape of text": entry(shape="four"),
    "unknown type": entry(dtype="Q7"),
    "another type of the same size": entry(dtype="I32"),
    "a tensor twice": header(lambda text: text.replace('"__metadata__"', '"intro.bias":{"dtype":"F32","shape":[4],"data_offsets":[0,16]},"__metadata__"', 1)),
    "text twice": lambda p: model(p, text='{"network": {"name": "UNet", "options": {}}, "network": ' + json.dumps(SPEC["network"]) + "}"),
    "text is no JSON": lambda p: model(p, text="{network}"),
    "text with NaN": lambda p: model(p, text=json.dumps({**SPEC, "psnr": float("nan")})),
    "text nested deeply": lambda p: model(p, text="[" * 100_000),
    "text with a number of 5,000 digits": lambda p: model(p, text='{"network": {"name": "NAFNet", "options": {"width": ' + "9" * 5000 + "}}}"),
    "text missing": lambda p: save_file(state(), str(p)),
    "no spec": lambda p: model(p, {}),
    "network is text": lambda p: model(p, {"network": "NAFNet"}),
    "network without a name": lambda p: model(p, {"network": {"options": OPTIONS}}),
    "bool weights": lambda p: model(p, tensors=put(intro__bias=torch.ones(4, dtype=torch.bool))),
    "int8 weights": lambda p: model(p, tensors=put(intro__bias=torch.ones(4, dtype=torch.int8))),
    "int64 weights": lambda p: model(p, tensors={k: v.long() for k, v in state().items()}),
    "complex weights": lambda p: model(p, tensors=put(intro__bias=torch.ones(4, dtype=torch.complex64))),
    "float8 weights": lambda p: model(p, tensors={k: v.to(torch.float8_e4m3fn) for k, v in state().items()}),
    "NaN in a weight": lambda p: model(p, tensors=put(intro__bias=torch.full((4,), float("nan")))),
    "a weight beyond single precision": lambda p: model(p, tensors=put(intro__bias=torch.full((4,), 1e200, dtype=torch.float64))),
    "tensor missing": lambda p: model(p, tensors={k: v for k, v in state().items() if k != "ending.bias"}),
    "tensor too many": lambda p: model(p, tensors=put(conv_up1__weight=torch.zeros(4))),
    "tensor with line breaks and escapes in its name": lambda p: model(p, tensors=put(**{"a\n\x1b[31mred": torch.zeros(1)})),
    "wrong shape": lambda p: model(p, tensors=put(intro__bias=torch.zeros(5))),
    "shape with the same count": lambda p: model(p, tensors=put(intro__weight=torch.zeros(3, 4, 3, 3))),
    "another network": named("UNet", width=4, depth=2),
    "unknown network": named("Nothing"),
    "a module that is no network": named("gate"),
    "a foreign class": named("payload.Net"),
    "a foreign class in a package": named("payload_package.nets.Net"),
    "a class of the standard library": named("os.system"),
    "a class of torch": named("torch.nn.Linear", in_features=1, out_features=1),
    "a dotted trick": named("irnb.images.os.system"),
    "another dotted trick": named("irnb.networks.checkpoints.Path"),
    "a name with a zero byte": named("irnb.\0"),
    "dots only": named("..."),
    "a name of a megabyte": named("A" * 1_000_000),
    "a foreign strategy": strategy("payload.Net"),
    "a strategy that is a function": strategy("os.system"),
    "a strategy by a dotted trick": strategy("irnb.networks.os.system"),
    "a strategy that is none": strategy("irnb.networks.rrdb.RRDB"),
    "a strategy without a class": lambda p: model(p, {**SPEC, "strategy": "supervised"}),
    "a strategy with a foreign wrapper": strategy("irnb.strategies.IRConStyle", encoder={"width": 10**9}),
    "a million blocks": options(middle_blk_num=1_000_000),
    "sixty thousand blocks": options(middle_blk_num=60_000),
    "a million blocks in an encoder": options(enc_blk_nums=[1_000_000]),
    "a list of blocks": options(enc_blk_nums=[1] * 60_000, dec_blk_nums=[1] * 60_000),
    "blocks of another family": named("RRDB", num_block=50_000),
    "levels of another family": named("UNet", depth=50_000),
    "width of 60,000": options(width=60_000),
    "width of 10^18": options(width=10**18),
    "width below zero": options(width=-4),
    "width of zero": options(width=0),
    "width is NaN": lambda p: model(p, text=json.dumps({"network": {"name": "NAFNet", "options": {"width": float("nan")}}})),
    "width is infinite": lambda p: model(p, text=json.dumps(SPEC).replace('"width": 4', '"width": 1e999')),
    "width is text": options(width="4"),
    "width is a fraction": options(width=4.0),
    "width is true": options(width=True),
    "width is null": options(width=None),
    "width is a list": options(width=[4]),
    "a switch is text": lambda p: model(p, {"network": {"name": "RRDB", "options": {**RRDB.PRESETS["tiny"], "image_skip": "no"}}}, awake(build("RRDB", preset="tiny")).state_dict()),
    "an unknown option": options(payload=1),
    "options are a list": lambda p: model(p, {"network": {"name": "NAFNet", "options": [1, 2]}}),
    "options are null": lambda p: model(p, {"network": {"name": "NAFNet", "options": None}}),
    "an option called name": options(name="UNet"),
    "a preset that is a list": options(preset=["tiny"]),
    "upscale of 10^9": options(upscale=10**9),
    **{f"pickle with a command, protocol {k}": pickled({"a": Payload()}, k) for k in range(6)},
    "pickle with eval": pickled(Evaluated(), 4),
    "archive with a command": checkpoint(lambda: {"params": state(), "a": Payload()}),
    "archive with a command, protocol 4": checkpoint(lambda: {"a": Payload()}, pickle_protocol=4),
    "old checkpoint with a command": checkpoint(lambda: {"a": Payload()}, _use_new_zipfile_serialization=False),
    "a whole module": checkpoint(lambda: torch.nn.Linear(2, 2)),
    "zip bomb": packed,
    "zip of one part ten thousand times": overlapping,
    "zip that is none": lambda p: p.write_bytes(b"PK\x03\x04" + bytes(100)),
    "zip of something else": lambda p: zipfile.ZipFile(p, "w").writestr("a.txt", "hello"),
    "bit flipped in an archive": damaged_archive,
    "archive cut": lambda p: (torch.save(state(), p), p.write_bytes(p.read_bytes()[:2000])),
    "expanded tensors": checkpoint(lambda: {k: torch.zeros(1).expand(10**6, 10**6) if "intro.weight" in k else v for k, v in state().items()}),
    "tensors of no numbers and huge sides": checkpoint(lambda: put(intro__weight=torch.empty(10**15, 0, 3, 3))),
    "sparse tensors": checkpoint(lambda: put(intro__bias=torch.ones(4).to_sparse())),
    "tensors without memory": checkpoint(lambda: put(intro__bias=torch.ones(4, device="meta"))),
    "a dictionary inside itself": checkpoint(endless),
    "two to the sixty dictionaries": checkpoint(laughs),
    "five thousand dictionaries": checkpoint(lambda: {f"a{k}": {"w": torch.zeros(1)} for k in range(5000)}),
    "four thousand levels": checkpoint(lambda: {"intro.weight": torch.zeros(4, 3, 3, 3), **{f"downs.{k}.weight": torch.zeros(1) for k in range(4000)}}),
    "twenty thousand names": checkpoint(lambda: {f"body.{k}.rdb1.conv1.weight": torch.zeros(1) for k in range(20_000)}),
    "a list of tensors": checkpoint(lambda: [torch.zeros(2)]),
    "numbers for names": checkpoint(lambda: {0: torch.zeros(2)}),
    "integer checkpoint": checkpoint(lambda: {k: v.long() for k, v in state().items()}),
    "checkpoint of nobody": checkpoint(lambda: {"conv.weight": torch.zeros(3)}),
    "checkpoint with a tensor too many": checkpoint(lambda: put(conv_up1__weight=torch.zeros(4))),
    "two stages": checkpoint(lambda: {"first": state(), "second": {"conv.weight": torch.zeros(3)}}),
    "enlarging network, one layer missing": checkpoint(lambda: {k: v for k, v in real_esrgan(1).items() if not k.startswith("conv_up2")}),
    "enlarging network, one layer more": checkpoint(lambda: {**real_esrgan(1), "conv_up3.weight": torch.zeros(6, 6, 3, 3)}),
    "block number 10^9": checkpoint(lambda: {**real_esrgan(1), "body.1000000000.rdb1.conv1.weight": torch.zeros(4, 6, 3, 3)}),
    "EDSR of 2017 for another range": checkpoint(lambda: old_edsr(1)),
    "empty": lambda p: p.write_bytes(b""),
    "a web page": lambda p: p.write_text("<!DOCTYPE html>"),
    "a gigabyte of nothing": lambda p: os.truncate(os.open(p, os.O_CREAT | os.O_RDWR), 1 << 30),
    "a directory": lambda p: p.mkdir(),
    "nothing": lambda p: None,
    "a pipe": lambda p: os.mkfifo(p),
    "a device": lambda p: p.symlink_to("/dev/zero"),
    "a link to itself": lambda p: p.symlink_to(p),
}
SAMPLE = ["as saved", "RealESRGAN_x4plus", "bit flipped at 0.9", "a foreign class", "a dotted trick", "sixty thousand blocks", "width of 60,000", "bool weights",
          "pickle with a command, protocol 4", "zip bomb", "a pipe", "two to the sixty dictionaries"]


@contextlib.contextmanager
def aside(folder):
    "The current folder for a while, with a module of a payload beside the model."
    before = Path.cwd()
    os.chdir(folder)
    code = "import os\nos.mkdir('pwned')\nimport torch\nclass Net(torch.nn.Module): pass\n"
    Path("payload.py").write_text(code)
    Path("payload_package").mkdir()
    for name in ("__init__", "nets"): Path("payload_package", f"{name}.py").write_text(code)
    sys.path.insert(0, str(folder))
    try: yield
    finally:
        os.chdir(before)
        sys.path.remove(str(folder))
        for name in [name for name in sys.modules if name.startswith("payload")]: del sys.modules[name]


@contextlib.contextmanager
def patience():
    "Raise `TimeoutError` inside if it takes for ever, as reading from a pipe would."
    def late(*_): raise TimeoutError(f"nothing came in {FOREVER} s")
    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(FOREVER)
    try: yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def sentence(text, path):
    "Whether a text is one line that names a file and holds nothing that a terminal would obey."
    return str(path) in text and text.isprintable() and len(text) < 2000


def judged(name, folder):
    "Make one file, open it, and say what came of it: 'loaded', 'refused', or what is wrong."
    make, wanted = GOOD[name] if name in GOOD else (BAD[name], None)
    path = folder / "model"
    with aside(folder):
        make(path)
        start = time.process_time()
        try:
            with patience(): found = load_model(path)[0]
        except (ModelError, CheckpointError) as error: found, said = None, str(error)
        except BaseException as error: return f"{type(error).__name__}: {error}"[:300]
        if (spent := time.process_time() - start) > LIMIT: return f"computed for {spent:.0f} s"
        if Path("pwned").exists(): return "the payload has run"
    if found is None: return ("refused" if wanted is None else f"refused: {said}") if sentence(said, path) else f"no sentence: {said[:300]}"
    if wanted is None: return "loaded, but should be refused"
    x = torch.rand(1, 3, 8, 12, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(): return "loaded" if torch.equal(found(x), wanted().eval()(x)) else "silently wrong"


def expected(name): return "loaded" if name in GOOD else "refused"


@pytest.mark.parametrize("name", SAMPLE)
def test_a_sample_of_the_storm(name, tmp_path): assert judged(name, tmp_path) == expected(name)


@pytest.mark.slow
@pytest.mark.storm
def test_model_storm(tmp_path):
    results = {}
    for k, name in enumerate([*GOOD, *BAD]):
        (tmp_path / str(k)).mkdir()
        results[name] = judged(name, tmp_path / str(k))
    wrong = {name: what for name, what in results.items() if what != expected(name)}
    counts = {what: sum(w == what for w in results.values()) for what in ("loaded", "refused")}
    print(f"\nmodel storm: {len(results)} files, {counts['loaded']} loaded with the right output, {counts['refused']} refused in a sentence, {len(wrong)} wrong")
    assert len(results) >= 70 and not wrong, wrong


@pytest.mark.slow
@pytest.mark.storm
def test_load_weights_in_the_storm(tmp_path):
    "The same files into a network that is already built: afterwards it has the file's weights, or its own to the last bit."
    torch.manual_seed(1)
    wrong = {}
    for k, name in enumerate([*GOOD, *BAD]):
        (folder := tmp_path / str(k)).mkdir()
        target, path = NAFNet(**OPTIONS), folder / "model"
        before = {key: value.clone() for key, value in target.state_dict().items()}
        with aside(folder), contextlib.redirect_stdout(io.StringIO()):
            (GOOD[name][0] if name in GOOD else BAD[name])(path)
            try:
                with patience(): load_weights(target, path)
            except CheckpointError as error: said = None if sentence(str(error), path) else str(error)[:300]
            except BaseException as error: said = f"{type(error).__name__}: {error}"[:300]
            else: before, said = target.state_dict(), None
            if Path("pwned").exists(): said = "the payload has run"
        if said is None and any(not torch.equal(value, before[key]) for key, value in target.state_dict().items()): said = "half loaded"
        if said: wrong[name] = said
    print(f"\nload_weights in the model storm: {len(GOOD) + len(BAD)} files, {len(wrong)} wrong")
    assert not wrong, wrong
