"""The loop: killed and resumed bit for bit, two processes as one, nothing trained on NaN."""
import dataclasses
import os
import pickle
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch import nn

from irnb.strategies.strategy import Supervised, ToyNet, toy_batch
from irnb.training import (NonFiniteError, TrainConfig, ema_decay, environment, learning_rate, load_checkpoint, pick_device, run_fingerprint,
                           save_checkpoint, train)

CONFIG = TrainConfig(steps=40, warmup=4, lr=3e-3, log_every=4, checkpoint_every=8)


class Batches:
    def __init__(self, batch=8):
        self.size = batch

    def batch(self, step):
        return toy_batch(batch=self.size, seed=step)

    def seeds(self, step):
        return {"clean": 1000 + step}


def run(net=None, batches=None, config=CONFIG, **options):
    return train(Supervised(net or ToyNet()), batches or Batches(), config, progress=False, device="cpu", **options)


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.restorer.state_dict().values(), b.restorer.state_dict().values(), strict=True))


PROGRAM = textwrap.dedent("""
    import os, signal, sys, torch
    torch.set_num_threads(1)
    from irnb.strategies.strategy import Supervised
    from irnb.training import train
    from tests.test_training import Batches, CONFIG, DropNet
    import irnb.images
    folder, where = sys.argv[1:3]
    class Deadly(Batches):
        def batch(self, step):
            if where == str(step): os.kill(os.getpid(), signal.SIGKILL)
            return super().batch(step)
    if where == "writing":   # in the middle of the third checkpoint
        count, plain = [0], os.replace
        def replace(*a):
            count[0] += 1
            if count[0] == 3: os.kill(os.getpid(), signal.SIGKILL)
            return plain(*a)
        os.replace = replace
    result = train(Supervised(DropNet()), Deadly(), CONFIG, checkpoint=folder + "/checkpoint.pt", device="cpu", progress=False)
    torch.save({"net": result.restorer.state_dict(), "history": result.history, "resumed_at": result.resumed_at}, folder + "/result.pt")
""")


class DropNet(ToyNet):
    "With dropout and BatchNorm: a network whose resume needs the global generator and buffers."

    def __init__(self):
        super().__init__()
        self.drop, self.norm = nn.Dropout(.2), nn.BatchNorm2d(3)

    def forward(self, x):
        return super().forward(self.norm(self.drop(x)))


def run_program(folder, where):
    code = subprocess.run([sys.executable, "-c", PROGRAM, str(folder), where], capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    return code.returncode, code.stderr


@pytest.mark.slow
def test_sigkill_at_any_step_changes_no_bit(tmp_path):
    (tmp_path / "whole").mkdir()
    assert run_program(tmp_path / "whole", "never")[0] == 0
    whole = torch.load(tmp_path / "whole" / "result.pt", weights_only=True)
    for where, resumed in (("3", 0), ("27", 24), ("writing", 16)):
        folder = tmp_path / where
        folder.mkdir()
        assert run_program(folder, where)[0] == -signal.SIGKILL
        assert not (folder / "result.pt").exists()
        code, error = run_program(folder, "never")
        assert code == 0, error
        again = torch.load(folder / "result.pt", weights_only=True)
        assert again["resumed_at"] == resumed
        assert again["history"] == whole["history"]
        assert all(torch.equal(a, again["net"][k]) for k, a in whole["net"].items())


TORCHRUN = textwrap.dedent("""
    import sys, torch
    torch.set_num_threads(1)
    from irnb.strategies.strategy import Supervised, ToyNet
    from irnb.training import train, processes
    from tests.test_training import Batches, CONFIG
    with processes("cpu") as (rank, world, device):
        class Slice(Batches):
            def batch(self, step):
                return {k: v.chunk(world)[rank] for k, v in super().batch(step).items()}
        result = train(Supervised(ToyNet()), Slice(), CONFIG, device=device, checkpoint=sys.argv[1] + "/checkpoint.pt", progress=False)
    torch.save({"net": result.restorer.state_dict(), "world": world}, f"{sys.argv[1]}/rank{rank}.pt")
""")


@pytest.mark.slow
def test_torchrun_with_two_processes_equals_one(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(TORCHRUN)
    root = str(Path(__file__).parent.parent)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": root}
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script), str(tmp_path)],
                          capture_output=True, text=True, env=environment, cwd=root, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    ranks = [torch.load(tmp_path / f"rank{r}.pt", weights_only=True) for r in range(2)]
    assert ranks[0]["world"] == 2
    alone = run().restorer.state_dict()
    for name, value in alone.items():
        assert torch.equal(ranks[0]["net"][name], ranks[1]["net"][name])
        torch.testing.assert_close(ranks[0]["net"][name], value, rtol=1e-3, atol=1e-4)


