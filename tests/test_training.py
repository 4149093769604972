"""The loop: killed and resumed bit for bit, two processes as one, nothing trained on NaN."""
import dataclasses
import os
import pickle
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from irnb.strategies.strategy import Supervised, ToyNet, toy_batch
from irnb import training
from irnb.training import (NonFiniteError, TrainConfig, code_of, ema_decay, environment, imported_modules, learning_rate, load_checkpoint,
                           module_closure, pick_device, run_fingerprint, run_lock, save_checkpoint, train)

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
            if sys.argv[2] == str(step): os.kill(os.getpid(), signal.SIGKILL)
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


KILLED_TORCHRUN = textwrap.dedent("""
    import os, signal, sys, torch
    torch.set_num_threads(1)
    from irnb.strategies.strategy import Supervised
    from irnb.training import train, processes
    from tests.test_training import Batches, CONFIG, DropNet
    folder = sys.argv[1]
    with processes("cpu") as (rank, world, device):
        class Slice(Batches):
            def batch(self, step):
                if rank == 1 and sys.argv[2] == str(step): os.kill(os.getpid(), signal.SIGKILL)
                return {k: v.chunk(world)[rank] for k, v in super().batch(step).items()}
        result = train(Supervised(DropNet()), Slice(), CONFIG, device=device, checkpoint=folder + "/checkpoint.pt", progress=False)
    torch.save({"net": result.restorer.state_dict(), "history": result.history, "resumed_at": result.resumed_at}, f"{folder}/rank{rank}.pt")
""")


@pytest.mark.slow
def test_two_processes_killed_and_resumed_draw_the_same_dropout(tmp_path):
    "Every process has its own state of the global generator: a resume gives each its own back."
    root, script = str(Path(__file__).parent.parent), tmp_path / "script.py"
    script.write_text(KILLED_TORCHRUN)
    def go(folder, where):
        folder.mkdir(exist_ok=True)
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script), str(folder), where]
        return subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": root}, cwd=root, timeout=300)
    assert (done := go(tmp_path / "whole", "never")).returncode == 0, done.stderr[-2000:]
    assert go(tmp_path / "killed", "27").returncode != 0 and not list((tmp_path / "killed").glob("rank*"))
    assert (done := go(tmp_path / "killed", "never")).returncode == 0, done.stderr[-2000:]
    for rank in range(2):
        whole, again = (torch.load(tmp_path / folder / f"rank{rank}.pt", weights_only=True) for folder in ("whole", "killed"))
        assert again["resumed_at"] == 24 and (rank or again["history"] == whole["history"])
        assert all(torch.equal(value, again["net"][name]) for name, value in whole["net"].items())
    assert [p.name for p in (tmp_path / "killed").glob("checkpoint*")] == ["checkpoint.pt"]   # and no lock


# ---------------------------------------------------------------- which code

OWN = {"mine.py": "from irnb.strategies import Supervised\nfrom my_losses import loss\nclass Mine(Supervised):\n    def __init__(self, net):\n        super().__init__(net, loss)\n",
       "my_losses.py": "def loss(restored, clean):\n    return (restored - clean).abs().mean()\n",
       "program.py": textwrap.dedent("""
    import os, signal, sys, torch
    torch.set_num_threads(1)
    from irnb.strategies.strategy import ToyNet
    from irnb.training import train
    from mine import Mine
    from tests.test_training import Batches, CONFIG
    class Deadly(Batches):
        def batch(self, step):
            if sys.argv[1] == str(step): os.kill(os.getpid(), signal.SIGKILL)
            return super().batch(step)
    for name, checkpoint in (("resumed", "checkpoint.pt"), ("fresh", None)):
        result = train(Mine(ToyNet()), Deadly(), CONFIG, checkpoint=checkpoint, device="cpu", progress=False)
        torch.save({"net": result.restorer.state_dict(), "history": result.history, "resumed_at": result.resumed_at}, name + ".pt")
""")}
EDITS = {"my_losses.py": (".abs()", ".square()"), "irnb/strategies/strategy.py": ("self.step += 1", "self.step += 1; self.net.layers[0].bias.data.add_(1e-3)"), "nothing": ("", "")}


