"""Processes that are killed on the way, and the check that registry.json says what the database says."""

import json
import sqlite3
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from aios.store import transaction
from aios.store.experts import Registry

CUTS = ("before the file", "before COMMIT", "after COMMIT", "after the file")


@pytest.fixture
def killed_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], AbstractContextManager[None]]:
    """Changes of the store within this context are killed at a point: KeyboardInterrupt, and nothing is tidied up."""

    @contextmanager
    def call(cut: str) -> Iterator[None]:
        with monkeypatch.context() as patch:
            patch.setattr(transaction, "whole_file", _killed_writer(cut))
            patch.setattr(Registry, "_settle_folders", lambda self: None)
            with pytest.raises(KeyboardInterrupt):
                yield

    return call


def _killed_writer(cut: str) -> Any:
    class File:
        """The file beside registry.json."""

        def __init__(self) -> None:
            self.beside = tempfile.TemporaryFile()  # noqa: SIM115 (closed below)

        def write(self, data: bytes) -> None:
            if cut == "before the file":
                raise KeyboardInterrupt
            self.data = data

        def flush(self) -> None:
            if cut == "before COMMIT":
                raise KeyboardInterrupt

        def fileno(self) -> int:
            return self.beside.fileno()

    @contextmanager
    def whole_file(path: Path) -> Iterator[File]:
        file = File()
        with file.beside:
            yield file
        if cut == "after the file":
            path.write_bytes(file.data)
        raise KeyboardInterrupt

    return whole_file


def assert_projected(registry: Registry) -> None:
    """registry.json says what aios.db says, read without any of our code; and nothing is left of a kill."""
    with closing(sqlite3.connect(registry.database)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        assert connection.execute("PRAGMA foreign_key_check").fetchall() == []
        experts = {
            uid: (name, version)
            for uid, name, version in connection.execute("SELECT expert_uid, expert_id, version FROM experts")
        }
        linked = connection.execute("SELECT expert_uid, text FROM links JOIN goals ON id = goal_id").fetchall()
        (revision,) = connection.execute("SELECT revision FROM registry").fetchone()
        (stones,) = connection.execute("SELECT count(*) FROM tombstones").fetchone()
    top = json.loads(registry.file.read_text())
    assert {one["expert_uid"]: (one["expert_id"], one["version"]) for one in top["experts"]} == experts
    goals = {(one["expert_uid"], text) for one in top["experts"] for text in one["goals"]}
    assert goals == {(uid, text) for uid, text in linked if uid is not None}
    assert (top["revision"], len(top["tombstones"])) == (revision, stones)
    assert not [file.name for file in registry.home.iterdir() if file.name.startswith(".aside")]
