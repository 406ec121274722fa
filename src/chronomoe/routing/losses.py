"""Router losses, each with a true gradient to the router, and their sum with the language-model loss.

    L = L_lm + lambda_balance L_balance + lambda_coherence L_coherence + lambda_valley L_valley + lambda_z L_z

All are sums over tokens divided by a number of tokens that the caller fixes for the whole optimizer step, so splitting
a batch into micro-batches changes neither value nor gradient. Each function returns one value per layer.

Shape suffixes: L MoE layers, T tokens, N experts, D hidden size.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from chronomoe.errors import ConfigError
from chronomoe.routing.loss_weights import LossWeights

if TYPE_CHECKING:
    from chronomoe.routing.steering import Steering


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


def direction_agreement(h_TD: Tensor, usual_MD: Tensor, along_mean_M: Tensor) -> Tensor:
    """Cosine between each centred input and the direction each expert's inputs usually come from, (T, N).

    ``usual_MD`` (N + 1, D) are the directions v and, last, the mean input m; ``along_mean_M`` their products with m.
    """
    return agreement_of(*nearness(h_TD, usual_MD), along_mean_M)


def nearness(h_TD: Tensor, usual_MD: Tensor) -> tuple[Tensor, Tensor]:
    """All that the agreement needs of the inputs: <h, v> and, last, <h, m>, (T, N + 1), and |h|, (T,).

    Here and below leading dimensions may be added to all arguments.
    """
    h_TD = h_TD.float()
    return h_TD @ usual_MD.mT, torch.linalg.vector_norm(h_TD, dim=-1)


def agreement_of(products_TM: Tensor, length_T: Tensor, along_mean_M: Tensor) -> Tensor:
    """:func:`direction_agreement` from :func:`nearness`.

    <h - m, v> = <h, v> - <m, v> and |h - m|^2 = |h|^2 - 2 <h, m> + |m|^2.
    """
    along_mean_M = along_mean_M.unsqueeze(-2)
    squared_T = length_T.square() - 2 * products_TM[..., -1] + along_mean_M[..., -1]
    return (products_TM - along_mean_M)[..., :-1] * squared_T.clamp(min=1e-12).rsqrt().unsqueeze(-1)


def coherence_loss(agreement_sum_L: Tensor, counted: Tensor | float, num_tokens: Tensor | float) -> Tensor:
    """Mean over tokens of 1 - sum_k p_k cos(h - mean, m_k), in [0, 2], shape (L,); ``counted`` tokens were summed.

    m_k is the running direction whose length is the coherence R_k. Descending it sends a token to the expert that
    usually receives its kind, which is what makes R_k long.
    """
    return (counted - agreement_sum_L) / num_tokens


@dataclass(frozen=True, kw_only=True)
class ChronoMoELoss(LossWeights):
    """Weights of the terms. A model given labels adds them itself; :meth:`compute` is for a loss made outside it."""

    def total(self, lm_loss: Tensor, terms: dict[str, Tensor]) -> Tensor:
        """The weighted sum."""
        extra = sum(self.weights[name] * term for name, term in terms.items())
        return lm_loss + extra.to(lm_loss.dtype) if isinstance(extra, Tensor) else lm_loss

    def compute(self, logits: Tensor, labels: Tensor, steering: "Steering") -> tuple[Tensor, dict[str, Any]]:
        """Loss of the latest training forward of a steered model that was called without labels.

        ``logits`` (batch, sequence, vocabulary), ``labels`` (batch, sequence), not shifted, -100 ignored. Returns the
        loss and its parts, detached. May be called once per forward.
        """
        lm_loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
        context, steering.context = steering.context, None
        terms = {} if context is None else steering.losses(context)
        if self.lambda_coherence > 0 and terms and "coherence" not in terms and bool(steering.direction.any()):
            raise ConfigError("the forward knew of no coherence loss; put these weights into steering.config.loss.")
        total = self.total(lm_loss, terms)
        parts = {"lm": lm_loss, **terms, "total": total}
        return total, {f"{name}_loss": value.detach() for name, value in parts.items()}
