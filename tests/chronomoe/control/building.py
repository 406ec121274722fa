"""Tiny models, data and training for the tests of the control layer."""

import torch

from chronomoe import ChronovisorMixtralForCausalLM, ControlConfig, MixtralConfig
from chronomoe.training.control import language_model_loss

VOCAB = 61


def build(control=None, seed=0, **shape):
    torch.manual_seed(seed)
    shape = {"vocab_size": VOCAB, "hidden_dim": 32, "num_layers": 2, "num_experts": 6, "max_seq_length": 64} | shape
    model = ChronovisorMixtralForCausalLM(MixtralConfig(**shape)).train()
    model.controller.config = control or ControlConfig()
    return model


def batches(n=50, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCAB, (n, 4, 16), generator=generator)


def text(n, seed=1):
    """Sequences that can be learned: each counts on in steps of one to three."""
    generator = torch.Generator().manual_seed(seed)
    start = torch.randint(0, VOCAB, (n, 16, 1), generator=generator)
    stride = torch.randint(1, 4, (n, 16, 1), generator=generator)
    return (start + stride * torch.arange(16)) % VOCAB


def train(model, steps=50, after=None, data=batches):
    """Steps as a bare loop takes them."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for x in data(steps):
        loss = model(input_ids=x, labels=x).loss
        loss.backward()
        window = model.controller.tick()
        if after is not None:
            after(window)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def same_weights(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def language_loss(model):
    return language_model_loss(model, {"input_ids": text(1, seed=9)[0]}, 16)


def windows_of(n=6):
    """The windows of the first steps of a new model."""
    windows = []
    train(build(), n, windows.append)
    return windows


def feed(controller, *windows):
    """Tick once for each window, as if the routers had observed it."""
    for window in windows:
        controller.steering.end_step = lambda window=window: window
        controller.tick()
