"""A tiny workspace with a brain and an expert, the manager serving a copy of it, and a browser.

Run by `make test-web`: it takes nicegui, playwright, and Debian's chromium (or CHROMIUM=path).
"""

import contextlib
import io
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

# Threads of a job that wait for each other while browser and page hold the cores take five times as long as one alone.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
from playwright.sync_api import Page, expect, sync_playwright

from aios.cli import run
from aios.manager.jobs import Jobs

TINY = [
    *("--hidden-dim", "32", "--num-layers", "2", "--num-experts", "4", "--seq-len", "32", "--batch-size", "2"),
    *("--learning-rate", "3e-2", "--eval-tokens", "300", "--log-every-n-steps", "5"),
    *("--eval-every-n-steps", "10", "--save-every-n-steps", "20"),
]
EXPERT = [
    "--steps",
    "8",
    "--batch-size",
    "2",
    "--max-seq-len",
    "32",
    "--eval-tokens",
    "300",
    "--calibration-windows",
    "8",
]
expect.set_options(timeout=15_000)


def thinker(root: Path) -> list[str]:
    """The command that trains a tiny HRM brain of two segments."""
    text = root / "training_data/curated_datasets/test_sample.txt"
    return [
        "hrm-hf", "train-actv1", "--model", str(root / "artifacts/hf_implant/base_model"), "--dataset-file", str(text),
        "--brain-name", "thinker", "--hidden-size", "32", "--num-heads", "4", "--h-layers", "1", "--l-layers", "1",
        "--max-seq-len", "16", "--batch-size", "2", "--no-gradient-checkpointing", "--eval-batches", "2",
        "--steps", "4", "--use-moe", "--num-experts", "4", "--halt-max-steps", "2", "--root", str(root),
    ]  # fmt: skip


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace, never written to again."""
    root = tmp_path_factory.mktemp("web") / "w"
    for words in (
        ["init", "--max-bytes", "60000", "--vocab-size", "400"],
        ["train", "--name", "small", *TINY, "--max-steps", "40"],
        [
            "experts",
            "train",
            "laws",
            "--brain",
            "small",
            "--dataset-file",
            str(root / "training_data/licences"),
            *EXPERT,
        ],
        ["goals", "add", "Know licences", "--expert-id", "laws"],
    ):
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            assert run([*words, "--root", str(root)]) == 0, printed.getvalue()
    return root


@pytest.fixture
def root(made: Path, tmp_path: Path) -> Iterator[Path]:
    """A copy of the workspace; jobs that a test leaves behind are ended."""
    yield Path(shutil.copytree(made, tmp_path / "w"))
    for job in Jobs(tmp_path / "w").all():
        if job.state == "running" and job.pid is not None:
            os.kill(job.pid, signal.SIGKILL)


class Served:
    """The manager, serving."""

    def __init__(self, root: Path, *options: str) -> None:
        self.root = root
        self.log = root.parent / f"manager-{time.monotonic_ns()}.log"
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "aios", "manager", "--no-open", "--port", "0", "--root", str(root), *options],
                stdout=log, stderr=subprocess.STDOUT, env={**os.environ, "PYTHONUNBUFFERED": "1"},
            )  # fmt: skip
        deadline = time.monotonic() + 60
        self.address = ""
        while time.monotonic() < deadline and not self.address:
            lines = self.log.read_text().splitlines()
            self.address = next((w for line in reversed(lines) for w in line.split() if w.startswith("http")), "")
            assert self.process.poll() is None, lines
            time.sleep(0.05)
        self.address = self.address.partition("?")[0].rstrip("/")
        while time.monotonic() < deadline:
            try:
                urllib.request.urlopen(self.address + "/jobs", timeout=10).close()
                return
            except urllib.error.HTTPError as answer:  # it wants a token
                answer.close()
                return
            except OSError:
                time.sleep(0.05)
        self.stop(signal.SIGKILL)
        raise AssertionError("the manager does not answer")

    def stop(self, how: int = signal.SIGINT) -> int:
        """End it."""
        self.process.send_signal(how)
        return self.process.wait(30)


@pytest.fixture
def served(root: Path) -> Iterator[Served]:
    """The manager on the copy."""
    one = Served(root)
    yield one
    if one.process.poll() is None:
        assert one.stop() == 0
    assert "Traceback" not in one.log.read_text()


@pytest.fixture(scope="session")
def chromium() -> Iterator[object]:
    """The browser."""
    with sync_playwright() as play:
        place = os.environ.get("CHROMIUM", "/usr/bin/chromium")
        browser = play.chromium.launch(executable_path=place, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(chromium, served: Served) -> Iterator[Page]:
    """A window; at the end nothing was asked of another machine, and the console has no error."""
    context = chromium.new_context(viewport={"width": 1280, "height": 800}, base_url=served.address)
    window = context.new_page()
    wrong: list[str] = []
    window.on("console", lambda line: wrong.append(line.text) if line.type == "error" else None)
    window.on("pageerror", lambda error: wrong.append(str(error)))
    window.on("dialog", lambda dialog: (wrong.append(f"dialog {dialog.message}"), dialog.dismiss()))
    ours = ("http://127.0.0.1:", "data:", "blob:")  # a test may serve twice
    window.on("request", lambda asked: None if asked.url.startswith(ours) else wrong.append(asked.url))
    window.on("websocket", lambda opened: None if "://127.0.0.1:" in opened.url else wrong.append(opened.url))
    yield window
    context.close()
    assert wrong == []
