"""ConStyle: the step against the same graph with the pixel loss alone, by counted operations; InfoNCE with the released queue; what the encoder costs at test."""
from __future__ import annotations

from tests.bench._timing import best_seconds, flops

BATCH, SIDE, COLUMNS = 8, 128, 65760


def _peak(work, device) -> int:
    "Bytes at the peak of a function: allocated ones on a GPU; on the CPU those of the tensors that live at one time."
    import torch
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - before
    from torch.profiler import ProfilerActivity, profile
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        work()
    level = highest = 0
    for event in sorted((e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        level += event.nbytes()
        highest = max(highest, level)
    return highest


def _step(strategy, batch) -> None:
    for p in strategy.parameters():
        p.grad = None
    strategy(batch).backward()
    strategy.after_step()


def _contrast(strategy, codes, key):
    "The part with the queue: logits of the codes, InfoNCE, backward to the codes, and the write."
    from irnb.strategies.constyle import info_nce, nce_logits
    queue, module = strategy.constyle.queue, strategy.constyle

    def work():
        leaf = codes.detach().requires_grad_()
        info_nce(nce_logits(leaf, key, queue.data, module.temperature, normalize=module.normalize, norms=queue.norms, valid=queue.valid())).backward()
        queue.write(leaf)
    return work


def _network(name: str, spec: dict, device):
    import torch
    from irnb.networks import build
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build(**spec).to(device)


def _case(name: str, spec: dict, device, rounds: int) -> list[dict]:
    import torch
    from irnb.strategies.constyle import IRConStyle
    from irnb.strategies.strategy import Supervised
    g, net, rows = torch.Generator().manual_seed(0), _network(name, spec, device), []
    batch = {k: torch.rand(BATCH, 3, SIDE, SIDE, generator=g).to(device) for k in ("degraded", "clean")}
    plain, where = Supervised(net), f"({name}, {BATCH}x3x{SIDE}x{SIDE})"
    for preset in ("official", "corrected"):
        strategy = IRConStyle(net, preset=preset, queue_size=COLUMNS).to(device)
        codes = [torch.randn(BATCH, strategy.query.code_dim, generator=g).to(device) for _ in range(2)]
        best = best_seconds({"constyle": lambda: _step(strategy, batch), "l1": lambda: _step(plain, batch), "nce": _contrast(strategy, *codes)}, device, rounds)
        counted = flops(lambda: _step(strategy, batch)) / flops(lambda: _step(plain, batch))
        ratio = best["constyle"] / best["l1"] / counted
        rows.append({"name": f"ConStyle {preset} step / L1 step, over the ratio of counted operations {counted:.3f} {where}", "ours_s": best["constyle"], "reference_s": best["l1"] * counted,
                     "ratio": ratio, "bound": 1.1, "ok": ratio <= 1.1})
        share = best["nce"] / best["constyle"]
        rows.append({"name": f"InfoNCE {preset} with {COLUMNS} columns / ConStyle step {where}", "ours_s": best["nce"], "reference_s": best["constyle"], "ratio": share, "bound": 0.05, "ok": share <= 0.05})
    return rows + _inference(net, batch["degraded"][:1], where.replace(f"{BATCH}x3", "1x3"), device, rounds)


def _inference(net, x, where: str, device, rounds: int) -> list[dict]:
    "The whole restorer over its graph alone (codes and maps given), in time against the count, and in peak memory."
    import torch
    net.eval()
    with torch.no_grad():
        cond = net.encode(x)
        whole, graph = lambda: net(x), lambda: net.restore(x, cond)
        best, counted = best_seconds({"whole": whole, "graph": graph}, device, 2 * rounds), flops(whole) / flops(graph)
        memory = _peak(whole, device), _peak(graph, device)
    net.train()
    ratio = best["whole"] / best["graph"] / counted
    return [{"name": f"restorer / its graph without the encoder, over the ratio of counted operations {counted:.3f} {where}", "ours_s": best["whole"], "reference_s": best["graph"] * counted, "ratio": ratio, "bound": 1.1, "ok": ratio <= 1.1},
            {"name": f"peak memory of the restorer / of its graph {where}", "ours_bytes": memory[0], "reference_bytes": memory[1], "ratio": memory[0] / memory[1], "bound": 1.1, "ok": memory[0] <= 1.1 * memory[1]}]


def ratios() -> list[dict]:
    "Rows: name, ours_s, reference_s, ratio, bound, ok (at most the bound; memory in bytes)."
    import torch
    from irnb.training import pick_device
    device = pick_device("auto")
    cuda = device.type == "cuda"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    paper = {"name": "ConStyleNAFNet"} | ({"preset": "paper"} if cuda else {"dim": 16, "left": [1, 1, 1], "bottom": 1, "right": [1, 1, 1]})
    try:
        return _case("ConStyleNAFNet of the paper" if cuda else "ConStyleNAFNet d = 16, 1 block a level, the paper's encoder", paper, device, 12 if cuda else 6)
    finally:
        torch.set_num_threads(threads)
