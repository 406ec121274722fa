"""Goals linked to slots of a brain's own routers."""

import json

import pytest

from aios.brains.brain import Brain
from aios.brains.run_file import RunFile
from aios.goals.slots import find_slot, link, link_target
from aios.settings.train import MixtralRun
from aios.store.goals import Goals
from aios.store.slots import Slot, read_slot
from chronomoe.errors import CheckpointError, ConfigError

MIXTRAL = {"model_type": "mixtral", "num_hidden_layers": 4, "num_local_experts": 8}
HRM = {"model_type": "hrm_actv1", "l_layers": 2, "h_layers": 1, "num_local_experts": 4, "use_moe": True}


@pytest.fixture
def brain(tmp_path):
    """A brain that is no more than its config."""

    def call(place, config):
        folder = tmp_path / "artifacts/brains" / place
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
        return folder

    return call


@pytest.fixture
def goals(tmp_path):
    return Goals(tmp_path)


@pytest.mark.parametrize("word", ["small:2.5", "small:*.0", "actv1/thinker:0.3"])
def test_a_slot_is_written_as_it_is_read(word):
    assert str(read_slot(word)) == word


@pytest.mark.parametrize(
    "word", ["", "small", "small:", "small:1", "small:a.1", "small:1.*", "small:-1.2", "a:b:1.2", ":1.2"]
)
def test_words_that_are_no_slot(word):
    with pytest.raises(ConfigError, match=r"write BRAIN:LAYER\.EXPERT"):
        read_slot(word)


def test_a_slot_is_checked_against_its_brain(brain, tmp_path):
    brain("mixtral/small", MIXTRAL)
    brain("actv1/thinker", HRM)
    brain("actv1/dense", HRM | {"use_moe": False})
    assert find_slot(tmp_path, "small:3.7") == Slot("mixtral/small", 3, 7)
    assert find_slot(tmp_path, "thinker:*.3") == Slot("actv1/thinker", None, 3)
    assert find_slot(tmp_path, "actv1/thinker:2.0") == Slot("actv1/thinker", 2, 0)
    for word, said in {
        "small:4.0": "no layer 4; its layers are 0 to 3",
        "small:0.8": "no expert 8; its experts are 0 to 7",
        "thinker:3.0": "no layer 3",
        "dense:0.0": "no experts of its own",
        "nobody:0.0": "no brain nobody in this workspace",
        "/etc:0.0": "no brain /etc",
    }.items():
        with pytest.raises(CheckpointError, match=said):
            find_slot(tmp_path, word)


def test_a_brain_in_training_is_known_by_its_checkpoints(brain, tmp_path):
    brain("mixtral/small/checkpoints/step_3", MIXTRAL)
    assert find_slot(tmp_path, "small:0.0").brain == "mixtral/small"


@pytest.mark.parametrize("config", ["", "[]", "{}", '{"model_type": "mixtral"}'])
def test_a_config_that_does_not_say(brain, tmp_path, config):
    brain("mixtral/small", config)
    with pytest.raises(CheckpointError, match="does not say how many layers"):
        find_slot(tmp_path, "small:0.0")


def test_links_to_slots(brain, goals):
    brain("mixtral/small", MIXTRAL)
    one, _ = goals.add("one", expert=link_target(goals.root, "small:2.5"))
    two, _ = goals.add("two", expert="mixtral/small:*.5")
    link(goals.root, one.id, "mixtral/small:2.5")
    assert goals.get(one.id).experts == ("mixtral/small:2.5",)
    assert [goal.text for goal in goals.for_expert("small:2.5")] == ["two", "one"]
    assert [goal.text for goal in goals.for_expert("small:1.5")] == ["two"]
    assert goals.for_expert("small:2.4") == []
    with pytest.raises(CheckpointError, match="no expert 8"):
        link(goals.root, one.id, "small:2.8")
    assert [one.slots for one in goals.active()] == [(Slot("mixtral/small", None, 5),), (Slot("mixtral/small", 2, 5),)]
    with pytest.raises(CheckpointError, match=r"not linked to small:1\.5"):
        goals.unlink(two.id, "small:1.5")
    assert goals.unlink(one.id, "small:2.5").experts == ()
    with pytest.raises(ConfigError, match="is no slot"):
        link(goals.root, one.id, "small:two.5")


def test_two_brains_of_one_name_are_told_apart(goals):
    goal, _ = goals.add("one", expert="mixtral/small:2.5")
    goals.link(goal.id, "actv1/small:2.5")
    for refused in (lambda: goals.for_expert("small:2.5"), lambda: goals.unlink(goal.id, "small:2.5")):
        with pytest.raises(ConfigError, match="actv1/small or mixtral/small; write the family"):
            refused()
    assert goals.for_expert("actv1/small:2.5") == [goals.get(goal.id)]
    assert goals.unlink(goal.id, "actv1/small:2.5").experts == ("mixtral/small:2.5",)


def test_links_follow_a_brain(brain, goals, tmp_path):
    run = RunFile(family="mixtral", run=MixtralRun())
    for name in ("small", "smaller"):
        run.write_file(brain(f"mixtral/{name}", MIXTRAL) / "run.json")
    one, _ = goals.add("one", expert=link_target(goals.root, "small:2.5"))
    link(goals.root, one.id, "smaller:0.0")
    Brain.of_workspace(tmp_path, "small").rename("big")
    assert set(goals.get(one.id).experts) == {"mixtral/big:2.5", "mixtral/smaller:0.0"}
    Brain.of_workspace(tmp_path, "big").delete()
    assert goals.get(one.id).experts == ("mixtral/smaller:0.0",)
