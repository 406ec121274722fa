"""Router losses, each with a true gradient to the router, and their sum with the language-model loss.

    L = L_lm + lambda_balance L_balance + lambda_coherence L_coherence + lambda_valley L_valley + lambda_z L_z

All are sums over tokens divided by a number of tokens that the caller fixes for the whole optimizer step, so splitting
a batch into micro-batches changes neither value nor gradient. Each function returns one value per layer.

Shape suffixes: C calls of routers in one forward, L MoE layers, T tokens, S sampled tokens, N experts, D hidden size.
"""

import math
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from chronomoe.errors import ConfigError
from chronomoe.routing.context import SAMPLED, LossSums, RoutedCall, RoutingContext, sampled, stacked
from chronomoe.routing.loss_weights import LossWeights


def balance_loss(load_LN: Tensor, probability_sum_LN: Tensor, num_tokens: Tensor | float) -> Tensor:
    """N sum_k f_k P_k (Switch Transformer, Fedus et al. 2021, eq. 4), shape (L,).

    ``load_LN`` is each expert's share of the assignments: it sums to 1, that is, it is divided by K, so the loss is 1.0
    when balanced for every K (transformers' own reads K there). ``probability_sum_LN`` is sum_t softmax(z_t).
    """
    return load_LN.shape[-1] * (load_LN.detach() * probability_sum_LN).sum(dim=-1) / num_tokens


def z_loss(squared_logsumexp_L: Tensor, num_tokens: Tensor | float) -> Tensor:
    """Mean over tokens of (logsumexp z)^2: keeps logits small (ST-MoE, Zoph et al. 2022, eq. 5), shape (L,)."""
    return squared_logsumexp_L / num_tokens


def valley_loss(weight_LN: Tensor, probability_sum_LN: Tensor, num_tokens: Tensor | float) -> Tensor:
    """N sum_k w_k P_k: moves probability off experts that are cold and unhealthy (w in [0, 1], else 0), shape (L,)."""
    return weight_LN.shape[-1] * (weight_LN.detach() * probability_sum_LN).sum(dim=-1) / num_tokens


def direction_similarity(h_TD: Tensor, prototypes_MD: Tensor, along_mean_M: Tensor) -> Tensor:
    """Cosine between each centred input and each expert's direction, where its inputs usually come from, (T, N).

    ``prototypes_MD`` (N + 1, D) are the directions v and, last, the mean input m; ``along_mean_M`` their products with
    m. Leading dimensions may be added to all arguments.

    <h - m, v> = <h, v> - <m, v> and |h - m|^2 = |h|^2 - 2 <h, m> + |m|^2.
    """
    h_TD = h_TD.float()
    products_TM, length_T = h_TD @ prototypes_MD.mT, torch.linalg.vector_norm(h_TD, dim=-1)
    along_mean_M = along_mean_M.unsqueeze(-2)
    squared_T = length_T.square() - 2 * products_TM[..., -1] + along_mean_M[..., -1]
    cosine_TM: Tensor = (products_TM - along_mean_M)[..., :-1] * squared_T.clamp(min=1e-12).rsqrt().unsqueeze(-1)
    return cosine_TM


def coherence_loss(similarity_sum_L: Tensor, counted: Tensor | float, num_tokens: Tensor | float) -> Tensor:
    """Mean over tokens of 1 - sum_k p_k cos(h - mean, m_k), in [0, 2], shape (L,); ``counted`` tokens were summed.

    m_k is the running direction whose length is the coherence R_k. Descending it sends a token to the expert that
    usually receives its kind, which is what makes R_k long.
    """
    return (counted - similarity_sum_L) / num_tokens


def loss_sums(
    calls: list[RoutedCall],
    z_CTN: Tensor,
    p_CTN: Tensor,
    counted_CT: Tensor | None,
    assigned: dict[int, Tensor],
    prototypes: tuple[Tensor, Tensor] | None,
    row_length: int,
) -> LossSums:
    """What the losses need of calls that carry a gradient.

    ``z_CTN`` and ``p_CTN`` are their logits and probabilities, ``assigned`` by layer the assignments (N,) of all
    its calls. ``prototypes`` (L, N + 1, D) and their products with the mean input (L, N + 1) are what
    :func:`direction_similarity` compares with; None where coherence does not count.
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

    similarity, compared = None, None
    h_CSD = stacked([call.sampled_inputs for call in calls])
    if prototypes is not None and h_CSD is not None:
        prototypes_CMD, along_mean_CM = (of_layer[layers_C] for of_layer in prototypes)
        similarity_CSN = direction_similarity(h_CSD, prototypes_CMD, along_mean_CM)
        scale = row_length / math.ceil(row_length / SAMPLED)
        if counted_CT is None:
            compared = scale * h_CSD.shape[1] * torch.tensor(times, device=h_CSD.device)
        else:
            counted_CT1 = sampled(counted_CT.unsqueeze(-1), row_length)
            similarity_CSN = similarity_CSN * counted_CT1
            compared = by_layer(scale * counted_CT1.sum(dim=(1, 2)))
        similarity = by_layer(scale * (sampled(p_CTN, row_length) * similarity_CSN).sum(dim=(1, 2)))
    return LossSums(
        layers=layers,
        calls=times,
        assigned=torch.stack([assigned[layer] for layer in layers]),
        probability=by_layer(counted_p_CTN.sum(dim=1)),
        squared_logsumexp=by_layer(squared_CT.sum(dim=-1)),
        similarity=similarity,
        compared=compared,
        measured={call.layer: (call.logits, call.inputs) for call in calls if call.inputs is not None},
    )


class Observing(Protocol):
    """What :meth:`ChronoMoELoss.compute` needs of a model's steering."""

    context: RoutingContext | None
    direction: Tensor

    def losses(self, context: RoutingContext) -> dict[str, Tensor]:
        """The terms of one forward, unweighted."""


@dataclass(frozen=True, kw_only=True)
class ChronoMoELoss(LossWeights):
    """Weights of the terms. A model given labels adds them itself; :meth:`compute` is for a loss made outside it."""

    def total(self, lm_loss: Tensor, terms: dict[str, Tensor]) -> Tensor:
        """The weighted sum."""
        extra = sum(self.weights[name] * term for name, term in terms.items())
        return lm_loss + extra.to(lm_loss.dtype) if isinstance(extra, Tensor) else lm_loss

    def compute(self, logits: Tensor, labels: Tensor, steering: Observing) -> tuple[Tensor, dict[str, Any]]:
        """Loss of the latest training forward of a steered model that was called without labels.

        ``logits`` (batch, sequence, vocabulary), ``labels`` (batch, sequence), not shifted, -100 ignored. Returns the
        loss and its parts, detached. May be called once per forward.
        """
        lm_loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
        context, steering.context = steering.context, None
        terms = {} if context is None else steering.losses(context)
        if self.lambda_coherence > 0 and terms and "coherence" not in terms and bool(steering.direction.any()):
            raise ConfigError("the forward computed no coherence loss; put these weights into steering.config.loss.")
        total = self.total(lm_loss, terms)
        parts = {"lm": lm_loss, **terms, "total": total}
        return total, {f"{name}_loss": value.detach() for name, value in parts.items()}
