import io
import sys
from pathlib import Path

import pytest

from aios.actions import standard_input
from aios.actions.standard_input import as_file, read_text
from chronomoe.errors import ConfigError


@pytest.fixture
def typed(monkeypatch):
    """Put bytes on standard input."""

    def call(data: bytes) -> None:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), "utf-8"))

    return call


def test_a_text_is_given_or_read(typed, tmp_path):
    typed("Zürich\nnoch eine Zeile\n".encode())
    assert read_text("Bern") == "Bern"
    assert read_text("-") == "Zürich\nnoch eine Zeile\n"
    typed(b"caf\xe9")
    assert read_text("-") == "caf\ufffd"
    typed(b"some words\n")
    with as_file(tmp_path / "-") as file:
        assert file == tmp_path / "-"
    with as_file(Path("-")) as file:
        assert file.read_bytes() == b"some words\n"
    assert not file.exists()


def test_more_than_is_read_is_refused(typed, monkeypatch):
    monkeypatch.setattr(standard_input, "MOST_CHARACTERS", 100)
    monkeypatch.setattr(standard_input, "MOST_BYTES", 100)
    typed(b"x" * 101)
    with pytest.raises(ConfigError, match="more than 100 characters"):
        read_text("-")
    typed(b"x" * 101)
    with pytest.raises(ConfigError, match="more than 100 bytes"), as_file(Path("-")):
        pass


def test_no_standard_input(monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(ConfigError, match="no standard input"):
        read_text("-")


def test_commands_read_it(brain, aios, typed):
    root = brain.parents[3]
    text = "Of the sea and of the ships, and of the men who sail them. " * 40
    explained = {}
    for words in (("--text", text), ("--text", "-"), ("--text=-",)):
        typed(text.encode())
        assert aios("goals", "add", "Tell stories", "--root", root).code in (0, 1)
        outcome = aios("goals", "explain", "--brain", "straight", *words, "--root", root, "--json")
        assert outcome.code == 0, outcome.err
        explained[words] = outcome.out
    assert len(set(explained.values())) == 1
    (root / "t.txt").write_text(text)
    measured = []
    for path in (root / "t.txt", "-"):
        typed(text.encode())
        outcome = aios("evaluate", "straight", "--text", path, "--root", root, "--tokens", 100, "--json")
        assert outcome.code == 0, outcome.err
        measured.append(outcome.out)
    assert "standard_input" in measured[1]
    assert measured[1].replace("standard_input", "t") == measured[0]
    typed(b"")
    outcome = aios("evaluate", "straight", "--text", "-", "--root", root)
    assert (outcome.code, "standard_input.txt holds no text" in outcome.err) == (1, True)
