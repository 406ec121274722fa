"""The routing map: how fields outside the gradient choose the experts of a token.

    u = z + b + g                   semantic logits z, pressure b, goal bias g (unavailable experts: -inf)
    d = max_j u_j - u               deficit from the best, >= 0
    s = -d / T                      T_k = T0 exp(tau_k)
    S = top-K of s (+ Gumbel noise while training)

Dividing the deficit rather than the logit makes the map blind to a constant added to z, keeps the best expert best for
every temperature field, and gives a hotter expert more access, never less. A stays ahead of B for all admissible T
exactly when d_B > rho d_A. Proofs: docs/mechanisms/routing-map.md.

Shape suffixes: T tokens, N experts, K chosen experts. Everything here is fp32 and a pure function.
"""

import math

import torch
from torch import Tensor

RHO = 2.0
"""Ratio of the hottest to the coldest admissible temperature of one layer."""


def temperature(log_temperature_N: Tensor, base_temperature: Tensor, rho: float = RHO) -> Tensor:
    """T_k = T0 exp(tau_k), with tau clipped to +-log(rho)/2 (shape of ``log_temperature_N``)."""
    bound = 0.5 * math.log(rho)
    return base_temperature * log_temperature_N.clamp(-bound, bound).exp()


def selection_scores(z_TN: Tensor, bias_N: Tensor, temperature_N: Tensor | None) -> Tensor:
    """Scores whose top-K are the chosen experts, shape (T, N). ``bias_N`` is b + g; no temperature: all are 1."""
    u_TN = z_TN + bias_N
    # Where T is 1 everywhere s = u: forming max - u would merge near-ties far below the top.
    if temperature_N is None:
        return u_TN
    return (u_TN - u_TN.amax(dim=-1, keepdim=True)) / temperature_N


def gumbel_like(scores_TN: Tensor, scale: Tensor) -> Tensor:
    """Gumbel noise of ``scale``: top-K of scores + noise samples K experts without replacement (Kool et al. 2019)."""
    noise = torch.rand_like(scores_TN).clamp_(min=torch.finfo(scores_TN.dtype).tiny)
    return noise.log_().neg_().log_().mul_(-scale)


def open_probabilities(z_TN: Tensor, available_N: Tensor) -> Tensor:
    """softmax(z) over the available experts, exactly 0 for the others. Shape (T, N).

    Closed experts are left out of the softmax, not masked inside it: an inert expert must change no bit of the others'
    weights, and the order of a vectorised sum depends on its length.
    """
    columns = available_N.nonzero().squeeze(-1)
    return torch.zeros_like(z_TN).index_copy(1, columns, z_TN.index_select(1, columns).softmax(dim=-1))


def within_capacity(
    chosen_TK: Tensor, num_experts: int, capacity: Tensor, counted_T: Tensor, row_length: int
) -> Tensor:
    """Which assignments fit: bool (T, K). An expert has ``capacity`` places (scalar).

    They are given out by place in the sequence: first position, first choices, then second ones, then the next
    position, all sequences in turn. A token therefore never loses a place to a later one of its own sequence, as it
    would if all first choices of the batch were seated first (GShard, Lepikhin et al. 2020).
    """
    top_k = chosen_TK.shape[1]
    in_turn_SKB = chosen_TK.view(-1, row_length, top_k).permute(1, 2, 0)
    by_turn = in_turn_SKB.reshape(-1)
    counted = counted_T.view(-1, row_length).T.unsqueeze(1).expand(in_turn_SKB.shape).reshape(-1, 1)
    queue = torch.nn.functional.one_hot(by_turn, num_experts) * counted
    place = queue.cumsum(dim=0).gather(1, by_turn.unsqueeze(-1)).squeeze(-1)
    return (place <= capacity).view(in_turn_SKB.shape).permute(2, 0, 1).reshape(chosen_TK.shape)
