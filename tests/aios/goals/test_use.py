"""Goals at work in a brain: generate, chat, evaluate, train, explain, teach; and what is refused."""

import json
import shutil

import pytest
import torch

from aios.brains.bundle import load_brain
from aios.goals.links import Goals
from aios.goals.use import REMEMBERED, remembered, remembered_flags
from chronomoe.errors import CheckpointError

EXPERT = ("--steps", 4, "--batch-size", 2, "--max-seq-len", 32, "--eval-tokens", 300, "--calibration-windows", 12)


@pytest.fixture
def root(brain):
    return brain.parents[3]


@pytest.fixture
def linked(root):
    """A goal for expert 2 of the brain's only layer."""
    goal, _ = Goals(root).add("Sound like Python", expert="straight:0.2")
    return goal


@pytest.fixture
def served(aios, root, brain):
    """A goal for an attached expert."""
    where = ("--root", root)
    text = root / "training_data/licences"
    words = ("experts", "train", "laws", "--brain", "straight", "--dataset-file", text, *EXPERT, *where)
    assert aios(*words, "--default-goal", "Read laws").code == 0
    assert aios("experts", "attach", "laws", "--brain", "straight", *where).code == 0
    return Goals(root).all()[0]


def events(brain):
    records = [json.loads(line) for line in (brain / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if record["event"] == "goal_bias"]


def test_a_goal_opens_the_gate_of_its_expert_and_off_is_as_before(aios, root, brain, served):
    plain = aios("generate", "straight", "--root", root, "--temperature", 0)
    on = aios("generate", "straight", "--root", root, "--temperature", 0, "--goal", served.id, "--goal-strength", 5)
    assert on.code == 0, on.err
    assert "expert laws: +5.00 nats for its gate" in on.err
    assert aios("generate", "straight", "--root", root, "--temperature", 0).out == plain.out
    found = aios("evaluate", "straight", "--root", root, "--goals-active", "--tokens", 300, "--json")
    bits = json.loads(found.out)
    assert list(bits) == ["base", "experts", "goals"]
    assert bits["goals"] != bits["experts"]
    told = json.loads(
        aios("goals", "explain", "--brain", "straight", "--text", "the law", "--root", root, "--json").out
    )
    assert told["on"]["open"]["laws"] >= told["off"]["open"]["laws"]
    assert told["priors"] == {"laws": 3.0}
    words = ("goals", "explain", "--brain", "straight", "--text", "the law", "--goal-strength", 5, "--json")
    assert json.loads(aios(*words, "--root", root).out)["priors"] == {"laws": 5.0}
    assert sum(told["on"]["share"][0]) == pytest.approx(1.0)
    # A goal that rests, or whose expert does, changes nothing.
    assert aios("experts", "deactivate", "laws", "--root", root).code == 0
    resting = aios("generate", "straight", "--root", root, "--temperature", 0, "--goal", "Read laws")
    assert "expert laws is not attached, or not active: skipped" in resting.err
    Goals(root).deactivate(served.id)
    none = aios("generate", "straight", "--root", root, "--goals-active")
    assert none.code == 0
    assert "nothing changes" in none.err


def test_a_goal_of_the_brains_own_experts_stays_within_its_budget(aios, root, linked):
    text = root / "training_data/curated_datasets/test_sample.txt"
    words = ("evaluate", "straight", "--root", root, "--goal", linked.id, "--tokens", 300, "--goal-kl", 0.0005)
    own, given = aios(*words), aios(*words, "--goal-text", text)
    for found in (own, given):
        assert found.code == 0, found.err
        assert "share of tokens: 0.2" in found.err
    assert "output KL 0.0005" in own.err or "out of reach" in own.err
    told = json.loads(
        aios("goals", "explain", "--brain", "straight", "--text", "def f(x):", "--root", root, "--json").out
    )
    assert told["on"]["share"][0][2] >= told["off"]["share"][0][2]
    assert told["experts"] == ["0.2"]


def test_training_under_a_goal_is_logged_remembered_and_resumes_bit_for_bit(aios, root, brain, linked):
    twin = root.parent / "twin"
    shutil.copytree(root, twin)
    more = ("--resume", "--max-steps", 34, "--goal", linked.id, "--goal-kl", 0.002)
    assert aios("train", "--root", root, "--name", "straight", *more).code == 0
    (first, *_) = found = events(brain)
    assert [event["step"] for event in found] == [30, 34]
    assert first["goals"] == ["Sound like Python"]
    assert first["share_after"][0][2] > first["share_before"][0][2]
    assert 0 < first["beta"] <= 1
    assert {"kl", "protected_fraction", "experts"} <= first.keys()
    assert [goal.slots for goal in remembered(brain)] == [((0, 2),)]
    assert remembered_flags(brain).goal_kl == 0.002
    # Stopped on the way, and continued without a word about goals.
    other = twin / "artifacts/brains/mixtral/straight"
    assert aios("train", "--root", twin, "--name", "straight", *more, "--stop-after", 31).code == 0
    assert aios("train", "--root", twin, "--name", "straight", "--resume").code == 0
    assert (other / "model.safetensors").read_bytes() == (brain / "model.safetensors").read_bytes()
    # The file has the field; who loads the brain has it off, until asked for.
    model, _ = load_brain(brain)
    assert not model.steering.goal_bias.any()
    assert aios("generate", "straight", "--root", root, "--goals-remembered").err.startswith("Goals: Sound like Python")


def test_without_goals_training_is_what_it_was(aios, root, brain, linked):
    twin = root.parent / "twin"
    shutil.copytree(root, twin)
    other = twin / "artifacts/brains/mixtral/straight"
    more = ("--resume", "--max-steps", 30)
    assert aios("train", "--root", root, "--name", "straight", *more).code == 0
    assert aios("train", "--root", twin, "--name", "straight", *more, "--goal", linked.id).code == 0
    assert not events(brain)
    assert events(other)
    assert (other / "model.safetensors").read_bytes() != (brain / "model.safetensors").read_bytes()


def test_domains_of_a_goal_are_drawn_more_often(aios, root, linked):
    twin = root.parent / "twin"
    shutil.copytree(root, twin)
    more = ("--resume", "--max-steps", 30, "--goal", linked.id, "--goal-domain", "python", "--goal-domain-weight", 50)
    outcome = aios("train", "--root", root, "--name", "straight", *more)
    assert outcome.code == 0, outcome.err
    brain = root / "artifacts/brains/mixtral/straight"
    assert remembered_flags(brain).goal_domain == ("python",)
    other = twin / "artifacts/brains/mixtral/straight"
    assert aios("train", "--root", twin, "--name", "straight", *more[:-4]).code == 0
    assert (other / "model.safetensors").read_bytes() != (brain / "model.safetensors").read_bytes()
    wrong = aios("train", "--root", root, "--name", "straight", *more[:-4], "--goal-domain", "cooking")
    assert wrong.code == 1
    assert "no domain 'cooking'" in wrong.err
    assert "--goal-domain needs a goal" in aios("train", "--root", root, "--name", "x", "--goal-domain", "python").err


def test_a_talk_turns_goals_on_and_off(aios, root, served, monkeypatch):
    said = iter(["/goal Read laws", "hello", "/goal nonsense", "/goal off", ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(said))
    outcome = aios("chat", "straight", "--root", root, "--max-new-tokens", 3)
    assert outcome.code == 0, outcome.err
    assert "expert laws: +3.00 nats" in outcome.out
    assert "there is no goal 'nonsense'" in outcome.out
    assert "Goals: off" in outcome.out


def test_routers_are_taught_a_goal_by_its_text_and_the_weights_stay(aios, root, brain):
    weights = (brain / "model.safetensors").read_bytes()
    Goals(root).add("Read laws")
    words = ("goals", "teach", "--brain", "straight", "--root", root, "--goal", "Read laws")
    text = ("--dataset-file", root / "training_data/licences", "--max-seq-len", 32, "--steps", 6, "--batch-size", 2)
    outcome = aios(*words, *text, "--json")
    assert outcome.code == 0, outcome.err
    bits = json.loads(outcome.out)["bits_per_byte"]["Read laws"]
    assert bits["on"] != bits["off"]
    assert (brain / "model.safetensors").read_bytes() == weights
    plain = aios("evaluate", "straight", "--root", root, "--tokens", 300, "--goal", "Read laws", "--json")
    learned = aios(
        "evaluate", "straight", "--root", root, "--tokens", 300, "--goal", "Read laws", "--goals-learned", "--json"
    )
    assert learned.code == 0, learned.err
    assert json.loads(plain.out)["base"] == json.loads(plain.out)["goals"] == json.loads(learned.out)["base"]
    assert json.loads(learned.out)["goals"] != json.loads(learned.out)["base"]
    assert aios(*words).code == 2
    assert aios(*words, *text, "--goal", "Nothing").code == 2


@pytest.mark.parametrize(
    ("options", "code", "sentence"),
    [
        (("--goal", "77"), 2, "there is no goal '77'"),
        (("--goal", "Sound like Python", "--goal-strength", "5.1"), 2, "lies between 0 and 5"),
        (("--goal", "Sound like Python", "--goal-kl", "0"), 2, "above 0"),
        (("--goal", "Sound like Python", "--goal-beta", "-1"), 2, "between 0 and 1"),
        (("--goal", "Sound like Python", "--goal-layers", "3"), 2, "layers 0 to 0"),
        (("--goal", "Sound like Python", "--goal-text", "nowhere.txt"), 2, "there is no text"),
        (("--goal", "Sound like Python", "--goals-learned"), 2, "never taught"),
        (("--goal-strength", "4"), 2, "--goal-strength needs a goal"),
        (("--goals-learned",), 2, "--goals-learned needs a goal"),
    ],
)
def test_what_cannot_be_is_one_sentence(aios, root, linked, options, code, sentence):
    outcome = aios("generate", "straight", "--root", root, *options)
    assert outcome.code == code
    assert sentence in outcome.err


def test_a_brain_goes_on_without_the_goals_it_was_trained_under(aios, root, brain, linked):
    train = ("train", "--root", root, "--name", "straight", "--resume", "--max-steps")
    assert aios(*train, 32, "--goal", linked.id).code == 0
    assert remembered(brain)
    assert aios(*train, 34, "--goals-forget", "--goal", linked.id).code == 2
    assert aios("train", "--root", root, "--name", "new", "--goals-forget").code == 2
    assert aios(*train, 34, "--goals-forget").code == 0
    assert not remembered(brain)
    assert max(event["step"] for event in events(brain)) == 32


def test_a_damaged_memory_and_goals_without_effect_are_said(aios, root, brain):
    (brain / REMEMBERED).write_text("{")
    with pytest.raises(CheckpointError, match=r"goals\.json is damaged"):
        remembered(brain)
    assert aios("train", "--root", root, "--name", "straight", "--resume", "--max-steps", 30).code == 1
    (brain / REMEMBERED).unlink()
    Goals(root).add("Be kind")
    outcome = aios("train", "--root", root, "--name", "straight", "--resume", "--max-steps", 30, "--goal", "Be kind")
    assert outcome.code == 2
    assert "link-expert" in outcome.err


def test_a_plain_model_of_the_folder_loads_with_its_fields(brain):
    model, _ = load_brain(brain)
    assert model.steering.pressure.any()  # only goals are turned off by loading
    assert torch.isfinite(model.steering.pressure).all()


def test_a_brain_begun_with_a_goal_enters_it(aios, train, workspace):
    assert train(workspace, "kind", "--stop-after", 1, "--default-goal", "Be kind").code == 0
    assert [(goal.text, goal.source) for goal in Goals(workspace).all()] == [("Be kind", "training")]


def test_the_base_alone_is_measured_without_its_experts(aios, root, brain, served):
    from chronomoe.experts.file import read_expert, save_expert

    (weights,) = (brain / "experts").glob("*.safetensors")
    one, header = read_expert(weights)
    one.gate.threshold.fill_(-1e9)  # open everywhere
    save_expert(one, header, weights)
    words = ("evaluate", "straight", "--root", root, "--tokens", 300, "--json")
    attached = json.loads(aios(*words).out)
    assert attached["base"] != attached["experts"]
    assert aios("experts", "detach", "laws", "--brain", "straight", "--root", root).code == 0
    assert json.loads(aios(*words).out) == {"base": attached["base"]}
