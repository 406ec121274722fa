"""ChronovisorMixtralForCausalLM: transformers' Mixtral, steered from construction.

Everything but the routing is transformers': attention, cache, ``generate``, saving and loading. A plain Mixtral
checkpoint loads with :meth:`from_pretrained`; :meth:`export_plain` writes one.
"""

import os
from typing import Any

import torch
from transformers import MixtralConfig as HFMixtralConfig
from transformers import MixtralForCausalLM

from chronomoe.experts.attachment import base_state
from chronomoe.mixtral_core import MixtralConfig
from chronomoe.pretrained import SteeredPreTrained


class ChronovisorMixtralForCausalLM(SteeredPreTrained, MixtralForCausalLM):
    """A Mixtral whose routers are steered; ``model.steering`` holds the fields, ``model.controller`` moves them."""

    config: MixtralConfig
    config_class = MixtralConfig

    def __init__(self, config: HFMixtralConfig) -> None:
        # Ours unless another is named; transformers fills in its own default in its constructor.
        dispatch = config._experts_implementation or "sorted"
        super().__init__(config)
        self.steer(dispatch)

    def export_plain(self, path: str | os.PathLike[str]) -> None:
        """Write a checkpoint of plain transformers: no fields, transformers' own configuration."""
        ours = self.config.to_dict()
        plain_fields = HFMixtralConfig().to_dict()
        plain = HFMixtralConfig(**{name: ours[name] for name in plain_fields if name in ours})
        plain.architectures = ["MixtralForCausalLM"]
        plain.dtype = self.dtype
        with torch.device("meta"):
            skeleton: Any = MixtralForCausalLM(plain)
            skeleton.to(self.dtype)
        skeleton.generation_config = self.generation_config
        skeleton.save_pretrained(path, state_dict=base_state(self))