@pytest.mark.slow
def test_a_run_killed_under_other_sources_starts_anew(tmp_path):
    "Once as it was, once with another helper of the user's strategy, once with another library: never a mixture."
    root, tree = Path(__file__).parent.parent, tmp_path / "tree"
    shutil.copytree(root / "irnb", tree / "irnb", ignore=shutil.ignore_patterns("__pycache__"))
    for name, text in OWN.items():
        (tree / name).write_text(text)
    def go(folder, where):
        path = os.pathsep.join([str(folder), str(root)])
        return subprocess.run([sys.executable, "program.py", where], cwd=folder, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path}, timeout=300)
    assert go(tree, "27").returncode == -signal.SIGKILL and (tree / "checkpoint.pt").exists()
    for number, (name, (old, new)) in enumerate(EDITS.items()):
        shutil.copytree(tree, folder := tmp_path / str(number), ignore=shutil.ignore_patterns("__pycache__"))
        if name != "nothing":
            assert old in (text := (folder / name).read_text())
            (folder / name).write_text(text.replace(old, new))
        assert (done := go(folder, "never")).returncode == 0, done.stderr
        again, fresh = (torch.load(folder / f"{kind}.pt", weights_only=True) for kind in ("resumed", "fresh"))
        assert again["resumed_at"] == (24 if name == "nothing" else 0)
        assert again["history"] == fresh["history"] and all(torch.equal(v, again["net"][k]) for k, v in fresh["net"].items())
        told = [line for line in done.stderr.splitlines() if "other code" in line]
        assert bool(told) == (name != "nothing") and all("checkpoint.pt" in line and name.removesuffix(".py").replace("/", ".") in line for line in told)


class Interrupted(Batches):
    def batch(self, step):
        if step == 22:
            raise RuntimeError("stop")
        return super().batch(step)


def interrupt(path, **options):
    with pytest.raises(RuntimeError, match="stop"):
        run(batches=Interrupted(), checkpoint=path, **options)
    return load_checkpoint(path, run_fingerprint(Supervised(options.get("net") or ToyNet()), CONFIG))


@pytest.mark.parametrize("name, other", [("threads", 64), ("torch", "1.0"), ("device", "cuda"), ("processes", 2), ("irnb.training", "?"), (None, None)])
def test_a_checkpoint_of_another_environment_is_named_and_not_continued(tmp_path, name, other):
    state = interrupt(tmp_path / "c.pt")
    if name:
        assert state["code"][name] != other
        state["code"][name] = other
    else:
        del state["code"]   # as earlier versions wrote it
    save_checkpoint(tmp_path / "c.pt", state)
    with pytest.warns(UserWarning, match=rf"c.pt: .*code.*{name or 'irnb.training'}"):
        again = run(batches=Batches(), checkpoint=tmp_path / "c.pt")
    assert again.resumed_at == 0 and same(again, run())


def typed(text, **values):
    "The names of a program that has no file, as a notebook has none."
    namespace = {"__name__": "cells", "Supervised": Supervised, "ToyNet": ToyNet, "training": training, **values}
    exec(compile(textwrap.dedent(text), "<cell>", "exec"), namespace)
    return namespace


CELL = """
    def helper(x): return FACTOR * x
    class Mine(Supervised):
        scale = 1.0
        def __init__(self, net): super().__init__(net, lambda a, b: helper((a - b).abs()).mean() + SCALE_OF(0))
        def forward(self, batch): return self.scale * super().forward(batch)
    def SCALE_OF(x): return x * 0
"""


