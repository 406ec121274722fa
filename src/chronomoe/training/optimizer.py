"""The optimizer and the learning-rate schedule, both the libraries' own."""

from typing import Any

import torch
from torch import nn
from transformers import get_scheduler

from chronomoe.errors import ConfigError
from chronomoe.routing.router import SteeredRouter
from chronomoe.training.config import TrainingConfig


def build_optimizer(model: nn.Module, config: TrainingConfig) -> torch.optim.Optimizer:
    """AdamW over the parameters that train; decay on matrices only; routers in a group of their own."""
    routers = {id(module.weight) for module in model.modules() if isinstance(module, SteeredRouter)}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # (parameters, multiple of the learning rate, do they decay)
    groups = [
        ([p for p in trained if p.dim() >= 2 and id(p) not in routers], 1.0, True),
        ([p for p in trained if p.dim() < 2], 1.0, False),
        ([p for p in trained if id(p) in routers], config.router_lr_scale, True),
    ]
    made = [
        {"params": group, "lr": config.learning_rate * scale, "weight_decay": config.weight_decay if decays else 0.0}
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


def build_schedule(optimizer: Any, config: TrainingConfig, total_steps: int) -> Any:
    """Linear warm-up, then cosine to a tenth, linear to zero, or constant."""
    name, extra = {
        "cosine": ("cosine_with_min_lr", {"min_lr_rate": 0.1}),
        "linear": ("linear", None),
        "constant": ("constant_with_warmup", None),
    }[config.lr_schedule]
    warmup = config.warmup_steps(total_steps)
    return get_scheduler(name, optimizer, warmup, total_steps, scheduler_specific_kwargs=extra)


def apply_settings(optimizer: Any, schedule: Any, model: nn.Module, config: TrainingConfig) -> None:
    """Settings a resumed run was given win over those of its checkpoint; equal ones change no bit."""
    inner = getattr(schedule, "scheduler", schedule)
    wanted = build_optimizer(model, config).param_groups
    inner.base_lrs = [group["lr"] for group in wanted]
    rates = [rate * factor(inner.last_epoch) for rate, factor in zip(inner.base_lrs, inner.lr_lambdas, strict=True)]
    for group, want, rate in zip(optimizer.param_groups, wanted, rates, strict=True):
        group |= {"lr": rate, "initial_lr": want["lr"], "betas": want["betas"], "weight_decay": want["weight_decay"]}
    inner._last_lr = rates
