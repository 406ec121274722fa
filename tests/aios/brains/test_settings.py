from pathlib import Path

import pytest

from aios.brains.settings import ModelShape, Run, RunSettings
from chronomoe.errors import ConfigError
from chronomoe.training.config import TrainingConfig

BEGUN = Run(
    settings=RunSettings(name="a", data=Path("d"), seq_len=64, root=Path("r")),
    shape=ModelShape(hidden_dim=32),
    training=TrainingConfig(max_steps=9, seed=4),
)


def test_a_resumed_run_keeps_its_settings_and_takes_the_given_ones():
    asked = Run(settings=RunSettings(name="a", resume=True, stop_after=5), training=TrainingConfig(max_steps=12))
    run, changes = asked.continuing(BEGUN.to_json())
    assert changes == {"max_steps": (9, 12)}
    assert run.settings == RunSettings(name="a", data=Path("d"), seq_len=64, resume=True, stop_after=5)
    assert run.shape == BEGUN.shape
    assert run.training == TrainingConfig(max_steps=12, seed=4)


def test_what_concerns_one_invocation_is_not_saved():
    assert not {"root", "name", "resume", "dry_run", "stop_after"} & BEGUN.to_json()["settings"].keys()


@pytest.mark.parametrize("setting", [{"seq_len": 1}, {"eval_tokens": 0}, {"stop_after": 0}])
def test_settings_are_checked(setting):
    with pytest.raises(ConfigError, match=next(iter(setting))):
        RunSettings(**setting)
