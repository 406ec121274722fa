"""The optimizer and the learning-rate schedule, both the libraries' own."""

from typing import Any

import torch
from torch import nn
from transformers import get_scheduler

from chronomoe.training.config import TrainingConfig


def build_optimizer(model: nn.Module, config: TrainingConfig) -> torch.optim.AdamW:
    """Fused AdamW over the parameters that train; decay on matrices only."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        betas=(0.9, config.adam_beta2),
        fused=True,
    )


def build_schedule(optimizer: Any, config: TrainingConfig, total_steps: int) -> Any:
    """Linear warm-up, then cosine to a tenth, linear to zero, or constant."""
    name, extra = {
        "cosine": ("cosine_with_min_lr", {"min_lr_rate": 0.1}),
        "linear": ("linear", None),
        "constant": ("constant_with_warmup", None),
    }[config.lr_schedule]
    warmup = config.warmup_steps(total_steps)
    return get_scheduler(name, optimizer, warmup, total_steps, scheduler_specific_kwargs=extra)


def apply_settings(optimizer: Any, schedule: Any, config: TrainingConfig) -> None:
    """Settings a resumed run was given win over those of its checkpoint; equal ones change no bit."""
    inner = getattr(schedule, "scheduler", schedule)
    inner.base_lrs = [config.learning_rate for _ in optimizer.param_groups]
    rates = [config.learning_rate * factor(inner.last_epoch) for factor in inner.lr_lambdas]
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group |= {"lr": rate, "initial_lr": config.learning_rate, "betas": (0.9, config.adam_beta2)}
        group["weight_decay"] = config.weight_decay if group["params"][0].dim() >= 2 else 0.0
    inner._last_lr = rates
