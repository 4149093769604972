"""SPN's step against the operations that it must do, as counted in its specification: time and memory, for one and four negatives."""
from __future__ import annotations

import time

CASES = (("random", 1), ("random", 4), ({"name": "random", "form": "vgg16"}, 1), ({"name": "random", "form": "vgg16"}, 4))


def _saved_bytes(function) -> int:
    "Bytes of the different tensors that a forward pass keeps for its backward pass."
    import torch
    kept = {}

    def pack(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        alive = function()
    del alive
    return sum(kept.values())


def _weights(module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters())


def _memory(spn, plain, batch) -> tuple[int, int]:
    "Bytes of an SPN step and of its parts: the plain step, the extractor's graph on one output, one set of reference features and one set of weights a negative."
    out, extractor, count = spn.net(batch["degraded"]).detach().requires_grad_(), spn.objective.distance.extractor, len(spn.models)
    features = sum(m.numel() * m.element_size() for m in extractor(out))
    parts = _saved_bytes(lambda: plain(batch)) + _saved_bytes(lambda: [m.sum() for m in extractor(out)]) + count * (features + _weights(spn.net))
    return _saved_bytes(lambda: spn(batch)) + _weights(spn.models), parts


def _pair(strategy, plain, batch, sync) -> tuple[float, float]:
    "Seconds of a step and of its counted operations (plain step, N past networks, N + 2 extractors), best of many; on a CPU processor time of one thread, since others may use it."
    import torch
    clock = time.process_time if batch["clean"].device.type == "cpu" else time.perf_counter
    extractor, count = strategy.objective.distance.extractor, len(strategy.models)

    def step(s):
        s.net.zero_grad(set_to_none=True)
        s(batch).backward()
        s.after_step()

    @torch.no_grad()
    def forward(module, x):
        module(x)

    with torch.no_grad():
        out = plain.net(batch["degraded"])
    works = {"spn": lambda: step(strategy), "plain": lambda: step(plain), "net": lambda: forward(plain.net, batch["degraded"]), "extractor": lambda: forward(extractor, out)}
    best = dict.fromkeys(works, float("inf"))
    for i in range(18):  # interleaved
        for name, work in works.items():
            sync()
            start = clock()
            work()
            sync()
            if i > 2:
                best[name] = min(best[name], clock() - start)
    return best["spn"], best["plain"] + count * best["net"] + (count + 2) * best["extractor"]


def ratios() -> list[dict]:
    "Rows: name, ours_s, reference_s, ratio, bound, ok (at most the bound; memory in bytes)."
    import torch
    from irnb.networks import build
    from irnb.strategies import SPN, Supervised
    from irnb.training import pick_device
    device, rows = pick_device("auto"), []
    sync = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    generator = torch.Generator().manual_seed(0)
    batch = {k: torch.rand(4, 3, 64, 64, generator=generator).to(device) for k in ("degraded", "clean")}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = build("NAFNet", preset="tiny").to(device)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for extractor, count in CASES:
        spn = SPN(net, extractor=extractor, lam=1e-4, negatives=[{"interval": 100, "decay": 0.1}] * count, check_every=50).to(device)
        mine, reference = _pair(spn, Supervised(net), batch, sync)
        ratio = mine / reference
        name = f"SPN, N = {count}, {extractor if isinstance(extractor, str) else 'random with VGG16 topology'} (NAFNet tiny, 4x3x64x64)"
        rows.append({"name": f"step / counted operations: {name}", "ours_s": mine, "reference_s": reference, "ratio": ratio, "bound": 1.1, "ok": ratio <= 1.1})
        used, parts = _memory(spn, Supervised(net), batch)
        rows.append({"name": f"memory / counted tensors: {name}", "ours_bytes": used, "reference_bytes": parts, "ratio": used / parts, "bound": 1.1, "ok": used <= 1.1 * parts})
    torch.set_num_threads(threads)
    return rows
