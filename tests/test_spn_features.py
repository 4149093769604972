"""Feature extractors and distances: VGG's layout and files, the stand-ins, and what a distance may and may not do."""
import hashlib
import itertools
import pickle
import socket

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy import ndimage
from torch import nn
from torch.nn import functional as F

from irnb.strategies.features import (FEATURE_CRITERIA, FeatureDistance, FeatureExtractor, FilterBank, PixelFeatures, RandomTrunk, SelfTrained, VGGFileError,
                                      VGGTrunk, _main, feature_extractor, gabor_filters, train_encoder, trunk_layers, vgg_file, write_vgg_features)

# torchvision's indices of the convolutions, written out independently of the code
CONVS = {"vgg16": (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28), "vgg19": (0, 2, 5, 7, 10, 12, 14, 16, 19, 21, 23, 25, 28, 30, 32, 34)}
POOLS = {"vgg16": (4, 9, 16, 23, 30), "vgg19": (4, 9, 18, 27, 36)}
OUT = {"vgg16": (64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512), "vgg19": (64, 64, 128, 128) + (256,) * 4 + (512,) * 8}


def made_up(arch="vgg16", last=None, seed=0):
    "A state dict of torchvision's form with random values, up to the convolution `last`."
    g, state, width = torch.Generator().manual_seed(seed), {}, 3
    for index, out in zip(CONVS[arch], OUT[arch]):
        if last is None or index <= last:
            state[f"features.{index}.weight"] = torch.randn(out, width, 3, 3, generator=g) * (2 / (9 * width)) ** .5
            state[f"features.{index}.bias"] = .1 * torch.randn(out, generator=g)
        width = out
    return state


def plain_vgg(state, x, taps, arch="vgg16"):
    "VGG by hand: indices, not names; normalised by ImageNet's numbers."
    x = (x - torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)) / torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)
    found = []
    for index in range(max(taps) + 1):
        if index in CONVS[arch]:
            x = F.conv2d(x, state[f"features.{index}.weight"], state[f"features.{index}.bias"], padding=1)
        else:
            x = F.max_pool2d(x, 2) if index in POOLS[arch] else x.clamp(min=0)
        if index in taps:
            found.append(x)
    return found


@pytest.fixture(scope="module")
def small():
    "Only the convolutions that relu3_3 needs: what most tests take."
    return made_up(last=14)


@pytest.fixture
def no_vgg(monkeypatch, tmp_path):
    "No weight file anywhere, and no network."
    monkeypatch.delenv("SPN_VGG_PATH", raising=False)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(socket, "socket", lambda *a, **k: pytest.fail("a connection was opened"))
    return tmp_path


def stored(path, state, **options):
    torch.save(state, path, **options)
    return path


