"""aios train: what is printed, what is refused, and that the commands it prints work."""

import errno
import os
import shlex
import signal

import pytest

from chronomoe.training import checkpoint
from chronomoe.training.checkpoint import Checkpoint
from chronomoe.training.trainer import ChronoMoETrainer


def bundle_of(root, name):
    return root / "artifacts/brains/mixtral" / name


def steps_in(root, name):
    return [path.name for path in checkpoint.list_checkpoints(bundle_of(root, name) / "checkpoints")]


def pasted(line, start):
    assert line.startswith(start)
    words = shlex.split(line.removeprefix(start))
    assert words[0] == "aios"
    return words[1:]


def test_every_printed_command_works_when_pasted(train, aios, workspace):
    outcome = train(workspace, "a", "--stop-after", 3)
    assert outcome.code == 0
    assert steps_in(workspace, "a") == ["step_3"]
    last = outcome.out.splitlines()[-1]
    assert last.startswith("Stopped at step 3, saved.")
    outcome = aios(*pasted(last, "Stopped at step 3, saved. Continue with: "))
    assert outcome.code == 0
    assert steps_in(workspace, "a") == ["step_3", "step_8", "step_10", "step_16", "step_20", "step_24"]
    card = (bundle_of(workspace, "a") / "README.md").read_text()
    assert "Trained for 24 steps" in card
    outcome = aios(*pasted(outcome.out.splitlines()[-1], "Next: "))
    assert outcome.code == 0
    assert len(outcome.out) > 5


def test_a_dry_run_prints_the_plan_and_leaves_nothing(train, workspace):
    before = sorted(workspace.rglob("*"))
    outcome = train(workspace, "a", "--dry-run")
    assert outcome.code == 0
    plan = dict(line.split(maxsplit=1) for line in outcome.out.splitlines())
    assert list(plan) == ["model", "parameters", "operations", "memory", "data", "text", "training", "time"]
    assert plan["model"] == "1 layers x 4 experts, top-2, width 32, expert width 112"
    assert "60,128 in all, 38,624 active" in plan["parameters"]
    assert "24 steps x 64 tokens = 1,536 tokens" in plan["training"]
    assert sorted(workspace.rglob("*")) == before
    (workspace / "artifacts/brains/mixtral/a").mkdir(parents=True)
    (workspace / "artifacts/brains/mixtral/a/model.safetensors").touch()
    outcome = train(workspace, "a", "--dry-run")
    assert (outcome.code, "exists already" in outcome.err) == (2, True), "no plan for a name that is taken"


def test_a_dry_run_of_what_does_not_fit_in_memory_answers(aios, made):
    shape = ("--hidden-dim", 32, "--num-layers", 1, "--seq-len", 32, "--max-steps", 1)
    outcome = aios("train", "--root", made[0], "--dry-run", *shape, "--batch-size", 4_000_000)
    assert outcome.code == 0
    memory = next(line for line in outcome.out.splitlines() if line.startswith("memory"))
    assert float(memory.split()[2]) > 1000


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_exits_130(train, aios, workspace, monkeypatch, number):
    update = ChronoMoETrainer._update

    def interrupted(self, step):
        update(self, step)
        if step.number == 5:
            os.kill(os.getpid(), number)

    with monkeypatch.context() as patch:
        patch.setattr(ChronoMoETrainer, "_update", interrupted)
        outcome = train(workspace, "a")
    assert outcome.code == 130
    assert steps_in(workspace, "a") == ["step_5"]
    words = pasted(outcome.out.splitlines()[-1], "Stopped at step 5, saved. Continue with: ")
    assert aios(*words, "--stop-after", 6).code == 0


def test_an_interrupt_while_saving_loses_nothing(train, aios, workspace, monkeypatch):
    write = Checkpoint._write

    def interrupted(self, *rest):
        write(self, *rest)
        if self.run.state.step == 10:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "_write", interrupted)
        outcome = train(workspace, "a")
    assert outcome.code == 130
    assert "what was saved before is untouched" in outcome.err
    assert [path.name for path in (bundle_of(workspace, "a") / "checkpoints").iterdir()] == ["step_8"]
    assert aios("train", "--root", workspace, "--name", "a", "--resume", "--stop-after", 9).code == 0


