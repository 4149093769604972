"""Networks in a state that shows mistakes: fresh ones are often nearly the identity."""
import torch
from torch import nn


def awake(net: nn.Module, scale: float = 0.2, seed: int = 0) -> nn.Module:
    "The network with every parameter random, biases too."
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in net.parameters(): p.copy_(scale * torch.randn(p.shape, generator=g, dtype=p.dtype))
    return net


class Batches:
    "A loader of toy batches that fails at one step: `batch(stop)` raises RuntimeError."

    def __init__(self, *sizes, stop=None):  # as for `toy_batch`
        self.sizes, self.stop = sizes, stop

    def batch(self, step):
        from irnb.strategies.strategy import toy_batch
        if step == self.stop:
            raise RuntimeError("power cut")
        return toy_batch(*self.sizes, seed=step)
