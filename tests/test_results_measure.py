"""A restorer and a benchmark give rows."""
import math

import numpy as np
import pytest
import torch
from torch import nn

from irnb.results.baselines import untrained
from irnb.results.measure import evaluate, evaluating
from irnb.results.table import TableError, read_table, write_table
from tests.result_rows import item


def test_rows_and_conventions_are_those_of_the_metrics():
    from irnb.metrics import psnr, ssim
    one = item(24)
    rows = evaluate(lambda x: x, [one], strategy="s", task="t", seed=3, y_channel=True, crop_border=2)
    args = (one["degraded"][None], one["clean"][None])
    conventions = dict(y_channel=True, crop_border=2, quantise=True)
    assert [r["value"] for r in rows] == [float(psnr(*args, **conventions)), float(ssim(*args, **conventions))]
    assert rows[0] | {"value": 0} == dict(image="a", task="t", setting="sigma_25", seen=True, strategy="s", seed=3, metric="psnr", value=0)
    loose = evaluate(lambda x: x, [one], strategy="s", task="t", quantise=False, metrics="psnr")
    assert [r["metric"] for r in loose] == ["psnr"] and loose[0]["value"] == float(psnr(*args))
    own = evaluate(lambda x: x, [one], strategy="s", task="t", metrics={"mae": lambda x, y, **k: (x - y).abs().mean()})
    assert own[0]["metric"] == "mae" and math.isclose(own[0]["value"], float((args[0] - args[1]).abs().mean()))


def test_items_may_be_objects_generators_or_batched():
    from irnb.data import Example
    one = item()
    batched = Example("a", "sigma_25", True, one["degraded"][None], one["clean"][None])
    want = evaluate(lambda x: x, [one], strategy="s", task="t")
    assert evaluate(lambda x: x, (i for i in [batched]), strategy="s", task="t", progress=True) == want


class Mixed(nn.Module):
    "A net with a frozen part that is in eval mode while the rest trains."
    def __init__(self):
        super().__init__()
        self.norm, self.frozen, self.seen = nn.BatchNorm2d(3), nn.BatchNorm2d(3).eval(), []

    def forward(self, x):
        self.seen.append((self.norm.training, self.frozen.training, torch.is_inference_mode_enabled()))
        return self.frozen(self.norm(x))


@pytest.mark.parametrize("broken", [False, True])
def test_module_is_left_as_it_was(broken):
    net = Mixed()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    items = [item(), item(image="b", degraded=torch.full((3, 16, 16), math.nan) if broken else torch.rand(3, 16, 16))]
    if broken:
        with pytest.raises(ValueError, match="'b'"):
            evaluate(net, items, strategy="s", task="t")
    else:
        evaluate(net, items, strategy="s", task="t")
    assert set(net.seen) == {(False, False, True)}
    assert (net.training, net.norm.training, net.frozen.training) == (True, True, False)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items()) and not torch.is_inference_mode_enabled()
    net(torch.rand(2, 3, 4, 4)).sum().backward()   # parameters are no inference tensors


def test_device_is_used_and_given_back(monkeypatch):
    moves, net = [], nn.Conv2d(3, 3, 1)
    monkeypatch.setattr(net, "to", lambda device: moves.append(str(device)))
    with evaluating(net, torch.device("meta")):
        assert moves == ["meta"]
    assert moves == ["meta", "cpu"]
    with evaluating(net, torch.device("cpu")):
        pass
    assert moves == ["meta", "cpu"]


def test_tiles_equal_the_whole_picture():
    torch.manual_seed(0)
    net = nn.Conv2d(3, 3, 3, padding=1)
    one = item(96)
    whole = evaluate(net, [one], strategy="s", task="t", quantise=False)
    tiled = evaluate(net, [one], strategy="s", task="t", quantise=False, tile=48, overlap=16)
    assert np.allclose([r["value"] for r in whole], [r["value"] for r in tiled], atol=1e-2)
    up = evaluate(untrained(2)["degraded"], [item(96, scale=2)], strategy="s", task="t", tile=32, overlap=8)
    assert up[0]["value"] > 5


@pytest.mark.parametrize("restorer, message", [
    (lambda x: x / 0, "infinite"), (lambda x: x * math.nan, "768 of 768"), (lambda x: x[..., 1:], r"16, 15\).*16, 16\)"),
    (lambda x: x[0], r"shape \(3, 16, 16\)"), (lambda x: x.numpy(), "ndarray"), (lambda x: None, "NoneType")])
def test_bad_restorers_are_named(restorer, message):
    with pytest.raises(ValueError, match=message) as error:
        evaluate(restorer, [item()], strategy="mine", task="t")
    assert all(name in str(error.value) for name in ("'mine'", "'a'", "'sigma_25'"))


@pytest.mark.parametrize("bad, message", [
    (dict(image="a"), "missing setting, seen, degraded, clean"), (item(clean=None), "missing clean"),
    (item(degraded=torch.zeros(3, 4, 4, dtype=torch.uint8)), "degraded of a, sigma_25.*uint8"),
    (item(clean=np.zeros((3, 4, 4))), "clean of a, sigma_25.*float"), (item(clean=torch.zeros(2, 3, 4, 4)), r"clean.*\(2, 3, 4, 4\)"),
    (item(degraded=torch.zeros(4, 4)), r"degraded.*\(4, 4\)"), (item(degraded=torch.zeros(3, 0, 4)), r"degraded.*\(3, 0, 4\)")])
def test_bad_items(bad, message):
    with pytest.raises(ValueError, match=message):
        evaluate(lambda x: x, [bad], strategy="s", task="t")


def test_bad_options_of_evaluate():
    for options, message in ((dict(metrics=("psnr", "vmaf")), r"metrics.*\['vmaf'\]"), (dict(seed=-1), ": seed .*-1"), (dict(strategy=""), ": strategy .*''"),
                             (dict(task=""), ": task .*''")):
        with pytest.raises(ValueError, match=message):
            evaluate(lambda x: x, [item()], **(dict(strategy="s", task="t") | options))
    with pytest.raises(ValueError, match="no items"):
        evaluate(lambda x: x, [], strategy="s", task="t")
    with pytest.raises(TableError, match="repeats"):
        evaluate(lambda x: x, [item(), item()], strategy="s", task="t")


def test_a_perfect_restoration_is_infinite_in_the_table(tmp_path):
    one = item()
    rows = evaluate(lambda x: x, [one | {"degraded": one["clean"]}], strategy="s", task="t")
    write_table(tmp_path / "t.csv", rows)
    assert read_table(tmp_path / "t.csv")[0]["value"] == math.inf


def test_high_frequency_ratio_is_a_metric_by_name():
    rows = evaluate(nn.Identity(), [item(side=32)], strategy="s", task="t", metrics=("high_frequency_ratio", "psnr"))
    assert [r["metric"] for r in rows] == ["high_frequency_ratio", "psnr"] and rows[0]["value"] > 0
