"""The network of an expert in one layer: what attachment needs of it (ExpertNetwork), and the one there is today."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN


class ExpertNetwork(Protocol):
    """What an expert has for each of its layers."""

    mixing: nn.Parameter
    """Logit of the share of the layer's output that is this expert's."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""

    def __call__(self, h_TD: Tensor) -> Tensor:
        """(T, D) to (T, D)."""


class LayerExpert(nn.Module):
    """A gated feed-forward network of one layer, y = w2(act(w1 x) * w3 x), and its mixing weight."""

    def __init__(self, hidden_size: int, width: int, act: str) -> None:
        super().__init__()
        self.w1 = nn.Linear(hidden_size, width, bias=False)
        self.w3 = nn.Linear(hidden_size, width, bias=False)
        self.w2 = nn.Linear(width, hidden_size, bias=False)
        self.act_fn = ACT2FN[act]
        self.mixing = nn.Parameter(torch.zeros(()))
        """Logit of the share of the layer's output that is this expert's, apart from anything that opens the gate."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return self.w1.weight.dtype

    def forward(self, h_TD: Tensor) -> Tensor:
        """(T, D) to (T, D)."""
        out: Tensor = self.w2(self.act_fn(self.w1(h_TD)) * self.w3(h_TD))
        return out


@torch.no_grad()
def redraw_units(matrices: Sequence[Tensor], count: int, generator: torch.Generator) -> None:
    """Redraw ``count`` hidden units of a feed-forward network in place, the same rows in all of ``matrices``.

    Each has a row a unit; new values come from a normal distribution with the mean and deviation of its old ones.
    """
    chosen = torch.randperm(len(matrices[0]), generator=generator)[:count]
    for matrix in matrices if count else ():
        mean, deviation = float(matrix.float().mean()), float(matrix.float().std(correction=0))
        fresh = torch.normal(mean, deviation, (count, matrix.shape[1]), generator=generator)
        matrix[chosen] = fresh.to(matrix)
