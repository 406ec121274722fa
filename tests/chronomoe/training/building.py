"""Tiny models, data and trainers for the tests of training."""

import json

import pytest
import torch
from torch.utils.data import DataLoader

from chronomoe import ChronovisorMixtralForCausalLM, MixtralConfig
from chronomoe.data.windows import HeldoutWindows
from chronomoe.training import Callback, ChronoMoETrainer, TrainingConfig
from tests.chronomoe.everything import differing, everything

VOCAB = 53


def build_model(seed=0, **changes):
    torch.manual_seed(seed)
    shape = {"vocab_size": VOCAB, "hidden_dim": 32, "num_layers": 2, "num_experts": 4, "max_seq_length": 64} | changes
    return ChronovisorMixtralForCausalLM(MixtralConfig(**shape))


def build_data(n=22, length=16, padded=False):
    generator = torch.Generator().manual_seed(3)
    rows = [{"input_ids": torch.randint(0, VOCAB, (length,), generator=generator)} for _ in range(n)]
    if padded:
        for index, row in enumerate(rows):
            row["attention_mask"] = (torch.arange(length) < length - index % 7).long()
    return rows


def build_trainer(
    folder, model=None, data=None, batch_size=4, eval_data=None, knob_agent=None, callbacks=(), **settings
):
    settings = {"max_steps": 12, "log_every_n_steps": 1, "save_every_n_steps": 4, "learning_rate": 1e-2} | settings
    config = TrainingConfig(checkpoint_dir=str(folder), batch_size=batch_size, **settings)
    loader = DataLoader(data or build_data(), batch_size=batch_size, shuffle=True)
    return ChronoMoETrainer(
        model or build_model(),
        config,
        loader,
        eval_data,
        show=lambda line: None,
        knob_agent=knob_agent,
        callbacks=callbacks,
    )


def records(folder, event="train"):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    drop = ("tokens_per_second",)
    return [{k: v for k, v in line.items() if k not in drop} for line in lines if line["event"] == event]


def equal_weights(a, b):
    return not differing(everything(a), everything(b))


class AfterStep(Callback):
    """Calls a function after each step, with what the step was."""

    def __init__(self, act):
        self.after_step = act


class Killed(BaseException):
    """Nothing of the trainer may catch this: it stands for kill -9 between two steps."""


def kill_at(trainer, step):
    def die(result):
        if result.number == step:
            raise Killed

    trainer.callbacks.append(AfterStep(die))
    with pytest.raises(Killed):
        trainer.train()


def held_out(n=4, length=16):
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(0, VOCAB, (n, length + 1), generator=generator)
    targets = ids[:, 1:].clone()
    targets[-1, 8:] = -100
    kept = int((targets != -100).sum())
    return HeldoutWindows(input_ids=ids[:, :-1], targets=targets, num_bytes=2 * kept, num_text_tokens=kept)


def poison(model, steps):
    """Make the loss NaN at the given forward passes."""
    count = iter(range(10_000))
    model.lm_head.register_forward_hook(lambda m, i, o: o * float("nan") if next(count) in steps else o)
    return model
