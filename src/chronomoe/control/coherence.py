"""Coherence: does each expert keep receiving the same kind of input?

R_k is the length of the running mean of the unit direction (centred on the mean of all inputs) of what expert k
receives, corrected for chance and for the start of the average; R of a layer is their load-weighted mean. It is the
order parameter of a Kuramoto model over time, per expert: near 0 for random routing, above 0.9 for stable routing. It
measures stability and nothing else: a collapsed router is coherent too. Loads of experts are no phases and could not
synchronise, since shares sum to one.

Shape suffixes: L MoE layers, N experts, D hidden size.
"""

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
    weight_LN = (1 - forgotten_LN).clamp(min=1e-12)
    squared_LN = (torch.linalg.vector_norm(direction_LND, dim=-1) / weight_LN).square()
    chance_LN = (1 - memory) / (1 + memory) * (1 + forgotten_LN) / weight_LN
    above_LN = (squared_LN - chance_LN) / (1 - chance_LN).clamp(min=1e-6)
    return torch.where(chance_LN < 1 - 1e-6, above_LN.clamp(0, 1).sqrt(), 0.0)


def layer_coherence(coherence_LN: Tensor, load_LN: Tensor) -> Tensor:
    """R of each layer (L,): the experts' own, weighted by load."""
    return (coherence_LN * load_LN).sum(dim=-1) / load_LN.sum(dim=-1).clamp(min=1e-12)
