"""Layers of a run: what a call says, what its brain was begun with, what the family has."""

import subprocess
import sys
from pathlib import Path

import pytest

from aios.settings.train import MixtralRun, ModelShape
from chronomoe.errors import ConfigError
from chronomoe.training.config import TrainingConfig

BEGUN = MixtralRun(
    name="a", data=Path("d"), seq_len=64, root=Path("r"), shape=ModelShape(hidden_dim=32), max_steps=9, seed=4
)


def test_a_resumed_run_keeps_its_settings_and_takes_the_given_ones():
    saved = MixtralRun.from_json(BEGUN.to_json())
    run = MixtralRun(name="a", resume=True, stop_after=5, max_steps=12).over(saved)
    assert run.changes_from(saved) == {"max_steps": (9, 12)}
    assert run == MixtralRun(
        name="a", data=Path("d"), seq_len=64, resume=True, stop_after=5, shape=BEGUN.shape, max_steps=12, seed=4
    )


def test_what_concerns_one_call_is_not_saved():
    assert not {"root", "name", "resume", "dry_run", "stop_after", "goals"} & BEGUN.to_json().keys()


@pytest.mark.parametrize("setting", [{"seq_len": 1}, {"eval_tokens": -1}, {"stop_after": 0}, {"start_offset": 0.5}])
def test_settings_are_checked(setting):
    with pytest.raises(ConfigError, match=next(iter(setting))):
        MixtralRun(**setting)


def test_a_flag_given_at_its_default_value_is_given():
    saved = MixtralRun.from_json(BEGUN.to_json())
    run = MixtralRun(seed=0, seq_len=256).over(saved)
    assert run.changes_from(saved) == {"seq_len": (64, 256), "seed": (4, 0)}
    assert (run.seed, run.seq_len) == (0, 256)


def test_a_stop_file_is_remembered_wherever_it_was_named_from(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = MixtralRun(stop_file="STOP")
    assert run.to_json()["stop_file"] == str(tmp_path / "STOP")
    assert run.over(run).changes_from(run) == {}  # given once more on --resume: nothing changes


def test_the_library_gets_its_own_settings():
    config = MixtralRun(seq_len=64, learning_rate=0.5, keep_last=2).training(max_steps=7)
    assert type(config) is TrainingConfig
    assert config == TrainingConfig(learning_rate=0.5, keep_last=2, kappa_warmup_steps=None, max_steps=7)


def test_runs_import_nothing_heavy():
    code = (
        "import sys, aios.settings.train, aios.settings.actv1, aios.actions.train;"
        "sys.exit(bool({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