@pytest.mark.parametrize("old, new", [("FACTOR * x", "FACTOR + x"), ("scale = 1.0", "scale = 2.0"), (".abs()", ".square()"), ("x * 0", "x * 1"), ("self.scale *", "2 *")])
def test_code_of_a_session_counts(old, new):
    "Without a file: the compiled functions, and what they use; not what else is there."
    digest = lambda text, **values: code_of(typed(text, **values)["Mine"](ToyNet()))["session code"]
    plain = digest(CELL, FACTOR=1.0)
    assert plain == digest("# a comment\n" + textwrap.dedent(CELL) + "other = 3\n", FACTOR=1.0, unused=4)
    assert plain != digest(CELL, FACTOR=2.0)
    assert CELL.count(old) == 1 and plain != digest(CELL.replace(old, new), FACTOR=1.0)
    assert "session code" not in code_of(Supervised(ToyNet()))


def test_code_of_what_the_data_source_holds_counts():
    cell = "class Noise:\n    def __call__(self, x): return x + LEVEL\nclass Source:\n    def __init__(self): self.degrade = Noise()\n"
    digest = lambda text, **values: code_of(Supervised(ToyNet()), "cpu", typed(text, **values)["Source"]())["session code"]
    assert digest(cell, LEVEL=1) == digest(cell, LEVEL=1) != digest(cell, LEVEL=2) != digest(cell.replace("+", "-"), LEVEL=2)


def test_code_is_the_same_in_another_process():
    text = "import tests.test_training as t\nprint(sorted(t.code_of(t.typed(t.CELL, FACTOR=1.0)['Mine'](t.DropNet()), 'cpu', t.Batches()).items()))"
    run_it = lambda seed: subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=True, cwd=Path(__file__).parent.parent, env=os.environ | {"PYTHONHASHSEED": seed}).stdout
    assert run_it("1") == run_it("2") != ""


def test_code_names_the_modules_that_a_run_passes_through():
    from irnb.data import Loader
    from irnb.networks import build
    from irnb.strategies import DIL
    found = code_of(DIL(build("NAFNet", preset="tiny"), confounders="denoise"), "cpu", Loader, None)
    wanted = {"irnb.strategies.dil", "irnb.strategies.strategy", "irnb.networks.nafnet", "irnb.data", "irnb.degradations", "irnb.training"}
    assert wanted <= set(found) and not {"irnb.strategies.spn", "irnb.networks.swinir", "irnb.explorer", "torch.nn"} & set(found)
    assert found["device"] == "cpu" and found["threads"] == torch.get_num_threads() and found["torch"] == torch.__version__


def test_imports_are_followed_into_own_modules_and_not_into_installed_ones(tmp_path, monkeypatch):
    (tmp_path / "mine_a.py").write_text("import torch, numpy, nowhere_at_all\ndef f():\n    from mine_b import x\n")
    (tmp_path / "mine_b.py").write_text("import mine_a\nimport irnb.metrics\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert imported_modules((tmp_path / "mine_a.py").read_text(), "mine_a") == {"mine_b"}
    assert {"mine_a", "mine_b", "irnb.metrics"} <= set(found := module_closure(["mine_a"])) and not {"torch", "numpy"} & set(found)


def test_extra_state_may_take_any_form(tmp_path):
    class Counting(Supervised):
        def get_extra_state(self):
            return torch.tensor([float(self.step)] * (1 + self.step % 2))
        def set_extra_state(self, state):
            self.step = int(state[0])

    fingerprint = run_fingerprint(strategy := Counting(ToyNet()), CONFIG)
    strategy.step = 1
    assert fingerprint == run_fingerprint(strategy, CONFIG)
    train_it = lambda batches, path: train(Counting(ToyNet()), batches, CONFIG, checkpoint=path, device="cpu", progress=False)
    with pytest.raises(RuntimeError, match="stop"):
        train_it(Interrupted(), tmp_path / "c.pt")
    again = train_it(Batches(), tmp_path / "c.pt")
    assert again.resumed_at == 16 and same(again, run())


# ---------------------------------------------------------------- one process to a run

HOLDER = textwrap.dedent("""
    import sys, time, pathlib
    from tests.test_training import Batches, run
    class Slow(Batches):
        def batch(self, step):
            if step == 10:
                pathlib.Path(sys.argv[1], "here").touch()
                time.sleep(600)
            return super().batch(step)
    run(batches=Slow(), checkpoint=sys.argv[1] + "/c.pt")
""")


@pytest.mark.slow
def test_a_second_process_of_a_run_is_refused_until_the_first_is_dead(tmp_path):
    job = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], cwd=Path(__file__).parent.parent)
    try:
        while not (tmp_path / "here").exists():
            assert job.poll() is None
            time.sleep(.02)
        before = (tmp_path / "c.pt").read_bytes()
        with pytest.raises(BlockingIOError, match=rf"c\.pt\.lock: .*{job.pid} "):
            run(checkpoint=tmp_path / "c.pt", on_log=pytest.fail)
        assert (tmp_path / "c.pt").read_bytes() == before and (tmp_path / "c.pt.lock").exists()
        run(checkpoint=tmp_path / "d.pt")   # another run is another matter
    finally:
        job.kill()
        job.wait()
    with pytest.warns(UserWarning, match=r"c\.pt: .*session code"):   # of another data source, in this test
        assert run(checkpoint=tmp_path / "c.pt").resumed_at == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c.pt", "d.pt", "here"]