def test_same_seed_same_bits_other_seed_other_data_order():
    assert same(run(), run())
    assert not same(run(), run(config=dataclasses.replace(CONFIG, lr=2e-3)))


def test_global_generator_is_given_back():
    net = DropNet()
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    run(net, config=dataclasses.replace(CONFIG, steps=4))
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_loss_names_step_seed_and_checkpoint(tmp_path, value):
    class Poisoned(Batches):
        def batch(self, step):
            batch = super().batch(step)
            if step == 21:
                batch["clean"][0, 0, 0, 0] = value
            return batch

    with pytest.raises(NonFiniteError, match=r"step 21 \(batch seeds .*1021.*checkpoint\.pt") as caught:
        run(batches=Poisoned(), checkpoint=tmp_path / "checkpoint.pt")
    assert caught.value.step == 21 and caught.value.batch_seeds == {"clean": 1021}
    state = load_checkpoint(caught.value.checkpoint, run_fingerprint(Supervised(ToyNet()), CONFIG))
    assert state["step"] == 16 and all(torch.isfinite(v).all() for v in state["average"].values() if isinstance(v, torch.Tensor))


def test_non_finite_gradient_is_found_too(tmp_path):
    class Steep(ToyNet):
        def forward(self, x):
            return super().forward(x) + torch.sqrt(self.layers[0].weight.sum() * 0)

    with pytest.raises(NonFiniteError, match="gradient norm is not finite at step 0"):
        run(Steep(), checkpoint=tmp_path / "checkpoint.pt")
    assert not (tmp_path / "checkpoint.pt").exists()


def test_checkpoint_of_another_run_is_not_continued(tmp_path):
    first = run(checkpoint=tmp_path / "c.pt")
    assert first.resumed_at == 0 and run(checkpoint=tmp_path / "c.pt").resumed_at == 40
    for other in (dict(config=dataclasses.replace(CONFIG, lr=1e-3)), dict(net=ToyNet(width=6)), dict(extra="other data")):
        run(checkpoint=tmp_path / "c.pt")
        assert run(checkpoint=tmp_path / "c.pt", **other).resumed_at == 0


def test_bad_checkpoints(tmp_path):
    path = tmp_path / "c.pt"
    for content in (b"", b"not a checkpoint", pickle.dumps({"fingerprint": "x"})):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="c.pt.*not a readable checkpoint.*delete it"):
            run(checkpoint=path)


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_code_in_a_checkpoint_does_not_run(tmp_path):
    torch.save({"fingerprint": Bomb(str(tmp_path / "boom"))}, tmp_path / "c.pt")
    with pytest.raises(ValueError, match="not a readable checkpoint"):
        run(checkpoint=tmp_path / "c.pt")
    assert not (tmp_path / "boom").exists()


