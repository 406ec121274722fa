from pathlib import Path

import pytest

from aios.brains.settings import BrainTraining, ModelShape, Run, RunSettings
from chronomoe.errors import ConfigError

BEGUN = Run(
    settings=RunSettings(name="a", data=Path("d"), seq_len=64, root=Path("r")),
    shape=ModelShape(hidden_dim=32),
    training=BrainTraining(max_steps=9, seed=4),
)


def test_a_resumed_run_keeps_its_settings_and_takes_the_given_ones():
    asked = Run(settings=RunSettings(name="a", resume=True, stop_after=5), training=BrainTraining(max_steps=12))
    run, changes = asked.continuing(BEGUN.to_json())
    assert changes == {"max_steps": (9, 12)}
    assert run.settings == RunSettings(name="a", data=Path("d"), seq_len=64, resume=True, stop_after=5)
    assert run.shape == BEGUN.shape
    assert run.training == BrainTraining(max_steps=12, seed=4)


def test_what_concerns_one_invocation_is_not_saved():
    assert not {"root", "name", "resume", "dry_run", "stop_after"} & BEGUN.to_json()["settings"].keys()


@pytest.mark.parametrize("setting", [{"seq_len": 1}, {"eval_tokens": -1}, {"stop_after": 0}])
def test_settings_are_checked(setting):
    with pytest.raises(ConfigError, match=next(iter(setting))):
        RunSettings(**setting)


def test_a_flag_given_at_its_default_value_is_given():
    asked = Run(training=BrainTraining(seed=0), settings=RunSettings(seq_len=256))
    run, changes = asked.continuing(BEGUN.to_json())
    assert changes == {"seed": (4, 0), "seq_len": (64, 256)}
    assert (run.training.seed, run.settings.seq_len) == (0, 256)


def test_a_stop_file_is_remembered_wherever_it_was_named_from(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    asked = Run(training=BrainTraining(stop_file="STOP"))
    assert asked.to_json()["training"]["stop_file"] == str(tmp_path / "STOP")
    assert asked.continuing(asked.to_json())[1] == {}  # asked for once more on --resume: nothing changes
