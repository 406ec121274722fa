"""Look at how the routers of a model take a text, without training.

Shape suffixes: L MoE layers, N experts, T tokens, K chosen experts.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from chronomoe.routing.attach import moe_layers
from chronomoe.routing.fields import selection_scores
from chronomoe.routing.steering import Steering


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
