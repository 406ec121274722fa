"""A tiny base of each family, and an expert for it that is loud enough to be seen."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from chronomoe import ChronovisorMixtralForCausalLM, MixtralConfig
from chronomoe.experts.expert import DomainExpert
from chronomoe.hrm import HRMACTv1Config, HRMACTv1ForCausalLM

BASES = ("mixtral", "hrm")
VOCAB = 61


def build_base(family: str, **changes: Any) -> Any:
    torch.manual_seed(0)
    if family == "mixtral":
        shape = {"vocab_size": VOCAB, "hidden_dim": 32, "intermediate_dim": 48, "num_layers": 3, "num_experts": 4}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_seq_length": 64}
        model: Any = ChronovisorMixtralForCausalLM(MixtralConfig(**{**shape, **heads, **changes}))
    else:
        shape = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_experts": 4}
        others = {"num_attention_heads": 4, "h_layers": 1, "l_layers": 2, "max_position_embeddings": 64}
        model = HRMACTv1ForCausalLM(HRMACTv1Config(**{**shape, **others, **changes}))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.15, generator=generator)
    return model.eval()


def build_expert(name: str = "licences", *, seed: int = 1, threshold: float = 0.0, **changes: Any) -> DomainExpert:
    """An expert in the layers 1 and 2 whose gate opens about half of the time."""
    torch.manual_seed(seed)
    expert = DomainExpert(
        name, uid=f"{seed:032x}", **{"hidden_size": 32, "width": 40, "layers": [1, 2], "gate_layers": [0, 1], **changes}
    )
    with torch.no_grad():
        for parameter in expert.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.5)
        expert.gate.direction.normal_()
        expert.gate.threshold.fill_(threshold)
    return expert.eval()


@pytest.fixture
def base() -> Callable[..., Any]:
    return build_base


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(0, VOCAB, (3, 17), generator=torch.Generator().manual_seed(1))
