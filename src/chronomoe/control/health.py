"""Health: is an expert worth what it is sent? Usage does not say; the backward pass does.

dL/dz_k of a token sent to k is w_k <dL/dy, E_k - y>: a contrast within the token, negative when more of k would have
lowered the loss. Its running mean over tokens, against the size of such gradients in the layer, is the trigger of a
probe (:mod:`chronomoe.control.judge`).

Shape suffixes: L MoE layers, N experts.
"""

import torch
from torch import Tensor

MEMORY = 0.98
"""Memory of the gradient signal: about fifty ticks."""


def update_signal(
    contrast_LN: Tensor, size_L: Tensor, gradient_LN: Tensor, absolute_LN: Tensor, count_LN: Tensor
) -> None:
    """Move the running means of -dL/dz per assignment of each expert, and of |dL/dz| of the layer, in place.

    An expert, or a layer, without tokens in the window keeps its value.
    """
    count_L = count_LN.sum(dim=-1)
    contrast_LN.lerp_(-gradient_LN / count_LN.clamp(min=1), (1 - MEMORY) * (count_LN > 0))
    size_L.lerp_(absolute_LN.sum(dim=-1) / count_L.clamp(min=1), (1 - MEMORY) * (count_L > 0))


def health(contrast_LN: Tensor, size_L: Tensor, scale: float) -> Tensor:
    """r in [-1, 1]: tanh of the contrast in units of ``scale`` times the layer's gradient size."""
    unit_L1 = (scale * size_L).clamp(min=torch.finfo(size_L.dtype).tiny).unsqueeze(-1)
    return (contrast_LN / unit_L1).tanh()
