"""The goal field g: a bias on which of a layer's own experts are chosen, never on their weights.

    g = beta s,   s centred over the available experts of each layer, |s| <= 1

beta is hard to guess, so it is found: by bisection, for a budget of KL(off || on) of the model's output per token on
calibration text. |g| <= beta <= cap whatever the budget.

Shape suffixes: L MoE layers, N experts.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from chronomoe.goals.settings import CAP
from chronomoe.hosts.capture import kl
from chronomoe.hosts.protocol import SteeredModel
from chronomoe.routing.steering import Steering

_TOLERANCE = 0.02
"""Share of the budget by which the divergence may miss it."""
_MAX_STEPS = 24
_MAX_KEPT_LOGITS = 1 << 26
"""So many logits without goals are kept; more are computed again each time."""


def centred(affinity_LN: Tensor, available_LN: Tensor, layers: Sequence[int] | None = None) -> Tensor:
    """s from affinities: rows sum to 0 over the available experts, the largest |s| of all is 1, closed experts have 0.

    ``layers`` leaves the others out. All 0 where nothing is preferred.
    """
    count_L1 = available_LN.sum(dim=-1, keepdim=True).clamp(min=1)
    kept_LN = affinity_LN * available_LN
    s_LN = torch.where(available_LN, kept_LN - kept_LN.sum(dim=-1, keepdim=True) / count_L1, 0.0)
    if layers is not None:
        chosen_L = torch.zeros(len(s_LN), dtype=torch.bool, device=s_LN.device)
        chosen_L[list(layers)] = True
        s_LN = s_LN * chosen_L.unsqueeze(-1)
    largest = s_LN.abs().max()
    return s_LN / largest if largest > 1e-6 else torch.zeros_like(s_LN)


@contextmanager
def biased(steering: Steering, g_LN: Tensor) -> Iterator[None]:
    """Within the block the routers have the goal field ``g_LN``."""
    before = steering.goal_bias.clone()
    steering.goal_bias.copy_(g_LN)
    try:
        yield
    finally:
        steering.goal_bias.copy_(before)


def output_kl(model: SteeredModel, windows: Tensor) -> Callable[[Tensor], float]:
    """Of a field g (L, N): mean KL(off || on) over the tokens of ``windows`` (n, S), nats.

    The model must be in evaluation mode, and stay as it is between the calls.
    """
    batches = windows.split(8)

    @torch.no_grad()
    def logits(rows: Tensor, g_LN: Tensor) -> Tensor:
        with biased(model.steering, g_LN):
            found: Tensor = model(input_ids=rows, use_cache=False).logits
            return found

    zero_LN = torch.zeros_like(model.steering.goal_bias)
    small = windows.numel() * model.config.vocab_size <= _MAX_KEPT_LOGITS
    kept = [logits(rows, zero_LN) for rows in batches] if small else []

    def divergence(g_LN: Tensor) -> float:
        offs = kept or (logits(rows, zero_LN) for rows in batches)
        found = [float(kl(off, logits(rows, g_LN)).sum()) for rows, off in zip(batches, offs, strict=True)]
        return sum(found) / windows.numel()

    return divergence


def find_beta(divergence: Callable[[float], float], budget: float, cap: float = CAP) -> tuple[float, float]:
    """beta in [0, cap] at which ``divergence(beta)``, which grows, meets the budget; and what it is there.

    Where even the cap stays below the budget, it is the cap. Every other step is one of bisection, the rest take the
    divergence for a square, which a small one is.
    """
    low, high, at_low, at_high = 0.0, cap, 0.0, divergence(cap)
    if at_high <= budget:
        return cap, at_high
    for number in range(_MAX_STEPS):
        share = 0.5 if number % 2 else (budget**0.5 - at_low**0.5) / (at_high**0.5 - at_low**0.5)
        middle = low + (high - low) * share
        found = max(0.0, divergence(middle))  # rounding may make nothing less than nothing
        if abs(found / budget - 1) <= _TOLERANCE:
            return middle, found
        low, high, at_low, at_high = (middle, high, found, at_high) if found < budget else (low, middle, at_low, found)
    # Choices change one at a time: the budget may lie within one change, and then less is right.
    return low, at_low
