"""Goals and experts: links, what a rename and a deletion make of them, and that the registry always agrees."""

import errno
import json
import random
import signal
import sqlite3
import subprocess
import sys
import threading
import time

import pytest

from aios.store.experts import ExpertEntry, Registry
from aios.store.goals import Goals
from chronomoe import storage
from chronomoe.errors import CheckpointError, ConfigError
from tests.aios.store.conftest import CUTS, assert_projected


@pytest.fixture
def registry(tmp_path):
    return Registry(tmp_path)


@pytest.fixture
def goals(tmp_path):
    return Goals(tmp_path)


def path(expert_id):
    return f"artifacts/experts/{expert_id}/expert.safetensors"


# -- links ---------------------------------------------------------------------------------------------------


def test_reading_creates_nothing(goals, registry):
    assert goals.all() == goals.active() == goals.for_expert("mixtral/small:0.0") == []
    assert goals.expert_ids() == {}
    with pytest.raises(CheckpointError, match="no goal 1"):
        goals.remove(1)
    assert goals.remove_like("x") == []
    goals.brain_moved("mixtral/a", "mixtral/b")
    assert not (registry.root / "artifacts").exists()


def test_many_to_many(goals, registry):
    a, b = registry.create("a"), registry.create("b")
    one, new = goals.add("one", expert="a")
    two, _ = goals.add("two", weight=0.5)
    assert new
    goals.link(two.id, "a")
    goals.link(two.id, b.expert_uid)
    assert goals.link(two.id, "b").experts == (a.expert_uid, b.expert_uid)
    assert registry.get("a").goals == ("one", "two")
    assert registry.get("b").goals == ("two",)
    assert [goal.id for goal in goals.for_expert("a")] == [two.id, one.id]
    assert_projected(registry)
    goals.unlink(two.id, "a")
    assert registry.get("a").goals == ("one",)
    assert goals.unlink(two.id).experts == ()
    assert registry.get("b").goals == ()
    with pytest.raises(CheckpointError, match="not linked to b"):
        goals.unlink(two.id, "b")
    goals.remove(one.id)
    assert registry.get("a").goals == ()
    assert_projected(registry)


def test_active_goals_with_their_experts(goals, registry):
    registry.create("a")
    registry.create("b")
    one, _ = goals.add("one", expert="a")
    goals.link(one.id, "b")
    two, _ = goals.add("two", expert="b")
    registry.deactivate("b")
    first, second = goals.active()
    assert (first.goal, first.entries, first.slots) == (goals.get(two.id), (registry.get("b"),), ())
    assert second.entries == (registry.get("a"), registry.get("b"))
    goals.deactivate(one.id)
    assert [one.goal.text for one in goals.active()] == ["two"]
    assert [goal.text for goal in goals.all(active_only=False)] == ["two", "one"]
    assert registry.get("a").goals == ("one",)  # its links stay
    goals.activate(one.id)
    assert len(goals.active()) == 2


@pytest.mark.parametrize("word", ["nobody", "gone", "asleep", "0" * 32])
def test_who_cannot_be_linked(goals, registry, word):
    for expert_id in ("here", "gone", "asleep"):
        registry.create(expert_id)
    registry.delete("gone")
    registry.deactivate("asleep")
    goal, _ = goals.add("one")
    said = {"gone": "was deleted", "asleep": "aios experts activate asleep"}.get(word, "there is no expert")
    for refused in (lambda: goals.link(goal.id, word), lambda: goals.add("two", expert=word)):
        with pytest.raises(CheckpointError, match=said):
            refused()
    assert [(goal.text, goal.experts) for goal in goals.all()] == [("one", ())]


def test_a_link_stays_when_its_expert_becomes_inactive(goals, registry):
    registry.create("a")
    goals.add("one", expert="a")
    registry.deactivate("a")
    assert [goal.text for goal in goals.for_expert("a")] == ["one"]


def test_rename_keeps_links(goals, registry):
    registry.create("a")
    goal, _ = goals.add("one", expert="a")
    registry.rename("a", "b")
    assert goals.get(goal.id) == goal
    assert goals.expert_ids()[goal.experts[0]] == "b"
    assert [one.text for one in goals.for_expert("b")] == ["one"]
    assert_projected(registry)


def test_delete_takes_links(goals, registry):
    for expert_id in "abc":
        registry.create(expert_id)
    registry.set_parent("b", "a")
    goal, _ = goals.add("one", expert="a")
    for expert_id in "bc":
        goals.link(goal.id, expert_id)
    registry.delete("a", "cascade")
    assert goals.get(goal.id).experts == (registry.get("c").expert_uid,)
    assert_projected(registry)
    assert registry.create("a").goals == ()


def test_remove_like_takes_wildcards_as_they_are(goals):
    for text in ("100% sure", "a_b", "Ärger", "axb", "10 percent"):
        goals.add(text)
    assert [goal.text for goal in goals.remove_like("%")] == ["100% sure"]
    assert [goal.text for goal in goals.remove_like("A_B")] == ["a_b"]
    assert [goal.text for goal in goals.remove_like("äRGER")] == ["Ärger"]
    goals.deactivate(goals.all()[0].id)
    assert len(goals.remove_like("1")) == 1
    with pytest.raises(ConfigError, match="say which goals"):
        goals.remove_like(" ")
    assert [goal.text for goal in goals.all(active_only=False)] == ["axb"]


