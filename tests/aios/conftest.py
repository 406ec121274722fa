"""One tiny workspace and one tiny trained brain, made once; tests that change something work on a copy."""

import contextlib
import io
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from aios.cli import run

STEPS = 24
TINY = [
    *("--hidden-dim", "32", "--num-layers", "1", "--num-experts", "4", "--seq-len", "32", "--batch-size", "2"),
    *("--max-steps", str(STEPS), "--learning-rate", "3e-2", "--eval-tokens", "300", "--log-every-n-steps", "5"),
    *("--eval-every-n-steps", "10", "--save-every-n-steps", "8", "--keep-last", "9"),
]


@dataclass(frozen=True)
class Outcome:
    """What a command line did."""

    code: int
    out: str
    err: str


@pytest.fixture
def aios(capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    def call(*words: object) -> Outcome:
        capsys.readouterr()
        code = run([str(word) for word in words])
        captured = capsys.readouterr()
        assert "Traceback" not in captured.out + captured.err
        return Outcome(code, captured.out, captured.err)

    return call


@pytest.fixture
def train(aios: Callable[..., Outcome]) -> Callable[..., Outcome]:
    """Begin a tiny brain: root, name, further options."""

    def call(root: Path, name: str, *options: object) -> Outcome:
        return aios("train", "--root", root, "--name", name, *TINY, *options)

    return call


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A workspace, never written to again, and what `aios init` printed. Its path needs quoting."""
    root = tmp_path_factory.mktemp("session") / "my work"
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert run(["init", "--root", str(root), "--max-bytes", "60000", "--vocab-size", "400"]) == 0
    return root, printed.getvalue()


@pytest.fixture(scope="session")
def straight(made: tuple[Path, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace, never written to again, with the brain "straight", trained without a stop."""
    root = tmp_path_factory.mktemp("straight") / "w"
    shutil.copytree(made[0], root)
    with contextlib.redirect_stdout(io.StringIO()):
        assert run(["train", "--root", str(root), "--name", "straight", *TINY]) == 0
    return root


@pytest.fixture
def workspace(made: tuple[Path, str], tmp_path: Path) -> Path:
    """A copy of the workspace."""
    return Path(shutil.copytree(made[0], tmp_path / "my work"))


@pytest.fixture
def brain(straight: Path, tmp_path: Path) -> Path:
    """A copy of the workspace with the trained brain: the bundle."""
    return Path(shutil.copytree(straight, tmp_path / "w")) / "artifacts/brains/mixtral/straight"
