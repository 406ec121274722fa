"""goals.json of a brain: what was written is read back; files of other versions are refused."""

import shutil
from pathlib import Path

import pytest

from aios.brains.brain import Brain
from aios.goals.memory import GOALS_FILE, read_memory
from chronomoe.errors import CheckpointError

OLD = Path(__file__).parents[2] / "fixtures/0.1.0/workspace/artifacts/brains/mixtral/small" / GOALS_FILE


def test_a_file_of_version_0_1_0_is_refused_with_what_to_do(tmp_path):
    shutil.copy(OLD, tmp_path / GOALS_FILE)
    with pytest.raises(CheckpointError, match=r"goals\.json .*0\.1\.0.*name the goals again with --goal"):
        read_memory(Brain(tmp_path, tmp_path))


def test_without_the_file_there_are_no_goals(tmp_path):
    assert read_memory(Brain(tmp_path, tmp_path)).goals == ()
