import json
import shlex
from pathlib import Path

import pytest

from aios.brains import base
from aios.workspace import Workspace


@pytest.fixture(autouse=True)
def small(monkeypatch):
    make = base.make_workspace

    def make_small(root, *, vocab_size, max_bytes, report):
        make(root, max_bytes=20_000, vocab_size=300)
        file = Workspace(root).base_model / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"num_hidden_layers": 1, "hidden_size": 32}))

    monkeypatch.setattr(base, "make_workspace", make_small)


def test_demo_and_what_it_suggests(aios, tmp_path, monkeypatch):
    root = tmp_path / "my demo"
    Workspace(root).brain("demo1").mkdir(parents=True)
    outcome = aios("demo", "--root", root, "--steps", 2)
    assert outcome.code == 0, outcome.err
    assert "Stopped at step 1 on purpose" in outcome.out
    table = outcome.out.split("Held-out bits per byte        this brain   unigram model\n")[1].splitlines()[:3]
    assert [line.split()[0] for line in table] == ["oratory", "python", "licences"]
    assert all(1 < float(number) < 9 for line in table for number in line.split()[1:])
    assert Workspace(root).brain("demo2").is_dir(), "an earlier demo is left alone"
    commands = [shlex.split(line) for line in outcome.out.split("Try next:\n")[1].splitlines()]
    assert [command[1] for command in commands] == ["generate", "train", "data", "train"]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").write_text("my own words, again and again. " * 200)
    for command in commands:
        words = [word.replace("/path/to/your/", "") for word in command[1:]]
        extra = {"generate": ("--max-new-tokens", 3), "train": ("--dry-run", "--seq-len", 9), "data": ()}[words[0]]
        assert aios(*words, *extra).code == 0, words


def test_in_one_step(aios, tmp_path):
    outcome = aios("demo", "--root", tmp_path / "d", "--steps", 1)
    assert outcome.code == 0, outcome.err
    assert "nan" not in (Workspace(tmp_path / "d").brain("demo1") / "README.md").read_text()


def test_steps_that_cannot_be_leave_nothing(aios, tmp_path):
    assert aios("demo", "--root", tmp_path / "d", "--steps", 0).code == 2
    assert not Path(tmp_path / "d").exists()
