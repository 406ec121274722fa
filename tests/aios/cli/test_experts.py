"""aios experts."""

import json
import sys

import pytest

from aios.store.experts import ExpertEntry, Registry

COMMANDS = (
    *("list", "show", "create", "freeze", "unfreeze", "activate", "deactivate", "set-parent", "clear-parent"),
    *("rename", "delete", "stats"),
)


@pytest.fixture
def experts(aios, tmp_path):
    """`aios experts <words> --root <workspace>`."""
    return lambda *words: aios("experts", *words, "--root", tmp_path)


@pytest.fixture
def told(experts):
    """The same with --json, read."""

    def call(*words):
        outcome = experts(*words, "--json")
        assert outcome.code == 0, outcome.err
        return json.loads(outcome.out)

    return call


def test_every_command_has_help(aios):
    shown = aios("experts", "--help").out
    assert all(f" {command} " in shown for command in COMMANDS)
    for command in COMMANDS:
        shown = aios("experts", command, "--help").out
        assert "--root" in shown
        assert "--json" in shown


def test_an_empty_workspace(experts, told, tmp_path):
    assert "No expert yet" in experts("list").out
    assert told("list") == []
    assert told("stats")["experts"] == 0
    assert "experts 0" in experts("stats").out
    for words in (["show", "x"], ["freeze", "x"], ["rename", "x", "y"], ["delete", "x", "--yes"]):
        outcome = experts(*words)
        assert outcome.code == 2
        assert "no expert" in outcome.err
    assert list(tmp_path.iterdir()) == []


def test_create_list_and_show(experts, told):
    entered = told("create", "law", "--name", "[bold]Law", "--category", "[red]legal", "--goal", "a b", "--goal", "c")
    assert entered["goals"] == ["a b", "c"]
    assert "no weights yet" in experts("create", "code", "--parent", "law", "--description", "Python").out
    assert experts("create", "law").code == 2
    assert [one["expert_id"] for one in told("list")] == ["law", "code"]
    listed = " ".join(experts("list").out.split())
    assert "law [red]legal" in listed
    shown = told("show", "code")
    assert (shown["parent_expert_id"], shown["description"]) == ("law", "Python")
    assert told("show", "law") == entered | {"child_expert_ids": ["code"]}
    lines = experts("show", "law").out.splitlines()
    assert ["goals", "a", "b,", "c"] in map(str.split, lines)
    assert ["child_expert_ids", "code"] in map(str.split, lines)


def test_switches(experts, told):
    told("create", "a")
    assert told("freeze", "a")["is_frozen"]
    assert told("deactivate", "a")["is_active"] is False
    assert "inactive, frozen, no weights" in " ".join(experts("list").out.split())
    assert told("unfreeze", "a")["is_frozen"] is False
    assert told("activate", "a")["is_active"]
    for command in ("freeze", "unfreeze", "activate", "deactivate"):
        outcome = experts(command, "a")
        assert outcome.code == 0
        assert outcome.out.strip().endswith(".")


def test_hierarchy(experts, told):
    for expert in "abc":
        told("create", expert)
    assert told("set-parent", "b", "a")["parent_expert_id"] == "a"
    assert "c is below b" in experts("set-parent", "c", "b").out
    outcome = experts("set-parent", "a", "c")
    assert outcome.code == 2
    assert "c is below a already" in outcome.err
    assert "its own parent" in experts("set-parent", "a", "a").err
    assert told("clear-parent", "c")["parent_expert_id"] is None
    assert "no parent" in experts("clear-parent", "b").out


def test_rename(experts, told):
    told("create", "a")
    assert told("rename", "a", "b")["expert_id"] == "b"
    assert "Renamed to c" in experts("rename", "b", "c").out
    for bad in ("../x", "x" * 300, "a/b", ""):
        outcome = experts("rename", "c", bad)
        assert outcome.code == 2
        assert "is not a name" in outcome.err


def test_delete(experts, told, tmp_path, monkeypatch):
    for expert in "abc":
        told("create", expert)
    told("set-parent", "b", "a")
    told("set-parent", "c", "b")
    monkeypatch.setattr(sys.stdin, "isatty", lambda: False, raising=False)
    outcome = experts("delete", "a")
    assert outcome.code == 2
    assert "--yes" in outcome.err
    outcome = experts("delete", "a", "--yes")
    assert outcome.code == 2
    assert "has children" in outcome.err
    assert experts("delete", "a", "--yes", "--children", "burn").code == 2
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)

    def end_of_input(prompt):
        raise EOFError

    answers = iter(["n", "y"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(answers))
    assert "Kept" in experts("delete", "a", "--children", "cascade").out
    with monkeypatch.context() as patch:
        patch.setattr("builtins.input", end_of_input)
        outcome = experts("delete", "a", "--children", "cascade")  # Ctrl-D
        assert (outcome.code, "Kept" in outcome.out) == (0, True)
    assert "Deleted a." in experts("delete", "a", "--children", "orphan").out
    Registry(tmp_path).note_attached("c", "mine")
    outcome = experts("delete", "b", "--yes", "--children", "cascade")
    assert outcome.code == 2
    assert "attached to mine" in outcome.err
    gone = told("delete", "b", "--yes", "--children", "cascade", "--force")
    assert [one["expert_id"] for one in gone] == ["b", "c"]
    assert told("stats")["deleted"] == 3


def test_stats(experts, told, tmp_path):
    path = "artifacts/experts/a/expert.safetensors"
    Registry(tmp_path).upsert(ExpertEntry(expert_id="a", checkpoint_path=path))
    told("create", "b")
    Registry(tmp_path).record_use("a", 40, 0.25)
    assert told("stats")["usage"][0] == {
        "expert_id": "a",
        "total_activations": 40,
        "share": 1.0,
        "avg_routing_weight": 0.25,
    }
    shown = experts("stats").out
    assert "experts 2, trained 1" in shown
    assert ["a", "40", "100.0%", "0.250"] in map(str.split, shown.splitlines())


@pytest.mark.parametrize(("text", "said"), [("{", "is damaged"), ('{"schema_version": 4, "experts": []}', "newer")])
def test_a_registry_that_cannot_be_read_is_a_failure(experts, tmp_path, text, said):
    file = tmp_path / "artifacts/experts/registry.json"
    file.parent.mkdir(parents=True)
    file.write_text(text)
    for words in (["list"], ["list", "--json"], ["stats"], ["create", "a"], ["delete", "a", "--yes"]):
        outcome = experts(*words)
        assert outcome.code == 1
        assert said in outcome.err
        assert outcome.err.count("\n") == 1
    assert file.read_text() == text
