"""Pictures of a run, from one history of its metrics."""

import json
import sys

import pytest

from aios.brains.metrics import read_metrics
from aios.brains.plot import plot_run
from chronomoe.errors import CheckpointError, ConfigError

PICTURES = ["control", "landscape", "load", "loss"]


def test_a_trained_brain_is_drawn(brain, aios):
    outcome = aios("plot", "straight", "--root", brain.parents[3])
    assert outcome.code == 0
    drawn = sorted((brain / "plots").iterdir())
    assert [path.stem for path in drawn] == PICTURES
    for path in drawn:
        assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
        assert path.stat().st_size > 5000
        assert str(path) in outcome.out


def test_a_metrics_file_elsewhere(brain, aios, tmp_path):
    assert aios("plot", brain / "metrics.jsonl", "--out", tmp_path / "p").code == 0
    assert sorted(path.stem for path in (tmp_path / "p").iterdir()) == PICTURES


def test_what_a_continued_run_did_again_counts_once(tmp_path):
    events = [
        *({"event": "train", "step": n, "loss": 1.0} for n in range(1, 7)),
        {"event": "resumed", "step": 3},
        *({"event": "train", "step": n, "loss": 2.0} for n in range(4, 6)),
    ]
    file = tmp_path / "metrics.jsonl"
    file.write_text("".join(json.dumps(event) + "\n" for event in events) + '{"event": "st')
    found = read_metrics(file)
    assert [(record["step"], record["loss"]) for record in found] == [(1, 1), (2, 1), (3, 1), (4, 2), (5, 2)]


def test_a_dense_runs_loss_is_drawn_alone(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text(json.dumps({"event": "train", "step": 1, "loss": 2.0}) + "\n")
    assert [path.name for path in plot_run(file)] == ["loss.png"]


@pytest.mark.parametrize("odd", [{"load": "x"}, {"T_bar": [[1], [2, 3]]}, {"kappa": {}, "R": 1, "gate": 1}])
def test_what_is_no_number_is_named(tmp_path, odd):
    file = tmp_path / "metrics.jsonl"
    file.write_text("".join(json.dumps({"event": "train", "step": n, "loss": 1.0} | odd) + "\n" for n in (1, 2)))
    with pytest.raises(CheckpointError, match="holds something that is no number"):
        plot_run(file)


def test_nothing_to_draw_is_said(brain, aios, tmp_path, monkeypatch):
    outcome = aios("plot", "nobody", "--root", brain.parents[3])
    assert (outcome.code, "metrics" in outcome.err) == (1, True)
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(CheckpointError, match="no record"):
        plot_run(tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigError, match="plots"):
        plot_run(brain)
