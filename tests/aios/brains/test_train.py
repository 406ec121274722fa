"""Resuming: bit-identical after a stop and after kill -9, and refused when something changed."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save

from aios.brains.brain import Brain
from chronomoe.training.checkpoint import Checkpoint

KILLED = """\
import os, signal, sys
import torch
from aios.cli import main
from chronomoe.training.checkpoint import Checkpoint
torch.set_num_threads(1)
write = Checkpoint._write
def killed(self, *rest):
    write(self, *rest)
    if self.run.state.step == 16:
        os.kill(os.getpid(), signal.SIGKILL)
Checkpoint._write = killed
main(sys.argv[1:])
"""


def records(bundle):
    """metrics.jsonl without what the clock decides."""
    found = [json.loads(line) for line in (bundle / "metrics.jsonl").read_text().splitlines()]
    for record in found:
        record.pop("tokens_per_second", None)
    return [record for record in found if record["event"] in ("train", "eval", "sample")]


def assert_same_training(bundle, straight):
    for file in ("model", "optimizer", "chronovisor", "rng_0"):
        names = [f"checkpoints/step_24/{file}.safetensors"] + ["model.safetensors"] * (file == "model")
        for name in names:
            ours, theirs = load_file(bundle / name), load_file(straight / name)
            assert ours.keys() == theirs.keys()
            assert all(ours[key].equal(theirs[key]) for key in theirs), name


@pytest.fixture
def reference(straight):
    return straight / "artifacts/brains/mixtral/straight"


@pytest.mark.parametrize("stop", [7, 10])
def test_stopping_and_resuming_changes_no_bit(train, aios, workspace, reference, stop):
    bundle = workspace / "artifacts/brains/mixtral/a"
    assert train(workspace, "a", "--stop-after", stop).code == 0
    assert not (bundle / "model.safetensors").exists()
    assert aios("train", "--root", workspace, "--name", "a", "--resume").code == 0
    assert_same_training(bundle, reference)
    assert records(bundle) == records(reference)
    assert json.loads((bundle / "run.json").read_text()) == json.loads((reference / "run.json").read_text())


def test_kill_9_while_saving_then_resume_changes_no_bit(train, aios, workspace, reference):
    bundle = workspace / "artifacts/brains/mixtral/a"
    run = json.loads((reference / "run.json").read_text())["run"]
    given = {**run.pop("shape"), **run, "checkpoint_dir": None, "log_file": None}
    options = [
        word
        for name, value in given.items()
        if value is not None and not isinstance(value, bool)
        for word in (f"--{name.replace('_', '-')}", str(value))
    ]
    command = [sys.executable, "-c", KILLED, "train", "--root", str(workspace), "--name", "a", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr
    checkpoints = bundle / "checkpoints"
    assert sorted(path.name for path in checkpoints.glob("step_*")) == ["step_10", "step_8"]
    assert list(checkpoints.glob(".step_16.*")), "the save was half done"
    with (bundle / "metrics.jsonl").open("a") as file:
        file.write('{"event": "st')  # as a write cut off would leave it
    assert aios("train", "--root", workspace, "--name", "a", "--resume").code == 0
    assert_same_training(bundle, reference)
    assert not list(checkpoints.glob(".step_*")), "what the killed save left is swept away"
    lines = (bundle / "metrics.jsonl").read_text().splitlines()
    assert [line for line in lines if not line.endswith("}")] == ['{"event": "st']
    assert {"event": "resumed", "step": 10} in map(json.loads, (line for line in lines if line.endswith("}")))


def test_resuming_a_finished_brain_changes_nothing(aios, brain, reference):
    card = (brain / "README.md").read_text()
    assert aios("train", "--root", brain.parents[3], "--name", brain.name, "--resume").code == 0
    assert_same_training(brain, reference)
    assert (brain / "README.md").read_text() == card


def test_more_steps_than_before(aios, brain):
    outcome = aios("train", "--root", brain.parents[3], "--name", brain.name, "--resume", "--max-steps", 26)
    assert outcome.code == 0
    assert "max_steps: 26 (was 24)" in outcome.out
    assert (brain / "checkpoints/step_26").is_dir()
    assert json.loads((brain / "run.json").read_text())["run"]["max_steps"] == 26
    assert "Trained for 26 steps" in (brain / "README.md").read_text()


def test_a_name_that_is_taken(train, brain):
    before = {path: path.stat().st_mtime_ns for path in brain.rglob("*") if path.name != ".lock"}
    outcome = train(brain.parents[3], brain.name)
    assert (outcome.code, "add --resume" in outcome.err) == (2, True)
    assert {path: path.stat().st_mtime_ns for path in brain.rglob("*") if path.name != ".lock"} == before
    (brain / "run.json").unlink()
    assert train(brain.parents[3], brain.name).code == 2, "weights are never overwritten"
    outcome = train(brain.parents[3], "other", "--checkpoint-dir", brain / "checkpoints")
    assert outcome.code == 2, "nor mixed with another brain's"


def test_a_run_that_ended_before_it_saved_can_be_begun_again(train, aios, workspace, monkeypatch, reference):
    bundle = workspace / "artifacts/brains/mixtral/a"

    def interrupt(self, *rest):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "_write", interrupt)
        assert train(workspace, "a").code == 130
    outcome = aios("train", "--root", workspace, "--name", "a", "--resume")
    assert (outcome.code, "leave out --resume" in outcome.err) == (1, True)
    assert train(workspace, "a").code == 0
    assert records(bundle) == records(reference)


def test_a_failed_resume_does_not_change_the_settings(aios, brain):
    before = (brain / "run.json").read_bytes()
    resume = ("train", "--root", brain.parents[3], "--name", brain.name, "--resume")
    assert aios(*resume, "--seq-len", 10**6).code == 1
    (brain / "checkpoints/step_24/trainer.json").write_text("{")
    assert aios(*resume, "--max-steps", 30).code == 1
    assert (brain / "run.json").read_bytes() == before


def test_a_changed_shape_data_or_tokenizer_is_refused(aios, brain, tmp_path):
    root = brain.parents[3]
    resume = ("train", "--root", root, "--name", brain.name, "--resume")
    outcome = aios(*resume, "--hidden-dim", 64)
    assert (outcome.code, "shape cannot change" in outcome.err) == (2, True)
    base = root / "artifacts/hf_implant/base_model"
    (tmp_path / "a.txt").write_text("some words " * 900)
    assert aios("data", "prepare", tmp_path / "a.txt", "--out", tmp_path / "new", "--tokenizer", base).code == 0
    outcome = aios(*resume, "--data", tmp_path / "new")
    assert (outcome.code, "the data changed" in outcome.err) == (1, True)
    other = tmp_path / "other"
    assert aios("init", "--root", other, "--max-bytes", 20000, "--vocab-size", 300).code == 0
    shutil.copytree(other / "artifacts/hf_implant", root / "artifacts/hf_implant", dirs_exist_ok=True)
    outcome = aios(*resume, "--data", other / "training_data/prepared")
    assert (outcome.code, "the tokenizer changed" in outcome.err) == (1, True)


def test_data_that_only_moved_is_welcome(aios, brain):
    root = brain.parents[3]
    os.rename(root / "training_data/prepared", root / "moved")
    resume = ("train", "--root", root, "--name", brain.name, "--resume", "--max-steps", 25)
    assert aios(*resume).code == 1
    assert aios(*resume, "--data", root / "moved").code == 0


def test_nothing_to_resume(aios, made):
    outcome = aios("train", "--root", made[0], "--name", "gone", "--resume")
    assert (outcome.code, "there is no brain" in outcome.err) == (1, True)
    assert not (made[0] / "artifacts/brains").exists()


def test_one_process_at_a_time(aios, brain):
    with Brain(Path(), brain).lock():
        outcome = aios("train", "--root", brain.parents[3], "--name", brain.name, "--resume")
    assert (outcome.code, "another process is training" in outcome.err) == (1, True)


FILES = ("model.safetensors", "optimizer.safetensors", "rng_0.safetensors", "chronovisor.safetensors", "trainer.json")


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        (file, damage)
        for file in (*FILES, "config.json")
        for damage in ("truncated", "empty", "foreign", "missing")
        if (file, damage) != ("chronovisor.safetensors", "missing")  # a run may be told not to save it
    ],
)
def test_a_damaged_checkpoint_is_refused_and_the_one_before_still_works(aios, brain, file, damage):
    latest = brain / "checkpoints/step_20"
    shutil.rmtree(brain / "checkpoints/step_24")
    path = latest / file
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "foreign":
        path.write_bytes(b'{"a": 1}' if file.endswith("json") else save({"x": torch.ones(3)}))
    else:
        path.write_bytes(content[: len(content) // 2] if damage == "truncated" else b"")
    resume = ("train", "--root", brain.parents[3], "--name", brain.name, "--resume", "--stop-after", 21)
    outcome = aios(*resume)
    assert outcome.code == 1
    assert str(latest) in outcome.err or "the checkpoint's" in outcome.err
    assert "--debug" not in outcome.err
    assert outcome.err.count("\n") == 1
    os.rename(latest, brain / "aside")
    assert "Loaded checkpoint: step_16" in aios(*resume).out
