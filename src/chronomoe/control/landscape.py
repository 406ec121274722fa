"""The landscape of structural temperature: valleys (cold), ridges (hot), and whether it is more than noise.

Shape suffixes: L MoE layers, B blocks of time, N experts.
"""

import torch
from torch import Tensor

BLOCK, BLOCKS = 25, 64
"""Ticks in a block of the null, and blocks remembered."""
Z = 1.0
"""Robust z-score beyond which an expert is a valley or a ridge."""
LEAST_CONTRAST = 0.01
"""And it must differ from the median by this much in log temperature."""
_MAD = 1.4826  # median absolute deviation to standard deviation of a normal distribution
_DRAWS = 400


def contrast(tau: Tensor) -> Tensor:
    """Robust z-score of log temperatures over the last dimension; 0 for one that hardly differs from the median."""
    gap = tau - tau.median(dim=-1, keepdim=True).values
    scale = (_MAD * gap.abs().median(dim=-1, keepdim=True).values).clamp(min=1e-9)
    return torch.where(gap.abs() > LEAST_CONTRAST, gap / scale, 0.0)


def valleys_and_ridges(tau_N: Tensor) -> tuple[list[int], list[int]]:
    """Cold and hot experts by the contrast of their log temperature; both empty for a flat field."""
    z_N = contrast(tau_N)
    return (z_N < -Z).nonzero().flatten().tolist(), (z_N > Z).nonzero().flatten().tolist()


def valley_weight(tau_LN: Tensor, health_LN: Tensor, suspect_below: float) -> Tensor:
    """(L, N) how much an expert is an unhealthy valley: cold and bad, in [0, 1]; exactly 0 for all others."""
    cold_LN = -contrast(tau_LN)
    weight_LN = (2 * (cold_LN - Z)).sigmoid() * (4 * (suspect_below - health_LN)).sigmoid()
    unhealthy_LN = (cold_LN > Z) & (health_LN < suspect_below)
    return torch.where(unhealthy_LN, weight_LN, 0.0)


def null_variance(blocks_BN: Tensor, weights_B: Tensor, quantile: float = 0.95) -> float:
    """The variance over experts that remains when each block of time has its experts shuffled.

    ``blocks_BN`` are block means of the fast log temperature, ``weights_B`` their weight in the structural one. Single
    steps are no blocks: their correlation would make any landscape look real. Uses a generator of its own.
    """
    generator = torch.Generator().manual_seed(0)
    blocks_BN, weights_B = blocks_BN.cpu(), weights_B.cpu()
    order = torch.rand((_DRAWS, *blocks_BN.shape), generator=generator).argsort(dim=-1)
    shuffled = blocks_BN.expand(_DRAWS, -1, -1).gather(-1, order)
    averages = (shuffled * weights_B[:, None]).sum(dim=1)
    return averages.var(dim=-1, unbiased=False).quantile(quantile).item()
