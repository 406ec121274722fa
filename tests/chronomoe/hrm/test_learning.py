"""It learns what can be learned and nothing else."""

import math

import torch

from tests.chronomoe.hrm.building import VOCAB, build


def trained(batches, **changes):
    torch.manual_seed(0)
    model = build(thoughtful=False, halt_max_steps=2, **changes).train()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(0.3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for x in batches:
        model(x, labels=x).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        model.controller.tick()
    return model.eval()


def held_out_loss(model, x):
    logits = model(x).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), x[:, 1:].flatten()).item()


def test_random_tokens_stay_at_the_entropy_of_the_vocabulary():
    """A model that saw the future would copy it."""
    generator = torch.Generator().manual_seed(0)
    data = torch.randint(0, VOCAB, (120, 8, 16), generator=generator)
    assert held_out_loss(trained(data[:100]), data[100:].flatten(0, 1)) > math.log(VOCAB) - 0.02


def test_text_with_a_rule_is_learned():
    generator = torch.Generator().manual_seed(0)
    start = torch.randint(0, VOCAB, (120, 8, 1), generator=generator)
    stride = torch.randint(1, 4, (120, 8, 1), generator=generator)
    data = (start + stride * torch.arange(16)) % VOCAB
    assert held_out_loss(trained(data[:100]), data[100:].flatten(0, 1)) < 1.6