def test_lock_is_given_back_after_an_error_and_may_be_nested(tmp_path):
    with run_lock(tmp_path / "runs" / "c.pt"), run_lock(tmp_path / "runs" / ".." / "runs" / "c.pt"), run_lock(None):
        assert (tmp_path / "runs" / "c.pt.lock").read_text() == str(os.getpid())
    with pytest.raises(RuntimeError), run_lock(tmp_path / "runs" / "c.pt"):
        raise RuntimeError
    assert not list((tmp_path / "runs").iterdir())


def test_a_lock_file_that_its_holder_has_just_removed_is_no_lock(tmp_path, monkeypatch):
    hold, calls = training._hold, []
    def late(file):
        hold(file)
        calls.append(1)
        if len(calls) == 1:
            (tmp_path / "c.pt.lock").unlink()
    monkeypatch.setattr(training, "_hold", late)
    with run_lock(tmp_path / "c.pt"):
        assert len(calls) == 2 and (tmp_path / "c.pt.lock").exists()


def test_a_file_system_without_locks_refuses_nobody(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "_hold", lambda file: (_ for _ in ()).throw(OSError(37, "No locks available")))
    assert run(checkpoint=tmp_path / "c.pt").steps == CONFIG.steps


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

    with pytest.raises(NonFiniteError, match=r"step 21 .*1021.*checkpoint\.pt") as caught:
        run(batches=Poisoned(), checkpoint=tmp_path / "checkpoint.pt")
    assert caught.value.step == 21 and caught.value.batch_seeds == {"clean": 1021}
    state = load_checkpoint(caught.value.checkpoint, run_fingerprint(Supervised(ToyNet()), CONFIG))
    assert state["step"] == 16 and all(torch.isfinite(v).all() for v in state["average"].values() if isinstance(v, torch.Tensor))


class Lenient(Supervised):
    "Leaves out what is not finite: its loss is good on a bad batch."

    def forward(self, batch):
        return super().forward({k: torch.nan_to_num(v, 0, 0, 0) for k, v in batch.items()})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("step", [0, 21, 41])   # 41: in the last window, which is not full
@pytest.mark.parametrize("name", ["degraded", "clean"])
def test_non_finite_inputs_are_noticed_though_the_loss_is_finite(tmp_path, value, step, name):
    class Poisoned(Batches):
        def batch(self, at):
            batch = super().batch(at)
            if at == step:
                batch[name][-1, 0, 0, 0] = value
            return batch

    with pytest.raises(NonFiniteError, match=rf"^batch\['{name}'\].*step {step} ") as caught:
        train(Lenient(ToyNet()), Poisoned(), dataclasses.replace(CONFIG, steps=42), checkpoint=tmp_path / "c.pt", device="cpu", progress=False)
    assert caught.value.step == step and caught.value.batch_seeds == {"clean": 1000 + step}
    assert (tmp_path / "c.pt").exists() == (step >= 8)


