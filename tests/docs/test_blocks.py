"""Every fenced block of README and docs runs: `aios` lines through the command line, python blocks as scripts.

The blocks of a page run in its order, in one workspace that has a brain `small`. Sizes are made tiny by flags that are
added. A line that cannot run here is in NOT_RUN, with the reason.
"""

import contextlib
import io
import os
import re
import runpy
import shlex
import shutil
import sys
from pathlib import Path

import pytest

from aios.cli import run

ROOT = Path(__file__).parents[2]
PAGES = ["README.md", *sorted(str(file.relative_to(ROOT)) for file in (ROOT / "docs").rglob("*.md"))]
NOT_RUN = {
    "make ": "its own recipe; CI runs it",
    "pip install ": "changes the environment",
    "aios manager": "serves until it is stopped; tests/web does it",
    "accelerate launch ": "starts processes; tests/chronomoe/training/test_distributed.py does",
    "PYTHONPATH=": "an earlier version's code",
}
SMALL = ["--hidden-dim", "16", "--num-layers", "2", "--num-experts", "4", "--seq-len", "32", "--batch-size", "2"]
SHORT = ["--max-steps", "6", "--eval-tokens", "200", "--log-every-n-steps", "3", "--eval-every-n-steps", "6"]
HRM = ["--hidden-size", "32", "--num-heads", "2", "--h-layers", "1", "--l-layers", "1", "--max-seq-len", "16"]
HRM += ["--batch-size", "2", "--eval-batches", "1"]
EXPERT = [
    "--steps",
    "2",
    "--batch-size",
    "2",
    "--max-seq-len",
    "16",
    "--eval-tokens",
    "100",
    "--calibration-windows",
    "8",
]
TINY = {
    ("init",): ["--max-bytes", "60000", "--vocab-size", "400"],
    ("train",): [*SMALL, *SHORT],
    ("generate",): ["--max-new-tokens", "4"],
    ("chat",): ["--max-new-tokens", "4"],
    ("evaluate",): ["--tokens", "200"],
    ("hrm-hf", "train-actv1"): [*HRM, "--steps", "2"],
    ("experts", "train"): EXPERT,
    ("goals", "teach"): EXPERT[:8],
    ("goals", "explain"): ["--goal-beta", "0.5"],
}
"""What is added to a command so that it takes a second; a flag given twice counts as its last."""
LICENCE = "Permission is hereby granted, free of charge, to any person obtaining a copy of this software. "


def blocks(page: str) -> list[tuple[str, str]]:
    """(language, text) of each fenced block."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def commands(text: str) -> list[str]:
    """The command lines of a shell block, continued lines joined, comments gone."""
    lines = text.replace("\\\n", " ").splitlines()
    return [line for line in (re.sub(r"(^|\s)#.*", "", line).strip() for line in lines) if line]


def reason(command: str) -> str | None:
    """Why a command is not run, if it is not."""
    return next((why for prefix, why in NOT_RUN.items() if command.startswith(prefix)), None)


def tiny(words: list[str]) -> list[str]:
    """The same command, made to take a second."""
    added = next((extra for start, extra in TINY.items() if tuple(words[: len(start)]) == start), [])
    given = {word for word in words if word.startswith("--")}
    if "--resume" in given:  # a resumed run has its own settings
        return words
    words = list(words)
    for flag, value in zip(added[::2], added[1::2], strict=True):
        if flag in given:
            words[words.index(flag) + 1] = value
        else:
            words += [flag, value]
    return words


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace as the pages take it for granted."""
    root = tmp_path_factory.mktemp("pages") / "w"
    with contextlib.redirect_stdout(io.StringIO()):
        assert run(tiny(["init", "--root", str(root)])) == 0
        assert run(tiny(["train", "--root", str(root), "--name", "small"])) == 0
    (root / "my-licences").mkdir()
    for number in range(12):
        (root / f"my-licences/{number}.txt").write_text(LICENCE * (number + 3))
    (root / "my.txt").write_text("The sun rose over the small town and people walked to work. " * 80)
    (root / "notes").mkdir()
    (root / "notes/one.txt").write_text("Notes of a day, and of the day after it. " * 60)
    (root / "mail.jsonl").write_text('{"body": "Dear friend, the parcel came in time."}\n' * 40)
    shutil.copytree(ROOT / "examples", root / "examples")
    return root


BEFORE = {
    "docs/goals.md": [
        "aios experts train laws --brain small --dataset-file my-licences",
        "aios experts attach laws --brain small",
    ],
}
"""What a page takes for granted beyond that."""


@pytest.mark.parametrize("page", [page for page in PAGES if any(kind == "bash" for kind, _ in blocks(page))])
def test_commands(page, made, tmp_path, monkeypatch, capsys):
    root = tmp_path / "w"
    shutil.copytree(made, root)
    monkeypatch.chdir(root)
    monkeypatch.setenv("HOME", str(root))
    lines = [line for kind, text in blocks(page) if kind == "bash" for line in commands(text)]
    for line in BEFORE.get(page, []) + lines:
        if reason(line):
            continue
        words = shlex.split(os.path.expandvars(line))
        assert words[0] == "aios", f"{page}: {line!r} neither runs nor is in NOT_RUN"
        monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n"))
        code = run(tiny(words[1:]))
        assert code == 0, (page, line, capsys.readouterr())


@pytest.mark.parametrize("page", [page for page in PAGES if any(kind == "python" for kind, _ in blocks(page))])
def test_python(page, made, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for number, (kind, text) in enumerate(blocks(page)):
        included = re.fullmatch(r'--8<-- "(examples/\w+\.py)"\n', text)
        if kind != "python":
            continue
        if included:  # tests/examples runs it
            assert (ROOT / included[1]).is_file()
            continue
        script = tmp_path / f"block{number}.py"
        script.write_text(text.replace("path/to/a/mixtral-olmoe-or-qwen-moe", str(tiny_mixtral(tmp_path))))
        runpy.run_path(str(script), run_name="__main__")


def tiny_mixtral(folder: Path) -> Path:
    """A checkpoint of transformers' own Mixtral, as small as the block allows: its layer 3 has an expert 5."""
    from transformers import MixtralConfig, MixtralForCausalLM

    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2}
    config = MixtralConfig(vocab_size=64, num_key_value_heads=2, num_local_experts=8, **shape)
    MixtralForCausalLM(config).save_pretrained(folder / "mixtral")
    return folder / "mixtral"


@pytest.mark.parametrize("page", PAGES)
def test_blocks_say_what_they_are(page):
    """Commands and Python stand in fences with a language, so that the tests above find them."""
    text = (ROOT / page).read_text(encoding="utf-8")
    assert all(kind in ("bash", "python", "text", "math", "toml", "json") for kind, _ in blocks(page))
    outside = re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    assert not re.findall(r"^    (?:aios|make|pip|python|import|from) .*", outside, re.MULTILINE)
