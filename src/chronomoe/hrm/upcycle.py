"""Sparse upcycling: a dense HRM ACTv1 becomes a mixture of copies of its own feed-forward layers.

Combine weights sum to 1, so equal experts compute what the dense layer did, whichever a router chooses. Until they
differ the choice changes nothing and routers learn from their balancing losses only; experts come apart because they
read different tokens, or from the start with ``redraw`` (drop-upcycling).
"""

import copy
from typing import Any

import torch
from torch import nn

from chronomoe.errors import ConfigError
from chronomoe.experts.network import redraw_units
from chronomoe.hrm.config import HRMACTv1Config
from chronomoe.hrm.model import HRMACTv1ForCausalLM


def redrawn_units(intermediate_size: int, redraw: float) -> int:
    """Intermediate units of an expert that are redrawn: at least one, unless it is 0."""
    return max(1, round(redraw * intermediate_size)) if redraw else 0


def upcycle(
    dense: HRMACTv1ForCausalLM, num_experts: int, num_experts_per_tok: int, *, redraw: float = 0.0, seed: int = 0
) -> HRMACTv1ForCausalLM:
    """A model with ``num_experts`` copies of each dense layer and fresh routers; ``dense`` is left as it is.

    Its outputs equal the dense model's to rounding, unless ``redraw`` (a share in [0, 1)) draws that many intermediate
    units of every expert but the first again, from a normal with mean and deviation of the layer's own weights.

    Raises :class:`ConfigError` for a model that has experts or biases in its feed-forward layers, and for numbers that
    cannot be.
    """
    if dense.config.use_moe:
        raise ConfigError("the model has experts already; upcycling begins with a dense one (use_moe off).")
    if dense.config.mlp_bias:
        raise ConfigError("the model's feed-forward layers have biases (mlp_bias), which experts have not.")
    if num_experts < 2:
        raise ConfigError(f"num_experts is {num_experts}; it must be at least 2.")
    if not 0 <= redraw < 1:
        raise ConfigError(f"redraw is {redraw}; it must be at least 0 and below 1.")
    changes = {"use_moe": True, "num_local_experts": num_experts, "num_experts_per_tok": num_experts_per_tok}
    config = HRMACTv1Config.from_dict(dense.config.to_dict() | changes)
    with torch.random.fork_rng(devices=[]):  # what construction draws is overwritten; the caller's draws stay
        model = HRMACTv1ForCausalLM(config)
    model.load_state_dict({n: t for n, t in dense.state_dict().items() if ".mlp." not in n}, strict=False)
    generator = torch.Generator().manual_seed(seed)
    for moe, layer in zip(_feed_forward(model), _feed_forward(dense), strict=True):
        _fill(moe, layer, redrawn_units(layer.intermediate_size, redraw), generator)
        nn.init.normal_(moe.gate.weight, std=config.initializer_range, generator=generator)
    model.generation_config = copy.deepcopy(dense.generation_config)
    model.to(device=dense.device, dtype=dense.dtype).train(dense.training)  # type: ignore[call-arg]
    return model


def _feed_forward(model: HRMACTv1ForCausalLM) -> list[Any]:
    return [block.mlp for stack in (model.model.L_module, model.model.H_module) for block in stack.layers]


@torch.no_grad()
def _fill(moe: Any, dense: Any, units: int, generator: torch.Generator) -> None:
    """Copy a dense layer into every expert, and redraw ``units`` of all but the first."""
    width = dense.intermediate_size
    down = moe.experts.down_proj
    gate, up = moe.experts.gate_up_proj[:, :width], moe.experts.gate_up_proj[:, width:]
    weights = dense.gate_proj.weight, dense.up_proj.weight, dense.down_proj.weight
    for copies, weight in zip((gate, up, down), weights, strict=True):
        copies.copy_(weight)
    for expert in range(1, len(down)) if units else ():
        redraw_units((gate[expert], up[expert], down[expert].T), units, generator)