@pytest.mark.parametrize("goal_id", [0, -1, 7, 2**63, 10**30])
def test_goals_that_are_not_there(goals, goal_id):
    goals.add("one")
    for refused in (goals.get, goals.remove, goals.activate, goals.deactivate, goals.unlink):
        with pytest.raises(CheckpointError, match=f"no goal {goal_id};"):
            refused(goal_id)


# -- goals that come with experts ----------------------------------------------------------------------------


def test_goals_of_created_and_trained_experts(goals, registry):
    registry.create("a", goals=["one", "two"])
    assert [(goal.text, goal.source) for goal in goals.all()] == [("two", "cli"), ("one", "cli")]
    for _ in range(2):
        registry.upsert(ExpertEntry(expert_id="a", checkpoint_path=path("a"), goals=("three",)))
    registry.upsert(ExpertEntry(expert_id="b", checkpoint_path=path("b"), goals=("one",)), source="import")
    assert [(goal.text, goal.source) for goal in goals.all()] == [("three", "training"), ("two", "cli"), ("one", "cli")]
    assert registry.get("a").goals == ("one", "two", "three")
    assert registry.get("b").goals == ("one",)
    assert_projected(registry)
    before = registry.file.read_bytes()
    with pytest.raises(ConfigError, match="needs words"):
        registry.create("c", goals=[" "])
    assert registry.file.read_bytes() == before


def test_a_registry_of_the_original_brings_its_goals(goals, registry):
    goals.add("mine")
    old = [
        {"expert_id": "a", "goals": ["one", " two\n"]},
        {"expert_id": "b", "goals": ["one", "\ud800", "", "x" * 5000]},
    ]
    registry.file.write_text(json.dumps({"version": "1.0", "experts": old}))
    assert [goal.text for goal in goals.for_expert("a")] == ["two", "one"]
    assert {goal.source for goal in goals.for_expert("a")} == {"registry"}
    assert registry.get("b").goals == ("one", "?", "x" * 1000)
    assert len(goals.all()) == 5
    seen = [(goal.id, goal.text, goal.experts) for goal in goals.all()], registry.entries()
    registry.freeze("a")
    registry.unfreeze("a")
    assert ([(goal.id, goal.text, goal.experts) for goal in goals.all()], registry.entries()) == seen
    assert_projected(registry)


def test_goals_of_the_registry_are_entered_before_anything_else_is_done(goals, registry):
    registry.create("a", goals=["one"])
    registry.database.unlink()  # lost
    registry.create("b", goals=["two"])
    assert registry.get("a").goals == ("one",)
    registry.database.unlink()
    registry.delete("b")
    assert {goal.text: len(goal.experts) for goal in goals.all()} == {"one": 1, "two": 0}
    assert_projected(registry)


def test_a_lost_registry_takes_no_links(goals, registry):
    entry = registry.create("a", goals=["one"])
    kept = registry.file.read_bytes()
    registry.file.write_text("{")
    for refused in (goals.all, lambda: goals.add("two"), lambda: goals.unlink(1)):
        with pytest.raises(CheckpointError, match="is damaged"):
            refused()
    registry.file.unlink()
    assert goals.get(1).experts == (entry.expert_uid,)
    assert registry.file.read_bytes() == kept
    registry.file.unlink()
    goals.add("two")
    registry.create("b", goals=["two"])
    assert [goal.text for goal in goals.for_expert(entry.expert_uid)] == ["one"]
    registry.file.write_bytes(kept)
    assert [goal.text for goal in goals.for_expert("a")] == ["one"]
    assert [goal.text for goal in goals.for_expert("b")] == ["two"]


def test_a_damaged_database_changes_nothing(goals, registry):
    registry.create("a", goals=["one"])
    registry.create("b")
    before = registry.file.read_bytes()
    registry.database.write_bytes(b"no database" * 500)
    for refused in (
        registry.entries,
        lambda: goals.add("two", expert="a"),
        lambda: registry.create("c", goals=["two"]),
        lambda: registry.freeze("a"),
        lambda: registry.delete("a"),
        lambda: registry.upsert(ExpertEntry(expert_id="a", checkpoint_path=path("a"), goals=("two",))),
    ):
        with pytest.raises(CheckpointError, match=r"aios\.db is damaged"):
            refused()
    assert registry.file.read_bytes() == before
    registry.database.unlink()
    assert [goal.text for goal in goals.for_expert("a")] == ["one"]
    assert registry.file.read_bytes() == before


# -- killed on the way ---------------------------------------------------------------------------------------

CHANGES = {
    "add": lambda registry, goals: goals.add("new", expert="a"),
    "unlink": lambda registry, goals: goals.unlink(1, "a"),
    "remove": lambda registry, goals: goals.remove(1),
    "create": lambda registry, goals: registry.create("c", goals=["new"]),
    "train": lambda registry, goals: registry.upsert(
        ExpertEntry(expert_id="a", checkpoint_path=path("a"), goals=("new",))
    ),
    "delete": lambda registry, goals: registry.delete("a"),
}


