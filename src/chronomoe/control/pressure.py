"""Pressure: a bias per expert that brings the load to its target, as a controller and not as a loss.

    e = N (pi - f)                              relative load error, 0 on target
    b_I <- (1 - leak) b_I + gamma phi(e)        integral; phi is the identity, or the sign (loss-free balancing)
    b*  = gamma_P N (pi - f_bar) + b_I          f_bar: lightly smoothed load
    b   = projection of b* on {sum b = 0, |b| <= B}
    b_I <- b_I + ANTI_WINDUP (b - b*)           an integral that cannot act does not grow

The gains are multiples of sigma_z, the spread of the logits, because the plant's own gain falls as 1 / sigma_z. With
gain g the loop is stable for gamma g < 2 and settles in about 1 / (gamma g) ticks (docs/mechanisms/pressure.md).

Shape suffixes: L MoE layers, N experts. Everything is fp32 and a pure function.
"""

import torch
from torch import Tensor

ANTI_WINDUP = 0.5
"""How fast the integral gives back what the bound took."""


def equal_target(available_LN: Tensor) -> Tensor:
    """pi: 1 / (number of available experts) each; 0 for the others."""
    return available_LN / available_LN.sum(dim=-1, keepdim=True)


def load_error(load_LN: Tensor, target_LN: Tensor) -> Tensor:
    """e = N (pi - f): positive where an expert gets less than its target."""
    return load_LN.shape[-1] * (target_LN - load_LN)


def alarm(slow_error_LN: Tensor, threshold: float) -> Tensor:
    """How much the gain should rise, (L, 1) in [0, 1]: from a lasting error of ``threshold`` on, fully at twice it."""
    worst_L1 = slow_error_LN.abs().amax(dim=-1, keepdim=True)
    return (worst_L1 / max(threshold, 1e-9) - 1).clamp(0, 1)


def project(b_LN: Tensor, bound_L1: Tensor) -> Tensor:
    """The nearest point with ``sum b = 0`` and ``|b| <= bound`` in each row, exactly.

    It is clip(b - mu, +-bound) for the mu at which the sum vanishes: the sum falls piecewise linearly in mu, so mu lies
    on the segment between two neighbouring breakpoints b_k +- bound.
    """
    centred_LN = b_LN - b_LN.mean(dim=-1, keepdim=True)
    if bool((centred_LN.abs() <= bound_L1).all()):
        return centred_LN  # as almost always
    breaks_LM = torch.cat([b_LN - bound_L1, b_LN + bound_L1], dim=-1).sort(dim=-1).values
    sums_LM = _clipped(b_LN.unsqueeze(1) - breaks_LM.unsqueeze(-1), bound_L1.unsqueeze(-1)).sum(dim=-1)
    after_L1 = (sums_LM > 0).sum(dim=-1, keepdim=True).clamp(1, breaks_LM.shape[-1] - 1)
    low, high = breaks_LM.gather(-1, after_L1 - 1), breaks_LM.gather(-1, after_L1)
    at_low, at_high = sums_LM.gather(-1, after_L1 - 1), sums_LM.gather(-1, after_L1)
    fall = (at_low - at_high).clamp(min=torch.finfo(b_LN.dtype).tiny)
    mu_L1 = low + (high - low) * (at_low / fall).clamp(0, 1)
    return _clipped(b_LN - mu_L1, bound_L1)


def _clipped(values: Tensor, bound: Tensor) -> Tensor:
    return torch.minimum(torch.maximum(values, -bound), bound)


def pi_update(
    integral_LN: Tensor,
    error_LN: Tensor,
    smooth_error_LN: Tensor,
    gamma_L1: Tensor,
    gamma_p_L1: Tensor,
    bound_L1: Tensor | None,
    *,
    leak: float = 0.0,
    centred: bool = True,
) -> tuple[Tensor, Tensor]:
    """One tick of the controller: the new integral and the new pressure, both (L, N)."""
    integral_LN = (1 - leak) * integral_LN + gamma_L1 * error_LN
    wanted_LN = gamma_p_L1 * smooth_error_LN + integral_LN
    if bound_L1 is None:
        return integral_LN, wanted_LN - wanted_LN.mean(dim=-1, keepdim=True) if centred else wanted_LN
    b_LN = project(wanted_LN, bound_L1) if centred else _clipped(wanted_LN, bound_L1)
    return integral_LN + ANTI_WINDUP * (b_LN - wanted_LN), b_LN


def sign_update(pressure_LN: Tensor, error_LN: Tensor, step: float) -> Tensor:
    """Loss-free balancing, b <- b + u sign(e) (Wang et al. 2024, algorithm 1)."""
    return pressure_LN + step * error_LN.sign()
