"""SteeredPreTrained: what steered models that are built by us add to transformers' PreTrainedModel."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from chronomoe.control.config import ControlConfig
from chronomoe.control.controller import ChronovisorMixtralController
from chronomoe.errors import ConfigError
from chronomoe.hosts.attach import attach
from chronomoe.routing.state import SteeringConfig
from chronomoe.routing.steering import Steering
from chronomoe.sidecars import load_attached, save_attached


class SteeredPreTrained:
    """Mixed into a causal language model: ``model.steering`` holds the fields, ``model.controller`` moves them."""

    steering: Steering
    controller: ChronovisorMixtralController
    _keep_in_fp32_modules_strict: Any = {"steering", "controller"}  # noqa: RUF012 (bf16 would round them)

    def steer(self, dispatch: str) -> None:
        """Attach what the configuration asks for; :class:`ConfigError` when it does not know what that is."""
        config: Any = self.config  # type: ignore[attr-defined]
        steering, control = (getattr(config, name, None) or {} for name in ("steering", "control"))
        try:
            made = SteeringConfig(**steering, enabled=getattr(config, "enable_chronovisor", True))
            attach(self, made, ControlConfig(**control), dispatch=dispatch)  # type: ignore[arg-type]
        except TypeError as error:
            raise ConfigError(f"the model's steering or control settings are not ours: {error}.") from error

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """As transformers' own; attached experts go into files of their own, beside the unchanged base."""
        state = kwargs.pop("state_dict", None) or self.state_dict()  # type: ignore[attr-defined]
        kwargs["state_dict"] = {name: t for name, t in state.items() if not name.startswith("subbrains.")}
        super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]
        save_attached(self, save_directory)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As transformers' own, with the experts attached there; a plain checkpoint loads too, with neutral fields."""
        loaded = super().from_pretrained(*args, **kwargs)  # type: ignore[misc]
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if getattr(model, "controller", None) is not None:
            model.steering.after_loading()
            model.controller.restore_dtypes()
        if args and Path(args[0]).is_dir():
            load_attached(model, args[0])
        return loaded

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return True  # transformers looks for its decorator in the source of this module, where it cannot be

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # Also reached for what a plain checkpoint does not hold: its fields start neutral.
        if isinstance(module, Steering):
            module.reset()
        if isinstance(module, ChronovisorMixtralController):
            module.forget()
        super()._init_weights(module)  # type: ignore[misc]

    @property
    def num_active_params(self) -> int:
        """Parameters one token uses: all but the experts it is not sent to."""
        experts = sum(p.numel() for name, p in self.named_parameters() if ".experts." in name)  # type: ignore[attr-defined]
        total = sum(p.numel() for p in self.parameters())  # type: ignore[attr-defined]
        steering = getattr(self, "steering", None)
        return total if steering is None else total - experts + experts * steering.top_k // steering.num_experts
