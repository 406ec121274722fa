"""Every script in examples/ runs, with tiny sizes; each asserts what it shows."""

import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
TINY = {
    "train_mixtral.py": ["text.txt", "--steps", "6", "--hidden-dim", "32"],
    "steer_olmoe.py": [],
    "trainer_callback.py": ["--steps", "6"],
    "one_expert.py": ["--steps", "4"],
    "one_goal.py": [],
}


def test_every_example_is_here_and_in_the_list():
    assert {file.name for file in EXAMPLES.glob("*.py")} == set(TINY)
    listed = (EXAMPLES / "README.md").read_text()
    assert all(f"`{name}`" in listed for name in TINY)


@pytest.mark.parametrize("name", TINY)
def test_example(name, tmp_path, monkeypatch, capsys):
    (tmp_path / "text.txt").write_text("The sun rose over the town. " * 200)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [name, *TINY[name]])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    assert capsys.readouterr().out
