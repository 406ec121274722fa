"""Look at how the routers of a model take a text, without training.

Shape suffixes: L MoE layers, N experts, T tokens, K chosen experts.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from chronomoe.hosts.attach import moe_layers
from chronomoe.routing.fields import selection_scores
from chronomoe.routing.steering import Steering


@contextmanager
def listening(model: Any, hear: Callable[[Any, Tensor | None, Any], None]) -> Iterator[None]:
    """Within the block each call of a router is heard: the router, bool (T,) of the tokens that count (None: all), and
    what it returned.
    """
    counted: dict[int, Tensor | None] = {}

    def before(router: Any, args: Any) -> None:
        counted[router.layer] = None if router.context is None else router.context.counted_T  # it takes it away

    blocks = moe_layers(model)
    handles = [block.gate.register_forward_pre_hook(before) for block in blocks]
    handles += [
        block.gate.register_forward_hook(lambda router, args, output: hear(router, counted[router.layer], output))
        for block in blocks
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class Routed:
    """How the routers of a model took a text."""

    share: Tensor
    """(L, N) share of the assignments of each layer."""
    protected: Tensor
    """(L,) share of the tokens whose choice no field of that range can change, their inputs being equal."""


@contextmanager
def counting(model: Any, reach_L: Tensor | None = None) -> Iterator[Callable[[], Routed]]:
    """Within the block all that is routed is counted; ``reach_L`` is the range max g - min g of ``protected``."""
    steering = model.steering
    counts_LN = torch.zeros(steering.available.shape)
    safe_L, tokens_L = torch.zeros(len(counts_LN)), torch.zeros(len(counts_LN))

    def count(router: Any, counted_T: Tensor | None, output: Any) -> None:
        z_TN, _, chosen_TK = output if counted_T is None else (x[counted_T] for x in output)
        layer = router.layer
        counts_LN[layer] += torch.bincount(chosen_TK.flatten().cpu(), minlength=steering.num_experts)
        tokens_L[layer] += len(z_TN)
        if reach_L is not None:
            safe_L[layer] += float(protected(steering, layer, z_TN, float(reach_L[layer])).sum())

    def found() -> Routed:
        shares_LN = counts_LN / counts_LN.sum(dim=-1, keepdim=True).clamp(min=1)
        return Routed(shares_LN, safe_L / tokens_L.clamp(min=1))

    with listening(model, count):
        yield found


@torch.no_grad()
def routed(model: Any, windows: Tensor, reach_L: Tensor | None = None) -> Routed:
    """Read ``windows`` (n, S), counted as by :func:`counting`."""
    with counting(model, reach_L) as found:
        for part in windows.split(8):
            model(input_ids=part, use_cache=False)
    return found()


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


@dataclass(frozen=True)
class Choices:
    """What was decided for each token of one text."""

    chosen: Tensor
    """(L, T, K) experts; -1 where the token had halted."""
    weights: Tensor
    """(L, T, K)"""
    heard: dict[str, Tensor]
    """Id of an attached expert -> bool (T,): its gate is open."""
    segments: Tensor | None
    """(T,) segments each token ran, in a model that halts."""
    logits: Tensor
    """(T, V)"""


@torch.no_grad()
def choices(model: Any, row: Tensor, segment: int | None = None) -> Choices:
    """Read one text (1, T); a layer called several times tells of the last call that each token took part in.

    ``segment`` takes calls of that segment alone, where a model has segments.
    """
    base = getattr(model, "model", model)
    shape = len(model.steering.available), row.shape[1], model.steering.top_k
    chosen_LTK, weights_LTK = torch.full(shape, -1), torch.zeros(shape)
    length = getattr(model.config, "slots_per_segment", None)
    heard: dict[str, Tensor] = {}

    def note(router: Any, counted_T: Tensor | None, output: Any) -> None:
        if segment is not None and length is not None and router.slot // length != segment:
            return
        _, w_TK, chosen_TK = output
        at = torch.ones(shape[1], dtype=torch.bool) if counted_T is None else counted_T.cpu()
        chosen_LTK[router.layer, at] = chosen_TK.cpu()[at]
        weights_LTK[router.layer, at] = w_TK.float().cpu()[at]

    def gates(base: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        for expert in getattr(model, "subbrains", {}).values():
            open_T = torch.zeros(shape[1], dtype=torch.bool)
            index_T = kwargs["routing_context"].hearing.open.get(expert.uid)
            heard[expert.expert_id] = open_T if index_T is None else open_T.index_fill(0, index_T.cpu(), True)

    handle = base.register_forward_hook(gates, with_kwargs=True)
    try:
        with listening(model, note):
            output = model(input_ids=row, use_cache=False)
    finally:
        handle.remove()
    segments = getattr(output, "segments", None)
    return Choices(
        chosen_LTK, weights_LTK, heard, None if segments is None else segments[0].cpu(), output.logits[0].cpu()
    )


@torch.no_grad()
def gate_inputs(base: Any, layers: Sequence[int], windows: Tensor) -> dict[int, Tensor]:
    """What a gate in the MoE ``layers`` sees in ``windows`` (n, S): inputs at the first call, fp32 (n, S, D)."""
    found: dict[int, list[Tensor]] = {layer: [] for layer in layers}

    def keep(layer: int) -> Any:
        def hook(block: Any, args: Any) -> None:
            if layer not in heard:
                heard.add(layer)
                found[layer].append(args[0].float())

        return hook

    blocks = moe_layers(base)
    handles = [blocks[layer].register_forward_pre_hook(keep(layer)) for layer in layers]
    try:
        for part in windows.split(8):
            heard: set[int] = set()
            base(input_ids=part, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return {
        layer: torch.cat([h.view(-1, windows.shape[1], h.shape[-1]) for h in parts]) for layer, parts in found.items()
    }


def kl(own: Tensor, theirs: Tensor) -> Tensor:
    """KL(own || theirs) of logits (..., V), nats."""
    return F.kl_div(theirs.float().log_softmax(-1), own.float().log_softmax(-1), log_target=True, reduction="none").sum(
        -1
    )