image = lambda *size, seed=0: torch.rand(*size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("arch", CONVS)
def test_layer_names_give_torchvisions_indices(arch):
    names = trunk_layers({"vgg16": (2, 2, 3, 3, 3), "vgg19": (2, 2, 4, 4, 4)}[arch])
    assert tuple(i for i, n in enumerate(names) if n.startswith("conv")) == CONVS[arch]
    assert tuple(i for i, n in enumerate(names) if n.startswith("pool")) == POOLS[arch]
    assert tuple(i for i, n in enumerate(names) if n.startswith("relu")) == tuple(i + 1 for i in CONVS[arch])


def test_default_taps_are_after_the_relu_and_match_a_vgg_by_hand(small, tmp_path):
    trunk, x = VGGTrunk(weights=stored(tmp_path / "v.pth", small)), image(2, 3, 20, 12) * 2 - .5
    assert trunk.indices == (3, 8, 15) and len(trunk.features) == 16 and trunk.label == "VGG16"
    for mine, reference in zip(trunk(x), plain_vgg(small, x, (3, 8, 15)), strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-4, atol=1e-5)
        assert mine.min() >= 0
    assert not any(p.requires_grad for p in trunk.parameters()) and not trunk.train(True).training


def test_convolution_taps_are_not_overwritten_by_their_relu(small, tmp_path):
    trunk, x = VGGTrunk(layers=("conv1_2", "relu1_2"), weights=stored(tmp_path / "v.pth", small)), image(1, 3, 8, 8)
    conv, relu = trunk(x)
    assert conv.min() < 0 and torch.equal(conv.clamp(min=0), relu)


@pytest.mark.parametrize("style", ["features.{i}", "{i}", "module.features.{i}", "conv{n}", "vgg_net.conv{n}"])
def test_every_key_style_loads_the_same(style, small, tmp_path):
    names = {i: name[4:] for i, name in enumerate(trunk_layers((2, 2, 3))) if name.startswith("conv")}
    renamed = {}
    for key, value in small.items():
        _, index, kind = key.split(".")
        renamed[f"{style.format(i=index, n=names[int(index)])}.{kind}"] = value
    renamed["classifier.0.weight"] = torch.full((4, 4), float("nan"))
    x = image(1, 3, 8, 8)
    for path in (stored(tmp_path / "a.pth", renamed), stored(tmp_path / "b.pth", renamed, _use_new_zipfile_serialization=False)):
        for mine, reference in zip(VGGTrunk(weights=path)(x), plain_vgg(small, x, (3, 8, 15))):
            torch.testing.assert_close(mine, reference, rtol=1e-4, atol=1e-5)


def test_range_and_input_norm(small, tmp_path):
    path, x = stored(tmp_path / "v.pth", small), image(1, 3, 8, 8)
    plain, ranged, bare = VGGTrunk(weights=path), VGGTrunk(weights=path, range_norm=True), VGGTrunk(weights=path, input_norm=False)
    torch.testing.assert_close(ranged(2 * x - 1)[2], plain(x)[2])
    by_hand = x * torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1) + torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)
    torch.testing.assert_close(bare(x)[2], plain(by_hand)[2], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layer, side", [("relu1_2", 1), ("relu3_3", 4), ("relu5_1", 16), ("pool5", 32)])
def test_the_deepest_tap_sets_the_smallest_patch(layer, side, no_vgg):
    with pytest.warns(UserWarning, match="untrained"):
        trunk = VGGTrunk(layers=(layer,), missing="random")
    assert trunk.smallest == side and trunk(image(1, 3, side, side))[0].numel() > 0
    if side > 1:
        with pytest.raises(ValueError, match=rf"{layer}.*\b{side}\b.*{side} x {side - 1}"):
            trunk(image(1, 3, side, side - 1))


def test_missing_file_is_an_error_that_names_file_hash_and_way_out(no_vgg):
    with pytest.raises(VGGFileError, match="vgg19-dcbb9e9d.pth.*dcbb9e9d.*SPN_VGG_PATH.*'random'"):
        VGGTrunk("vgg19")
    with pytest.warns(UserWarning, match="VGGTrunk.*vgg16"):
        assert VGGTrunk(missing="random").label == "random"


def test_search_order(small, no_vgg, monkeypatch):
    hub = no_vgg / "home" / "hub" / "checkpoints"
    for folder in (hub, no_vgg / "env", no_vgg / "given"):
        folder.mkdir(parents=True)
        stored(folder / "vgg16-397923af.pth", small)
    assert vgg_file("vgg16").parent == hub
    monkeypatch.setenv("SPN_VGG_PATH", str(no_vgg / "env"))
    assert vgg_file("vgg16").parent.name == "env"
    assert vgg_file("vgg16", no_vgg / "given").parent.name == "given"
    assert vgg_file("vgg16", no_vgg / "given" / "vgg16-397923af.pth").parent.name == "given"
    save_file(small, no_vgg / "env" / "vgg16-features.safetensors")
    assert vgg_file("vgg16").suffix == ".safetensors"
    with pytest.raises(VGGFileError, match="vgg19"):
        vgg_file("vgg19", no_vgg / "given")
    (no_vgg / "bare").mkdir()
    with pytest.raises(VGGFileError, match="bare"):  # an explicit folder is the only place searched
        vgg_file("vgg16", no_vgg / "bare")
    monkeypatch.setenv("SPN_VGG_PATH", str(no_vgg / "nowhere"))
    with pytest.raises(VGGFileError, match="nowhere.*SPN_VGG_PATH"):
        vgg_file("vgg16")


def test_the_digits_in_the_name_are_verified(small, tmp_path):
    path = stored(tmp_path / "v.pth", small)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    right, wrong = path.rename(tmp_path / f"vgg16-{digest[:8]}.pth"), tmp_path / "vgg16-397923af.pth"
    VGGTrunk(weights=right), VGGTrunk(weights=right, verify=digest.upper())
    wrong.write_bytes(right.read_bytes())
    with pytest.raises(VGGFileError, match=f"vgg16-397923af.pth.*{digest[:8]}"):
        VGGTrunk(weights=wrong)
    VGGTrunk(weights=wrong, verify=None)
    with pytest.raises(VGGFileError, match="SHA-256"):
        VGGTrunk(weights=right, verify="0" * 64)


class Evil:
    def __reduce__(self):
        return (pytest.fail, ("pickled code was run",))


def faults():
    base = made_up(last=14)
    nan = base | {"features.5.weight": torch.full_like(base["features.5.weight"], float("nan"))}
    yield "vgg19 convolutions", base | {"features.16.weight": torch.zeros(256, 256, 3, 3)}, "vgg19.*vgg16"
    yield "batch norm variant", {"features.0.weight": base["features.0.weight"], "features.3.weight": base["features.2.weight"]}, "another"
    yield "a convolution missing", {k: v for k, v in base.items() if k != "features.12.bias"}, "conv3_2.bias"
    yield "a wrong shape", base | {"features.5.weight": torch.zeros(128, 32, 3, 3)}, "conv2_1.weight.*128, 32"
    yield "not finite", nan, "conv2_1.weight.*finite"
    yield "another model", {"head.weight": torch.zeros(3)}, "head.weight"
    yield "no state dict", [torch.zeros(3)], "list"


@pytest.mark.parametrize("state, message", [pytest.param(s, m, id=n) for n, s, m in faults()])
def test_wrong_files_are_refused(state, message, tmp_path):
    with pytest.raises(VGGFileError, match=f"wrong.pth.*{message}"):
        VGGTrunk(weights=stored(tmp_path / "wrong.pth", state))


def test_a_vgg16_file_for_vgg19_is_refused(tmp_path):
    with pytest.raises(VGGFileError, match="v.pth.*vgg16.*vgg19"):
        VGGTrunk("vgg19", weights=stored(tmp_path / "v.pth", made_up("vgg16", last=17)))


@pytest.mark.parametrize("form", ["zip", "legacy", "safetensors", "empty", "text"])
def test_damaged_files_are_refused(form, small, tmp_path):
    path = tmp_path / ("v.safetensors" if form == "safetensors" else "v.pth")
    save_file(small, path) if form == "safetensors" else torch.save(small, path, _use_new_zipfile_serialization=form == "zip")
    path.write_bytes({"empty": b"", "text": b"hello world, no weights here"}.get(form, path.read_bytes()[:path.stat().st_size // 2]))
    with pytest.raises(VGGFileError, match=f"{path.name}.*damaged"):
        VGGTrunk(weights=path)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_pickled_code_is_refused_unrun(tmp_path):
    torch.save({"features.0.weight": Evil()}, tmp_path / "a.pth")
    (tmp_path / "b.pth").write_bytes(pickle.dumps(Evil()))
    for name in ("a.pth", "b.pth"):
        with pytest.raises(VGGFileError, match=f"{name}.*refused"):
            VGGTrunk(weights=tmp_path / name)


def test_export_keeps_features_only_and_loads_the_same(tmp_path):
    state = made_up(last=28) | {"classifier.0.weight": torch.zeros(64, 64)}
    source = stored(tmp_path / "v.pth", state)
    assert _main(["export", str(source), str(tmp_path / "vgg16-features.safetensors")]) == 0
    kept = load_file(tmp_path / "vgg16-features.safetensors")
    assert set(kept) == {k for k in state if k.startswith("features")} and all(torch.equal(kept[k], state[k]) for k in kept)
    x = image(1, 3, 16, 16)
    for a, b in zip(VGGTrunk(weights=tmp_path)(x), VGGTrunk(weights=source)(x)):
        assert torch.equal(a, b)
    assert _main(["export", str(source), str(tmp_path / "no.safetensors"), "--arch", "vgg19"]) == 1 and not (tmp_path / "no.safetensors").exists()
    with pytest.raises(VGGFileError, match="absent.pth"):
        write_vgg_features(tmp_path / "absent.pth", tmp_path / "x.safetensors")


@pytest.mark.parametrize("options, message", [({"arch": "vgg11"}, "vgg11"), ({"layers": ("relu9_1",)}, "relu9_1"), ({"layers": ()}, r"layers.*\[\]"),
                                              ({"layers": ("relu1_1", "relu1_1")}, "layers.*relu1_1"), ({"missing": "zeros"}, "zeros")])
def test_bad_vgg_options(options, message):
    with pytest.raises(ValueError, match=message):
        VGGTrunk(**options)


# --- extractors without a file

@pytest.mark.parametrize("form, channels", [("thin", (16, 32, 48)), ("vgg16", (64, 128, 256))])
def test_random_trunk(form, channels):
    before = torch.get_rng_state()
    trunk, x = RandomTrunk(2, form), image(1, 3, 12, 12)
    assert torch.equal(before, torch.get_rng_state())
    assert [m.shape[1:] for m in trunk(x)] == [(c, 12 >> i, 12 >> i) for i, c in enumerate(channels)]
    for layer in trunk.features:
        if isinstance(layer, nn.Conv2d):
            torch.testing.assert_close(layer.weight.flatten(1).norm(dim=1), torch.full((len(layer.weight),), 2 ** .5))
            assert not layer.bias.any()
    assert all(torch.equal(a, b) for a, b in zip(trunk(x), RandomTrunk(2, form)(x))) and not torch.equal(trunk(x)[0], RandomTrunk(3, form)(x)[0])
    first = trunk.features[0]
    torch.testing.assert_close(first((x - .45) / .225).relu(), nn.Sequential(*trunk.features[:2])((x - .45) / .225))


def test_random_trunk_input_is_normalised():
    trunk, x = RandomTrunk(), image(1, 3, 8, 8)
    torch.testing.assert_close(trunk(x)[0], nn.Sequential(*trunk.features[:4])((x - .45) / .225))
    with pytest.raises(ValueError, match="form"):
        RandomTrunk(form="resnet")


def test_gabors_are_balanced_oriented_and_of_the_stated_period():
    bank = gabor_filters().double()
    assert bank.shape == (8, 1, 7, 7) and bank.sum(dim=(-2, -1)).abs().max() < 1e-6
    np.testing.assert_allclose(bank.flatten(1).norm(dim=1), 1, rtol=1e-6)
    np.testing.assert_allclose(bank[1, 0], -bank[1, 0].flip(-1), atol=1e-7)  # odd about the vertical axis
    np.testing.assert_allclose(bank[0, 0], bank[0, 0].flip(-1), atol=1e-7)
    u = np.arange(-3, 4)
    profile = np.exp(-u ** 2 / (2 * 1.5 ** 2)) * np.sin(2 * np.pi * u / 4.5)
    np.testing.assert_allclose(bank[1, 0, 3] / bank[1, 0, 3].norm(), profile / np.linalg.norm(profile), atol=1e-6)
    np.testing.assert_allclose(bank[4, 0], bank[0, 0].T, atol=1e-6)  # 90 degrees is the transpose
    column = np.exp(-u ** 2 / (2 * 2.0 ** 2))
    np.testing.assert_allclose(bank[1, 0, :, 4] / bank[1, 0, 3, 4], column, atol=1e-6)


def test_filter_bank_against_scipy():
    x = image(1, 3, 21, 18).double()
    maps = FilterBank().double()(x)
    weights = np.array([[.299, .587, .114], [.5, -.5, 0], [-.25, -.25, .5]])
    planes = np.tensordot(weights, x[0].numpy(), 1)
    taps = np.array([1, 4, 6, 4, 1]) / 16
    for level, found in enumerate(maps):
        if level:
            planes = np.stack([ndimage.correlate(p, np.outer(taps, taps), mode="mirror")[::2, ::2] for p in planes])
        for colour, index in itertools.product(range(3), range(8)):
            answer = 10 * ndimage.correlate(planes[colour], gabor_filters()[index, 0].double().numpy(), mode="mirror")
            np.testing.assert_allclose(found[0, 16 * colour + index], answer.clip(min=0), atol=1e-5)
            np.testing.assert_allclose(found[0, 16 * colour + 8 + index], (-answer).clip(min=0), atol=1e-5)


@pytest.mark.parametrize("extractor", [FilterBank(), RandomTrunk(), PixelFeatures()], ids=lambda e: e.label)
def test_stand_ins_take_odd_sizes_grey_and_their_smallest(extractor):
    side = extractor.smallest
    assert all(torch.isfinite(m).all() for m in extractor(image(2, 3, side, side + 3)))
    if not isinstance(extractor, PixelFeatures):
        torch.testing.assert_close(extractor(image(1, 1, 20, 20)), extractor(image(1, 1, 20, 20).expand(-1, 3, -1, -1)))
        with pytest.raises(ValueError, match=f"{side} px"):
            extractor(image(1, 3, side, side - 1))
        with pytest.raises(ValueError, match="RGB"):
            extractor(image(1, 4, 20, 20))
    assert not extractor.train(True).training


class Batches:
    def batch(self, step):
        return {"clean": F.interpolate(image(4, 3, 5, 5, seed=step), size=16, mode="bicubic")}


def test_self_trained_learns_repeats_and_survives_its_file(tmp_path):
    before = torch.get_rng_state()
    encoder, again, other = train_encoder(Batches(), 120), train_encoder(Batches(), 120), train_encoder(Batches(), 120, seed=1)
    assert torch.equal(before, torch.get_rng_state())
    assert encoder.digest() == again.digest() != other.digest() and not any(p.requires_grad for p in encoder.parameters())
    assert encoder.digest() != SelfTrained().digest() and encoder.provenance["loss"] < 1
    encoder.save(tmp_path / "e.safetensors")
    loaded = feature_extractor({"name": "self", "path": tmp_path / "e.safetensors"})
    assert loaded.provenance["steps"] == 120 and all(torch.equal(a, b) for a, b in zip(loaded(image(1, 3, 8, 8)), encoder(image(1, 3, 8, 8))))


def test_self_trained_bad_files(tmp_path):
    with pytest.raises(ValueError, match="absent.*encoder PATCHES"):
        SelfTrained(tmp_path / "absent")
    (tmp_path / "half").write_bytes(b"x" * 100)
    with pytest.raises(ValueError, match="half"):
        SelfTrained(tmp_path / "half")
    encoder = SelfTrained()
    encoder.save(tmp_path / "e")
    data = bytearray((tmp_path / "e").read_bytes())
    data[-1] ^= 1
    (tmp_path / "e").write_bytes(data)
    with pytest.raises(ValueError, match="hash"):
        SelfTrained(tmp_path / "e")
    with pytest.raises(ValueError, match="path"):
        feature_extractor("self")
    with pytest.raises(ValueError, match=r"\blr\b"):
        train_encoder(type("B", (), {"batch": lambda self, step: {"clean": torch.full((1, 3, 16, 16), float("nan"))}})(), 2)


def test_encoder_command_reads_training_patches(tmp_path):
    from irnb.data import write_patches
    write_patches({"a": image(3, 64, 64), "b": image(3, 64, 64, seed=1)}, tmp_path / "patches", size=32, stride=32)
    assert _main(["encoder", str(tmp_path / "patches"), str(tmp_path / "e.safetensors"), "--steps", "3", "--crop", "16", "--batch", "2"]) == 0
    assert SelfTrained(tmp_path / "e.safetensors").provenance["steps"] == 3
    assert _main(["encoder", str(tmp_path / "nothing"), str(tmp_path / "f.safetensors")]) == 1


# --- the distance

class Counted(FeatureExtractor):
    "RandomTrunk in float64 that counts its calls."
    names, label = RandomTrunk().names, "counted"

    def __init__(self):
        super().__init__()
        self.trunk, self.calls = RandomTrunk().double(), []

    def forward(self, x):
        self.calls.append((len(x), torch.is_grad_enabled()))
        return self.trunk(x)


def doubles(seed, count=1):
    return [image(2, 3, 12, 12, seed=seed + i).double() for i in range(count)]


@pytest.mark.parametrize("criterion", FEATURE_CRITERIA)
def test_a_tensor_to_itself_has_distance_and_gradient_exactly_zero(criterion):
    x = image(2, 3, 16, 16).requires_grad_()
    for extractor in (RandomTrunk(), FilterBank(), PixelFeatures()):
        value = FeatureDistance(extractor, criterion=criterion)(x, [x.detach().clone()])
        gradient, = torch.autograd.grad(value.sum(), x)
        assert abs(value.item()) < 1e-9 and not gradient.any()


def test_shared_features_equal_the_naive_loop_in_value_and_gradient():
    x, refs, weights = doubles(0)[0].requires_grad_(), doubles(1, 3), (.2, .3, .5)
    counted = Counted()
    shared = FeatureDistance(counted, weights)(x, refs)
    assert counted.calls == [(2, False)] * 3 + [(2, True)]
    naive = torch.stack([sum(w * (a - b).abs().mean() for w, a, b in zip(weights, counted.trunk(x), counted.trunk(r))) for r in refs])
    torch.testing.assert_close(shared, naive, rtol=1e-12, atol=1e-14)
    for upstream in (torch.ones(3) / 3, torch.tensor([1., 0, -2])):
        mine, reference = (torch.autograd.grad(v, x, upstream.double(), retain_graph=True)[0] for v in (shared, naive))
        torch.testing.assert_close(mine, reference, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("extractor", [PixelFeatures(), RandomTrunk(), FilterBank()], ids=lambda e: e.label)
def test_images_are_not_written_over_and_both_calls_agree(extractor):
    x, y, distance = image(1, 3, 16, 16), image(1, 3, 16, 16, seed=1), FeatureDistance(extractor)
    kept = y.clone()
    first = distance(x, [y, x])
    assert torch.equal(y, kept) and torch.equal(distance(x, [y, x]), first) and first[1] == 0


def test_order_and_repetition_of_references():
    x, refs, distance = doubles(0)[0], doubles(1, 3), FeatureDistance(Counted())
    values = distance(x, refs)
    torch.testing.assert_close(distance(x, refs[::-1]), values.flip(0), rtol=0, atol=0)
    assert torch.equal(distance(x, [refs[0]] * 4), values[:1].expand(4))
    assert distance(x, []).shape == (0,)


def test_no_gradient_reaches_references_or_the_extractor():
    x, ref = (t.requires_grad_() for t in doubles(0, 2))
    distance = FeatureDistance(RandomTrunk().double())
    distance(x, [ref]).sum().backward()
    assert ref.grad is None and all(p.grad is None for p in distance.parameters()) and x.grad.abs().sum() > 0


@pytest.mark.parametrize("criterion, by_hand", [("l1", lambda d: d.abs().mean()), ("l2", lambda d: (d * d).mean()), ("fro", lambda d: (d * d).sum().sqrt()),
                                                ("charbonnier", lambda d: ((d * d + 1e-6).sqrt() - 1e-3).mean())])
def test_criteria(criterion, by_hand):
    x, y = doubles(0, 2)
    torch.testing.assert_close(FeatureDistance(PixelFeatures(), (2.0,), criterion)(x, [y])[0], 2 * by_hand(x - y), rtol=1e-9, atol=0)


def test_values_outside_the_image_range_count():
    x, y, distance = image(1, 3, 16, 16) + .7, image(1, 3, 16, 16, seed=1), {e.label: FeatureDistance(e) for e in (RandomTrunk(), FilterBank())}
    for label, d in distance.items():
        assert not torch.allclose(d(x, [y]), d(x.clamp(0, 1), [y])), label


def test_distance_is_reduced_in_float32_under_autocast():
    x, y = image(1, 3, 16, 16), image(1, 3, 16, 16, seed=1)
    exact = FeatureDistance(RandomTrunk())(x, [y])
    with torch.autocast("cpu", torch.bfloat16):
        value = FeatureDistance(RandomTrunk())(x, [y])
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, exact, rtol=2e-2, atol=0)
    assert value.bfloat16().float() != value  # not rounded to bfloat16 on the way


@pytest.mark.parametrize("weights, extractor, message", [((.5, .5), RandomTrunk(), r"3.*weights.*0\.5"), ((-1, 1, 1), RandomTrunk(), "weights.*-1"),
                                                         ((float("nan"),) * 3, RandomTrunk(), "weights"), (None, type("Two", (PixelFeatures,), {"names": ("a", "b")})(), "2.*weights.*None")])
def test_bad_weights(weights, extractor, message):
    with pytest.raises(ValueError, match=message):
        FeatureDistance(extractor, weights)


def test_bad_criterion_shapes_and_names():
    with pytest.raises(ValueError, match="cosine"):
        FeatureDistance(PixelFeatures(), criterion="cosine")
    with pytest.raises(ValueError, match="FeatureDistance.* 8, 8.*16, 16"):
        FeatureDistance(PixelFeatures())(image(1, 3, 16, 16), [image(1, 3, 8, 8)])
    for spec, message in (("vgg", "extractor.*'vgg'"), ({"name": "random", "sed": 1}, "sed"), ({}, "extractor.*None"), (None, "extractor.*None")):
        with pytest.raises(ValueError, match=message):
            feature_extractor(spec)


def test_default_weights_are_those_of_the_papers():
    assert FeatureDistance(RandomTrunk()).weights == (.2, .3, .5) and FeatureDistance(PixelFeatures()).weights == (1.0,)
    five = type("Five", (PixelFeatures,), {"names": tuple("abcde")})()
    assert FeatureDistance(five).weights == (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1.0)
