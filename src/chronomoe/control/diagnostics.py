"""What the state of the control layer says, put in words and numbers a person or a log can use.

Shape suffixes: L MoE layers, N experts, B blocks of time.
"""

from typing import Any

import torch
from torch import Tensor

from chronomoe.control.config import ControlConfig
from chronomoe.control.landscape import BLOCK, BLOCKS, null_variance, valleys_and_ridges
from chronomoe.control.state import ControlState
from chronomoe.errors import ConfigError

MIN_BLOCKS = 4
"""Blocks of time below which no landscape counts as formed."""


def landscape_of(state: ControlState, config: ControlConfig, layer: int | None = None) -> dict[str, Any]:
    """T_bar, valleys, ridges, variance and null of one layer, or of the expert slots over all layers.

    ``landscape_formed`` is True when the variance exceeds what shuffling experts within blocks of time leaves.
    Raises :class:`ConfigError` for a layer that is not there.
    """
    if layer is None:
        tau_N, rate = state.structural_T_global, config.eta_structural_T_global
    else:
        tau_N, rate = state.structural_T_local[_checked(state, layer)], config.eta_structural_T_local
    valleys, ridges = valleys_and_ridges(tau_N)
    blocks_BLN, weights_B = _blocks(state, rate)
    blocks_BN = blocks_BLN.mean(dim=1) if layer is None else blocks_BLN[:, layer]
    null = null_variance(blocks_BN, weights_B) if len(weights_B) >= MIN_BLOCKS else None
    variance = tau_N.var(unbiased=False).item()
    t_bar_N = tau_N.exp()
    return {
        "label": "global" if layer is None else f"layer_{_checked(state, layer)}",
        "structural_T": t_bar_N.tolist(),
        "variance": t_bar_N.var(unbiased=False).item(),
        "log_variance": variance,
        "null_variance": null,
        "landscape_formed": null is not None and variance > null,
        "mean": t_bar_N.mean().item(),
        "std": t_bar_N.std(unbiased=False).item(),
        "valleys": valleys,
        "ridges": ridges,
        "evolution_steps": int(state.ticks),
    }


def valley_health_of(state: ControlState, config: ControlConfig, layer: int | None = None) -> dict[str, Any]:
    """Which valleys of a layer, or of all, hold healthy experts: by the gradient signal, not by usage.

    Valleys are named "<layer>.<expert>". Raises :class:`ConfigError` for a layer that is not there.
    """
    layers = range(len(state.health)) if layer is None else [_checked(state, layer)]
    health: dict[str, float] = {}
    for index in layers:
        for expert in valleys_and_ridges(state.structural_T_local[index])[0]:
            health[f"{index}.{expert}"] = state.health[index, expert].item()
    unhealthy = [name for name, value in health.items() if value < config.suspect_below]
    return {
        "label": "all layers" if layer is None else f"layer_{layers[0]}",
        "valleys": list(health),
        "valley_health": health,
        "healthy_valleys": [name for name in health if name not in unhealthy],
        "unhealthy_valleys": unhealthy,
        "mean_valley_health": sum(health.values()) / len(health) if health else 1.0,
        "masked_experts": state.masked.nonzero().tolist(),
        "self_correction_working": not unhealthy,
    }


def _blocks(state: ControlState, rate: float) -> tuple[Tensor, Tensor]:
    """Complete blocks so far, newest last, and the weight of each in an average of that rate."""
    complete = int(state.ticks) // BLOCK
    kept = min(complete, BLOCKS - 1)  # one may be in the making
    index = [number % BLOCKS for number in range(complete - kept, complete)]
    # kappa scales the rate; a block remembers its mean scale.
    kept_B = (1 - (rate * state.block_rates[index]).clamp(max=1)) ** BLOCK
    since_B = kept_B.flip(0).cumprod(0).flip(0) / kept_B.clamp(min=torch.finfo(kept_B.dtype).tiny)
    return state.fast_blocks[index], since_B * (1 - kept_B)


def _checked(state: ControlState, layer: int) -> int:
    layers = len(state.health)
    if type(layer) is not int or not -layers <= layer < layers:
        raise ConfigError(f"there is no MoE layer {layer}; there are {layers}.")
    return layer % layers
