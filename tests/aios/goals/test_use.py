"""Goals at work in a brain: generate, chat, evaluate, train, explain, teach; and what is refused."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from aios.brains.brain import Brain
from aios.brains.loaded import LoadedBrain, load_brain
from aios.goals.memory import GOALS_FILE, read_memory
from aios.store.goals import Goals
from chronomoe import ChronovisorMixtralForCausalLM
from chronomoe.errors import CheckpointError
from chronomoe.experts.file import read_expert, save_expert
from chronomoe.goals.conditioning import FILE

EXPERT = ("--steps", 4, "--batch-size", 2, "--max-seq-len", 32, "--eval-tokens", 300, "--calibration-windows", 12)


@pytest.fixture
def root(brain):
    return brain.parents[3]


@pytest.fixture
def linked(root):
    """A goal for expert 2 of the brain's only layer."""
    goal, _ = Goals(root).add("Sound like Python", expert="mixtral/straight:0.2")
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
    assert "expert laws is not in this brain, or not active: skipped" in resting.err
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
    assert [event["step"] for event in found] == [24, 30, 34]  # before the first of the new steps, too
    assert first["goals"] == ["Sound like Python"]
    assert first["share_after"][0][2] > first["share_before"][0][2]
    assert 0 < first["beta"] <= 1
    assert {"kl", "protected_fraction", "experts"} <= first.keys()
    assert [goal.slots for goal in read_memory(Brain(root, brain)).goals] == [((0, 2),)]
    assert read_memory(Brain(root, brain)).settings.goal_kl == 0.002
    # Stopped on the way, and continued without a word about goals.
    other = twin / "artifacts/brains/mixtral/straight"
    assert aios("train", "--root", twin, "--name", "straight", *more, "--stop-after", 31).code == 0
    assert aios("train", "--root", twin, "--name", "straight", "--resume").code == 0
    assert (other / "model.safetensors").read_bytes() == (brain / "model.safetensors").read_bytes()
    # Who loads the brain, or its file, has no goal on until asked for; the goals remembered are on as they were.
    for model in (load_brain(Brain(root, brain)).model, ChronovisorMixtralForCausalLM.from_pretrained(brain)):
        assert not model.steering.goal_bias.any()
    told = aios(
        "goals", "explain", "--brain", "straight", "--text", "x", "--root", root, "--goals-remembered", "--json"
    )
    assert json.loads(told.out)["kl_budget"] == 0.002
    assert aios("generate", "straight", "--root", root, "--goals-remembered").err.startswith("Goals: Sound like Python")


def test_other_goals_act_from_the_first_step_of_a_resumed_run_and_none_do_without(aios, root, brain, linked):
    more = ("train", "--root", root, "--name", "straight", "--resume", "--eval-every-n-steps", 100, "--max-steps")

    def field():
        folder = max((brain / "checkpoints").glob("step_*"), key=lambda path: int(path.name[5:]))
        return torch.tensor(
            json.loads((folder / "trainer.json").read_text())["callbacks"]["evaluation"]["goal_bias"][0]
        )

    assert aios(*more, 26, "--goal", linked.id, "--goal-beta", 0.5).code == 0
    first = field()
    assert first[2] > 0
    other, _ = Goals(root).add("Sound like a law", expert="mixtral/straight:0.1")
    assert aios(*more, 28, "--goal", other.id, "--goal-beta", 0.5).code == 0
    assert field()[1] > 0 > field()[2]
    assert [event["step"] for event in events(brain)] == [24, 26, 26, 28]
    (brain / GOALS_FILE).unlink()
    assert aios(*more, 30).code == 0
    assert not field().any()


