"""Metrics records: what a step was, averaged since the last record."""

import pytest

from tests.chronomoe.training.building import build_trainer, records


def test_router_losses_are_in_the_log_and_in_the_loss(tmp_path):
    build_trainer(tmp_path, max_steps=2, lambda_balance=0.3).train()
    for record in records(tmp_path):
        extra = record["loss"] - record["lm_loss"] - 0.001 * record["z_loss"]
        assert extra == pytest.approx(0.3, rel=0.05)
        assert 0.9 < record["lb_loss"] < 2
        assert len(record["load"]) == 2
        assert sum(record["load"][0]) == pytest.approx(1)


def test_lb_loss_is_that_of_the_steps_own_load(tmp_path):
    trainer = build_trainer(tmp_path, max_steps=1)
    trainer.train()
    window = trainer.metrics.window
    expected = 4 * (
        window.assignments / (2 * window.tokens[:, None]) * window.probability / window.tokens[:, None]
    ).sum(-1)
    assert records(tmp_path)[0]["lb_loss"] == pytest.approx(expected.mean().item(), rel=1e-5)
