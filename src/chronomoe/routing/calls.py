"""What the calls of routers leave to be observed when their forward is over, and its sums for the losses.

Many small operations cost more than few large ones, so all calls of a forward are observed at once. But what needs
their inputs is taken in the call, while these are in the processor's cache: nothing keeps them, unless gradients are
to be compared.

Shape suffixes: C calls of routers in one forward, L MoE layers, T tokens, N experts, K chosen experts, D hidden size.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from chronomoe.routing.losses import agreement_of, nearness

SAMPLED = 8
"""One token in so many of each sequence is enough for the coherence loss and for counting flips."""


@dataclass(eq=False, kw_only=True)
class RoutedCall:
    """What one call of a router leaves to be observed."""

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
    """(N + 1, D) sum of the inputs that each expert was given and, last, of all that count."""
    sampled_inputs: Tensor | None = None
    """(S, D) inputs of the tokens that the coherence loss looks at; None where it does not count."""
    inputs: Tensor | None = None
    """h (T, D), detached; None unless gradients are to be compared."""
    counted: Tensor | None = None
    """bool (T,): tokens that are not padding; None when all count."""
    unasked: Tensor | None = None
    """(T, K) what would have been chosen without goals; None when no goal biased the choice."""
    unasked_kept: Tensor | None = None
    """bool (T, K): what of that would have been within capacity; None where nothing limits it."""


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
    """One tensor of what all calls of a forward have, or none of them has."""
    return None if values[0] is None else torch.stack(values)  # type: ignore[arg-type]


def sampled(x: Tensor, row_length: int) -> Tensor:
    """One token in :data:`SAMPLED` of each sequence of (..., T, .): by place, so splitting a batch changes none."""
    return x.unflatten(-2, (-1, row_length))[..., ::SAMPLED, :].flatten(-3, -2)


def which_count(calls: list[RoutedCall]) -> Tensor | None:
    """bool (C, T): tokens that are not padding; None when all count."""
    if all(call.counted is None for call in calls):
        return None
    everything = torch.ones(len(calls[0].chosen), dtype=torch.bool, device=calls[0].chosen.device)
    return torch.stack([everything if call.counted is None else call.counted for call in calls])


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
    agreement: Tensor | None
    """sum_t sum_k p_tk cos(h_t, usual direction of k), (L,), with its gradient; see coherence_loss."""
    agreed: Tensor | None
    """Tokens in that sum, (L,)."""
    measured: dict[int, tuple[Tensor, Tensor]]
    """Layer -> logits and inputs of its last call, kept when gradients are to be compared."""


def loss_sums(
    calls: list[RoutedCall],
    z_CTN: Tensor,
    p_CTN: Tensor,
    counted_CT: Tensor | None,
    assigned: dict[int, Tensor],
    usual: tuple[Tensor, Tensor] | None,
    row_length: int,
) -> LossSums:
    """Sum up calls that carry a gradient.

    ``z_CTN`` and ``p_CTN`` are their logits and probabilities, ``assigned`` by layer the assignments (N,) of all
    its calls. ``usual`` (L, N + 1, D) and its products with the mean input (L, N + 1) are what
    :func:`chronomoe.routing.losses.direction_agreement` compares with; None where coherence does not count.
    """
    squared_CT = z_CTN.logsumexp(dim=-1).square()
    counted_p_CTN = p_CTN
    if counted_CT is not None:
        squared_CT, counted_p_CTN = squared_CT * counted_CT, p_CTN * counted_CT.unsqueeze(-1)
    layers_C = [call.layer for call in calls]
    layers = sorted(set(layers_C))
    times = [layers_C.count(layer) for layer in layers]

    def by_layer(x_C: Tensor) -> Tensor:
        if layers_C == layers:
            return x_C
        rank_C = torch.tensor([layers.index(layer) for layer in layers_C], device=x_C.device)
        return x_C.new_zeros(len(layers), *x_C.shape[1:]).index_add(0, rank_C, x_C)

    agreement, agreed = None, None
    h_CSD = stacked([call.sampled_inputs for call in calls])
    if usual is not None and h_CSD is not None:
        usual_CMD, along_mean_CM = (of_layer[layers_C] for of_layer in usual)
        agreement_CTN = agreement_of(*nearness(h_CSD, usual_CMD), along_mean_CM)
        scale = row_length / math.ceil(row_length / SAMPLED)
        if counted_CT is None:
            agreed = scale * h_CSD.shape[1] * torch.tensor(times, device=h_CSD.device)
        else:
            counted_CT1 = sampled(counted_CT.unsqueeze(-1), row_length)
            agreement_CTN = agreement_CTN * counted_CT1
            agreed = by_layer(scale * counted_CT1.sum(dim=(1, 2)))
        agreement = by_layer(scale * (sampled(p_CTN, row_length) * agreement_CTN).sum(dim=(1, 2)))
    return LossSums(
        layers=layers,
        calls=times,
        assigned=torch.stack([assigned[layer] for layer in layers]),
        probability=by_layer(counted_p_CTN.sum(dim=1)),
        squared_logsumexp=by_layer(squared_CT.sum(dim=-1)),
        agreement=agreement,
        agreed=agreed,
        measured={call.layer: (call.logits, call.inputs) for call in calls if call.inputs is not None},
    )