def test_disk_full_keeps_the_old_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "c.pt"
    save_checkpoint(path, {"fingerprint": "x", "step": 1})
    monkeypatch.setattr(os, "fsync", lambda fd: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(ValueError, match="c.pt.*No space left"):
        save_checkpoint(path, {"fingerprint": "x", "step": 2})
    monkeypatch.undo()
    assert load_checkpoint(path, "x")["step"] == 1 and [p.name for p in tmp_path.iterdir()] == ["c.pt"]


def test_ema_zero_is_the_network_itself_with_trained_statistics():
    strategy = Supervised(DropNet())
    result = train(strategy, Batches(), dataclasses.replace(CONFIG, ema=0.), device="cpu", progress=False)
    x = torch.rand(2, 3, 16, 16)
    assert torch.equal(result.restorer(x), strategy.restorer().eval()(x)) and not result.restorer.training
    assert result.restorer.norm.num_batches_tracked == 40


def test_recalibrated_statistics_are_the_means_over_the_batches_after_the_last_step():
    "Against the definition, with the average's own weights; everything else is bit for bit as without."
    config = dataclasses.replace(CONFIG, ema=.9)
    class Norm(ToyNet):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm2d(3)
        def forward(self, x):
            return super().forward(self.norm(x))
    plain, fresh = (run(Norm(), config=dataclasses.replace(config, recalibrate=n)).restorer for n in (0, 5))
    later = [toy_batch(batch=8, seed=CONFIG.steps + i)["degraded"] for i in range(5)]
    torch.testing.assert_close(fresh.norm.running_mean, torch.stack([x.mean((0, 2, 3)) for x in later]).mean(0))
    torch.testing.assert_close(fresh.norm.running_var, torch.stack([x.var((0, 2, 3)) for x in later]).mean(0))
    assert all(torch.equal(v, fresh.state_dict()[k]) for k, v in plain.state_dict().items() if "running" not in k and "num_batches" not in k)
    assert not torch.equal(plain.norm.running_mean, fresh.norm.running_mean) and not any(m.training for m in fresh.modules())


def test_recalibration_leaves_other_networks_and_the_validation_sees_it():
    a, b = (run(config=dataclasses.replace(CONFIG, recalibrate=n)) for n in (0, 3))
    assert same(a, b)
    seen = []
    net = DropNet()
    result = train(Supervised(net), Batches(), dataclasses.replace(CONFIG, recalibrate=3), device="cpu", progress=False, validate=lambda r: {"m": seen.append(r.norm.running_mean.clone()) or 0.})
    assert torch.equal(seen[-1], result.restorer.norm.running_mean)


def test_average_is_smoother_than_the_last_iterate():
    raw, average = (run(config=dataclasses.replace(CONFIG, ema=e)) for e in (0., .9))
    assert not same(raw, average)


@pytest.mark.parametrize("options", [{"recalibrate": 2}, {"precision": "bf16"}, {"channels_last": True}, {"accumulate": 4}, {"clip": None}, {"weight_decay": .1}])
def test_options_train(options):
    result = run(config=dataclasses.replace(CONFIG, **options))
    losses = [p["task_loss"] for p in result.history]
    assert losses[-1] < losses[0]
    assert all(p.dtype == torch.float32 for p in result.restorer.parameters())


def test_accumulation_needs_equal_parts():
    with pytest.raises(ValueError, match="8 images.*accumulate=3"):
        run(config=dataclasses.replace(CONFIG, accumulate=3))


@pytest.mark.slow
def test_compiled_network_trains_and_is_given_back():
    strategy = Supervised(ToyNet())
    try:
        result = train(strategy, Batches(), dataclasses.replace(CONFIG, steps=8, compile=True), device="cpu", progress=False)
    except Exception as error:
        if "ompiler" in str(error):
            pytest.skip("no C++ compiler for torch.compile")
        raise
    assert strategy.net._compiled_call_impl is None
    plain = run(config=dataclasses.replace(CONFIG, steps=8))
    for a, b in zip(result.restorer.parameters(), plain.restorer.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_nothing_to_train_is_an_error():
    with pytest.raises(ValueError, match="no trainable parameter"):
        run(ToyNet().requires_grad_(False))


def test_validation_and_log_calls():
    points, calls = [], []
    result = run(config=dataclasses.replace(CONFIG, validate_every=16), on_log=points.append, validate=lambda net: calls.append(net.training) or {"v": 1.})
    assert [p["step"] for p in points] == list(range(4, 41, 4)) and points == result.history
    assert [p["step"] for p in points if "v" in p] == [16, 32, 40] and calls == [False] * 3


def test_a_resumed_run_logs_the_old_points_first(tmp_path):
    class Stop(Batches):
        def batch(self, step):
            if step == 22:
                raise RuntimeError("stop")
            return super().batch(step)

    with pytest.raises(RuntimeError):
        run(batches=Stop(), checkpoint=tmp_path / "c.pt")
    points = []
    run(checkpoint=tmp_path / "c.pt", on_log=points.append)
    assert [p["step"] for p in points] == list(range(4, 41, 4))


@pytest.mark.parametrize("values", [{"stepss": 3}, {"steps": 0}, {"steps": 1.5}, {"lr": 0}, {"lr": -1}, {"final_lr": 1}, {"ema": 1}, {"clip": 0}, {"precision": "half"},
                                    {"betas": [.9]}, {"betas": [.9, 1]}, {"warmup": -1}, {"accumulate": 0}, {"weight_decay": -1}, {"recalibrate": -1}])
def test_bad_settings(values):
    with pytest.raises(ValueError, match=next(iter(values))):
        TrainConfig.from_dict(values)


def test_schedule_and_decay_formulas():
    config = TrainConfig(steps=11, warmup=0, lr=1., final_lr=0.)
    assert [round(learning_rate(t, config), 6) for t in (0, 5, 10)] == [1., .5, 0.]
    assert learning_rate(0, TrainConfig(steps=1, warmup=0)) == TrainConfig().lr
    assert ema_decay(0, .99) == .1 and ema_decay(10 ** 9, .99) == .99 and ema_decay(3, 0.) == 0.


def test_device_names():
    assert pick_device("cpu").type == "cpu"
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="no CUDA device"):
            pick_device("cuda")
    assert {"torch", "threads", "cpu_capability", "device"} <= environment().keys()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_trains_resumes_and_agrees_with_the_cpu(tmp_path):
    on_gpu = train(Supervised(ToyNet()), type("B", (), {"batch": lambda self, s: {k: v.cuda() for k, v in toy_batch(batch=8, seed=s).items()}})(), CONFIG,
                   device="cuda", progress=False)
    for a, b in zip(on_gpu.restorer.parameters(), run().restorer.parameters()):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-2, atol=1e-3)


