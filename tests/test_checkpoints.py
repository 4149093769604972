"""Loading published checkpoints: every wrapping that is forgiven, everything that is refused, and a network that is never half loaded."""
import copy
import os
import pickle
import re
import struct
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from safetensors.torch import save_file
from torch import nn
from irnb.networks import EDSR, FFANet, RRDB, SwinIR, UpscaleFirst, build, load_weights, networks
from irnb.networks.checkpoints import CheckpointError, CheckpointNotFound, LoadReport, guess_network, infer_network, read_sections

EDSR_OPTIONS = dict(num_feat=8, num_block=2, upscale=2)


def make(seed=0, **options):
    "A small EDSR; the same for the same seed."
    torch.manual_seed(seed)
    return EDSR(**{**EDSR_OPTIONS, **options})


def same(a, b): return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture
def source(): return make(1)


@pytest.fixture
def net(): return make(2)


def stored(path, content, form="zip"):
    "Write content as a new checkpoint, an old one, or safetensors."
    if form == "safetensors": save_file({k: v.contiguous() for k, v in content.items()}, path)
    else: torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
    return path


# --- what is forgiven

def prefixed(state, *prefixes): return {"".join(prefixes) + k: v for k, v in state.items()}


WRAPPINGS = {
    "bare": lambda s: s,
    "params": lambda s: {"params": s},
    "params_ema": lambda s: {"params_ema": s},
    "state_dict": lambda s: {"state_dict": s, "epoch": 3},
    "model": lambda s: {"model": s, "step": 3},
    "module": lambda s: prefixed(s, "module."),
    "compiled": lambda s: prefixed(s, "_orig_mod."),
    "both": lambda s: prefixed(s, "module.", "_orig_mod."),
    "both, nested": lambda s: {"params": prefixed(s, "_orig_mod.", "module.")},
    "lightning": lambda s: {"state_dict": {**prefixed(s, "model."), "loss.vgg.weight": torch.zeros(3)}, "hyper_parameters": {"lr": 1e-3}},
    "net_g": lambda s: prefixed(s, "net_g."),
    "net_g in DDP": lambda s: {"state_dict": prefixed(s, "module.net_g.")},
    "deep": lambda s: {"state": {"weights": {"generator": s}}, "optimizer": {"state": {0: {"exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 1.0}]}},
    "flat params": lambda s: prefixed(s, "params."),
    "wrapped inside": lambda s: {k.replace("body.", "body._orig_mod."): v for k, v in s.items()},
    "half": lambda s: {k: v.half() for k, v in s.items()},
}


@pytest.mark.parametrize("form", ["zip", "legacy"])
@pytest.mark.parametrize("wrap", WRAPPINGS.values(), ids=WRAPPINGS)
def test_wrappings(tmp_path, source, net, wrap, form):
    report = load_weights(net, stored(tmp_path / "f.pth", wrap(source.state_dict()), form))
    expected = {k: v.half().float() for k, v in source.state_dict().items()} if wrap is WRAPPINGS["half"] else source.state_dict()
    assert same(net.state_dict(), expected)
    assert report.complete and set(report.loaded) == set(net.state_dict()) and not report.missing and not report.mismatched
    assert report.parameters == sum(p.numel() for p in net.parameters()) and all(v.dtype == torch.float32 for v in net.state_dict().values())


@pytest.mark.parametrize("prefix", ["", "module.", "params.", "params_ema.", "state_dict.", "_orig_mod."])
def test_safetensors(tmp_path, source, net, prefix):
    report = load_weights(net, stored(tmp_path / "f.safetensors", prefixed(source.state_dict(), prefix), "safetensors"))
    assert same(net.state_dict(), source.state_dict()) and (report.renamed > 0) == bool(prefix)
    stored(tmp_path / "wrong.pth", source.state_dict(), "safetensors")                 # told by content, not by suffix
    assert load_weights(net, tmp_path / "wrong.pth").complete


@given(prefixes=st.lists(st.sampled_from(["module.", "_orig_mod."]), max_size=3), entry=st.sampled_from([None, "params", "state_dict", "weights", "model"]),
       extra=st.integers(0, 3))
@settings(max_examples=15, deadline=None)
def test_any_mixture(tmp_path_factory, prefixes, entry, extra):
    source, net = make(1), make(2)
    state = prefixed(source.state_dict(), *prefixes) | {f"surprise.{i}": torch.zeros(2) for i in range(extra)}
    path = stored(tmp_path_factory.mktemp("mix") / "f.pth", state if entry is None else {entry: state, "epoch": 1})
    report = load_weights(net, path)
    assert same(net.state_dict(), source.state_dict()) and set(report.skipped) == {f"surprise.{i}" for i in range(extra)}
    assert report.section == (entry or "") and report.others == (() if entry is None else ("epoch",)) and report.renamed == (len(net.state_dict()) if prefixes else 0)


def test_averages_are_preferred_and_which_overrules(tmp_path, net):
    last, average = make(1), make(3)
    stored(tmp_path / "f.pth", {"params": last.state_dict(), "params_ema": average.state_dict(), "iter": 5})
    report = load_weights(net, tmp_path / "f.pth")
    assert same(net.state_dict(), average.state_dict()) and report.section == "params_ema" and report.others == ("params", "iter")
    assert load_weights(net, tmp_path / "f.pth", which="params").section == "params" and same(net.state_dict(), last.state_dict())
    stored(tmp_path / "g.safetensors", prefixed(last.state_dict(), "params.") | prefixed(average.state_dict(), "params_ema."), "safetensors")
    report = load_weights(net, tmp_path / "g.safetensors")
    assert same(net.state_dict(), average.state_dict()) and report.others == ("params",)
    load_weights(net, tmp_path / "g.safetensors", which="params")
    assert same(net.state_dict(), last.state_dict())


def test_a_section_that_fits_beats_a_preferred_name(tmp_path, source, net):
    stored(tmp_path / "f.pth", {"params_ema": build("UNet", preset="tiny").state_dict(), "generator": source.state_dict()})
    assert load_weights(net, tmp_path / "f.pth").section == "generator" and same(net.state_dict(), source.state_dict())


def test_the_top_level_is_preferred_to_a_copy(tmp_path, source, net):
    path = stored(tmp_path / "f.pth", {"backup": source.state_dict(), **make(5).state_dict()})
    assert load_weights(net, path).section == "" and same(net.state_dict(), make(5).state_dict())


def test_two_equal_sections_must_be_chosen(tmp_path, source, net):
    other = make(5)
    stored(tmp_path / "f.pth", {"first": source.state_dict(), "second": other.state_dict()})
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(CheckpointError, match="'first', 'second'.*which="): load_weights(net, tmp_path / "f.pth")
    assert same(net.state_dict(), before)
    assert load_weights(net, tmp_path / "f.pth", which="second").complete and same(net.state_dict(), other.state_dict())


class Old(np.float64):
    "A number whose pickle has the module names of NumPy 1."


@pytest.mark.parametrize("numpy", ["1", "2"])
def test_the_layout_of_the_dehazing_files(tmp_path, numpy):
    "`model`, `module.`, NumPy scores, surprising extra keys: old and new names of NumPy's own modules."
    torch.manual_seed(1)
    source, net = FFANet(**FFANet.PRESETS["tiny"]), FFANet(3, 1, 16)
    state = prefixed(source.state_dict(), "module.") | {f"module.g{i}.{k}": torch.zeros(2) for i in (1, 2, 3) for k in ("la.gamma", "last.weight", "last.bias")}
    content = {"step": 500, "max_psnr": np.float64(36.1), "max_ssim": np.float32(0.99), "ssims": [np.float64(0.9)], "psnrs": [np.float64(1.0)], "losses": [0.1], "n": np.int64(3), "model": state}
    path = stored(tmp_path / "its_train_ffa_3_19.pk", content, "legacy")
    data = path.read_bytes()
    assert b"cnumpy._core.multiarray\n" in data or b"cnumpy.core.multiarray\n" in data
    core = b"numpy.core" if numpy == "1" else b"numpy._core"
    path.write_bytes(data.replace(b"cnumpy._core.multiarray\n", b"c" + core + b".multiarray\n").replace(b"cnumpy.core.multiarray\n", b"c" + core + b".multiarray\n"))
    report = load_weights(net, path)
    assert same(net.state_dict(), source.state_dict()) and report.section == "model" and len(report.skipped) == 9 and "g1.la.gamma" in report.skipped
    assert report.others == ("step", "max_psnr", "max_ssim", "ssims", "psnrs", "losses", "n")


@pytest.mark.parametrize("size", [16, 24, 48])
def test_masks_of_any_size_are_rebuilt(tmp_path, size):
    torch.manual_seed(1)
    source, net = SwinIR(**{**SwinIR.PRESETS["tiny"], "img_size": size}), SwinIR(**SwinIR.PRESETS["tiny"])
    own = {k: v.clone() for k, v in net.state_dict().items() if "attn_mask" in k}
    spoilt = {k: torch.full_like(v, 7) if "relative_position_index" in k else v for k, v in source.state_dict().items()}
    report = load_weights(net, stored(tmp_path / "f.pth", {"params": prefixed(spoilt, "module.")}))
    x = torch.rand(1, 3, 13, 20)
    assert torch.equal(net(x), source(x)) and len(report.rebuilt) == 6 and report.complete
    assert all(torch.equal(net.state_dict()[k], v) for k, v in own.items())
    without = {k: v for k, v in spoilt.items() if "attn_mask" not in k and "index" not in k}
    assert load_weights(net, stored(tmp_path / "g.pth", without)).rebuilt == ()


class Custom(nn.Module):
    "A user's network: a learned tensor with the name of a mask, batch normalisation, a part called `module`."
    def __init__(self, size=3):
        super().__init__()
        self.attn_mask, self.norm, self.module = nn.Parameter(torch.randn(size)), nn.BatchNorm2d(2), nn.Conv2d(3, 2, 1)


def test_any_module(tmp_path):
    source, net = Custom(), Custom()
    source.norm.running_mean.fill_(3)
    report = load_weights(net, stored(tmp_path / "f.pth", {"state_dict": source.state_dict()}))
    assert same(net.state_dict(), source.state_dict()) and "attn_mask" in report.loaded
    state = {k: v for k, v in source.state_dict().items() if k != "norm.num_batches_tracked"}
    assert load_weights(net, stored(tmp_path / "g.pth", state)).complete
    with pytest.raises(CheckpointError, match="'attn_mask'.*shape"): load_weights(Custom(4), tmp_path / "f.pth")


class Clash(nn.Module):
    "Two tensors that would have one simplified name."
    def __init__(self):
        super().__init__()
        self.weight, self.module = nn.Parameter(torch.randn(3)), nn.ParameterDict({"weight": torch.randn(3)})


def test_names_that_would_clash_are_kept(tmp_path):
    source, net = Clash(), Clash()
    assert load_weights(net, stored(tmp_path / "f.pth", {"params": source.state_dict()})).complete and same(net.state_dict(), source.state_dict())


def test_wrapped_networks(tmp_path, source):
    path = stored(tmp_path / "f.pth", source.state_dict())
    for wrap in (nn.DataParallel, lambda n: torch.compile(n, backend="eager"), lambda n: torch.compile(nn.DataParallel(n), backend="eager")):
        inner = make(2)
        wrapped = wrap(inner)
        assert load_weights(wrapped, path).network == "EDSR" and same(inner.state_dict(), source.state_dict())
    rrdb = build("RRDB", preset="tiny")
    stored(tmp_path / "r.pth", {"params": rrdb.state_dict()})
    up = build("RRDB", preset="tiny", upscale=2)
    assert isinstance(up, UpscaleFirst) and load_weights(up, tmp_path / "r.pth").network == "RRDB" and same(up.net.state_dict(), rrdb.state_dict())


def test_old_edsr_layout(tmp_path, source, net):
    new = {"conv_first": "head.0", "conv_after_body": "body.2", "upsample.0": "tail.0.0", "conv_last": "tail.1"} | {f"body.{i}.conv{k + 1}": f"body.{i}.body.{2*k}" for i in (0, 1) for k in (0, 1)}
    old = {f"{new[k.rpartition('.')[0]]}.{k.rpartition('.')[2]}": v for k, v in source.state_dict().items()} | {"sub_mean.weight": torch.eye(3), "add_mean.bias": torch.zeros(3)}
    report = load_weights(net, stored(tmp_path / "f.pt", prefixed(old, "module.")))
    assert same(net.state_dict(), source.state_dict()) and report.renamed == len(net.state_dict())


# --- the report

def test_report_prints_what_was_done(tmp_path, source, net):
    path = stored(tmp_path / "mine.pth", {"params": prefixed(source.state_dict(), "module.") | {"module.extra": torch.zeros(1)}, "epoch": 3})
    report = load_weights(net, path)
    assert isinstance(report, LoadReport) and report.path == path and str(report) == repr(report)
    lines = str(report).splitlines()
    assert lines[0] == f"EDSR: 16 of 16 tensors ({sum(p.numel() for p in net.parameters()):,} numbers) from 'params' of mine.pth"
    assert [line.split() for line in lines[1:]] == [["renamed", "16"], ["not", "wanted", "1", "extra"], ["other", "entries", "1", "epoch"]]


def test_partial_loading_is_explicit(tmp_path, net):
    source = make(1, upscale=4)
    path, before = stored(tmp_path / "x4.pth", source.state_dict()), copy.deepcopy(net.state_dict())
    report = load_weights(net, path, strict=False)
    assert report.complete and report.skipped == ("upsample.2.weight", "upsample.2.bias")
    source = make(1, upscale=3)
    net = make(2)
    report = load_weights(net, stored(tmp_path / "x3.pth", {k: v for k, v in source.state_dict().items() if k != "conv_last.bias"}), strict=False)
    assert report.mismatched == ("upsample.0.weight", "upsample.0.bias") and report.missing == ("conv_last.bias",) and not report.complete
    state = net.state_dict()
    for k in state: assert torch.equal(state[k], before[k] if k in report.mismatched + report.missing else source.state_dict()[k])
    assert "missing" in str(report) and "wrong shape" in str(report)


def test_read_sections(tmp_path, source):
    stored(tmp_path / "f.pth", {"params": source.state_dict(), "log": {"loss": 1.0}, "deep": {"er": {"w": torch.ones(2), "n": 3}}, "bias": torch.zeros(1)})
    sections = read_sections(tmp_path / "f.pth")
    assert list(sections) == ["", "params", "deep.er"] and list(sections[""]) == ["bias"] and list(sections["deep.er"]) == ["w"] and same(sections["params"], source.state_dict())


# --- what is refused: the network stays as it was, the message names file, tensor and remedy

class Malicious:
    "Unpickling this makes a folder."
    def __init__(self, path): self.path = str(path)
    def __reduce__(self): return os.mkdir, (self.path,)


def refused(net, path, message, **options):
    before, training = copy.deepcopy(net.state_dict()), net.training
    with pytest.raises(CheckpointError, match=message) as caught: load_weights(net, path, **options)
    assert str(path) in str(caught.value) and isinstance(caught.value, ValueError)
    assert same(net.state_dict(), before) and net.training == training
    return caught.value


def test_missing_file(tmp_path, net):
    error = refused(net, tmp_path / "no.pth", "no such file")
    assert isinstance(error, CheckpointNotFound) and isinstance(error, FileNotFoundError)
    refused(net, tmp_path, "cannot be read.*path")


@pytest.mark.parametrize("data, message", [
    (b"", "b''"), (b"<!DOCTYPE html>", "b'<!DOCTYP'.*web page"),
    (b"version https://git-lfs.github.com/spec/v1", "b'version '.*pointer"), (b"PK\x03\x04 and then nothing", ": truncated"),
    (b"\x80\x02 not a pickle", ": truncated"), (b"\x80", ": truncated"),
    (struct.pack("<Q", 2**40) + b'{"', ": truncated"), (struct.pack("<Q", 2) + b"{}", "no tensors.*empty")])
def test_files_that_are_no_checkpoints(tmp_path, net, data, message):
    (tmp_path / "f.pth").write_bytes(data)
    refused(net, tmp_path / "f.pth", message)


@pytest.mark.parametrize("form", ["zip", "legacy", "safetensors"])
@pytest.mark.parametrize("keep", [0.02, 0.5, 0.9, 0.999])
def test_truncated_files(tmp_path, source, net, form, keep):
    path = stored(tmp_path / "f.pth", source.state_dict(), form)
    data = path.read_bytes()
    path.write_bytes(data[:int(keep * len(data))])
    refused(net, path, ": truncated .*copy")


def test_a_flipped_bit_in_a_weight(tmp_path, source, net):
    "PyTorch itself does not notice."
    path = stored(tmp_path / "f.pth", source.state_dict())
    data = bytearray(path.read_bytes())
    data[data.find(source.conv_last.bias.detach().numpy().tobytes())] ^= 1
    path.write_bytes(data)
    assert not same(torch.load(path, weights_only=True), source.state_dict())
    refused(net, path, ": truncated .*CRC-32.*copy")


def test_a_part_marked_as_a_folder(tmp_path, source, net):
    "PyTorch reads nothing of it and takes what is in memory for weights."
    path = stored(tmp_path / "f.pth", source.state_dict())
    data = bytearray(path.read_bytes())
    name = data.rfind(b"f/data/0PK\x01\x02")                                            # in the archive's table of contents
    data[name - 8] |= 0x10                                                             # its attributes, four bytes before its offset
    path.write_bytes(data)
    refused(net, path, "'f/data/0'.*folder")


def test_archives_without_checksums(tmp_path, source, net):
    torch.serialization.set_crc32_options(False)
    try: path = stored(tmp_path / "f.pth", source.state_dict())
    finally: torch.serialization.set_crc32_options(True)
    assert load_weights(net, path).complete and same(net.state_dict(), source.state_dict())


def test_a_flipped_bit_anywhere_in_an_archive(tmp_path, source, net):
    "An error of ours or the right weights, never wrong ones nor half of them."
    path = stored(tmp_path / "f.pth", source.state_dict())
    data = bytearray(path.read_bytes())
    for at in [*range(0, len(data) - 400, 397), *range(len(data) - 400, len(data), 7)]:
        damaged = data.copy(); damaged[at] ^= 0x10
        path.write_bytes(damaged)
        before = copy.deepcopy(net.state_dict())
        try: load_weights(net, path)
        except CheckpointError: assert same(net.state_dict(), before)
        else: assert same(net.state_dict(), source.state_dict()); net = make(2)


@pytest.mark.parametrize("form", ["zip", "legacy"])
def test_code_is_refused_unrun(tmp_path, source, net, form):
    proof = tmp_path / "the code has run"
    path = stored(tmp_path / "f.pth", {"params": source.state_dict(), "surprise": Malicious(proof)}, form)
    refused(net, path, r": refused.*\w\.mkdir.*safetensors")
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        (tmp_path / "g.pth").write_bytes(pickle.dumps({"a": Malicious(proof)}, protocol=protocol))
        refused(net, tmp_path / "g.pth", ": refused.*mkdir")
        torch.save({"a": Malicious(proof)}, tmp_path / "g.pth", pickle_protocol=protocol, _use_new_zipfile_serialization=form == "zip")
        refused(net, tmp_path / "g.pth", ": refused.*mkdir")
    assert not proof.exists()
    refused(net, stored(tmp_path / "h.pth", net, form), ": refused.*EDSR")


def test_torchscript_is_no_checkpoint(tmp_path, net):
    torch.jit.save(torch.jit.script(nn.Conv2d(3, 3, 1)), str(tmp_path / "f.pt"))
    refused(net, tmp_path / "f.pt", "TorchScript|: refused")


@pytest.mark.parametrize("content, message", [
    ([torch.zeros(2)], "no named.* list"), (torch.zeros(2), "no named.* Tensor"), (3, "no named.* int"),
    ({}, "no tensors.*empty"), ({"epoch": 3, "loss": [1.0]}, "no tensors.*epoch, loss"), ({"params": {"a": 1}}, "no tensors.*params"),
    ({0: torch.zeros(2)}, "no tensors")])
def test_files_without_named_tensors(tmp_path, net, content, message): refused(net, stored(tmp_path / "f.pth", content), message)


def change(source, **changes):
    "The weights with some replaced; None deletes."
    state = {**source.state_dict(), **{k.replace("__", "."): v for k, v in changes.items()}}
    return {k: v for k, v in state.items() if v is not None}


@pytest.mark.parametrize("changes, message, broken", [
    (dict(conv_last__bias=None), "1 of 16.*missing.*'conv_last.bias'.*EDSR.*strict=False", False),
    (dict(conv_last__bias=None, conv_first__bias=None, body__0__conv1__weight=None), "3 of 16.*missing.*'conv_first.bias', 'body.0.conv1.weight'.*EDSR", False),
    (dict(conv_last__bias=torch.zeros(4)), r"'conv_last.bias'.*\(4,\).*\(3,\).*EDSR", False),
    (dict(conv_last__bias=torch.zeros(4), conv_first__bias=torch.zeros(9)), r"'conv_first.bias'.*\(9,\).*\(8,\).*1 more", False),
    (dict(conv_last__bias=torch.tensor([0, float("nan"), 0])), "'conv_last.bias'.*finite.*get another", True),
    (dict(conv_last__bias=torch.tensor([0, float("inf"), 0])), "'conv_last.bias'.*finite", True),
    (dict(conv_last__bias=[0.0, 0.0, 0.0]), "'conv_last.bias'.* list", True), (dict(conv_last__bias=3), "'conv_last.bias'.* int", True),
    (dict(conv_last__bias=torch.zeros(3, dtype=torch.int64)), "'conv_last.bias'.*int64.*float32", True)])
@pytest.mark.parametrize("section", [None, "params"])
def test_flawed_weights(tmp_path, source, net, changes, message, broken, section):
    content = change(source, **changes)
    path = stored(tmp_path / "f.pth", content if section is None else {section: prefixed(content, "module.")})
    error = refused(net, path, message)
    assert ("'params'" in str(error)) == (section is not None)
    if broken: refused(net, path, message, strict=False)


@pytest.mark.parametrize("value", [torch.zeros(3, dtype=torch.bool), torch.zeros(3, dtype=torch.complex64), torch.zeros(3).to(torch.float8_e4m3fn), torch.full((3,), 1e300, dtype=torch.float64),
                                   torch.zeros(3, dtype=torch.uint8)])
def test_another_kind_of_number(tmp_path, source, net, value):
    "Also a fraction that the network's own precision cannot hold."
    refused(net, stored(tmp_path / "f.pth", change(source, conv_last__bias=value)), "'conv_last.bias'.*(torch.float32|finite)")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("form", ["zip", "safetensors"])
def test_fractions_of_any_precision(tmp_path, source, net, dtype, form):
    state = {k: v.to(dtype) for k, v in source.state_dict().items()}
    assert load_weights(net, stored(tmp_path / "f", state, form)).complete and same(net.state_dict(), {k: v.float() for k, v in state.items()})


@pytest.mark.parametrize("value", [torch.zeros(1).expand(10**6, 10**6), torch.empty(10**12, 0), torch.eye(3).to_sparse(), torch.empty(3, device="meta")])
def test_tensors_without_memory_of_their_own(tmp_path, source, net, value):
    refused(net, stored(tmp_path / "f.pth", change(source, conv_last__bias=value)), "'conv_last.bias'.*plain|: refused|: truncated")


def test_a_dictionary_without_a_bottom(tmp_path, source, net):
    deep, wide = {"a": torch.zeros(1)}, {"a": torch.zeros(1)}
    for _ in range(200): deep = {"a": deep}
    for _ in range(40): wide = {"a": wide, "b": wide}
    endless = {}; endless["a"] = endless
    for content in (deep, wide, endless): refused(net, stored(tmp_path / "f.pth", content), "deep")


def test_an_archive_that_unpacks_to_much_more(tmp_path, source, net):
    import zipfile
    path = stored(tmp_path / "f.pth", {"a": torch.zeros(500_000)})
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(tmp_path / "g.pth", "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist(): new.writestr(name, old.read(name))
    refused(net, tmp_path / "g.pth", "16 times")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes with names")
def test_a_pipe_is_not_waited_for(tmp_path, net):
    os.mkfifo(tmp_path / "f.pth")
    refused(net, tmp_path / "f.pth", "regular file")


# --- the network is inferred: every tensor must find its place

OPTIONS = {"NAFNet": {}, "UNet": {}, "RRDB": dict(scale=4), "FFANet": {}, "EDSR": dict(upscale=3), "SwinIR": dict(upscale=2), "Restormer": {}, "ConStyleNAFNet": {}, "ConStyleRestormer": {}, "ConStyleConv": {},
           "ConStyleUformer": {}, "ConStyleKBNet": {}, "ConStyleMAXIM": {}}


@pytest.mark.parametrize("name", OPTIONS)
def test_every_family_refuses_a_tensor_too_many(tmp_path, name):
    state = build(name, preset="tiny", **OPTIONS[name]).state_dict()
    net, found, options = infer_network(stored(tmp_path / "f.pth", {"params": state}))
    assert found == name and same(net.state_dict(), state)
    first = next(iter(state))
    for extra in ({"conv_up9.weight": torch.zeros(2, 2)}, {first.replace(".", ".9.", 1): torch.zeros(2)}, {"gain": torch.ones(())}, {"nowhere.attn_mask": torch.zeros(4, 4)}):
        with pytest.raises(CheckpointError, match=r"f.pth: .*"): infer_network(stored(tmp_path / "f.pth", {"params": {**state, **extra}}))
    assert sorted(networks()) == sorted(OPTIONS)                                        # a new family comes here too


@pytest.mark.parametrize("form", ["nested", "flat"])
def test_what_may_stand_beside_an_inferred_network(tmp_path, form):
    state = build("FFANet", preset="tiny").state_dict()
    unused = {"g1.la.gamma": torch.zeros(1), "g2.last.weight": torch.zeros(4, 4)}
    content = {"params": {**state, **unused}, "params_old": {k: v + 1 for k, v in state.items()}, "optimizer": {"exp_avg": torch.zeros(3)}}
    other = {"net": state, "second": {"conv.weight": torch.zeros(3)}}
    if form == "flat": content, other = ({f"{at}.{k}": v for at, s in c.items() for k, v in s.items()} for c in (content, other))
    else: content |= {"epoch": torch.tensor(3), "lr_schedulers": {"last": torch.zeros(2)}}
    net, name, _ = infer_network(stored(tmp_path / "f.pth", content))
    assert name == "FFANet" and same(net.state_dict(), state)
    turned = {{"params": "params_old", "params_old": "params_ema"}.get(at, at): part for at, part in content.items()} if form == "nested" else content
    assert infer_network(stored(tmp_path / "f.pth", turned))[1] == "FFANet"              # what no version uses may stand in the copy
    with pytest.raises(CheckpointError, match="conv.weight.*left out"): infer_network(stored(tmp_path / "g.pth", other))


def test_a_network_larger_than_its_file(tmp_path, monkeypatch):
    monkeypatch.setattr("irnb.networks.MAX_SPARE", -10**9)
    path = stored(tmp_path / "f.pth", build("UNet", preset="tiny").state_dict())
    with pytest.raises(CheckpointError, match=r"f.pth: .*\d numbers"): infer_network(path)


def test_unknown_section(tmp_path, source, net):
    path = stored(tmp_path / "f.pth", {"params": source.state_dict(), "epoch": 3})
    refused(net, path, "'params_ema'.*'params'", which="params_ema")
    refused(net, path, "'epoch'.*'params'", which="epoch")


FAMILIES = {"NAFNet": {}, "UNet": {}, "RRDB": {}, "FFANet": {}, "EDSR": dict(upscale=3), "SwinIR": dict(upscale=2)}


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("wrap", ["bare", "module", "lightning"])
def test_another_family_is_named(tmp_path, net, name, wrap):
    other = build(name, preset="tiny", **FAMILIES[name])
    path = stored(tmp_path / "f.pth", WRAPPINGS[wrap](other.state_dict()))
    error = str(refused(net, path, rf"build\('{name}', .*\)"))
    again = eval(re.search(r"build\(.*\)", error)[0], {"build": build})                # the remedy works
    assert load_weights(again, path).complete and same(again.state_dict(), other.state_dict())
    if name not in ("EDSR", "RRDB"): refused(net, path, rf"none .*EDSR.*build\('{name}'", strict=False)


def test_another_size_of_the_same_family_is_named(tmp_path):
    for small, options in ((SwinIR(**SwinIR.PRESETS["tiny"]), dict(preset="tiny", embed_dim=30, upscale=4)), (RRDB(num_feat=8, num_block=1, growth=4), dict(preset="tiny")),
                           (FFANet(3, 2, 16), dict(preset="tiny"))):
        path = stored(tmp_path / "f.pth", {"params": small.state_dict()})
        refused(build(type(small).__name__, **options), path, rf"build\('{type(small).__name__}', ")


def test_weights_of_nobody_known(tmp_path, net):
    path = stored(tmp_path / "f.pth", {"encoder.stem.kernel": torch.zeros(3), "decoder.out.kernel": torch.zeros(3)})
    refused(net, path, "EDSR.*encoder.stem.kernel, decoder.out.kernel")


def test_guesses():
    for name in FAMILIES:
        other = build(name, preset="tiny", **FAMILIES[name])
        found = guess_network(prefixed(other.state_dict(), "module."))
        assert found[0] == name and {k: v.shape for k, v in build(name, **found[1]).state_dict().items()} == {k: v.shape for k, v in other.state_dict().items()}
    assert guess_network({}) is None and guess_network({"a": torch.zeros(1)}) is None
    assert set(FAMILIES) <= set(networks())


def test_a_failure_half_way_leaves_the_network_as_it_was(tmp_path, source, net):
    "Memory that runs out, or any other surprise, while tensors are being copied."
    path, before = stored(tmp_path / "f.pth", source.state_dict()), copy.deepcopy(net.state_dict())
    def fail(*_): raise MemoryError("no memory")
    handle = net.conv_last.register_load_state_dict_pre_hook(fail)
    with pytest.raises(MemoryError): load_weights(net, path)
    assert same(net.state_dict(), before)
    handle.remove()
    assert load_weights(net, path).complete and same(net.state_dict(), source.state_dict())


def test_a_network_without_memory(tmp_path, source):
    with torch.device("meta"): net = make()
    with pytest.raises(CheckpointError, match="meta.*to_empty"): load_weights(net, stored(tmp_path / "f.pth", source.state_dict()))


def test_the_rest_of_the_network_is_left_alone(tmp_path, source, net):
    "Mode, gradients, dtype, identity of the parameters, global generator."
    net.eval().double()
    ids, p = [id(p) for p in net.parameters()], next(net.parameters())
    p.requires_grad_(False)
    path, state = stored(tmp_path / "f.pth", source.state_dict()), torch.get_rng_state()
    load_weights(net, path)
    assert not net.training and [id(p) for p in net.parameters()] == ids and not p.requires_grad and p.dtype == torch.float64 and torch.equal(torch.get_rng_state(), state)
    assert torch.equal(p, source.conv_first.weight.double())
