"""Router losses, each with a true gradient to the router.

Both are sums over tokens divided by a number of tokens that the caller fixes for the whole optimizer step, so splitting
a batch into micro-batches changes neither value nor gradient.

Shape suffixes: L MoE layers, N experts.
"""

from torch import Tensor


def balance_loss(load_LN: Tensor, probability_sum_LN: Tensor, num_tokens: Tensor | float) -> Tensor:
    """N sum_k f_k P_k, averaged over layers (Switch Transformer, Fedus et al. 2021, eq. 4), scalar.

    ``load_LN`` is each expert's share of the assignments: it sums to 1, that is, it is divided by K, so the loss is 1.0
    when balanced for every K (transformers' own reads K there). ``probability_sum_LN`` is sum_t softmax(z_t).
    """
    num_experts = load_LN.shape[-1]
    per_layer = num_experts * (load_LN.detach() * probability_sum_LN).sum(dim=-1) / num_tokens
    return per_layer.mean()


def z_loss(squared_logsumexp_L: Tensor, num_tokens: Tensor | float) -> Tensor:
    """Mean over tokens and layers of (logsumexp z)^2: keeps logits small (ST-MoE, Zoph et al. 2022, eq. 5), scalar."""
    return (squared_logsumexp_L / num_tokens).mean()