def state(registry, goals):
    links = {goal.text: {goals.expert_ids().get(expert) for expert in goal.experts} for goal in goals.all()}
    return links, {one.expert_id: set(one.goals) for one in registry.entries()}


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("what", CHANGES)
def test_a_kill_at_any_point_leaves_the_old_or_the_new(registry, goals, killed_at, what, cut):
    registry.create("a", goals=["one", "both"])
    registry.create("b", goals=["both"])
    old = state(registry, goals)
    with killed_at(cut):
        CHANGES[what](registry, goals)
    found = state(registry, goals)
    assert_projected(registry)
    done = cut in ("after COMMIT", "after the file")
    assert (found != old) == done
    if not done:
        CHANGES[what](registry, goals)
        found = state(registry, goals)
    assert (
        found
        == {
            "add": ({"new": {"a"}, "both": {"a", "b"}, "one": {"a"}}, {"a": {"one", "both", "new"}, "b": {"both"}}),
            "unlink": ({"both": {"a", "b"}, "one": set()}, {"a": {"both"}, "b": {"both"}}),
            "remove": ({"both": {"a", "b"}}, {"a": {"both"}, "b": {"both"}}),
            "create": (
                {"new": {"c"}, "both": {"a", "b"}, "one": {"a"}},
                {"a": {"one", "both"}, "b": {"both"}, "c": {"new"}},
            ),
            "train": ({"new": {"a"}, "both": {"a", "b"}, "one": {"a"}}, {"a": {"one", "both", "new"}, "b": {"both"}}),
            "delete": ({"both": {"b"}, "one": set()}, {"b": {"both"}}),
        }[what]
    )


@pytest.mark.parametrize("what", CHANGES)
def test_a_change_that_cannot_be_written_is_not_made(registry, goals, monkeypatch, what):
    registry.create("a", goals=["one", "both"])
    registry.create("b", goals=["both"])
    old = state(registry, goals)
    with monkeypatch.context() as patch:
        patch.setattr(storage.os, "fsync", full)
        with pytest.raises(CheckpointError, match="full"):
            CHANGES[what](registry, goals)
    assert state(registry, goals) == old
    assert_projected(registry)


def full(*words):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_two_writers(goals, registry):
    registry.create("a")
    failed = []

    def write(name):
        try:
            for number in range(15):
                Goals(registry.root).add(f"{name} {number}", expert="a")
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=write, args=(name,)) for name in ("x", "y")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    assert len(goals.for_expert("a")) == 30
    assert_projected(registry)


WORKER = """
import os, sys
from pathlib import Path
from aios.store.goals import Goals
root, worker, writes = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
goals, log = Goals(root), root / f"acknowledged-{worker}"
begin = len(log.read_text().split()) if log.exists() else 0
with open(log, "a") as file:
    for number in range(begin, writes):
        text = f"{worker}-{number}"
        goal, _ = goals.add(text, expert=f"e{number % 3}")
        if number % 10 == 0:
            goals.unlink(goal.id, f"e{number % 3}")
            goals.link(goal.id, "e3")
        file.write(text + "\\n")
        file.flush()
        os.fsync(file.fileno())
assert not {"torch", "numpy"} & set(sys.modules)
"""


def test_no_acknowledged_goal_is_lost_when_processes_are_killed(registry, goals):
    workers, writes, kills, rng = 4, 100, 8, random.Random(0)
    for number in range(4):
        registry.create(f"e{number}")
    goals.add("first")
    # While it is open SQLite leaves changes in the -wal file, which is faster and what a killed process leaves behind.
    witness = sqlite3.connect(registry.database)
    assert witness.execute("SELECT text FROM goals").fetchall() == [("first",)]

    def begin(worker):
        return subprocess.Popen([sys.executable, "-c", WORKER, str(registry.root), str(worker), str(writes)])

    running = {worker: begin(worker) for worker in range(workers)}
    for _ in range(kills):
        time.sleep(rng.uniform(0.2, 0.5))
        victim = rng.randrange(workers)
        running[victim].send_signal(signal.SIGKILL)
        running[victim].wait(timeout=20)
        running[victim] = begin(victim)
    assert [process.wait(timeout=60) for process in running.values()] == [0] * workers
    assert goals.remove(1).text == "first"
    ids = goals.expert_ids()
    known = {goal.text: [ids[expert] for expert in goal.experts] for goal in goals.all()}
    for worker in range(workers):
        acknowledged = (registry.root / f"acknowledged-{worker}").read_text().split()
        assert acknowledged == [f"{worker}-{number}" for number in range(writes)]
        for number, text in enumerate(acknowledged):
            assert known[text] == ["e3" if number % 10 == 0 else f"e{number % 3}"]
    assert len(known) == workers * writes
    assert_projected(registry)
    witness.close()
    assert {file.name for file in registry.home.iterdir()} == {"registry.json", "registry.json.lock"}
