"""One step: micro-batches that share their counts, a clipped gradient, steps that are skipped."""

import pytest
import torch
from torch.utils.data import DataLoader

from chronomoe.errors import ConfigError
from chronomoe.training import Callback, ChronoMoETrainer, TrainingConfig
from tests.chronomoe.training.building import (
    AfterStep,
    build_data,
    build_model,
    build_trainer,
    equal_weights,
    poison,
    records,
)


def test_micro_batches_change_nothing(tmp_path):
    data = build_data(24, padded=True)
    trainers = []
    for batch_size, accumulation in ((6, 1), (2, 3)):
        torch.manual_seed(0)
        config = TrainingConfig(
            checkpoint_dir=str(tmp_path / str(batch_size)), batch_size=batch_size, max_steps=4, learning_rate=1e-3,
            gradient_accumulation_steps=accumulation, log_every_n_steps=1, lambda_balance=0.5, initial_kappa=0.0,
        )  # fmt: skip
        trainer = ChronoMoETrainer(build_model(), config, DataLoader(data, batch_size=batch_size), show=lambda s: None)
        trainer.train()
        trainers.append(trainer)
    a, b = (records(tmp_path / name) for name in ("6", "2"))
    for mine, theirs in zip(a, b, strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
        assert mine["lb_loss"] == pytest.approx(theirs["lb_loss"], rel=1e-4)
        assert mine["tokens"] == theirs["tokens"]
    for mine, theirs in zip(trainers[0].model.parameters(), trainers[1].model.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=2e-4)


def test_gradients_are_clipped_to_the_norm(tmp_path):
    trainer = build_trainer(tmp_path, max_steps=1, max_grad_norm=1e-3)
    seen = []

    class Norm(Callback):
        def after_backward(self, step):
            seen.append(torch.stack([p.grad.norm() for p in trainer.model.parameters()]).norm().item())

    trainer.callbacks.append(Norm())
    trainer.train()
    assert seen[0] == pytest.approx(1e-3, rel=1e-3)
    assert records(tmp_path)[0]["grad_norm"] > 1e-2


def test_batches_that_are_no_dicts_are_refused(tmp_path):
    trainer = build_trainer(tmp_path, data=[row["input_ids"] for row in build_data()])
    with pytest.raises(ConfigError, match="input_ids"):
        trainer.train()


def test_an_infinite_loss_with_finite_gradients_is_skipped(tmp_path):
    trainer = build_trainer(tmp_path, max_steps=2)
    trainer.model.register_forward_hook(lambda m, i, output: setattr(output, "loss", output.loss + float("inf")))
    assert trainer.train()["skipped_steps"] == 2


def test_a_non_finite_step_is_skipped_counted_and_moves_nothing(tmp_path):
    trainer = build_trainer(tmp_path, poison(build_model(), {2}), max_steps=3)
    snapshots = []
    trainer.callbacks.append(AfterStep(lambda step: snapshots.append((
        {k: v.clone() for k, v in trainer.model.state_dict().items()}, trainer.steering.load.clone()
    ))))  # fmt: skip
    result = trainer.train()
    assert result["skipped_steps"] == 1
    assert all(torch.equal(snapshots[1][0][name], value) for name, value in snapshots[2][0].items())
    assert torch.equal(snapshots[1][1], snapshots[2][1])
    assert trainer.steering.statistics.sums.abs().sum() == 0


def test_gradient_checkpointing_changes_nothing_but_memory(tmp_path):
    models = []
    for flag in (False, True):
        trainer = build_trainer(tmp_path / str(flag), gradient_checkpointing=flag, max_steps=3)
        trainer.train()
        models.append(trainer.model)
    assert equal_weights(*models)
