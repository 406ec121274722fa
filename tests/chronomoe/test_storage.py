"""Keeping other processes out."""

import time

import pytest

from chronomoe.errors import CheckpointError
from chronomoe.storage import held


def test_one_at_a_time_and_free_again_whatever_happens(tmp_path):
    lock = tmp_path / "deep" / "lock"
    with held(lock, "busy"), pytest.raises(CheckpointError, match="busy"), held(lock, "busy"):
        pass
    with pytest.raises(KeyError), held(lock, "busy"):
        raise KeyError
    with held(lock, "busy"):
        pass


def test_others_are_waited_for_as_long_as_it_is_said(tmp_path):
    with held(tmp_path / "lock", "busy"):
        began = time.monotonic()
        with pytest.raises(CheckpointError, match="busy"), held(tmp_path / "lock", "busy", 0.3):
            pass
    assert time.monotonic() - began >= 0.3