def test_inputs_that_a_strategy_does_not_need_are_not_watched():
    class Other(Batches):
        def batch(self, step):
            return super().batch(step) | {"real": torch.full((8, 3, 4, 4), float("nan")), "index": torch.arange(8), "name": "x"}
    assert same(run(batches=Other()), run())


def test_watching_reads_nothing_from_the_device():
    "A read (`_local_scalar_dense`) would make the processor wait for the device in every step."
    from torch.utils._python_dispatch import TorchDispatchMode

    class Seen(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.names = []
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.names.append(str(function))
            return function(*args, **(kwargs or {}))

    window, batch = training._Window(4, torch.device("cpu")), toy_batch(batch=2)
    with Seen() as seen:
        window.add(torch.ones(()), torch.ones(()), {"task_loss": torch.ones(())}, training._watched(batch, ("degraded", "clean")))
        assert any("sum" in name for name in seen.names) and not any("_local_scalar_dense" in name for name in seen.names)
        window.first_bad()
    assert any("_local_scalar_dense" in name or "is_nonzero" in name for name in seen.names)


def test_half_precision_inputs_do_not_overflow():
    images = torch.full((4, 3, 64, 64), 60000.0, dtype=torch.float16)
    assert [float(v) for v in training._watched({"clean": images}, ("clean", "degraded")).values()] == [0.0]


def test_non_finite_gradient_is_found_too(tmp_path):
    class Steep(ToyNet):
        def forward(self, x):
            return super().forward(x) + torch.sqrt(self.layers[0].weight.sum() * 0)

    with pytest.raises(NonFiniteError, match="gradient norm.*step 0"):
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
        with pytest.raises(ValueError, match=r"c\.pt: .*delete it"):
            run(checkpoint=path)


def test_cut_off_damaged_and_incomplete_checkpoints(tmp_path):
    state, path = interrupt(tmp_path / "c.pt"), tmp_path / "c.pt"
    whole, weights = path.read_bytes(), state["average"]["net.layers.1.weight"].numpy().tobytes()
    at = whole.index(weights) + len(weights) // 2
    flipped = whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1:]
    for content in (whole[:-1], whole[:len(whole) // 2], whole[:10], flipped):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"c\.pt: .*delete it"):
            run(checkpoint=path)
    for damage in ({"rng": None}, {"opt": {}}, {"strategy": {}}, {"rng": []}):
        save_checkpoint(path, state | damage)
        with pytest.raises(ValueError, match=r"c\.pt: .*delete it"):
            run(checkpoint=path)
    assert not (tmp_path / "c.pt.lock").exists()


def test_a_folder_or_a_pipe_is_no_checkpoint(tmp_path):
    (tmp_path / "folder.pt").mkdir()
    os.mkfifo(tmp_path / "pipe.pt")
    for name in ("folder.pt", "pipe.pt"):
        with pytest.raises(ValueError, match=f"{name}: .*not a file"):
            run(checkpoint=tmp_path / name)


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_code_in_a_checkpoint_does_not_run(tmp_path):
    torch.save({"fingerprint": Bomb(str(tmp_path / "boom"))}, tmp_path / "c.pt")
    with pytest.raises(ValueError, match=r"c\.pt: .*readable"):
        run(checkpoint=tmp_path / "c.pt")
    assert not (tmp_path / "boom").exists()


def test_disk_full_keeps_the_old_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "c.pt"
    save_checkpoint(path, {"fingerprint": "x", "step": 1})
    monkeypatch.setattr(os, "fsync", lambda fd: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(ValueError, match="c.pt.*No space left"):
        save_checkpoint(path, {"fingerprint": "x", "step": 2})
    with pytest.raises(ValueError, match="d.pt.*No space left"):
        run(checkpoint=tmp_path / "d.pt")
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
def test_compiled_network_trains_and_is_given_back(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))   # what was compiled for another processor is not ours
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
    with pytest.raises(ValueError, match="Supervised.*trainable"):
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
        with pytest.raises(ValueError, match="'cuda'.*'cpu'"):
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
