"""ChronovisorMixtralForCausalLM: transformers' Mixtral, steered from construction.

Everything but the routing is transformers': attention, cache, ``generate``, saving and loading. A plain Mixtral
checkpoint loads with :meth:`from_pretrained`; :meth:`export_plain` writes one.
"""

import os
from typing import Any

import torch
from torch import nn
from transformers import MixtralConfig as HFMixtralConfig
from transformers import MixtralForCausalLM

from chronomoe.control.config import ControlConfig
from chronomoe.control.controller import ChronovisorMixtralController
from chronomoe.mixtral_core import MixtralConfig
from chronomoe.routing.attach import STATE_PREFIXES, attach
from chronomoe.routing.steering import Steering, SteeringConfig


class ChronovisorMixtralForCausalLM(MixtralForCausalLM):
    """A Mixtral whose routers are steered; ``model.steering`` holds the fields, ``model.controller`` moves them."""

    config: MixtralConfig
    config_class = MixtralConfig
    steering: Steering
    controller: ChronovisorMixtralController
    _keep_in_fp32_modules_strict = {"steering", "controller"}  # noqa: RUF012 (bf16 would round them)

    def __init__(self, config: HFMixtralConfig) -> None:
        # Ours unless another was asked for by name; transformers resolves "none asked for" in its constructor.
        dispatch = config._experts_implementation or "sorted"
        super().__init__(config)
        steering = SteeringConfig(
            **(getattr(config, "steering", None) or {}), enabled=getattr(config, "enable_chronovisor", True)
        )
        control = ControlConfig(**(getattr(config, "control", None) or {}))
        attach(self, steering, control, dispatch=dispatch)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As transformers' own; a plain Mixtral checkpoint loads too, with neutral fields."""
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model.steering.after_loading()
        model.controller.restore_dtypes()
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
        super()._init_weights(module)

    def export_plain(self, path: str | os.PathLike[str]) -> None:
        """Write a checkpoint of plain transformers: no fields, transformers' own configuration."""
        ours = self.config.to_dict()
        plain_fields = HFMixtralConfig().to_dict()
        plain = HFMixtralConfig(**{name: ours[name] for name in plain_fields if name in ours})
        plain.architectures = ["MixtralForCausalLM"]
        plain.dtype = self.dtype
        state = {name: tensor for name, tensor in self.state_dict().items() if not name.startswith(STATE_PREFIXES)}
        with torch.device("meta"):
            skeleton: Any = MixtralForCausalLM(plain)
            skeleton.to(self.dtype)
        skeleton.generation_config = self.generation_config
        skeleton.save_pretrained(path, state_dict=state)

    @property
    def num_active_params(self) -> int:
        """Parameters one token uses: all but the experts it is not sent to."""
        experts = sum(p.numel() for name, p in self.named_parameters() if ".experts." in name)
        total = sum(p.numel() for p in self.parameters())
        return total - experts + experts * self.config.num_experts_per_tok // self.config.num_local_experts
