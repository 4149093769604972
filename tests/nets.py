"""Networks in a state that shows mistakes: fresh ones are often nearly the identity."""
import torch
from torch import nn


def awake(net: nn.Module, scale: float = 0.2, seed: int = 0) -> nn.Module:
    "The network with every parameter random, biases too."
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in net.parameters(): p.copy_(scale * torch.randn(p.shape, generator=g, dtype=p.dtype))
    return net
