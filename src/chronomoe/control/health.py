"""Health: is an expert worth what it is sent? Usage does not say; the backward pass does.

dL/dz_k of a token sent to k is w_k <dL/dy, E_k - y>: a contrast within the token, negative when more of k would have
lowered the loss. Its running mean over tokens, against the size of such gradients in the layer, is the trigger of a
probe (:mod:`chronomoe.control.judge`).

Shape suffixes: L MoE layers, N experts.
"""

import torch
from torch import Tensor


def update_signal(
    contrast_LN: Tensor, size_L: Tensor, gradient_LN: Tensor, absolute_LN: Tensor, count_LN: Tensor, memory: float
) -> None:
    """Move the running means of -dL/dz per assignment of each expert, and of |dL/dz| of the layer, in place.

    An expert, or a layer, without tokens in the window keeps its value.
    """
    count_L = count_LN.sum(dim=-1)
    contrast_LN.lerp_(-gradient_LN / count_LN.clamp(min=1), (1 - memory) * (count_LN > 0))
    size_L.lerp_(absolute_LN.sum(dim=-1) / count_L.clamp(min=1), (1 - memory) * (count_L > 0))


def health(contrast_LN: Tensor, size_L: Tensor, scale: float) -> Tensor:
    """r in [-1, 1]: tanh of the contrast in units of ``scale`` times the layer's gradient size."""
    unit_L1 = (scale * size_L).clamp(min=torch.finfo(size_L.dtype).tiny).unsqueeze(-1)
    return (contrast_LN / unit_L1).tanh()


def health_target(health_LN: Tensor, available_LN: Tensor, floor: float) -> Tensor:
    """Target shares pi that follow health: (floor + h) normalised over available experts, h = sigmoid(4 r)."""
    wish_LN = (floor + (4 * health_LN).sigmoid()) * available_LN
    return wish_LN / wish_LN.sum(dim=-1, keepdim=True)


def equal_target(available_LN: Tensor) -> Tensor:
    """1 / (number of available experts) each; 0 for the others."""
    return available_LN / available_LN.sum(dim=-1, keepdim=True)
