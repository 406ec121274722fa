"""Tiny HRMs whose segments, routing and halting all matter."""

import torch

from chronomoe.hrm import HRMACTv1Config, HRMACTv1ForCausalLM

VOCAB = 61


def build(*, thoughtful=True, seed=14, **changes):
    """``thoughtful``: the halting head stops some tokens early and others not at all."""
    shape = {
        "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "h_layers": 1,
        "l_layers": 2, "num_experts": 4, "halt_max_steps": 3, "max_position_embeddings": 64,
    } | changes  # fmt: skip
    torch.manual_seed(seed)
    model = HRMACTv1ForCausalLM(HRMACTv1Config(**shape))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "halt" not in name:
                parameter.normal_(std=0.15, generator=generator)
        head = model.model.halt_head
        if thoughtful and head is not None:
            head.weight.normal_(std=0.3, generator=generator)
            head.bias.fill_(0.1)
    return model.eval()


def tokens(rows=3, length=17, seed=1):
    return torch.randint(0, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))
