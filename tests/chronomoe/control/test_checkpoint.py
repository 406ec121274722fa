"""The control layer on disk: all of it comes back, and nothing is made up."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from chronomoe.errors import CheckpointError
from chronomoe.training import ChronovisorCheckpoint
from tests.chronomoe.control.building import build, same_weights, train
from tests.chronomoe.everything import differing, everything


@pytest.fixture
def model():
    model = build()
    model.controller.set_knob(0.4, "explore")
    train(model, 12)
    model.steering.available[1, 3] = False
    model.controller.masked[1, 3] = True
    model.controller.last_probe[0, 1], model.controller.fruitless[1, 2] = 7, 2
    model.controller.evidence[:, 0, 1] = torch.tensor([4.0, -1.0, 2.0])
    return model


def test_everything_comes_back(model, tmp_path):
    ChronovisorCheckpoint.from_controller(model.controller).save(tmp_path)
    other = build(seed=4)
    ChronovisorCheckpoint.load(tmp_path).restore_to_controller(other.controller)
    for mine, theirs in ((model.controller, other.controller), (model.steering, other.steering)):
        assert not differing(everything(mine), everything(theirs))
    assert other.controller.meta_knob.kappa == 0.4
    assert list(other.controller.meta_knob.history) == [(0.4, "explore")]
    assert list(other.controller.coherence_history) == list(model.controller.coherence_history)


def test_training_goes_on_as_if_it_had_not_stopped(model, tmp_path):
    ChronovisorCheckpoint.from_controller(model.controller).save(tmp_path)
    other = build()
    other.load_state_dict(model.state_dict())
    other.controller.reset()
    ChronovisorCheckpoint.load(tmp_path).restore_to_controller(other.controller)
    torch.manual_seed(3)
    mine = train(model, 5)
    torch.manual_seed(3)
    assert train(other, 5) == mine
    assert same_weights(model, other)


def test_goals_are_in_no_file(model, tmp_path):
    model.steering.goal_bias[0, 2] = 0.5
    ChronovisorCheckpoint.from_controller(model.controller).save(tmp_path)
    assert not [name for name in load_file(tmp_path / "chronovisor.safetensors") if "goal" in name]
    other = build()
    ChronovisorCheckpoint.load(tmp_path).restore_to_controller(other.controller)
    assert not other.steering.goal_bias.any()


def test_the_seeds_names_are_there(model):
    saved = ChronovisorCheckpoint.from_controller(model.controller)
    assert saved.structural_T_global.shape == (6,)
    assert set(saved.lens_states) == {0, 1}
    assert {"live_pressure", "temperature_fast", "structural_T_local", "direction"} <= set(saved.lens_states[0])
    assert len(saved.coherence_history) == 12
    assert saved.meta_knob_history == [(0.4, "explore")]


def alter(folder, tensors=None, content=None):
    path = folder / "chronovisor.safetensors"
    altered = (tensors or (lambda found: found))(load_file(path))
    save_file({name: tensor.clone() for name, tensor in altered.items()}, path)
    rest = folder / "chronovisor.json"
    rest.write_text(json.dumps((content or (lambda found: found))(json.loads(rest.read_text()))))


@pytest.mark.parametrize(
    ("tensors", "content", "message"),
    [
        (
            lambda t: {n: v for n, v in t.items() if n != "lens_states.1.integral"},
            None,
            r"1\.integral is missing",
        ),
        (
            lambda t: {**t, "lens_states.0.magic": t["lens_states.0.integral"]},
            None,
            r"0\.magic is missing or unknown",
        ),
        (lambda t: {n: v for n, v in t.items() if n != "structural_T_global"}, None, "structural_T_global"),
        (lambda t: {**t, "lens_states.2.integral": t["lens_states.0.integral"]}, None, r"lens_states\.2\.integral"),
        (lambda t: {**t, "extra": t["ticks"]}, None, "extra is missing or unknown"),
        (
            lambda t: {**t, "lens_states.0.integral": torch.zeros(5)},
            None,
            r"0\.integral has another shape",
        ),
        (None, lambda c: {n: v for n, v in c.items() if n != "kappa"}, "kappa is missing"),
        (None, lambda c: {**c, "kappa": 1.5}, "kappa is 1.5; it must be a finite number, at least -1 and at most 1"),
        (None, lambda c: {**c, "meta_knob_history": [[0.5]]}, "meta_knob_history"),
        (None, lambda c: {**c, "meta_knob_history": [[2.0, "x"]]}, "meta_knob_history"),
        (None, lambda c: {**c, "intent": 3}, "intent is 3; it must be text"),
        (lambda t: {**t, "lens_states.0.masked": t["lens_states.0.masked"].float()}, None, "type"),
        (lambda t: {**t, "ticks": t["ticks"].double()}, None, "ticks has another shape or type"),
        (lambda t: {**t, "steering.exploration": t["steering.exploration"] / 0}, None, "not finite"),
        (lambda t: {**t, "ticks": t["ticks"] - 1000}, None, "counted from 0"),
        (lambda t: {**t, "lens_states.1.last_probe": t["lens_states.1.last_probe"] - 8}, None, "counted from 0"),
        (lambda t: {**t, "lens_states.1.last_probe": t["lens_states.1.last_probe"] + 13}, None, "to the last"),
        (lambda t: {**t, "lens_states.1.fruitless": t["lens_states.1.fruitless"] - 1}, None, "counted from 0"),
        (None, lambda c: {**c, "coherence_history": [0.5, -3]}, "coherence_history"),
        (None, lambda c: {**c, "coherence_history": [float("nan")]}, "coherence_history"),
        (None, lambda c: {**c, "mood": 1}, "mood"),
        (None, lambda c: {**c, "version": 99}, "newer version"),
        (
            None,
            lambda c: {**c, "control": {n: v for n, v in c["control"].items() if n != "gamma"}},
            "control: gamma is missing",
        ),
        (None, lambda c: {**c, "control": {**c["control"], "magic": 1}}, "magic"),
    ],
)
def test_a_missing_or_unknown_field_is_an_error_and_changes_nothing(model, tmp_path, tensors, content, message):
    ChronovisorCheckpoint.from_controller(model.controller).save(tmp_path)
    alter(tmp_path, tensors, content)
    other = build(seed=4)
    before = everything(other)
    with pytest.raises(CheckpointError, match=message):
        ChronovisorCheckpoint.load(tmp_path).restore_to_controller(other.controller)
    assert not differing(before, everything(other))


def test_content_nested_without_end_is_damaged(model, tmp_path):
    ChronovisorCheckpoint.from_controller(model.controller).save(tmp_path / "made" / "for it")
    (tmp_path / "made" / "for it" / "chronovisor.json").write_text("[" * 100_000)
    with pytest.raises(CheckpointError, match="is damaged"):
        ChronovisorCheckpoint.load(tmp_path / "made" / "for it")


def test_a_model_of_another_shape_is_refused(model, tmp_path):
    ChronovisorCheckpoint.from_controller(model.controller).save(tmp_path)
    with pytest.raises(CheckpointError, match=r"another shape|missing or unknown"):
        ChronovisorCheckpoint.load(tmp_path).restore_to_controller(build(num_experts=4).controller)
    with pytest.raises(CheckpointError, match=r"lens_states\.1\.[a-zA-Z_]+ is missing or unknown"):
        ChronovisorCheckpoint.load(tmp_path).restore_to_controller(build(num_layers=1).controller)


@pytest.mark.parametrize("brain", ["mixtral/small/checkpoints/step_4", "actv1/thinker/checkpoints/step_2"])
def test_a_file_of_the_version_before_the_first_release_is_refused(brain):
    folder = Path(__file__).parents[2] / "fixtures/0.1.0/workspace/artifacts/brains" / brain
    assert json.loads((folder / "chronovisor.json").read_text())["version"] == 2
    with pytest.raises(CheckpointError, match=r"chronovisor\.json was made by version 0\.1\.0.*; train again"):
        ChronovisorCheckpoint.load(folder)


def test_a_missing_file_is_named(model, tmp_path):
    for name in ("chronovisor.json", "chronovisor.safetensors"):
        ChronovisorCheckpoint.from_controller(model.controller).save(tmp_path)
        (tmp_path / name).unlink()
        with pytest.raises(CheckpointError, match=f"has no {name}"):
            ChronovisorCheckpoint.load(tmp_path)


def test_a_copy_does_not_follow_the_controller(model):
    saved = ChronovisorCheckpoint.from_controller(model.controller)
    before = saved.structural_T_global.clone(), saved.lens_states[1]["live_pressure"].clone()
    train(model, 2)
    assert not torch.equal(model.controller.structural_T_global, before[0])
    assert torch.equal(saved.structural_T_global, before[0])
    assert torch.equal(saved.lens_states[1]["live_pressure"], before[1])
