"""The optimizer, the learning rate as a function of the step, and the optimizer's state by parameter name."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from chronomoe.errors import CheckpointError, ConfigError
from chronomoe.routing.router import SteeredRouter
from chronomoe.training.config import TrainingConfig

COSINE_FLOOR = 0.1
"""Share of the peak at which the cosine schedule ends."""


def build_optimizer(model: nn.Module, config: TrainingConfig) -> torch.optim.Optimizer:
    """AdamW over the parameters that train; decay on matrices only; routers in a group of their own.

    ``lr_scale`` of a group is its multiple of the learning rate. :class:`ConfigError` when adamw8bit is not installed.
    """
    routers = {id(module.weight) for module in model.modules() if isinstance(module, SteeredRouter)}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # (parameters, multiple of the learning rate, do they decay)
    groups = [
        ([p for p in trained if p.dim() >= 2 and id(p) not in routers], 1.0, True),
        ([p for p in trained if p.dim() < 2], 1.0, False),
        ([p for p in trained if id(p) in routers], config.router_lr_scale, True),
    ]
    made = [
        {
            "params": group,
            "lr": config.learning_rate * scale,
            "lr_scale": scale,
            "weight_decay": config.weight_decay if decays else 0.0,
        }
        for group, scale, decays in groups
        if group
    ]
    settings: dict[str, Any] = {"lr": config.learning_rate, "betas": (0.9, config.adam_beta2)}
    if config.optimizer == "adamw":
        return torch.optim.AdamW(made, **settings, fused=True)
    try:
        from bitsandbytes.optim import AdamW8bit  # type: ignore[import-not-found]
    except ImportError:
        raise ConfigError("the 8-bit optimizer needs bitsandbytes: pip install 'chronomoe-aios[8bit]'.") from None
    optimizer: torch.optim.Optimizer = AdamW8bit(made, **settings)
    return optimizer


def learning_rate(step: int, config: TrainingConfig, total_steps: int, scale: float = 1.0) -> float:
    """The learning rate after ``step`` steps of ``total_steps``, times ``scale``.

    Linear warm-up from 0, then cosine to a tenth of the peak, linear to 0, or constant; the same numbers as the
    schedules of transformers.
    """
    warmup = config.warmup_steps(total_steps)
    left = max(1, total_steps - warmup)
    if step < warmup:
        factor = step / warmup
    elif config.lr_schedule == "cosine":
        wave = 0.5 * (1.0 + math.cos(math.pi * ((step - warmup) / left)))
        factor = wave * (1 - COSINE_FLOOR) + COSINE_FLOOR
    elif config.lr_schedule == "linear":
        factor = max(0.0, (total_steps - step) / left)
    else:
        factor = 1.0
    return config.learning_rate * scale * factor


def set_learning_rate(optimizer: torch.optim.Optimizer, step: int, config: TrainingConfig, total_steps: int) -> None:
    """Write the learning rate after ``step`` steps into the optimizer's groups."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, config, total_steps, group["lr_scale"])


def parameter_names(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[list[str]]:
    """The names of the parameters in each of the optimizer's groups."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [[names[id(parameter)] for parameter in group["params"]] for group in optimizer.param_groups]


def pack_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state as tensors, named ``<parameter>.<moment>``."""
    names = [name for group in parameter_names(model, optimizer) for name in group]
    return {
        f"{names[number]}.{moment}": torch.as_tensor(value).contiguous()
        for number, entry in optimizer.state_dict()["state"].items()
        for moment, value in entry.items()
    }


def unpack_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """What ``optimizer.load_state_dict`` takes, from :func:`pack_optimizer`'s tensors; its settings are today's.

    :class:`CheckpointError` for the state of other parameters.
    """
    names = [name for group in parameter_names(model, optimizer) for name in group]
    numbers, shapes = {name: number for number, name in enumerate(names)}, dict(model.named_parameters())
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, moment = key.rpartition(".")
        wrong = "" if name in numbers else "this run does not train it"
        # The moments of an 8-bit optimizer have names and shapes of their own.
        if not wrong and moment.startswith("exp_avg") and tensor.shape != shapes[name].shape:
            wrong = f"it has the shape {list(tensor.shape)}, not {list(shapes[name].shape)}"
        if wrong:
            raise CheckpointError(f"the checkpoint's optimizer state {key} is for other parameters: {wrong}.")
        state.setdefault(numbers[name], {})[moment] = tensor
    return {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}
