"""See how the routers of a model take a text, outside training: :func:`capture_routing`, and what is built on it.

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
from chronomoe.hosts.protocol import SteeredModel
from chronomoe.routing.fields import selection_scores
from chronomoe.routing.steering import Steering


@dataclass(frozen=True, kw_only=True)
class CapturedCall:
    """One call of a router."""

    layer: int
    slot: int
    """Which call of the forward it is, in a model that calls a layer several times."""
    counted: Tensor | None
    """bool (T,): tokens that are neither padding nor halted; None when all count."""
    logits: Tensor
    """(T, N)"""
    weights: Tensor
    """(T, K)"""
    chosen: Tensor
    """(T, K)"""


@dataclass(frozen=True, kw_only=True)
class CapturedGate:
    """What the gate of one attached expert decided in one forward."""

    expert_id: str
    forced: bool
    """The expert was opened or closed by hand: its gate decided nothing."""
    open: Tensor | None
    """Indices of the tokens (flat) at which the expert is open; None for none."""
    num_tokens: int
    """Tokens of the forward, padding left out."""


@contextmanager
def capture_routing(
    model: Any,
    callback: Callable[[CapturedCall], None] | None = None,
    gate_callback: Callable[[CapturedGate], None] | None = None,
) -> Iterator[None]:
    """Within the block ``callback`` gets each call of a router, ``gate_callback`` each decision of an expert's gate."""
    handles = []
    if callback is not None:
        counted: dict[int, Tensor | None] = {}

        def before(router: Any, args: Any) -> None:
            counted[router.layer] = None if router.context is None else router.context.counted_T  # it takes it away

        def after(router: Any, args: Any, output: Any) -> None:
            z_TN, w_TK, chosen_TK = output
            callback(
                CapturedCall(
                    layer=router.layer,
                    slot=router.slot,
                    counted=counted[router.layer],
                    logits=z_TN,
                    weights=w_TK,
                    chosen=chosen_TK,
                )
            )

        for layer in moe_layers(model):
            handles += [layer.router.register_forward_pre_hook(before), layer.router.register_forward_hook(after)]
    if gate_callback is not None:

        def decided(base: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
            context = kwargs.get("routing_context")
            for expert in getattr(model, "subbrains", {}).values():
                if context is not None and context.gates is not None and expert.uid in context.gates.open:
                    gate_callback(
                        CapturedGate(
                            expert_id=expert.expert_id,
                            forced=expert.forced is not None,
                            open=context.gates.open[expert.uid],
                            num_tokens=int(context.num_tokens),
                        )
                    )

        handles.append(getattr(model, "model", model).register_forward_hook(decided, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class RoutingCounts:
    """Totals of what is captured: pass :meth:`add` and :meth:`add_gate` to :func:`capture_routing`.

    ``reach_L`` is the range max g - min g of the field that ``protected`` is about.
    """

    def __init__(self, model: Any, reach_L: Tensor | None = None) -> None:
        self.steering: Steering | None = getattr(model, "steering", None)
        self.reach_L = reach_L
        available_LN = torch.zeros(0, 0) if self.steering is None else self.steering.available
        self._assigned_LN = torch.zeros_like(available_LN, dtype=torch.float64)
        self._tokens_L = self._assigned_LN.new_zeros(len(available_LN))
        self._protected_L = self._assigned_LN.new_zeros(len(available_LN))
        attached = [expert.expert_id for expert in getattr(model, "subbrains", {}).values()]
        self.tokens_open = dict.fromkeys(attached, 0)
        """Attached expert -> tokens its gate was open at."""
        self.tokens_seen = dict.fromkeys(attached, 0)
        """Attached expert -> tokens its gate decided about."""

    def add(self, call: CapturedCall) -> None:
        """One call of a router."""
        counts_T = torch.ones(len(call.chosen), dtype=torch.float64, device=self._tokens_L.device)
        if call.counted is not None:
            counts_T = call.counted.to(counts_T)
        self._assigned_LN[call.layer].scatter_add_(
            0, call.chosen.flatten(), counts_T.unsqueeze(-1).expand(call.chosen.shape).flatten()
        )
        self._tokens_L[call.layer] += counts_T.sum()
        if self.reach_L is not None and self.steering is not None:
            safe_T = protected(self.steering, call.layer, call.logits, float(self.reach_L[call.layer]))
            self._protected_L[call.layer] += (safe_T * counts_T).sum()

    def add_gate(self, gate: CapturedGate) -> None:
        """One decision of a gate; an expert that is forced counts nothing."""
        if not gate.forced:
            self.tokens_open[gate.expert_id] += 0 if gate.open is None else len(gate.open)
            self.tokens_seen[gate.expert_id] += gate.num_tokens

    @property
    def share(self) -> Tensor:
        """(L, N) share of each layer's assignments; 0 where nothing was routed."""
        counts_LN = self._assigned_LN.float().cpu()
        return counts_LN / counts_LN.sum(dim=-1, keepdim=True).clamp(min=1)

    @property
    def protected(self) -> Tensor:
        """(L,) share of the tokens whose choice no field of that range can change, their inputs being equal."""
        return (self._protected_L.float() / self._tokens_L.float().clamp(min=1)).cpu()

    @property
    def open_share(self) -> dict[str, float]:
        """Attached expert -> share of the tokens its gate was open at."""
        return {name: count / max(1, self.tokens_seen[name]) for name, count in self.tokens_open.items()}


@contextmanager
def count_routing(model: Any, reach_L: Tensor | None = None) -> Iterator[RoutingCounts]:
    """Within the block everything that is routed adds to the :class:`RoutingCounts` it yields."""
    counts = RoutingCounts(model, reach_L)
    with capture_routing(model, counts.add, counts.add_gate):
        yield counts


@torch.no_grad()
def measure_routing(model: SteeredModel, windows: Tensor, reach_L: Tensor | None = None) -> RoutingCounts:
    """Read ``windows`` (n, S) and count what is routed."""
    with count_routing(model, reach_L) as counts:
        for rows in windows.split(8):
            model(input_ids=rows, use_cache=False)
    return counts


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
    open_at: dict[str, Tensor]
    """Id of an attached expert -> bool (T,): its gate is open."""
    segments: Tensor | None
    """(T,) segments each token ran, in a model that halts."""
    logits: Tensor
    """(T, V)"""


@torch.no_grad()
def capture_choices(model: SteeredModel, row: Tensor, segment: int | None = None) -> Choices:
    """Read one text (1, T); of a layer called several times, the last call that each token took part in counts.

    ``segment`` takes calls of that segment alone, where a model has segments.
    """
    shape = len(model.steering.available), row.shape[1], model.steering.top_k
    chosen_LTK, weights_LTK = torch.full(shape, -1), torch.zeros(shape)
    length = getattr(model.config, "slots_per_segment", None)
    open_at: dict[str, Tensor] = {
        expert.expert_id: torch.zeros(shape[1], dtype=torch.bool) for expert in getattr(model, "subbrains", {}).values()
    }

    def note(call: CapturedCall) -> None:
        if segment is not None and length is not None and call.slot // length != segment:
            return
        at = torch.ones(shape[1], dtype=torch.bool) if call.counted is None else call.counted.cpu()
        chosen_LTK[call.layer, at] = call.chosen.cpu()[at]
        weights_LTK[call.layer, at] = call.weights.float().cpu()[at]

    def note_gate(gate: CapturedGate) -> None:
        if gate.open is not None:
            open_at[gate.expert_id].index_fill_(0, gate.open.cpu(), True)

    with capture_routing(model, note, note_gate):
        output = model(input_ids=row, use_cache=False)
    segments = getattr(output, "segments", None)
    return Choices(
        chosen_LTK, weights_LTK, open_at, None if segments is None else segments[0].cpu(), output.logits[0].cpu()
    )


@torch.no_grad()
def gate_inputs(base: Any, layers: Sequence[int], windows: Tensor) -> dict[int, Tensor]:
    """What a gate in the MoE ``layers`` sees in ``windows`` (n, S): inputs at the first call, fp32 (n, S, D)."""
    found: dict[int, list[Tensor]] = {layer: [] for layer in layers}

    def keep(layer: int) -> Any:
        def hook(block: Any, args: Any) -> None:
            if layer not in seen:
                seen.add(layer)
                found[layer].append(args[0].float())

        return hook

    mine = moe_layers(base)
    handles = [mine[layer].block.register_forward_pre_hook(keep(layer)) for layer in layers]
    try:
        for rows in windows.split(8):
            seen: set[int] = set()
            base(input_ids=rows, use_cache=False)
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