FULL = "No space left on device"


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, FULL), RuntimeError(f"I/O error: {FULL} (os error 28)")])
def test_a_full_disk_while_saving_loses_nothing(train, aios, workspace, monkeypatch, error):
    save = checkpoint.save_tensors

    def full(path, tensors):
        if path.parent.name.startswith(".step_10"):
            raise error
        save(path, tensors)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_tensors", full)
        outcome = train(workspace, "a")
    assert outcome.code == 1
    assert "the disk is full" in outcome.err
    assert [path.name for path in (bundle_of(workspace, "a") / "checkpoints").iterdir()] == ["step_8"]
    assert aios("train", "--root", workspace, "--name", "a", "--resume").code == 0


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux")
def test_a_full_disk_while_logging(train, workspace):
    outcome = train(workspace, "a", "--log-file", "/dev/full")
    assert outcome.code == 1
    assert "the disk is full: /dev/full" in outcome.err


def test_a_place_that_cannot_be_written(train, workspace):
    (workspace / "artifacts/brains").write_text("")
    outcome = train(workspace, "a")
    assert (outcome.code, "Not a directory" in outcome.err) == (1, True)


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (("--num-experts-per-tok", 9), 2, "exceeds num_experts"),
        (("--num-attention-heads", 5), 2, "not divisible"),
        (("--moe-capacity-factor", 0), 2, "capacity_factor"),
        (("--weight-decay", "nan"), 2, "weight_decay"),
        (("--stop-after", 0), 2, "stop_after"),
        (("--data", "gone"), 1, "gone is not prepared data"),
        (("--model", "gone"), 2, "no base model gone"),
    ],
)
def test_settings_that_cannot_work_leave_nothing(train, made, options, code, said):
    outcome = train(made[0], "a", *options)
    assert (outcome.code, said in outcome.err) == (code, True), outcome.err
    assert not (made[0] / "artifacts/brains").exists()


@pytest.mark.parametrize("dry", [(), ("--dry-run",)])
def test_too_little_text_for_one_sequence(aios, made, dry):
    outcome = aios("train", "--root", made[0], "--seq-len", 10**6, "--max-steps", 1, *dry)
    assert (outcome.code, "too few to fill one sequence" in outcome.err) == (1, True)
    assert not (made[0] / "artifacts/brains").exists()


@pytest.mark.parametrize("name", ["../x", "", "a/b", ".x"])
def test_hostile_names(train, made, name):
    outcome = train(made[0], name)
    assert (outcome.code, "is not a name" in outcome.err) == (2, True)


def test_data_of_another_tokenizer(train, aios, workspace, tmp_path):
    (tmp_path / "a.txt").write_text("some words " * 500)
    data = tmp_path / "data"
    assert aios("data", "prepare", tmp_path / "a.txt", "--out", data, "--vocab-size", "bytes").code == 0
    outcome = train(workspace, "a", "--data", data)
    assert (outcome.code, "another tokenizer" in outcome.err, "--tokenizer" in outcome.err) == (2, True, True)
    base = workspace / "artifacts/hf_implant/base_model"
    assert aios("data", "prepare", tmp_path / "a.txt", "--out", data, "--tokenizer", base, "--overwrite").code == 0
    assert train(workspace, "a", "--data", data, "--stop-after", 1).code == 0, "the remedy works"


def test_a_base_model_of_another_kind(train, workspace):
    config = workspace / "artifacts/hf_implant/base_model/config.json"
    for text in ('{"model_type": "llama"}', "{", "{}"):
        config.write_text(text)
        outcome = train(workspace, "a")
        assert (outcome.code, "config.json" in outcome.err) == (1, True)


def test_checkpoints_stay_inside_the_brain(train, workspace):
    outcome = train(workspace, "a", "--checkpoint-dir", "../elsewhere")
    assert outcome.code == 2
    assert "inside the brain" in outcome.err
    assert not (workspace / "artifacts/brains/mixtral/elsewhere").exists()