def test_what_cannot_be_turned_on_is_refused_before_training_and_not_remembered(aios, root, brain, linked):
    words = ("train", "--root", root, "--name", "straight", "--resume", "--max-steps", 30, "--goal", linked.id)
    before = (brain / "metrics.jsonl").read_bytes()
    for wrong in (("--goal-kl", 0), ("--goal-strength", 7), ("--goal-layers", 7), ("--goal-text", "/nowhere"),
                  ("--goals-learned",)):  # fmt: skip
        outcome = aios(*words, *wrong)
        assert outcome.code == 2, wrong
        assert not (brain / GOALS_FILE).exists()
    records = [json.loads(line) for line in (brain / "metrics.jsonl").read_bytes()[len(before) :].splitlines()]
    assert {record["event"] for record in records} <= {"resumed"}
    # A brain that is begun has no experts to link a goal to.
    new = aios("train", "--root", root, "--name", "new", "--goal", linked.id)
    assert new.code == 2
    assert "go on with --resume" in new.err
    assert not (brain.parent / "new").exists()
    assert aios("train", "--root", root, "--name", "new", "--goal", "77", "--dry-run").code == 2


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
    assert read_memory(Brain(root, brain)).settings.goal_domain == ("python",)
    other = twin / "artifacts/brains/mixtral/straight"
    assert aios("train", "--root", twin, "--name", "straight", *more[:-4]).code == 0
    assert (other / "model.safetensors").read_bytes() != (brain / "model.safetensors").read_bytes()
    wrong = aios("train", "--root", root, "--name", "straight", *more[:-4], "--goal-domain", "cooking")
    assert wrong.code == 1
    assert "no domain 'cooking'" in wrong.err
    assert "--goal-domain needs a goal" in aios("train", "--root", root, "--name", "x", "--goal-domain", "python").err


