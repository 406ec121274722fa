"""What one forward pass hands down to its routers, and what it gets back: RoutingContext and RoutedCall.

Many small operations cost more than few large ones, so all calls of a forward are observed at once, when it is over.
What needs a call's inputs is computed in the call, while these are in the processor's cache: nothing keeps them, unless
gradients are to be compared.

Shape suffixes: B batch, C calls of routers in one forward, L MoE layers, T tokens, N experts, K chosen experts,
D hidden size.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

SAMPLED = 8
"""One token in so many of each sequence is enough for the coherence loss and for counting flips."""


def without_autocast(tensor: Tensor) -> AbstractContextManager[Any]:
    """Keep the dtypes of a block's arguments; costs nothing where autocast is off."""
    device = tensor.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


@dataclass(eq=False, kw_only=True)
class RoutedCall:
    """What one call of a router hands back, to be observed when its forward is over."""

    layer: int
    depth: int
    """Which of the layer's calls in this forward it was."""
    carries_gradient: bool
    logits: Tensor
    """z (T, N), with its gradient."""
    probabilities: Tensor
    """softmax(z) (T, N), with its gradient."""
    chosen: Tensor
    """(T, K)"""
    weights: Tensor
    """Combine weights (T, K), detached."""
    used: Tensor
    """:func:`used_experts` of this call, (T, N + 1)."""
    input_sums: Tensor
    """(N + 1, D) sum of the inputs each expert received and, last, of all that count."""
    sampled_inputs: Tensor | None = None
    """(S, D) sample of the inputs, for the coherence loss; None where it does not count."""
    inputs: Tensor | None = None
    """h (T, D), detached; None unless gradients are to be compared."""
    counted: Tensor | None = None
    """bool (T,): tokens that are not padding; None when all count."""
    chosen_without_goals: Tensor | None = None
    """(T, K) what would have been chosen without goals; None when no goal biased the choice."""
    kept_without_goals: Tensor | None = None
    """bool (T, K): what of that would have been within capacity; None where nothing limits it."""


@dataclass(frozen=True, kw_only=True)
class LossSums:
    """What the router losses need of one forward, summed over tokens and over calls that carry a gradient.

    A recurrent model has several such calls of one layer. Rows are the L layers that have any.
    """

    layers: list[int]
    calls: list[int]
    """Of each layer."""
    assigned: Tensor
    """Assignments, less what goals moved, (L, N); of calls without a gradient too."""
    probability: Tensor
    """sum_t softmax(z_t), (L, N), with its gradient."""
    squared_logsumexp: Tensor
    """sum_t logsumexp(z_t)^2, (L,), with its gradient."""
    similarity: Tensor | None
    """sum_t sum_k p_tk cos(h_t, direction of k), (L,), with its gradient; see coherence_loss."""
    compared: Tensor | None
    """Tokens in that sum, (L,)."""
    measured: dict[int, tuple[Tensor, Tensor]]
    """Layer -> logits and inputs of its last call, kept when gradients are to be compared."""


@dataclass(eq=False)
class GateState:
    """Which attached experts are open where in one forward, and what their gates remember afterwards."""

    batch: tuple[int, int]
    """Sequences and their length."""
    earlier: dict[str, Tensor] = field(default_factory=dict)
    """uid -> state (B, 2) from the cache."""
    later: dict[str, Tensor] = field(default_factory=dict)
    """uid -> state (B, 2) after this forward."""
    evidence: dict[str, dict[int, Tensor]] = field(default_factory=dict)
    """uid -> layer -> its evidence (B, S), until all layers of the gate have been read."""
    margins: dict[str, Tensor] = field(default_factory=dict)
    """uid -> by how much the gate's log-odds exceed its threshold (B, S), once it has decided; -inf for padding."""
    open: dict[str, Tensor | None] = field(default_factory=dict)
    """uid -> indices of the tokens (flat) at which the expert is used, None when there are none."""


@dataclass(eq=False)
class RoutingContext:
    """What one forward pass hands down to its routers, and what it gets back from them.

    It travels as a keyword argument down to each layer's attention, so a recomputed layer (activation checkpointing)
    sees the context of its own forward, and ``depths`` keeps it from being counted twice.
    """

    num_tokens: Tensor | float
    """Tokens of this forward that are not padding."""
    row_length: int
    """Positions of one sequence."""
    counted_T: Tensor | None = None
    """bool: tokens that count; None when all do."""
    depths: dict[tuple[int, int], int] = field(default_factory=dict)
    """(MoE layer, slot of the call) -> which of the layer's calls it was."""
    calls: list[RoutedCall] = field(default_factory=list)
    """Calls of routers that are yet to be observed."""
    assigned: dict[int, Any] = field(default_factory=dict)
    """By layer: assignments of all calls observed so far, less what goals moved, (N,)."""
    sums: LossSums | None = None
    """What the losses need of the calls; None where no call carried a gradient."""
    num_positions: int = 0
    """Tokens of this forward, padding included."""
    gates: GateState | None = None
    """Which attached experts are open where; see chronomoe.experts.attachment."""

    @classmethod
    def begin(cls, batch: int, length: int, attention_mask: Tensor | None = None) -> "RoutingContext":
        """The context of a forward over (batch, length) tokens; a mask (batch, past + length) has 0 for padding."""
        context = cls(num_tokens=batch * length, row_length=length, num_positions=batch * length)
        if attention_mask is not None and attention_mask.dim() == 2:
            context.counted_T = attention_mask[:, -length:].reshape(-1).bool()
            context.num_tokens = context.counted_T.sum()
        return context

    def restricted(self, to_T: Tensor | None) -> "RoutingContext":
        """The same forward, in which only the tokens ``to_T`` count from here on; None for no change."""
        if to_T is None:
            return self
        return replace(self, counted_T=to_T if self.counted_T is None else to_T & self.counted_T)


def used_experts(chosen: Tensor, num_experts: int, kept: Tensor | None, counted: Tensor | None) -> Tensor:
    """1 where a token used an expert, else 0, fp32 (C, T, N + 1). The last column is 1 for every token that counts.

    One product with it gives sums over pairs, over experts and over tokens. ``chosen`` and ``kept`` (which choices are
    within capacity) are (C, T, K), ``counted`` is (C, T); or all of them without C.
    """
    used = torch.zeros(*chosen.shape[:-1], num_experts + 1, device=chosen.device)
    used[..., -1] = 1
    if kept is None:
        used.scatter_(-1, chosen, 1.0)
    else:
        used.scatter_(-1, chosen, kept.float())
    return used if counted is None else used * counted.unsqueeze(-1)


def stacked(values: list[Tensor | None]) -> Tensor | None:
    """One tensor of a value that either all calls of a forward have, or none."""
    return None if values[0] is None else torch.stack(values)  # type: ignore[arg-type]


def sampled(x: Tensor, row_length: int) -> Tensor:
    """One token in :data:`SAMPLED` of each sequence of (..., T, .): by place, so splitting a batch changes none."""
    found: Tensor = x.unflatten(-2, (-1, row_length))[..., ::SAMPLED, :].flatten(-3, -2)
    return found


def which_count(calls: list[RoutedCall]) -> Tensor | None:
    """bool (C, T): tokens that are not padding; None when all count."""
    if all(call.counted is None for call in calls):
        return None
    everything = torch.ones(len(calls[0].chosen), dtype=torch.bool, device=calls[0].chosen.device)
    return torch.stack([everything if call.counted is None else call.counted for call in calls])
