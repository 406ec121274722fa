"""Coherence: does each expert keep receiving the same kind of input?

R_k is the length of the running mean of the unit direction (centred on the mean of all inputs) of what expert k
receives, corrected for chance and for the start of the average; R of a layer is their load-weighted mean. It is the
order parameter of a Kuramoto model over time, per expert: near 0 for random routing, above 0.9 for stable routing. It
measures stability and nothing else: a collapsed router is coherent too.

The Kuramoto helpers at the end work on phases; loads of experts are no phases and cannot synchronise, since shares sum
to one.

Shape suffixes: L MoE layers, N experts, D hidden size.
"""

import math

import torch
from torch import Tensor


def update_direction(direction_LND: Tensor, forgotten_LN: Tensor, centred_LND: Tensor, memory: float) -> None:
    """Move the running mean of unit directions, and memory^(number of updates) of each expert, in place.

    ``centred_LND`` is the window's mean input of each expert less the mean of all, 0 where it had none: such an expert
    keeps what it had.
    """
    length_LN = torch.linalg.vector_norm(centred_LND, dim=-1)
    rate_LN = (1 - memory) * (length_LN > 0)
    unit_LND = centred_LND / length_LN.clamp(min=torch.finfo(length_LN.dtype).tiny).unsqueeze(-1)
    direction_LND.lerp_(unit_LND, rate_LN.unsqueeze(-1))
    forgotten_LN.mul_(1 - rate_LN)


def expert_coherence(direction_LND: Tensor, forgotten_LN: Tensor, memory: float) -> Tensor:
    """R_k in [0, 1], shape (L, N): sqrt((|m|^2 - nu) / (1 - nu)), 0 where chance explains the length.

    With weights (1 - memory) memory^i over n updates, random directions give the mean m / (1 - memory^n) an expected
    squared length of nu = (1 - memory) / (1 + memory) (1 + memory^n) / (1 - memory^n).
    """
    whole_LN = (1 - forgotten_LN).clamp(min=1e-12)
    squared_LN = (torch.linalg.vector_norm(direction_LND, dim=-1) / whole_LN).square()
    chance_LN = (1 - memory) / (1 + memory) * (1 + forgotten_LN) / whole_LN
    above_LN = (squared_LN - chance_LN) / (1 - chance_LN).clamp(min=1e-6)
    return torch.where(chance_LN < 1 - 1e-6, above_LN.clamp(0, 1).sqrt(), 0.0)


def layer_coherence(coherence_LN: Tensor, load_LN: Tensor) -> Tensor:
    """R of each layer (L,): the experts' own, weighted by load."""
    return (coherence_LN * load_LN).sum(dim=-1) / load_LN.sum(dim=-1).clamp(min=1e-12)


def order_parameter(phases: Tensor) -> Tensor:
    """|mean e^{i phase}| over the last dimension: 1 when all agree, 0 when they splay (Kuramoto 1975)."""
    return torch.polar(torch.ones_like(phases), phases).mean(dim=-1).abs()


def order_parameter_null(n: int) -> float:
    """Expected order parameter of ``n`` independent uniform phases, about sqrt(pi / n) / 2."""
    return math.sqrt(math.pi / n) / 2


def phase_locking_value(phases_TN: Tensor) -> Tensor:
    """Mean over pairs of |time average of e^{i (phase_j - phase_k)}|, scalar: constant differences give 1."""
    waves = torch.polar(torch.ones_like(phases_TN), phases_TN)
    pairs = (waves.mH @ waves / len(waves)).abs()
    n = pairs.shape[-1]
    return (pairs.sum() - pairs.diagonal().sum()) / max(1, n * (n - 1))


def phase_locking_null(steps: int) -> float:
    """Expected phase-locking value of independent phases over ``steps`` instants."""
    return math.sqrt(math.pi / (4 * steps))
