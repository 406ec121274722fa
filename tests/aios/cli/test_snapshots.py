"""What every `--help` prints, and the shape of what `--json` prints, as files: wording is reviewed like code.

SNAPSHOTS=update make snapshots      writes them again; look at the difference before you commit it
"""

import json
import os
from pathlib import Path

import pytest
from rich.console import Console

from aios.cli import EVERY_COMMAND as COMMANDS

HERE = Path(__file__).parent / "snapshots"
UPDATE = os.environ.get("SNAPSHOTS") == "update"
GROUPS = sorted({command.split()[0] for command in COMMANDS if " " in command})
SHAPES = [
    "brains list",
    "brains show straight",
    "experts create tales --goal=Tell_stories --description=Of_the_sea",
    "experts create laws",
    "experts set-parent laws tales",
    "experts list",
    "experts show tales",
    "experts import-registry",
    "experts stats",
    "experts freeze tales",
    "experts rename laws rules",
    "goals add Answer_briefly --expert-id tales",
    "goals link-expert 2 straight:0.1",
    "goals unlink-expert 2 straight:0.1",
    "goals weigh 2 0.5",
    "goals deactivate 2",
    "goals list --all",
    "goals list-for-expert tales",
    "goals get-expert 1",
    "goals remove 2",
    "goals remove-like stories",
    "goals get-expert 99",
    "experts delete rules --yes",
    "evaluate straight --tokens 100",
    "generate straight --prompt A --max-new-tokens 2",
    "brains rename straight other",
]
"""Commands that follow one another in one workspace; _ stands for a space."""


def snapshot(name: str, text: str) -> None:
    """Compare with the file, or write it."""
    file = HERE / name
    if UPDATE:
        HERE.mkdir(exist_ok=True)
        file.write_text(text, encoding="utf-8")
    assert file.is_file(), f"{file} is missing: SNAPSHOTS=update make snapshots"
    assert text == file.read_text(encoding="utf-8")


@pytest.mark.parametrize("command", ["", *GROUPS, *COMMANDS])
def test_help(command, aios, monkeypatch):
    monkeypatch.setattr("aios.cli.app.console", Console(width=100))  # one made earlier keeps the width it had
    outcome = aios(*command.split(), "--help")
    assert outcome.code == 0
    text = "\n".join(line.rstrip() for line in outcome.out.splitlines()) + "\n"
    snapshot(f"{command.replace(' ', '-') or 'aios'}.txt", text)


def test_every_snapshot_is_of_a_command():
    names = {f"{command.replace(' ', '-') or 'aios'}.txt" for command in ["", *GROUPS, *COMMANDS]} | {"json.txt"}
    assert {file.name for file in HERE.iterdir()} == names


def shape(value: object) -> object:
    """Keys and types; of a list the shapes of its items, each once."""
    if isinstance(value, dict):
        return {key: shape(one) for key, one in value.items()}
    if isinstance(value, list):
        shapes: list[object] = []
        for one in map(shape, value):
            if one not in shapes:
                shapes.append(one)
        return shapes
    return "null" if value is None else type(value).__name__


def test_shapes_of_json(brain, aios):
    root = brain.parents[3]
    printed = []
    for command in SHAPES:
        words = [word.replace("_", " ") for word in command.split()]
        outcome = aios(*words, "--json", "--root", root)
        value = json.loads(outcome.out)
        printed.append(f"$ aios {command} --json    exit {outcome.code}\n{json.dumps(shape(value), indent=1)}\n")
    snapshot("json.txt", "\n".join(printed))
