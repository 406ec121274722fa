"""Tiny models of every family that can be steered."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers

SHAPE = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
}
FAMILIES = ("mixtral", "olmoe", "qwen2_moe", "qwen3_moe")


def build_host(family: str, **changes: Any) -> Any:
    """A plain transformers model with weights large enough for routing to matter."""
    shape = SHAPE | changes
    experts = shape.pop("num_experts", 4)
    if family == "mixtral":
        config = transformers.MixtralConfig(intermediate_size=48, num_local_experts=experts, **shape)
        model = transformers.MixtralForCausalLM(config)
    elif family == "olmoe":
        config = transformers.OlmoeConfig(intermediate_size=48, num_experts=experts, eos_token_id=1, **shape)
        model = transformers.OlmoeForCausalLM(config)
    elif family == "qwen2_moe":
        widths = {"moe_intermediate_size": 48, "shared_expert_intermediate_size": 48}
        model = transformers.Qwen2MoeForCausalLM(transformers.Qwen2MoeConfig(num_experts=experts, **widths, **shape))
    else:
        config = transformers.Qwen3MoeConfig(moe_intermediate_size=48, num_experts=experts, head_dim=8, **shape)
        model = transformers.Qwen3MoeForCausalLM(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.15, generator=generator)
    return model


@pytest.fixture
def host() -> Callable[..., Any]:
    return build_host


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(0, SHAPE["vocab_size"], (3, 17), generator=torch.Generator().manual_seed(1))
