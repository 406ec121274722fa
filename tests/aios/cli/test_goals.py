"""aios goals and aios goals-add, ...: the seed's commands, what programs read, what people see."""

import json
import sqlite3
import subprocess
import sys

import pytest

from aios.store.experts import ExpertEntry, Registry

VERBS = (
    *("add", "list", "list-for-expert", "get-expert", "link-expert", "unlink-expert", "activate", "deactivate"),
    *("weigh", "remove", "remove-like"),
)
ITEM = {
    *("id", "text", "created_ts", "active", "protected", "expert_id"),
    *("expert_ids", "weight", "updated_ts", "source"),
}


@pytest.fixture
def goals(aios, tmp_path):
    """`aios goals <words> --root <workspace>`, as a person at a terminal would have it or not."""
    return lambda *words: aios("goals", *words, "--root", tmp_path)


@pytest.fixture
def told(goals):
    """The same, read."""

    def call(*words, code=0):
        outcome = goals(*words)
        assert outcome.code == code, outcome.err
        return json.loads(outcome.out)

    return call


@pytest.fixture
def people(monkeypatch):
    """Standard output is a terminal."""
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setattr(type(sys.stdout), "isatty", lambda self: True)


def test_every_command_has_help_and_both_spellings(aios):
    shown = aios("goals", "--help").out
    assert all(f" {verb} " in shown for verb in VERBS)
    for verb in VERBS:
        grouped, flat = aios("goals", verb, "--help"), aios(f"goals-{verb}", "--help")
        assert grouped.code == flat.code == 0
        assert grouped.out.replace("goals ", "goals-", 1) == flat.out
        assert "--root" in flat.out
        assert "--json" in flat.out


