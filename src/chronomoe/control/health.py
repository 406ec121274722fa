"""Health: is an expert worth what it is sent? Usage does not say; the backward pass does.

dL/dz_k of a token sent to k is w_k <dL/dy, E_k - y>: a contrast within the token, negative when more of k would have
lowered the loss. Its running mean over tokens, against the size of such gradients in the layer, is the trigger. The
judge is a probe: the loss with the expert masked, on a few sequences. A merely noisy expert fails no probe and is left
alone.

Shape suffixes: L MoE layers, N experts.
"""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, distributed, nn


def update_signal(
    contrast_LN: Tensor, size_L: Tensor, gradient_LN: Tensor, absolute_LN: Tensor, count_LN: Tensor, memory: float
) -> None:
    """Move the running means of -dL/dz per assignment of each expert, and of |dL/dz| of the layer, in place.

    An expert, or a layer, without tokens in the window keeps its value.
    """
    count_L = count_LN.sum(dim=-1)
    contrast_LN.lerp_(-gradient_LN / count_LN.clamp(min=1), (1 - memory) * (count_LN > 0))
    size_L.lerp_(absolute_LN.sum(dim=-1) / count_L.clamp(min=1), (1 - memory) * (count_L > 0))


def health(contrast_LN: Tensor, size_L: Tensor, scale: float) -> Tensor:
    """r in [-1, 1]: tanh of the contrast in units of ``scale`` times the layer's gradient size."""
    unit_L1 = (scale * size_L).clamp(min=torch.finfo(size_L.dtype).tiny).unsqueeze(-1)
    return (contrast_LN / unit_L1).tanh()


def health_target(health_LN: Tensor, available_LN: Tensor, floor: float) -> Tensor:
    """Target shares pi that follow health: (floor + h) normalised over available experts, h = sigmoid(4 r)."""
    wish_LN = (floor + (4 * health_LN).sigmoid()) * available_LN
    return wish_LN / wish_LN.sum(dim=-1, keepdim=True)


def equal_target(available_LN: Tensor) -> Tensor:
    """1 / (number of available experts) each; 0 for the others."""
    return available_LN / available_LN.sum(dim=-1, keepdim=True)


@torch.no_grad()
def broken_experts(experts: nn.Module, num_experts: int, usual_D: Tensor) -> list[int]:
    """Experts of one layer whose output is not finite for inputs about ``usual_D``, of unit size beside it."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn((num_experts, 4, len(usual_D)), generator=generator).to(usual_D)
    h_TD = (usual_D + noise).flatten(0, 1).to(next(experts.parameters()).dtype)
    chosen_T1 = torch.arange(num_experts, device=usual_D.device).repeat_interleave(4).unsqueeze(-1)
    # The sum is the stricter judge: a value near the largest number breaks whatever adds to it.
    y_TD = experts(h_TD, chosen_T1, torch.ones_like(chosen_T1, dtype=torch.float32)).float()
    finite_N = y_TD.square().view(num_experts, -1).sum(dim=-1).isfinite()
    return (~finite_N).nonzero().flatten().tolist()


@torch.no_grad()
def probe(
    loss: Callable[[], Tensor], available_LN: Tensor, suspects: list[tuple[int, int]]
) -> Iterator[tuple[int, int, Tensor]]:
    """For each suspect (layer, expert) what changing its availability does to ``loss``, (sequences,); below 0: better.

    ``available_LN`` is put back as it was.
    """
    before = loss()
    for layer, expert in suspects:
        was = available_LN[layer, expert].clone()
        available_LN[layer, expert] = ~was
        try:
            after = loss()
        finally:
            available_LN[layer, expert] = was
        yield layer, expert, after - before


def sums_of(change: Tensor) -> Tensor:
    """Count, sum and sum of squares over the sequences of all ranks, (3,)."""
    sums = torch.stack([torch.ones_like(change).sum(), change.sum(), change.square().sum()])
    if distributed.is_available() and distributed.is_initialized():
        distributed.all_reduce(sums)
    return sums


def mean_and_error(sums: Tensor) -> tuple[float, float]:
    """Mean and its standard error (infinite for a single sequence) from count, sum and sum of squares."""
    count, total, squares = sums.double().tolist()
    mean = total / count
    variance = max(0.0, squares / count - mean**2) * count / max(count - 1, 1)
    return mean, math.sqrt(variance / count) if count > 1 else math.inf
