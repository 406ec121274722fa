"""Temperature: how far beyond the outright best an expert is offered tokens, fast and as a slow memory.

Temperatures live on a log scale with mean 0 over the experts of a layer, so that they say who is hotter than whom and
never soften the layer as a whole. The structural temperature is an average of the fast one; the effective one is a
convex mixture of both, so its fixed point is the fast temperature itself.

Shape suffixes: L MoE layers, N experts.
"""

import math

import torch
from torch import Tensor

from chronomoe.control.config import ControlConfig
from chronomoe.control.pressure import project


def centred(tau_LN: Tensor) -> Tensor:
    """Less its mean over experts."""
    return tau_LN - tau_LN.mean(dim=-1, keepdim=True)


def fast_temperature(
    error_LN: Tensor, recovering_LN: Tensor, coherence_LN: Tensor, health_LN: Tensor, config: ControlConfig
) -> Tensor:
    """log T of each expert: hot if under-used or recovering, cold if it is a coherent, healthy specialist.

    ``error_LN`` is N (pi - f), ``recovering_LN`` in [0, 1], ``coherence_LN`` R_k, ``health_LN`` r_k in [-1, 1].
    """
    specialist_LN = coherence_LN * (health_LN >= 0)
    return centred(
        config.beta_usage * error_LN.clamp(0, 1)
        + config.beta_recovery * recovering_LN
        - config.beta_specialist * specialist_LN
    )


def effective_temperature(fast_LN: Tensor, structural_LN: Tensor, config: ControlConfig, rho: float) -> Tensor:
    """log T used for routing: fast and structural, mixed convexly, within the admissible ratio ``rho``."""
    mixed_LN = config.fast_weight * fast_LN + (1 - config.fast_weight) * structural_LN
    return project(mixed_LN, torch.tensor(0.5 * math.log(rho), device=mixed_LN.device))
