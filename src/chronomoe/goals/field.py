"""The goal field g: a bias on which of a layer's own experts are chosen, never on their weights.

    g = beta s,   s centred over the available experts of each layer, |s| <= 1

beta is not a number anybody can guess, so it is found: by bisection, for a budget of KL(off || on) of the model's
output per token on calibration text. |g| <= beta <= cap whatever the budget.

Shape suffixes: L MoE layers, N experts, T tokens, K chosen experts, D hidden size.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from chronomoe.experts.training import kl
from chronomoe.routing.attach import moe_layers
from chronomoe.routing.fields import selection_scores
from chronomoe.routing.steering import Steering

CAP = 1.0
"""Largest |g|, in logits: the router's own distribution then moves by half a nat at most (Lemma 3: range^2 / 8)."""
_CLOSE = 0.02
_HALVINGS = 24


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


@torch.no_grad()
def output_kl(model: Any, windows: Tensor, g_LN: Tensor) -> float:
    """Mean KL(off || on) over the tokens of ``windows`` (n, S), nats; the model must be in evaluation mode."""
    total = 0.0
    for part in windows.split(8):
        with biased(model.steering, torch.zeros_like(g_LN)):
            off = model(input_ids=part, use_cache=False).logits
        with biased(model.steering, g_LN):
            total += float(kl(off, model(input_ids=part, use_cache=False).logits).sum())
    return total / windows.numel()


def find_beta(divergence: Callable[[float], float], budget: float, cap: float = CAP) -> tuple[float, float]:
    """beta in [0, cap] at which ``divergence(beta)``, which grows, meets the budget; and what it is there.

    Where even the cap stays below the budget, it is the cap.
    """
    low, high, found = 0.0, cap, divergence(cap)
    if found <= budget:
        return cap, found
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        found = divergence(middle)
        if abs(found / budget - 1) <= _CLOSE:
            return middle, found
        low, high = (middle, high) if found < budget else (low, middle)
    # Choices change one at a time: the budget may lie within one change, and then less is right.
    return low, divergence(low)


@dataclass(frozen=True)
class Routed:
    """How the routers of a model took a text."""

    share: Tensor
    """(L, N) share of the assignments of each layer."""
    protected: Tensor
    """(L,) share of the tokens whose choice no field of that range can change, their inputs being equal."""


@torch.no_grad()
def routed(model: Any, windows: Tensor, reach_L: Tensor | None = None) -> Routed:
    """Route ``windows`` (n, S) and count; ``reach_L`` is the range max g - min g that ``protected`` is about."""
    steering, blocks = model.steering, moe_layers(model)
    counts_LN = torch.zeros(len(blocks), steering.num_experts)
    safe_L, tokens_L = torch.zeros(len(blocks)), torch.zeros(len(blocks))

    def count(number: int) -> Any:
        def hook(router: Any, args: Any, output: Any) -> None:
            z_TN, _, chosen_TK = output
            counts_LN[number] += torch.bincount(chosen_TK.flatten().cpu(), minlength=steering.num_experts)
            tokens_L[number] += len(z_TN)
            if reach_L is not None:
                safe_L[number] += float(protected(steering, number, z_TN, float(reach_L[number])).sum())

        return hook

    handles = [block.gate.register_forward_hook(count(number)) for number, block in enumerate(blocks)]
    try:
        for part in windows.split(8):
            model(input_ids=part, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return Routed(counts_LN / counts_LN.sum(dim=-1, keepdim=True).clamp(min=1), safe_L / tokens_L.clamp(min=1))


def protected(steering: Steering, layer: int, z_TN: Tensor, reach: float) -> Tensor:
    """bool (T,): tokens whose set of experts stays, whatever field of range ``reach`` is added to z + b.

    A field changes the difference of two experts by ``reach`` at most. Without temperatures the gap between the last
    chosen and the first other expert decides; with them each deficit must bear the change by itself.
    """
    u_TN = (z_TN + steering.pressure[layer]).masked_fill(~steering.available[layer], -math.inf)
    top_k = steering.top_k
    if top_k >= int(steering.available[layer].sum()):
        return torch.ones(len(u_TN), dtype=torch.bool, device=u_TN.device)
    temperature_N = steering.temperature_of(layer)
    if temperature_N is None:
        ordered = u_TN.topk(top_k + 1, dim=-1).values
        return ordered[:, top_k - 1] - ordered[:, top_k] > reach
    scores_TN = selection_scores(u_TN, torch.zeros_like(steering.pressure[layer]), temperature_N)
    chosen_TK = scores_TN.topk(top_k, dim=-1).indices
    change_N = reach / temperature_N
    worst_chosen = (scores_TN - change_N).gather(-1, chosen_TK).amin(dim=-1)
    best_other = (scores_TN + change_N).scatter(-1, chosen_TK, -math.inf).amax(dim=-1)
    return worst_chosen > best_other
