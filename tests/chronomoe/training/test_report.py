"""TensorBoard shows what metrics.jsonl holds."""

import sys
import warnings

import pytest

from chronomoe.errors import ConfigError
from tests.chronomoe.training.building import build_model, build_trainer, held_out, kill_at, records


def test_tensorboard_has_the_numbers_of_the_metrics(tmp_path):
    pytest.importorskip("tensorboard")
    with warnings.catch_warnings(action="ignore"):  # of its own
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    settings = {"tensorboard": True, "save_every_n_steps": 4, "eval_every_n_steps": 5, "eval_data": {"a": held_out()}}
    kill_at(build_trainer(tmp_path, build_model(), **settings), 7)
    resumed = build_trainer(tmp_path, build_model(seed=9), **settings)
    resumed.load_checkpoint("latest")
    resumed.train()
    board = EventAccumulator(str(tmp_path / "tensorboard"), purge_orphaned_data=True).Reload()
    for event, name in (("train", "loss"), ("train", "R"), ("eval", "a")):
        kept = {record["step"]: record[name] for record in records(tmp_path, event)}
        assert len(kept) > 1
        shown = [(point.step, point.value) for point in board.Scalars(f"{event}/{name}")]
        assert shown == [(step, pytest.approx(value)) for step, value in kept.items()]


def test_without_tensorboard_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ConfigError, match=r"pip install 'chronomoe-aios\[tensorboard\]'"):
        build_trainer(tmp_path, tensorboard=True)