def gradients(seed: int, scale: float = 1.0) -> list[nn.Parameter]:
    g = torch.Generator().manual_seed(seed)
    parameters = [nn.Parameter(torch.zeros(shape, dtype=torch.float64)) for shape in ((3, 4), (7,), ())]
    for p in parameters:
        p.grad = scale * torch.randn(p.shape, generator=g, dtype=torch.float64)
    return parameters


@pytest.mark.parametrize("largest", [None, 1e-3, 1e3])
def test_clipping_equals_pytorch(largest):
    from irnb.training import _clip
    ours, theirs = gradients(0), gradients(0)
    norm = _clip([ours], largest)
    torch.testing.assert_close(norm, torch.nn.utils.clip_grad_norm_(theirs, largest or float("inf")))
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a.grad, b.grad)


def test_parts_are_clipped_apart():
    from irnb.training import _clip
    large, small, theirs = gradients(0, 100.0), gradients(1, 1e-3), gradients(0, 100.0)
    norm = _clip([large, small, [nn.Parameter(torch.zeros(1))]], 1.0)
    torch.testing.assert_close(norm, torch.linalg.vector_norm(torch.cat([p.grad.flatten() for p in theirs + gradients(1, 1e-3)])))
    torch.nn.utils.clip_grad_norm_(theirs, 1.0)
    for a, b in zip(large + small, theirs + gradients(1, 1e-3)):   # the small ones are as they were
        torch.testing.assert_close(a.grad, b.grad)


class Second(Supervised):
    "A second network whose gradients are a thousand times those of the first."

    def __init__(self, net, apart=True):
        super().__init__(net)
        self.other, self.free, self.apart = nn.Linear(4, 1), nn.Parameter(torch.ones(2)), apart

    def forward(self, batch):
        return super().forward(batch) + 1e3 * self.other(torch.ones(1, 4)).sum() + self.free.sum()

    def parts(self):
        return [self.net, self.other] if self.apart else [self]


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_step_clips_the_parts_of_the_strategy(wrapped, tmp_path):
    from irnb.training import _apart, train_step
    if wrapped:
        torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        steps = {}
        for apart in (True, False):
            torch.manual_seed(0)
            strategy = Second(ToyNet(), apart)
            opt = torch.optim.SGD([p for p in strategy.parameters() if p.requires_grad], lr=1.0)
            before = [p.detach().clone() for p in strategy.net.parameters()]
            model = nn.parallel.DistributedDataParallel(strategy) if wrapped else strategy
            groups = _apart(model, opt)
            assert [len(g) for g in groups] == ([len(before), 2, 1] if apart else [len(before) + 3])   # what no part holds is one too
            train_step(model, toy_batch(batch=4, seed=0), opt, TrainConfig(steps=1, clip=1e-2))
            steps[apart] = torch.cat([(p - b).detach().flatten() for p, b in zip(strategy.net.parameters(), before)]).norm().item()
            free = (strategy.free - 1).norm().item()
            assert free == pytest.approx(1e-2, rel=1e-4) if apart else free < 1e-4
    finally:
        if wrapped:
            torch.distributed.destroy_process_group()
    assert steps[True] == pytest.approx(1e-2, rel=1e-3) and steps[False] < 1e-4


def test_networks_that_play_against_each_other_are_parts():
    from irnb.strategies.dann import DANN
    from irnb.strategies.noise_da import NoiseDA
    for strategy in (NoiseDA(ToyNet(), denoiser="nano"), DANN(ToyNet())):
        assert len(strategy.parts()) == 2 and strategy.parts()[0] is strategy.net
    for strategy in (NoiseDA(ToyNet(), beta=0.0), DANN(ToyNet(), beta=0.0), Supervised(ToyNet())):
        assert len(strategy.parts()) == 1