def test_a_talk_turns_goals_on_and_off(aios, root, brain, served, monkeypatch):
    said = iter(["/goal Read laws", "hello", "/goal nonsense", "hello", "/goal off", "hello", "/goal 1", ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(said))
    priors, stream = [], LoadedBrain.stream

    def watched(loaded, *words, **settings):
        priors.extend(float(expert.gate.prior) for expert in loaded.attached)
        if len(priors) == 4:
            (root / "artifacts/aios.db").write_bytes(b"no database" * 1000)
        return stream(loaded, *words, **settings)

    monkeypatch.setattr(LoadedBrain, "stream", watched)
    outcome = aios("chat", "straight", "--root", root, "--max-new-tokens", 3, "--goal", served.id, "--goal-strength", 2)
    assert outcome.code == 0, outcome.err
    assert "expert laws: +2.00 nats" in outcome.out
    assert "there is no goal 'nonsense'" in outcome.out
    assert "Goals: off" in outcome.out
    assert priors == [2.0, 2.0, 0.0]
    # What fails in the middle of a talk is told, and the talk goes on.
    said = iter(["hello", "/goal 1", "hello", ""])
    outcome = aios("chat", "straight", "--root", root, "--max-new-tokens", 3, "--goal", served.id)
    assert outcome.code == 0, outcome.err
    assert "is damaged or not a database of aios" in outcome.out
    assert priors[3:] == [3.0, 3.0]


def test_text_is_made_under_the_goal(aios, root, brain, served):
    (weights,) = (brain / "experts").glob("*.safetensors")
    one, header = read_expert(weights)
    one.gate.direction.data.zero_()
    one.gate.offset.fill_(0.0)
    one.gate.threshold.fill_(2.0)  # without evidence only a goal opens it
    with torch.no_grad():
        for parameter in one.parameters():
            parameter.add_(0.5)  # loud
    save_expert(one, header, weights)
    words = ("generate", "straight", "--root", root, "--temperature", 0, "--max-new-tokens", 12)
    plain, on = aios(*words), aios(*words, "--goal", served.id)
    assert on.code == 0, on.err
    assert on.out != plain.out
    told = json.loads(
        aios("goals", "explain", "--brain", "straight", "--text", "the law", "--root", root, "--json").out
    )
    assert told["off"]["open"] == {"laws": 0.0}
    assert told["on"]["open"] == {"laws": 1.0}


def test_the_flags_of_a_brains_own_experts_reach_it(aios, root, linked):
    other = root / "artifacts/brains/mixtral/other"
    shutil.copytree(root / "artifacts/brains/mixtral/straight", other)
    Goals(root).add("4", expert="mixtral/other:0.1")
    words = ("goals", "explain", "--brain", "straight", "--text", "def f(x):", "--root", root, "--json", "--goal")

    def told(*options):
        outcome = aios(*words, *options)
        assert outcome.code == 0, outcome.err
        return json.loads(outcome.out)

    found = told(linked.id)
    assert found["kl_budget"] == 0.01
    assert found["on"]["share"][0][2] > found["off"]["share"][0][2]
    assert told(linked.id, "--goal-beta", 0.25)["beta"] == 0.25
    assert told(linked.id, "--goal-beta", 0.25, "--goal-layers", 0)["experts"] == ["0.2"]
    like = told(linked.id, "--goal-beta", 0.25, "--goal-likeness", 1.0)
    assert like["experts"] not in ([], ["0.2"])
    # Slots of another brain act there; a text that is a number is not the goal of that number.
    foreign = told("4", "--goal", linked.id, "--goal-beta", 0.25)
    assert foreign["idle"] == ["4"]
    assert foreign["experts"] == ["0.2"]
    Goals(root).add("1")
    assert told("1", "--goal-beta", 0.25)["goals"] == ["Sound like Python"]
    # The budget is measured on what it was trained on, or on the text given.
    texts = [root / "training_data/oratory", root / "training_data/python"]
    budget = (linked.id, "--goal-kl", 1e-4)
    measured = [told(*budget, "--goal-text", next(text.iterdir()))["kl"] for text in texts]
    assert len({told(*budget)["kl"], *measured}) == 3


def test_a_dense_brain_has_nothing_to_explain(aios, root, linked):
    words = ("hrm-hf", "train-actv1", "--root", root, "--brain-name", "dense", "--no-moe", "--steps", 1)
    base = root / "artifacts/hf_implant/base_model"
    sizes = ("--hidden-size", 32, "--num-heads", 4, "--max-seq-len", 16, "--batch-size", 2, "--model", base)
    text = root / "training_data/curated_datasets/test_sample.txt"
    assert aios(*words, *sizes, "--dataset-file", text).code == 0
    outcome = aios("goals", "explain", "--brain", "actv1/dense", "--text", "x", "--root", root)
    assert outcome.code == 2
    assert "nothing to explain" in outcome.err


def test_a_brain_that_halts_trains_under_a_goal(aios, root):
    base, text = root / "artifacts/hf_implant/base_model", root / "training_data/curated_datasets/test_sample.txt"
    words = ("hrm-hf", "train-actv1", "--root", root, "--brain-name", "thinker", "--dataset-file", text)
    sizes = ("--hidden-size", 32, "--num-heads", 4, "--h-layers", 1, "--l-layers", 1, "--max-seq-len", 16,
             "--batch-size", 2, "--model", base, "--halt-max-steps", 2, "--eval-batches", 1)  # fmt: skip
    assert aios(*words, *sizes, "--steps", 1).code == 0
    goal, _ = Goals(root).add("Think", expert="actv1/thinker:1.3")
    outcome = aios(*words, "--resume", "--steps", 2, "--goal", goal.id, "--goal-beta", 0.5)
    assert outcome.code == 0, outcome.err
    assert [event["experts"] for event in events(root / "artifacts/brains/actv1/thinker")] == [["1.3"], ["1.3"]]


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
    # Weights that changed, or damage, are no reason not to teach it anew.
    assert aios("train", "--root", root, "--name", "straight", "--resume", "--max-steps", 26).code == 0
    stale = aios("evaluate", "straight", "--root", root, "--tokens", 300, "--goal", "Read laws", "--goals-learned")
    assert "teach the goals again" in stale.err
    anew = aios(*words, *text)
    assert anew.code == 0, anew.err
    assert "is replaced" in anew.out


def test_what_is_taught_is_of_the_base_alone(aios, root, brain, served):
    twin = root.parent / "twin"
    shutil.copytree(root, twin)
    assert aios("experts", "detach", "laws", "--brain", "straight", "--root", twin).code == 0
    (weights,) = (brain / "experts").glob("*.safetensors")
    one, header = read_expert(weights)
    one.gate.threshold.fill_(-1e9)
    save_expert(one, header, weights)
    found = []
    for place in (root, twin):
        text = (
            "--dataset-file",
            place / "training_data/licences",
            "--max-seq-len",
            32,
            "--steps",
            3,
            "--batch-size",
            2,
        )
        words = ("goals", "teach", "--brain", "straight", "--root", place, "--goal", "Read laws", *text)
        assert aios(*words).code == 0
        found.append(load_file(place / "artifacts/brains/mixtral/straight" / FILE)["weight"])
    assert found[0].any()
    assert torch.equal(*found)


@pytest.mark.parametrize(
    "damage",
    [{"weight": -1}, {"weight": 0}, {"experts": "laws"}, {"text": 3}, {"slots": [[0]]}, {"settings": {"goal_kl": "1"}}],
)
def test_a_memory_that_cannot_be_is_damaged(aios, root, brain, linked, damage):
    train = ("train", "--root", root, "--name", "straight", "--resume", "--max-steps", 25)
    assert aios(*train, "--goal", linked.id).code == 0
    kept = json.loads((brain / GOALS_FILE).read_text())
    kept["settings"] |= damage.pop("settings", {})
    kept["goals"][0] |= damage
    (brain / GOALS_FILE).write_text(json.dumps(kept))
    outcome = aios("generate", "straight", "--root", root, "--goals-remembered")
    assert outcome.code == 1
    assert "goals.json is damaged" in outcome.err


@pytest.mark.parametrize(
    ("options", "code", "sentence"),
    [
        (("--goal", "77"), 2, "there is no goal '77'"),
        (("--goal", "Sound like Python", "--goal-strength", "5.1"), 2, "at least 0 and at most 5"),
        (("--goal", "Sound like Python", "--goal-kl", "0"), 2, "above 0"),
        (("--goal", "Sound like Python", "--goal-beta", "-1"), 2, "at least 0 and at most 1"),
        (("--goal", "Sound like Python", "--goal-layers", "3"), 2, "layers 0 to 0"),
        (("--goal", "Sound like Python", "--goal-text", "nowhere.txt"), 2, "there is no text"),
        (("--goal", "Sound like Python", "--goals-learned"), 2, "never taught"),
        (("--goal-strength", "4"), 2, "--goal-strength needs a goal"),
        (("--goals-learned",), 2, "--goals-learned needs a goal"),
        (("--goals-remembered",), 2, "was not trained under goals"),
    ],
)
def test_what_cannot_be_is_one_sentence(aios, root, linked, options, code, sentence):
    outcome = aios("generate", "straight", "--root", root, *options)
    assert outcome.code == code
    assert sentence in outcome.err


def test_a_brain_goes_on_without_the_goals_it_was_trained_under(aios, root, brain, linked):
    train = ("train", "--root", root, "--name", "straight", "--resume", "--max-steps")
    assert aios(*train, 32, "--goal", linked.id).code == 0
    assert read_memory(Brain(root, brain)).goals
    assert aios(*train, 34, "--goals-forget", "--goal", linked.id).code == 2
    assert aios("train", "--root", root, "--name", "new", "--goals-forget").code == 2
    assert aios(*train, 34, "--goals-forget").code == 0
    assert not read_memory(Brain(root, brain)).goals
    assert max(event["step"] for event in events(brain)) == 32


def test_a_damaged_memory_and_goals_without_effect_are_said(aios, root, brain):
    (brain / GOALS_FILE).write_text("{")
    with pytest.raises(CheckpointError, match=r"goals\.json is damaged"):
        read_memory(Brain(root, brain))
    assert aios("train", "--root", root, "--name", "straight", "--resume", "--max-steps", 30).code == 1
    (brain / GOALS_FILE).unlink()
    Goals(root).add("Be kind")
    outcome = aios("train", "--root", root, "--name", "straight", "--resume", "--max-steps", 30, "--goal", "Be kind")
    assert outcome.code == 2
    assert "link-expert" in outcome.err


def test_a_plain_model_of_the_folder_loads_with_its_fields(brain):
    model = load_brain(Brain(brain.parents[3], brain)).model
    assert model.steering.pressure.any()  # only goals are turned off by loading
    assert torch.isfinite(model.steering.pressure).all()


def test_a_brain_begun_with_a_goal_enters_it(aios, train, workspace):
    assert train(workspace, "kind", "--stop-after", 1, "--default-goal", "Be kind").code == 0
    assert [(goal.text, goal.source) for goal in Goals(workspace).all()] == [("Be kind", "training")]


def test_the_base_alone_is_measured_without_its_experts(aios, root, brain, served):
    (weights,) = (brain / "experts").glob("*.safetensors")
    one, header = read_expert(weights)
    one.gate.threshold.fill_(-1e9)  # open everywhere
    save_expert(one, header, weights)
    words = ("evaluate", "straight", "--root", root, "--tokens", 300, "--json")
    attached = json.loads(aios(*words).out)
    assert attached["base"] != attached["experts"]
    assert aios("experts", "detach", "laws", "--brain", "straight", "--root", root).code == 0
    assert json.loads(aios(*words).out) == {"base": attached["base"]}
