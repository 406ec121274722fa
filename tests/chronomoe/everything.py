"""All tensors of a model: its weights, and the run-time state of steering and controller, which no state dict holds."""

import torch
from torch import Tensor, nn


def everything(model: nn.Module) -> dict[str, Tensor]:
    """A copy of every parameter and buffer, by name."""
    return {name: t.detach().clone() for name, t in {**model.state_dict(), **dict(model.named_buffers())}.items()}


def differing(a: dict[str, Tensor], b: dict[str, Tensor]) -> list[str]:
    """Names of tensors that are not the same bits in both."""
    assert a.keys() == b.keys()
    return [name for name in a if not torch.equal(a[name], b[name])]
