"""How far a setting travels: the files of src in which a frame has it among its arguments, counted by tracing calls.

The bounds are what is reached; docs/architecture.md, "How far a setting travels", has what was wanted.
"""

import dataclasses
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch

from aios.cli import run

SRC = Path(__file__).parents[2] / "src"
RATE = 1.2345e-3
TINY = ["--max-steps", "2", "--hidden-dim", "32", "--num-layers", "1", "--num-experts", "4", "--seq-len", "32"]
TINY_HRM = ["--steps", "2", "--batch-size", "2", "--max-seq-len", "32", "--hidden-size", "32", "--num-experts", "4"]


def arguments(frame: FrameType) -> Iterator[Any]:
    """The values a frame was called with."""
    code = frame.f_code
    count = code.co_argcount + code.co_kwonlyargcount + bool(code.co_flags & 0x04) + bool(code.co_flags & 0x08)
    for name in code.co_varnames[:count]:
        if name in frame.f_locals:
            value = frame.f_locals[name]
            yield value
            if isinstance(value, list | tuple):
                yield from value
            elif isinstance(value, dict):
                yield from value.values()


@contextmanager
def walked(carries: Callable[[Any], bool], stop: Callable[[], bool] = lambda: False) -> Iterator[list[str]]:
    """Within the block: the files of src, in order, in which a frame carries what is followed, until ``stop``."""
    files: list[str] = []
    prefix = f"{SRC}{os.sep}"

    def profile(frame: FrameType, event: str, _: Any) -> None:
        file = frame.f_code.co_filename
        if event != "call" or not file.startswith(prefix) or stop():
            return
        name = file.removeprefix(prefix)
        if name not in files and any(carries(value) for value in arguments(frame)):
            files.append(name)

    previous = sys.getprofile()
    sys.setprofile(profile)
    try:
        yield files
    finally:
        sys.setprofile(previous)


def holds_rate(value: Any, depth: int = 3) -> bool:
    """Is this the learning rate, or settings that hold it?"""
    if isinstance(value, float):
        return value == RATE
    if isinstance(value, str):
        return str(RATE) in value
    if dataclasses.is_dataclass(value) and not isinstance(value, type) and depth:
        fields = (vars(value).get(field.name) for field in dataclasses.fields(value))
        return any(holds_rate(field, depth - 1) for field in fields)
    return False


@pytest.mark.parametrize(
    ("words", "most"),
    [
        (["train", "--name", "walked", *TINY, "--learning-rate", str(RATE)], 8),
        (["hrm-hf", "train-actv1", "--brain-name", "walked", *TINY_HRM, "--no-auto-adjust-lr", "--lr", str(RATE)], 10),
    ],
    ids=["train --learning-rate", "train-actv1 --lr"],
)
def test_learning_rate_passes_few_files(
    words: list[str], most: int, workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[bool] = []
    begin = torch.optim.Optimizer.__init__

    def note(self: Any, *args: Any, **kwargs: Any) -> None:
        built.append(True)
        begin(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.Optimizer, "__init__", note)
    if words[0] == "hrm-hf":
        words = [*words, "--dataset-file", str(workspace / "training_data")]
    with walked(holds_rate, stop=lambda: bool(built)) as files:
        assert run([*words, "--root", str(workspace)]) == 0
    assert built
    print(*files, sep="\n")
    assert len(files) <= most


def holds_expert_or_brain(value: Any) -> bool:
    """Is this the expert `walked` or the brain `straight`: its name, its folder, or an object that has either?"""
    if isinstance(value, str | Path):
        return Path(value).name in ("walked", "straight")
    ids = (getattr(value, name, None) for name in ("expert_id", "name", "bundle", "path", "folder"))
    return any(isinstance(found, str | Path) and holds_expert_or_brain(found) for found in ids)


def test_attaching_passes_few_files(brain: Path) -> None:
    root = str(brain.parents[3])
    text = str(brain.parents[3] / "training_data/licences")
    small = ["--steps", "2", "--batch-size", "2", "--max-seq-len", "32", "--eval-tokens", "300"]
    train = ["experts", "train", "walked", "--brain", "straight", "--dataset-file", text, *small]
    assert run([*train, "--calibration-windows", "12", "--root", root]) == 0
    with walked(holds_expert_or_brain) as files:
        assert run(["experts", "attach", "walked", "--brain", "straight", "--root", root]) == 0
    print(*files, sep="\n")
    assert len(files) <= 21
