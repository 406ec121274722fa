"""A workspace with a trained expert."""

import contextlib
import io
import shutil
from pathlib import Path

import pytest

from aios.cli import run

TRAIN = ("--steps", 4, "--batch-size", 2, "--max-seq-len", 32, "--eval-tokens", 300, "--calibration-windows", 12)


@pytest.fixture
def root(brain):
    return brain.parents[3]


@pytest.fixture(scope="session")
def with_laws(straight, tmp_path_factory):
    """A workspace, never written to again, with a trained expert that is attached to nothing."""
    root = Path(shutil.copytree(straight, tmp_path_factory.mktemp("laws") / "w"))
    said = train(root, "laws", root / "training_data/licences", "--default-goal", "Read laws")
    assert f"Next: aios experts attach laws --brain straight --root {root}" in said
    return root


@pytest.fixture(scope="session")
def with_three(with_laws, tmp_path_factory):
    """The same with two more experts, of other texts."""
    root = Path(shutil.copytree(with_laws, tmp_path_factory.mktemp("three") / "w"))
    train(root, "code", root / "training_data/python")
    sums = root / "sums.txt"
    sums.write_text("".join(f"{n} times {n} is {n * n}; " for n in range(4000)))
    train(root, "sums", sums)
    return root


def train(root, name, text, *more):
    """Train an expert by its command; what that printed."""
    words = ["experts", "train", name, "--brain", "straight", "--dataset-file", text, "--root", root, *TRAIN, *more]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert run(list(map(str, words))) == 0
    return printed.getvalue()


def take_over(source, root):
    """Copy the experts and goals of another workspace."""
    shutil.copytree(source / "artifacts/experts", root / "artifacts/experts", dirs_exist_ok=True)
    for file in (source / "artifacts").glob("aios.db*"):
        shutil.copy(file, root / "artifacts")


@pytest.fixture
def expert(root, brain, with_laws):
    """The file of a trained expert that is attached to nothing."""
    take_over(with_laws, root)
    return root / "artifacts/experts/laws/expert.safetensors"


@pytest.fixture
def three(root, brain, with_three):
    """The folder of three trained experts, laws, code and sums, that are attached to nothing."""
    take_over(with_three, root)
    return root / "artifacts/experts"
