"""Callbacks: six events in one order, state and files in checkpoints, errors that lose nothing."""

import pytest
import torch

from chronomoe.errors import CheckpointError
from chronomoe.training import Callback, ChronoMoETrainer
from chronomoe.training.trainer_file import list_checkpoints, read_trainer_file
from tests.chronomoe.training.building import build_model, build_trainer, poison


class Diary(Callback):
    """Notes every event."""

    name = "diary"

    def __init__(self):
        self.notes, self.steps = [], 0

    def before_training(self):
        self.notes.append("before")

    def after_backward(self, step):
        self.notes.append(f"backward {step.number}")

    def after_step(self, step):
        self.steps += 1
        self.notes.append(f"step {step.number}")

    def after_training(self):
        self.notes.append("after")

    def state_dict(self):
        return {"steps": self.steps}

    def load_state_dict(self, state):
        self.steps = state["steps"]

    def save(self, folder):
        (folder / "diary.txt").write_text("\n".join(self.notes))

    def load(self, folder):
        self.notes = (folder / "diary.txt").read_text().splitlines()


def with_diary(folder, **settings) -> tuple[ChronoMoETrainer, Diary]:
    diary = Diary()
    return build_trainer(folder, callbacks=[diary], **settings), diary


def test_events_come_in_their_order(tmp_path):
    trainer, diary = with_diary(tmp_path, max_steps=2)
    trainer.train()
    assert diary.notes == ["before", "backward 1", "step 1", "backward 2", "step 2", "after"]
    names = [type(one).__name__ for one in trainer.callbacks]
    assert names == ["Control", "Metrics", "Usage", "Diary", "Evaluation", "Checkpoint"]


def test_state_and_files_go_into_checkpoints_and_back(tmp_path):
    trainer, _ = with_diary(tmp_path, max_steps=8)
    trainer.stop_after = 4
    trainer.train()
    assert read_trainer_file(tmp_path / "step_4").callbacks["diary"] == {"steps": 4}
    resumed, diary = with_diary(tmp_path, max_steps=8)
    resumed.load_checkpoint("latest")
    assert (diary.steps, diary.notes[:2]) == (4, ["before", "backward 1"])
    resumed.train()
    assert diary.steps == 8


def test_a_checkpoint_of_other_callbacks_is_refused(tmp_path):
    with_diary(tmp_path, max_steps=4)[0].train()
    with pytest.raises(CheckpointError, match=r"other callbacks.*'diary'"):
        build_trainer(tmp_path).load_checkpoint("latest")


def test_an_error_of_a_callbacks_own_is_raised_as_it_is(tmp_path):
    with_diary(tmp_path, max_steps=4)[0].train()
    trainer, diary = with_diary(tmp_path)
    diary.load_state_dict = lambda state: state["typo"]
    with pytest.raises(KeyError, match="typo"):
        trainer.load_checkpoint("latest")


@pytest.mark.parametrize("event", ["after_step", "after_training"])
def test_a_failing_callback_loses_no_training(tmp_path, event):
    trainer, diary = with_diary(tmp_path, max_steps=3, save_every_n_steps=100)
    setattr(diary, event, lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    assert list_checkpoints(tmp_path)[-1].name == ("step_1" if event == "after_step" else "step_3")


def test_a_skipped_step_says_why(tmp_path):
    trainer, diary = with_diary(tmp_path, model=poison(build_model(), {1}), max_steps=3)
    seen = []
    diary.after_step = lambda step: seen.append((step.number, step.skip_reason, step.window is None))
    trainer.train()
    assert seen == [(1, "", False), (2, "its loss or gradient is not finite", True), (3, "", False)]
    assert torch.isfinite(trainer.model.lm_head.weight).all()
