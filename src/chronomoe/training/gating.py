"""CoherenceGatedOptimizer: take smaller steps while routing is incoherent.

Scaling gradients would change nothing under Adam, which divides by their size. What is scaled is the update.
"""

import math
from collections.abc import Callable
from typing import Any

import torch

from chronomoe.errors import ConfigError, require
from chronomoe.training.config import TrainingConfig


class CoherenceGatedOptimizer(torch.optim.Optimizer):
    """Wraps any optimizer whose update is proportional to its learning rate (SGD, Adam, AdamW, Lion, ...).

        raw  = 0 if R < min_coherence else (R - min_coherence) / (1 - min_coherence)
        gate = 1 - gating_strength (1 - raw)

    The step is taken with every learning rate times ``gate``, weight decay included where it is decoupled; at gate 0
    no step is taken at all: neither weights nor moments move. State, groups and hooks are the wrapped optimizer's own,
    so schedulers and accelerate work on it. Set ``coherence`` before each step; it is 1 until then, an open gate.
    """

    _step_supports_amp_scaling = False
    """A GradScaler must unscale and judge the gradients itself: what it would hand a fused step does not get there."""

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        min_coherence: float = TrainingConfig.min_coherence,
        gating_strength: float = TrainingConfig.gating_strength,
    ) -> None:
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise ConfigError(f"cannot gate a {type(optimizer).__name__}; give an optimizer.")
        # The base class' constructor would make groups and state of its own.
        self.optimizer = optimizer
        self.min_coherence, self.gating_strength = min_coherence, gating_strength
        require(self, "min_coherence", "gating_strength", least=0, most=1)
        self.coherence = 1.0

    def __getattr__(self, name: str) -> Any:
        if name == "optimizer":  # being copied or unpickled
            raise AttributeError(name)
        return getattr(self.optimizer, name)

    def __getstate__(self) -> dict[str, Any]:
        # A scheduler puts a step of its own in the place of ours; bound to us, it would step us and not the copy.
        return {name: value for name, value in vars(self).items() if name != "step"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)

    @property
    def gate(self) -> float:
        """The factor of the next update, in [1 - gating_strength, 1]; a coherence that is not a number closes it."""
        return gate_value(self.coherence, self.min_coherence, self.gating_strength)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """The wrapped optimizer's step, scaled by :attr:`gate`."""
        gate = self.gate
        if gate == 0:
            return None if closure is None else closure()
        if gate == 1:
            return self.optimizer.step(closure)
        rates = [group["lr"] for group in self.param_groups]
        try:
            for group in self.param_groups:
                group["lr"] = group["lr"] * gate
            return self.optimizer.step(closure)
        finally:
            for group, rate in zip(self.param_groups, rates, strict=True):
                group["lr"] = rate

    # Attributes reach the wrapped optimizer by __getattr__; methods that the base class has need a way of their own.

    def state_dict(self) -> dict[str, Any]:
        """The wrapped optimizer's; the gate has no memory."""
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Into the wrapped optimizer."""
        self.optimizer.load_state_dict(state_dict)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Of the wrapped optimizer's parameters."""
        self.optimizer.zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """To the wrapped optimizer."""
        self.optimizer.add_param_group(param_group)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.optimizer!r}, {self.min_coherence}, {self.gating_strength})"


def gate_value(coherence: float, min_coherence: float, gating_strength: float) -> float:
    """The gate for a coherence R in [0, 1]."""
    if not coherence >= min_coherence or not math.isfinite(coherence):
        raw = 0.0
    elif min_coherence == 1:
        raw = 1.0
    else:
        raw = min(1.0, (coherence - min_coherence) / (1 - min_coherence))
    return 1 - gating_strength * (1 - raw)
