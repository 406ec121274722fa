"""Evaluation: the code length of held-out text, which moves nothing; samples and goals at each."""

import pytest
import torch
from torch.utils.data import DataLoader

from tests.chronomoe.everything import differing, everything
from tests.chronomoe.training.building import (
    build_data,
    build_trainer,
    equal_weights,
    held_out,
    records,
)


def test_bits_per_byte_are_the_code_length_of_the_text(tmp_path):
    windows = held_out()
    trainer = build_trainer(tmp_path, eval_data={"a": windows, "b": held_out(2)}, batch_size=3)
    result = trainer.evaluate()
    logits = trainer.model(windows.input_ids).logits.log_softmax(-1)
    picked = logits.gather(-1, windows.targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    nats = -(picked * (windows.targets != -100)).sum()
    expected = nats.item() / torch.tensor(2.0).log().item() / windows.num_bytes
    assert result["a"] == pytest.approx(expected, rel=1e-4)
    assert result["mean"] == pytest.approx((result["a"] + result["b"]) / 2)


def test_evaluation_moves_nothing(tmp_path):
    trainer = build_trainer(tmp_path, eval_data={"a": held_out()}, eval_every_n_steps=1000)
    trainer.train()
    before = everything(trainer.model)
    state = torch.get_rng_state()
    trainer.evaluate()
    assert torch.equal(torch.get_rng_state(), state)
    assert not differing(before, everything(trainer.model))
    assert trainer.steering.statistics.sums.abs().sum() == 0
    assert trainer.model.training


def test_evaluation_on_a_loader_is_the_mean_over_its_tokens(tmp_path):
    data = build_data(5, padded=True)
    trainer = build_trainer(tmp_path, data=data, eval_data=DataLoader(data, batch_size=2))
    rows = []
    for row in data:
        keep = int(row["attention_mask"].sum())
        ids = row["input_ids"][:keep].unsqueeze(0)
        rows.append((trainer.model.eval()(ids, labels=ids).loss.item() * (keep - 1), keep - 1))
    assert trainer.evaluate()["loss"] == pytest.approx(sum(a for a, _ in rows) / sum(n for _, n in rows), rel=1e-4)


def test_samples_do_not_disturb_the_run(tmp_path):
    def run(folder, sample):
        trainer = build_trainer(folder, eval_data={"a": held_out()}, eval_every_n_steps=3)
        trainer.evaluation.sample = sample
        trainer.train()
        return trainer.model

    noisy = run(tmp_path / "a", lambda model: str(torch.rand(10).sum()))
    assert equal_weights(noisy, run(tmp_path / "b", None))
    assert len(records(tmp_path / "a", "sample")) == 4


def test_goals_are_turned_on_before_the_first_step_and_each_evaluation(tmp_path):
    trainer = build_trainer(tmp_path, max_steps=6, eval_every_n_steps=4)
    seen = []

    def goals():
        seen.append(trainer.state.step)
        trainer.model.steering.goal_bias[0, 1] = 0.5
        return {"event": "goal_bias", "beta": 0.5}

    trainer.evaluation.goals, trainer.evaluation.goals_key = goals, "x"
    trainer.train()
    assert seen == [0, 4, 6]
    assert [record["step"] for record in records(tmp_path, "goal_bias")] == seen
    assert trainer.model.steering.has_goals