def test_help_and_goals_import_nothing_heavy(tmp_path):
    code = (
        "import sys; from aios.cli import run\n"
        f"assert all(run(['goals-' + verb, '--help']) == 0 for verb in {VERBS})\n"
        f"assert run(['goals-add', 'x', '--root', {str(tmp_path)!r}]) == 0\n"
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_the_seed_word_for_word(aios, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    registry = Registry(tmp_path)
    registry.upsert(ExpertEntry(expert_id="test-expert-004", checkpoint_path="artifacts/experts/test-expert-004/e"))
    added = json.loads(aios("goals-add", "Improve summarization quality", "--expert-id", "test-expert-004").out)
    expected = {"added": 1, "text": "Improve summarization quality", "expert_id": "test-expert-004", "id": 1}
    assert added.items() >= expected.items()
    for number in range(2, 43):
        assert aios("goals-add", f"Goal {number}").code == 0
    linked = json.loads(aios("goals-link-expert", "42", "test-expert-004").out)
    assert linked.items() >= {"success": True, "directive_id": 42, "expert_id": "test-expert-004"}.items()
    listed = json.loads(aios("goals-list").out)
    assert listed["count"] == 42
    assert listed["directives"][0] == "Goal 42"
    of_expert = json.loads(aios("goals-list-for-expert", "test-expert-004").out)
    assert (of_expert["count"], of_expert["expert_id"]) == (2, "test-expert-004")
    assert of_expert["directives"] == ["Goal 42", "Improve summarization quality"]
    assert registry.get("test-expert-004").goals == ("Improve summarization quality", "Goal 42")


def test_the_objects(goals, told, tmp_path):
    for expert_id in "ab":
        Registry(tmp_path).create(expert_id)
    added = told("add", " Read laws ", "--weight", "0.5")
    assert set(added) == ITEM | {"success", "added"}
    assert (added["text"], added["weight"], added["source"], added["expert_id"]) == ("Read laws", 0.5, "cli", None)
    again = told("add", "Read laws")
    assert (again["added"], again["id"], again["weight"]) == (0, 1, 0.5)
    for expert_id in "ab":
        linked = told("link-expert", 1, expert_id)
        assert set(linked) == ITEM | {"success", "directive_id"}
        assert (linked["directive_id"], linked["expert_id"]) == (1, expert_id)
    listed = told("list")
    assert set(listed) == {"count", "directives", "items"}
    (item,) = listed["items"]
    assert set(item) == ITEM
    assert (item["active"], item["protected"], item["expert_id"], item["expert_ids"]) == (True, False, "a", ["a", "b"])
    assert set(told("list-for-expert", "a")) == {"count", "expert_id", "directives", "items"}
    assert told("get-expert", 1).items() >= {"directive_id": 1, "expert_id": "a", "expert_ids": ["a", "b"]}.items()
    assert told("unlink-expert", 1, "a")["expert_ids"] == ["b"]
    gone = told("unlink-expert", 1)
    assert (gone["success"], gone["directive_id"], gone["expert_ids"]) == (True, 1, [])
    assert told("deactivate", 1)["active"] is False
    assert told("list")["count"] == 0
    assert told("list", "--all")["items"][0]["active"] is False
    assert told("weigh", 1, 0.25).items() >= {"success": True, "weight": 0.25, "active": False}.items()
    for odd in (0, 1.5, "nan"):
        assert goals("weigh", 1, odd).code == 2
    assert told("list", "--all")["items"][0]["weight"] == 0.25
    assert told("activate", 1).items() >= {"success": True, "directive_id": 1, "active": True}.items()
    told("add", "100% sure")
    assert told("remove-like", "%").items() >= {"removed_count": 1, "match": "%", "ids": [2]}.items()
    assert told("remove-like", "nothing")["removed_count"] == 0
    assert told("remove", 1).items() >= {"removed": True, "id": 1}.items()
    assert told("list", "--all") == {"count": 0, "directives": [], "items": []}


def test_people_read_sentences(goals, people, tmp_path):
    Registry(tmp_path).create("a")
    said = [
        goals(*words).out.strip()
        for words in (
            *(["list"], ["add", "Read [laws]", "--expert-id", "a"], ["add", "Read [laws]"], ["link-expert", 1, "a"]),
            *(["get-expert", 1], ["unlink-expert", 1], ["list-for-expert", "a"], ["deactivate", 1], ["activate", 1]),
        )
    ]
    assert said == [
        "No goal yet; `aios goals add` makes one.",
        "Added goal 1, linked to a.",
        "There is already goal 1, linked to a.",
        *["Goal 1 is linked to a."] * 2,
        "Goal 1 is linked to no expert.",
        "a has no active goal.",
        "Goal 1 is inactive.",
        "Goal 1 is active.",
    ]
    table = [line.split() for line in goals("list").out.splitlines()]
    assert table == [["goal", "text", "weight", "state", "experts"], ["1", "Read", "[laws]", "1", "active"]]
    assert json.loads(goals("list", "--json").out)["count"] == 1
    assert goals("remove-like", "LAWS").out == "Removed 1 goal.\n"
    outcome = goals("remove", 1)
    assert (outcome.code, outcome.out) == (1, "")
    assert "there is no goal 1" in outcome.err


@pytest.mark.parametrize(
    ("words", "told_too"),
    [
        (["link-expert", 7, "a"], {"success": False, "directive_id": 7, "expert_id": "a"}),
        (["link-expert", 1, "nobody"], {"success": False, "directive_id": 1, "expert_id": "nobody"}),
        (["link-expert", 1, "small:1.2"], {"success": False, "expert_id": "small:1.2"}),
        (["unlink-expert", 1, "a"], {"success": False, "directive_id": 1}),
        (["add", "b", "--expert-id", "nobody"], {"success": False, "added": 0, "text": "b", "expert_id": "nobody"}),
        (["get-expert", 7], {"success": False, "directive_id": 7}),
        (["list-for-expert", "nobody"], {"success": False, "expert_id": "nobody"}),
        (["remove", 7], {"removed": False, "id": 7}),
        (["activate", 7], {"success": False, "directive_id": 7}),
    ],
)
def test_failures_are_told_and_exit_with_1(goals, tmp_path, words, told_too):
    Registry(tmp_path).create("a")
    goals("add", "one")
    outcome = goals(*words)
    assert outcome.code == 1
    told = json.loads(outcome.out)
    assert told.items() >= told_too.items()
    assert outcome.err == f"aios: {told['error']}\n"


@pytest.mark.parametrize(
    "words",
    [
        *(
            ["add"],
            ["add", " "],
            ["add", "x" * 10_000],
            ["add", "a\nb"],
            ["add", "a", "--weight", "2"],
            ["remove", "x"],
        ),
        *(["add", "a", "--weight", "nan"], ["link-expert", 1, "small:x"], ["remove-like", ""], ["rename", "a"]),
    ],
)
def test_wrong_usage_is_2(goals, words):
    goals("add", "one")
    outcome = goals(*words)
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err


@pytest.mark.parametrize("damage", ["junk", "newer", "folder"])
def test_trouble_with_the_database(goals, tmp_path, damage):
    file = tmp_path / "artifacts/aios.db"
    goals("add", "one")
    if damage == "newer":
        connection = sqlite3.connect(file)
        connection.execute("PRAGMA user_version = 7")
        connection.close()
    else:
        file.unlink()
        file.write_bytes(b"junk" * 999) if damage == "junk" else file.mkdir()
    for words in (["add", "two"], ["list"], ["remove", 1], ["remove-like", "o"], ["deactivate", 1]):
        outcome = goals(*words)
        assert outcome.code == 1
        told = json.loads(outcome.out)
        assert not told["success"]
        assert str(file) in told["error"]
        assert outcome.err == f"aios: {told['error']}\n"


def test_a_created_expert_brings_its_goals(aios, told, tmp_path):
    assert aios("experts", "create", "a", "--goal", "one", "--goal", "two", "--root", tmp_path).code == 0
    assert aios("experts", "create", "b", "--goal", "x" * 2000, "--root", tmp_path).code == 2
    assert told("list-for-expert", "a")["directives"] == ["two", "one"]
    assert aios("experts", "rename", "a", "c", "--root", tmp_path).code == 0
    assert told("list")["items"][0]["expert_ids"] == ["c"]
    assert aios("experts", "delete", "c", "--yes", "--root", tmp_path).code == 0
    assert told("list")["items"][0]["expert_ids"] == []


@pytest.mark.parametrize("text", ["-x", "- be brief", "--no lies", "-1"])
def test_a_text_that_looks_like_an_option(goals, text):
    assert goals("add", text, "--weight", 1).code == 0
    assert json.loads(goals("list", "--json").out)["directives"] == [text]
    assert json.loads(goals("remove-like", text, "--json").out)["removed_count"] == 1
