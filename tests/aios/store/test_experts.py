"""The registry of experts: every operation, bad input, files of others, many processes at once."""

import json
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aios.store import database, transaction
from aios.store.entry import ExpertEntry, checkpoint_file, expert_folder
from aios.store.experts import Registry
from aios.store.goals import Goals
from chronomoe.errors import CheckpointError, ConfigError
from tests.aios.store.conftest import CUTS, assert_projected

BAD_IDS = ["", ".", "..", "../x", "a/b", "a\\b", "/abs", "C:x", "a.b", ".a", "-a", "a b", "a\n", "a\0", "é", "x" * 300]


@pytest.fixture
def registry(tmp_path):
    return Registry(tmp_path)


@pytest.fixture
def trained(registry):
    """Enter a trained expert, with a file for its weights."""

    def call(expert_id: str, **known) -> ExpertEntry:
        folder = expert_folder(registry.root, expert_id)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "expert.safetensors").write_text(expert_id)
        path = f"artifacts/experts/{expert_id}/expert.safetensors"
        return registry.upsert(ExpertEntry(expert_id=expert_id, checkpoint_path=path, **known))

    return call


def weights(registry, expert_id):
    return checkpoint_file(registry.root, registry.get(expert_id)).read_text()


def raw(registry):
    return json.loads(registry.file.read_text())


def write(registry, value):
    registry.home.mkdir(parents=True, exist_ok=True)
    text = value if isinstance(value, str) else json.dumps(value)
    registry.file.write_bytes(text.encode(errors="surrogateescape"))


# -- one expert ----------------------------------------------------------------------------------------------


def test_reading_creates_nothing(registry):
    assert registry.entries() == []
    assert registry.stats()["experts"] == 0
    with pytest.raises(ConfigError, match="there is no expert 'x'"):
        registry.get("x")
    with pytest.raises(ConfigError, match="no expert in"):
        registry.freeze("x")
    assert not (registry.root / "artifacts").exists()


def test_create(registry):
    entry = registry.create(
        "law-1", name="Law", description="Licences", category="legal", goals=["know", "law", "know"]
    )
    assert entry == registry.get("law-1")
    assert (entry.name, entry.category, entry.goals, entry.version) == ("Law", "legal", ("know", "law"), 0)
    assert len(entry.expert_uid) == 32
    plain = registry.create("code", parent="law-1")
    assert (plain.name, plain.category, plain.is_active, plain.is_frozen) == ("Expert code", "general", True, False)
    assert registry.get("law-1").child_expert_ids == ("code",)
    with pytest.raises(ConfigError, match="already"):
        registry.create("law-1")
    with pytest.raises(ConfigError, match="already"):
        registry.create("LAW-1")
    with pytest.raises(ConfigError, match=r"no expert 'cod' \(is it code\?\); `aios experts list` shows all"):
        registry.create("x", parent="cod")
    assert [one.expert_id for one in registry.entries()] == ["law-1", "code"]
    with pytest.raises(CheckpointError, match="no weights yet"):
        checkpoint_file(registry.root, entry)


def test_the_file_has_every_field(registry):
    registry.create("a")
    top = raw(registry)
    assert [*top] == ["schema_version", "version", "revision", "created_at", "base_model", "experts", "tombstones"]
    assert (top["schema_version"], top["version"], top["revision"]) == (3, "3.0", 1)
    assert {*top["experts"][0]} == {
        *("expert_id", "name", "description", "category", "goals", "created_at", "last_trained", "training_datasets"),
        *("performance_metrics", "total_activations", "avg_routing_weight", "is_active", "is_frozen", "version"),
        *("parent_expert_id", "child_expert_ids", "model_architecture", "checkpoint_path", "training_config"),
        *("expert_uid", "base_fingerprint", "tokenizer_fingerprint", "attached_to"),
    }


def test_training_again_keeps_what_training_does_not_change(registry, trained):
    registry.create("top")
    registry.create("a", name="A", category="legal", goals=["g"], parent="top")
    created = registry.get("a")
    first = trained("a", training_datasets=("one.txt",), performance_metrics={"bits": 2.0}, goals=("h",))
    assert (first.version, first.expert_uid, first.name, first.goals) == (1, created.expert_uid, "A", ("g", "h"))
    assert first.last_trained
    registry.record_use("a", 10, 0.5)
    registry.freeze("a")
    registry.deactivate("a")
    registry.note_attached("a", "mine")
    trained("below")
    registry.set_parent("below", "a")
    before = registry.get("a")
    again = trained(
        "a",
        training_datasets=("one.txt", "two.txt"),
        performance_metrics={"bits": 1.5, "perplexity": float("nan")},
        base_fingerprint="f",
        name="B",
    )
    expected = replace(
        before,
        version=2,
        name="B",
        training_datasets=("one.txt", "two.txt"),
        performance_metrics={"bits": 1.5, "perplexity": None},
        base_fingerprint="f",
        last_trained=again.last_trained,
    )
    assert registry.get("a") == expected
    assert "NaN" not in registry.file.read_text()


def test_upsert_of_what_was_read_changes_only_the_version(registry, trained):
    trained("a", training_datasets=("x",), goals=("g",), extra={"mine": 1})
    entry = registry.get("a")
    assert registry.upsert(entry) == replace(entry, version=2)


def test_an_expert_from_elsewhere_keeps_uid_and_version(registry, trained):
    entry = trained("a", expert_uid="0" * 32, version=7, created_at="2020")
    assert (entry.expert_uid, entry.version, entry.created_at) == ("0" * 32, 7, "2020")
    with pytest.raises(ConfigError, match="are one expert"):
        trained("b", expert_uid="0" * 32)
    with pytest.raises(ConfigError, match="no expert 'nobody'"):
        trained("b", parent_expert_id="nobody")


def test_switches(registry):
    registry.create("a")
    assert registry.freeze("a").is_frozen
    assert registry.freeze("a").is_frozen
    assert not registry.deactivate("a").is_active
    assert registry.get("a").is_frozen
    assert not registry.unfreeze("a").is_frozen
    assert registry.activate("a").is_active
    with pytest.raises(ConfigError, match="no expert 'b'"):
        registry.freeze("b")


def test_use_is_a_running_mean(registry):
    registry.create("a")
    registry.record_use("a", 0, 0.9)
    assert registry.get("a").avg_routing_weight == 0
    registry.record_use("a", 30, 0.5)
    entry = registry.record_use("a", 10, 0.1)
    assert entry.total_activations == 40
    assert entry.avg_routing_weight == pytest.approx(0.4)
    for wrong in [(-1, 0.5), (1, -0.5), (1, float("nan")), (1, float("inf"))]:
        with pytest.raises(ConfigError):
            registry.record_use("a", *wrong)
    assert registry.get("a") == entry


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(uses=st.lists(st.tuples(st.integers(0, 10**6), st.floats(0, 1)), min_size=1, max_size=6))
def test_use_does_not_depend_on_how_it_is_told(tmp_path_factory, uses):
    registry = Registry(tmp_path_factory.mktemp("use"))
    registry.create("a")
    for activations, weight in uses:
        registry.record_use("a", activations, weight)
    total = sum(activations for activations, _ in uses)
    entry = registry.get("a")
    assert entry.total_activations == total
    mean = sum(activations * weight for activations, weight in uses) / max(total, 1)
    assert entry.avg_routing_weight == pytest.approx(mean, abs=1e-9)


def test_stats(registry, trained):
    trained("a")
    registry.create("b", goals=["g"])
    registry.create("c")
    registry.freeze("b")
    registry.deactivate("b")
    registry.record_use("b", 30, 0.5)
    registry.record_use("a", 10, 0.25)
    registry.delete("c")
    stats = registry.stats()
    usage = stats.pop("usage")
    assert stats == {
        "experts": 2,
        "trained": 1,
        "active": 1,
        "frozen": 1,
        "attached": 0,
        "with_goals": 1,
        "deleted": 1,
        "total_activations": 40,
    }
    assert [(one["expert_id"], one["share"]) for one in usage] == [("b", 0.75), ("a", 0.25)]


def test_brains(registry):
    registry.create("a")
    registry.note_attached("a", "one")
    registry.note_attached("a", "two")
    assert registry.note_attached("a", "one").attached_to == ("one", "two")
    assert registry.note_detached("a", "one").attached_to == ("two",)
    assert registry.note_detached("a", "never").attached_to == ("two",)


# -- hierarchy -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 2, 3])
def test_cycles_are_refused(registry, length):
    for expert_id in "abcd":
        registry.create(expert_id)
    for child, parent in zip("bc"[: length - 1], "ab", strict=False):
        registry.set_parent(child, parent)
    before = registry.file.read_bytes()
    with pytest.raises(ConfigError, match="its own parent" if length == 1 else "below a already"):
        registry.set_parent("a", "abc"[length - 1])
    assert registry.file.read_bytes() == before


def test_parents_and_children_agree(registry):
    for expert_id in "abc":
        registry.create(expert_id)
    assert registry.set_parent("b", "a").parent_expert_id == "a"
    registry.set_parent("c", "a")
    assert registry.get("a").child_expert_ids == ("b", "c")
    registry.set_parent("c", "b")
    assert registry.get("a").child_expert_ids == ("b",)
    assert registry.clear_parent("b").parent_expert_id is None
    assert registry.clear_parent("b").child_expert_ids == ("c",)
    assert registry.get("a").child_expert_ids == ()
    registry.set_parent("a", "c")
    with pytest.raises(ConfigError, match="no expert 'x'"):
        registry.set_parent("a", "x")


STEP = st.tuples(st.sampled_from(["parent", "clear", "rename", "orphan", "cascade"]), *[st.sampled_from("abcdef")] * 2)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=st.lists(STEP, max_size=10))
def test_whatever_is_done_links_agree_and_have_no_cycle(tmp_path_factory, steps):
    registry = Registry(tmp_path_factory.mktemp("links"))
    for expert_id in "abcd":
        registry.create(expert_id)
    for what, one, other in steps:
        try:
            if what == "parent":
                registry.set_parent(one, other)
            elif what == "clear":
                registry.clear_parent(one)
            elif what == "rename":
                registry.rename(one, other)
            else:
                registry.delete(one, what)
        except ConfigError:
            continue
    known = {one["expert_id"]: one for one in raw(registry)["experts"]}
    for name, one in known.items():
        assert all(known[child]["parent_expert_id"] == name for child in one["child_expert_ids"])
        assert one["parent_expert_id"] is None or name in known[one["parent_expert_id"]]["child_expert_ids"]
        hops, parent = 0, one["parent_expert_id"]
        while parent is not None:
            hops, parent = hops + 1, known[parent]["parent_expert_id"]
            assert hops < 9


# -- rename and delete ---------------------------------------------------------------------------------------


def test_rename_moves_folder_path_and_links(registry, trained):
    for expert_id in "abc":
        trained(expert_id)
    registry.set_parent("b", "a")
    registry.set_parent("c", "b")
    uid = registry.get("b").expert_uid
    entry = registry.rename("b", "better")
    assert (entry.expert_id, entry.expert_uid, entry.parent_expert_id) == ("better", uid, "a")
    assert entry.checkpoint_path == "artifacts/experts/better/expert.safetensors"
    assert weights(registry, "better") == "b"
    assert registry.get("a").child_expert_ids == ("better",)
    assert registry.get("c").parent_expert_id == "better"
    assert [one.expert_id for one in registry.entries()] == ["a", "better", "c"]
    assert sorted(file.name for file in registry.home.iterdir() if file.is_dir()) == ["a", "better", "c"]
    with pytest.raises(ConfigError, match="no expert 'b'"):
        registry.rename("b", "d")
    for taken in ("a", "better"):
        with pytest.raises(ConfigError, match="already"):
            registry.rename("better", taken)
    (registry.home / "junk").mkdir()
    with pytest.raises(ConfigError, match="no expert's"):
        registry.rename("better", "junk")
    assert registry.rename("better", "Better").expert_id == "Better"
    assert weights(registry, "Better") == "b"


def test_delete_leaves_a_tombstone(registry, trained):
    uid = trained("a").expert_uid
    assert [one.expert_id for one in registry.delete("a")] == ["a"]
    assert registry.entries() == []
    assert not (registry.home / "a").exists()
    (stone,) = raw(registry)["tombstones"]
    assert (stone["expert_id"], stone["expert_uid"]) == ("a", uid)
    assert stone["deleted_at"]
    assert registry.create("a").expert_uid != uid
    assert len(raw(registry)["tombstones"]) == 1


@pytest.fixture
def family(registry, trained):
    for expert_id in "abcx":
        trained(expert_id)
    registry.set_parent("b", "a")
    registry.set_parent("c", "b")


@pytest.mark.parametrize(("children", "left"), [("orphan", "bcx"), ("cascade", "x")])
def test_delete_with_children(registry, family, children, left):
    with pytest.raises(ConfigError, match="has children: b"):
        registry.delete("a")
    assert len(registry.entries()) == 4
    registry.delete("a", children)
    assert [one.expert_id for one in registry.entries()] == list(left)
    assert sorted(file.name for file in registry.home.iterdir() if file.is_dir()) == list(left)
    assert len(raw(registry)["tombstones"]) == 4 - len(left)
    if children == "orphan":
        assert registry.get("b").parent_expert_id is None
        assert registry.get("c").parent_expert_id == "b"


def test_an_attached_expert_goes_only_by_force(registry, family):
    registry.note_attached("c", "mine")
    before = registry.file.read_bytes()
    for expert_id in "ac":
        with pytest.raises(ConfigError, match="attached to mine"):
            registry.delete(expert_id, "cascade")
    assert registry.file.read_bytes() == before
    assert weights(registry, "a") == "a"
    registry.delete("a", "cascade", force=True)
    assert [one.expert_id for one in registry.entries()] == ["x"]
    with pytest.raises(ConfigError, match="refuse, orphan or cascade"):
        registry.delete("x", "burn")


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("what", ["rename", "delete"])
def test_a_kill_at_any_point_leaves_the_old_or_the_new(registry, trained, killed_at, what, cut):
    trained("a")
    with killed_at(cut):
        registry.rename("a", "b") if what == "rename" else registry.delete("a")
    assert any(registry.home.glob(".aside-*"))
    left = [one.expert_id for one in registry.entries()]
    done = cut in ("after COMMIT", "after the file")
    assert left == ({"rename": ["b"], "delete": []}[what] if done else ["a"])
    assert [weights(registry, expert_id) for expert_id in left] == ["a"] * len(left)
    assert sorted(file.name for file in registry.home.iterdir() if file.is_dir()) == left


def test_a_failed_write_puts_the_folder_back(registry, trained, monkeypatch):
    trained("a")

    def full(path):
        raise CheckpointError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(transaction, "whole_file", full)
        for change in (lambda: registry.rename("a", "b"), lambda: registry.delete("a")):
            with pytest.raises(CheckpointError, match="full"):
                change()
            assert weights(registry, "a") == "a"
    assert not any(registry.home.glob(".*"))


def test_weights_trained_anew_win_over_those_set_aside(registry, trained):
    uid = trained("a").expert_uid
    (registry.home / f".aside-{uid}").mkdir()
    assert weights(registry, "a") == "a"
    assert not any(registry.home.glob(".aside-*"))


# -- ids and paths -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", BAD_IDS)
def test_ids_that_are_no_plain_word(registry, bad):
    registry.create("a")
    before = registry.file.read_bytes()
    path = "artifacts/experts/a/expert.safetensors"
    for refused in (
        lambda: expert_folder(registry.root, bad),
        lambda: registry.create(bad),
        lambda: registry.rename("a", bad),
        lambda: registry.upsert(ExpertEntry(expert_id=bad, checkpoint_path=path)),
    ):
        with pytest.raises(ConfigError, match="is not a name"):
            refused()
    for refused in (lambda: registry.delete(bad), lambda: registry.set_parent("a", bad), lambda: registry.get(bad)):
        with pytest.raises(ConfigError, match="there is no expert"):
            refused()
    assert registry.file.read_bytes() == before
    assert sorted(file.name for file in registry.home.iterdir()) == ["registry.json", "registry.json.lock"]


def test_ids_that_are_plain_words(registry):
    for good in ("a", "0", "x" * 64, "test-expert-004", "A_b-9"):
        assert registry.create(good).expert_id == good
        assert expert_folder(registry.root, good) == registry.root / "artifacts/experts" / good


@pytest.mark.parametrize(
    "path",
    [
        *("/etc/passwd", "\\etc\\passwd", "C:\\x\\e.safetensors", "C:/x", "../e.safetensors", "artifacts/experts/../e"),
        *("artifacts\\experts\\..\\..\\e", "experts/expert_a.pt", "artifacts/experts", "e\0", "artifacts/brains/x"),
    ],
)
def test_paths_that_leave_the_experts(registry, path):
    with pytest.raises(CheckpointError, match="outside"):
        checkpoint_file(registry.root, ExpertEntry(expert_id="a", checkpoint_path=path))
    with pytest.raises(CheckpointError, match="outside"):
        registry.upsert(ExpertEntry(expert_id="a", checkpoint_path=path))
    assert registry.entries() == []


def test_a_link_does_not_lead_out(registry, tmp_path):
    registry.home.mkdir(parents=True)
    (registry.home / "a").symlink_to("/etc")
    with pytest.raises(CheckpointError, match="outside"):
        checkpoint_file(registry.root, ExpertEntry(expert_id="a", checkpoint_path="artifacts/experts/a/passwd"))


def test_paths_are_written_relative_with_forward_slashes(registry):
    windows = ExpertEntry(expert_id="a", checkpoint_path="artifacts\\experts\\a\\expert.safetensors")
    assert registry.upsert(windows).checkpoint_path == "artifacts/experts/a/expert.safetensors"
    whole = str(expert_folder(registry.root.resolve(), "b") / "expert.safetensors")
    entry = registry.upsert(ExpertEntry(expert_id="b", checkpoint_path=whole))
    assert entry.checkpoint_path == "artifacts/experts/b/expert.safetensors"
    assert checkpoint_file(registry.root, windows) == expert_folder(registry.root, "a") / "expert.safetensors"


# -- files of others -----------------------------------------------------------------------------------------


def original(expert_id, **known):
    """An entry as version 1.0 wrote it."""
    return {
        "expert_id": expert_id,
        "name": f"Expert {expert_id}",
        "description": "",
        "category": "general",
        "goals": [],
        "created_at": "2025-10-12T10:00:00",
        "last_trained": None,
        "training_datasets": [],
        "performance_metrics": {},
        "total_activations": 3,
        "avg_routing_weight": 0,
        "is_active": True,
        "is_frozen": False,
        "parent_expert_id": None,
        "child_expert_ids": [],
        "model_architecture": "feedforward",
        "checkpoint_path": f"artifacts\\experts\\{expert_id}\\expert.safetensors",
        "training_config": {"hidden_size": 512},
        **known,
    }


def version_1(*experts, **top):
    head = {"version": "1.0", "created_at": "2025-10-12T10:00:00", "base_model": "HRM-ACT-v1-87M"}
    return head | top | {"experts": list(experts)}


def test_version_1_is_read_and_converted_when_first_written(registry):
    write(registry, version_1(original("a"), original("b", parent_expert_id="a"), original("old.name"), note="kept"))
    before = registry.file.read_bytes()
    a, b, _ = registry.entries()
    assert registry.file.read_bytes() == before
    assert a.child_expert_ids == ("b",)
    assert (a.version, a.total_activations, a.training_config) == (1, 3, {"hidden_size": 512})
    assert checkpoint_file(registry.root, a) == registry.home / "a/expert.safetensors"
    assert a.expert_uid != b.expert_uid
    registry.freeze("a")
    top = raw(registry)
    assert (top["schema_version"], top["version"], top["base_model"], top["note"]) == (
        3,
        "3.0",
        "HRM-ACT-v1-87M",
        "kept",
    )
    assert top["created_at"] == "2025-10-12T10:00:00"
    assert top["experts"][0]["checkpoint_path"] == "artifacts/experts/a/expert.safetensors"
    assert [one["expert_uid"] for one in top["experts"][:2]] == [a.expert_uid, b.expert_uid]


def test_an_old_id_can_be_renamed_with_its_folder(registry):
    write(registry, version_1(original("old.name"), original("../x")))
    (registry.home / "old.name").mkdir()
    (registry.home / "old.name/expert.safetensors").write_text("w")
    (registry.home.parent / "x").mkdir()
    registry.rename("old.name", "new-name")
    assert weights(registry, "new-name") == "w"
    registry.delete("../x")
    assert (registry.home.parent / "x").exists()
    assert [one.expert_id for one in registry.entries()] == ["new-name"]


def test_links_of_version_1_that_do_not_agree(registry):
    write(
        registry,
        version_1(
            original("a", parent_expert_id="b", child_expert_ids=["gone", "c"]),
            original("b", parent_expert_id="a"),
            original("c", parent_expert_id="gone"),
            original("d", parent_expert_id="d"),
        ),
    )
    links = {one.expert_id: (one.parent_expert_id, one.child_expert_ids) for one in registry.entries()}
    assert links == {"a": (None, ("b",)), "b": ("a", ()), "c": (None, ()), "d": (None, ())}
    registry.delete("a", "cascade")
    assert [one.expert_id for one in registry.entries()] == ["c", "d"]


def test_unknown_keys_survive(registry):
    registry.create("a")
    top = raw(registry)
    top["colour"] = {"of": ["the", "registry"]}
    top["experts"][0]["taste"] = [1, None, "x"]
    top["tombstones"].append({"other": 1})
    write(registry, top)
    assert registry.get("a").extra == {"taste": [1, None, "x"]}
    registry.freeze("a")
    registry.upsert(ExpertEntry(expert_id="a", checkpoint_path="artifacts/experts/a/e", extra={"new": 1, "name": "no"}))
    after = raw(registry)
    assert after["colour"] == top["colour"]
    assert after["tombstones"] == [{"other": 1}]
    assert (after["experts"][0]["taste"], after["experts"][0]["new"]) == ([1, None, "x"], 1)
    assert after["experts"][0]["name"] == "Expert a"


@pytest.mark.parametrize("top", [{"schema_version": 4, "version": "4.0"}, {"schema_version": 99}, {"version": "2.0"}])
def test_a_newer_registry_is_not_touched(registry, top):
    write(registry, top | {"experts": [{"expert_id": 3}]})
    before = registry.file.read_bytes()
    for refused in (registry.entries, lambda: registry.create("a"), lambda: registry.delete("a")):
        with pytest.raises(CheckpointError, match="newer version of aios") as caught:
            refused()
        assert "\n" not in str(caught.value)
    assert registry.file.read_bytes() == before


@pytest.mark.parametrize(
    "text",
    [
        *("", "{", "null", "[]", "{}", '{"experts": {}}', "\udcff", "[" * 100000),
        *(
            '{"experts": [1]}',
            '{"experts": [{}]}',
            '{"experts": [{"expert_id": ""}]}',
            '{"experts": [{"expert_id": 1}]}',
        ),
        '{"experts": [{"expert_id": "a"}, {"expert_id": "a"}]}',
        '{"schema_version": "2", "experts": []}',
        '{"schema_version": true, "experts": []}',
        '{"schema_version": 3, "experts": [], "tombstones": {}}',
        *(
            json.dumps({"experts": [{"expert_id": "a", key: value}]})
            for key, value in {
                "goals": "x",
                "child_expert_ids": [1],
                "is_active": 1,
                "total_activations": 1.5,
                "version": -1,
                "avg_routing_weight": float("nan"),
                "training_config": [],
                "name": 3,
                "checkpoint_path": {},
                "parent_expert_id": 3,
                "expert_uid": "../../x",
                "attached_to": 5,
            }.items()
        ),
        json.dumps({"experts": [{"expert_id": name, "expert_uid": "0" * 32} for name in "ab"]}),
    ],
    ids=lambda text: text[:60] or "nothing",
)
def test_a_damaged_registry_is_refused_and_not_touched(registry, text):
    write(registry, text)
    for refused in (registry.entries, lambda: registry.create("a"), lambda: registry.rename("a", "b")):
        with pytest.raises(CheckpointError, match=r"registry\.json is damaged"):
            refused()
    assert registry.file.read_bytes() == text.encode(errors="surrogateescape")


def test_text_that_is_no_unicode_is_refused(registry):
    registry.create("a")
    before = registry.file.read_bytes()
    with pytest.raises(ConfigError, match="not valid Unicode"):
        registry.create("b", goals=["x\ud800"])
    with pytest.raises(ConfigError, match="not valid Unicode"):
        registry.create("b", description="x\ud800")
    assert registry.file.read_bytes() == before
    registry.create("b", goals=["Gerichtsbarkeit für Anfänger ☃"])
    assert "☃" in registry.file.read_text()


# -- a registry.json that somebody changed -------------------------------------------------------------------


@pytest.fixture
def said(caplog):
    """What was said to the user since the last call."""

    def call():
        found = [record.getMessage() for record in caplog.records]
        caplog.clear()
        return found

    return call


def test_a_file_that_was_lost_or_is_older_is_written_again(registry, killed_at):
    registry.create("a")
    content = registry.file.read_bytes()
    registry.file.unlink()
    assert [one.expert_id for one in registry.entries()] == ["a"]
    assert registry.file.read_bytes() == content
    with killed_at("after COMMIT"):
        registry.create("b")
    assert registry.file.read_bytes() == content
    assert [one.expert_id for one in registry.entries()] == ["a", "b"]
    assert_projected(registry)


def test_a_copy_that_was_put_back_is_no_older_file(registry, said):
    registry.create("a")
    registry.create("b")
    copy = registry.file.read_bytes()
    registry.delete("a")
    registry.file.write_bytes(copy)  # what the last change replaced
    assert [one.expert_id for one in registry.entries()] == ["b", "a"]
    registry.freeze("b")
    assert {one["expert_id"] for one in raw(registry)["experts"]} == {"a", "b"}
    assert said() == []


def test_what_an_edited_file_lacks_stays_unless_it_is_to_replace(registry, trained, said):
    for expert_id in "abc":
        trained(expert_id, goals=(expert_id,))
    registry.set_parent("b", "a")
    top = raw(registry)
    uid = top["experts"][0]["expert_uid"]
    top["experts"] = [top["experts"][1] | {"description": "edited", "goals": ["not a link"]}, {"expert_id": "new"}]
    write(registry, top)
    shown = registry.entries()
    assert [one.expert_id for one in shown] == ["a", "b", "c", "new"]
    assert said() == []  # reading says nothing
    registry.freeze("new")
    (sentence,) = said()
    assert "lacks a, c, which stay; `aios experts import-registry --replace` deletes them." in sentence
    assert registry.get("b").description == "edited"
    assert registry.get("b").goals == ("b",)
    assert_projected(registry)
    registry.freeze("b")
    assert said() == []
    write(registry, top)
    found = registry.import_file(replace_all=True)
    assert (found.entered, found.absent, found.refused) == ((), ("a", "c"), ())
    assert [one.expert_id for one in registry.entries()] == ["b", "new"]
    assert raw(registry)["tombstones"][0]["expert_uid"] == uid
    assert (registry.home / "a/expert.safetensors").exists()
    assert_projected(registry)


def test_goals_never_pass_to_another_expert_of_the_same_name(registry, said):
    old = registry.create("a", goals=["old"])
    copy = registry.file.read_bytes()
    registry.delete("a")
    new = registry.create("a", goals=["new"])
    registry.file.write_bytes(copy)
    assert registry.get("a") == new
    registry.freeze("a")
    (_, sentence) = said()
    assert "another expert has the id here: a;" in sentence
    assert registry.get("a").goals == ("new",)
    registry.file.write_bytes(copy)
    assert registry.import_file(replace_all=True).absent == ("a",)
    assert registry.get("a").expert_uid == old.expert_uid
    assert registry.get("a").goals == ("old",)
    assert_projected(registry)


def test_a_registry_from_elsewhere(registry, tmp_path):
    other = Registry(tmp_path / "other")
    other.create("theirs", parent=other.create("top").expert_id, goals=["g"])
    registry.create("mine")
    found = registry.import_file(other.file)
    assert (found.entered, found.absent) == (("top", "theirs"), ("mine",))
    assert registry.get("theirs") == other.get("theirs")
    assert_projected(registry)
    with pytest.raises(CheckpointError, match="there is no file"):
        registry.import_file(tmp_path / "nowhere.json")


FIXTURES = Path(__file__).parents[2] / "fixtures/0.1.0"


def test_the_registry_of_the_founding_text_enters_without_loss(registry):
    text = (FIXTURES / "registry-1.0.json").read_text()
    write(registry, text)
    old = json.loads(text)
    registry.create("last")
    new = raw(registry)
    assert {key: new[key] for key in old if key not in ("experts", "version")} == {
        key: value for key, value in old.items() if key not in ("experts", "version")
    }
    for before, after in zip(old["experts"], new["experts"], strict=False):
        changed = {key for key in before if before[key] != after[key]} - {"checkpoint_path"}
        assert changed <= {"child_expert_ids", "parent_expert_id"}
        assert after["checkpoint_path"] == before["checkpoint_path"].replace("\\", "/")
    assert len(new["experts"]) == len(old["experts"]) + 1
    assert_projected(registry)


@pytest.mark.parametrize("files", [["experts/registry.json"], ["aios.db"], ["experts/registry.json", "aios.db"]])
def test_files_of_version_0_1_0_are_refused_and_not_touched(registry, files):
    for file in files:
        place = registry.root / "artifacts" / file
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(FIXTURES / "workspace/artifacts" / file, place)
    before = {file: (registry.root / "artifacts" / file).read_bytes() for file in files}
    for refused in (registry.entries, lambda: registry.create("a"), lambda: Registry(registry.root).import_file()):
        with pytest.raises(CheckpointError, match=r"made by version 0\.1\.0|there is no file") as caught:
            refused()
        assert "\n" not in str(caught.value)
    assert {file: (registry.root / "artifacts" / file).read_bytes() for file in files} == before


# -- registry.json equals the database -----------------------------------------------------------------------


def is_written(registry):
    """Was a change ever made in the database that is there? One that was refused leaves empty tables."""
    if not registry.database.exists():
        return False
    with closing(sqlite3.connect(registry.database)) as connection:
        return connection.execute("SELECT count(*) FROM registry").fetchone() == (1,)


COMMANDS = st.lists(
    st.tuples(
        st.sampled_from(
            [
                *("create", "train", "freeze", "parent", "rename", "delete", "use", "attach", "goal", "link", "unlink"),
                *("remove", "brain", "kill", "lose-file", "lose-database"),
            ]
        ),
        st.sampled_from("abC"),
        st.sampled_from("abc"),
    ),
    max_size=10,
)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(commands=COMMANDS)
def test_after_any_commands_the_file_says_what_the_database_says(tmp_path_factory, killed_at, commands):
    root = tmp_path_factory.mktemp("any")
    registry, goals = Registry(root), Goals(root)
    done = {
        "create": lambda one, other: registry.create(one, goals=[other]),
        "train": lambda one, other: registry.upsert(
            ExpertEntry(expert_id=one, checkpoint_path=f"artifacts/experts/{one}/e", goals=(other,))
        ),
        "freeze": lambda one, other: registry.freeze(one),
        "parent": registry.set_parent,
        "rename": registry.rename,
        "delete": lambda one, other: registry.delete(one, "cascade", force=True),
        "use": lambda one, other: registry.record_use(one, 3, 0.5),
        "attach": registry.note_attached,
        "goal": lambda one, other: goals.add(one, expert=other),
        "link": lambda one, other: goals.link(1, f"mixtral/{one}:0.1" if one == other else one),
        "unlink": lambda one, other: goals.unlink(1),
        "remove": lambda one, other: goals.remove(1),
        "brain": lambda one, other: goals.brain_moved(f"mixtral/{one}", f"mixtral/{other}"),
        "lose-file": lambda one, other: registry.file.unlink(missing_ok=True),
        "lose-database": lambda one, other: registry.database.unlink(missing_ok=True),
    }
    for what, one, other in commands:
        known = [entry.expert_id for entry in registry.entries()]
        changed = False
        try:
            if what == "kill" and known:
                with killed_at("after COMMIT"):
                    registry.record_use(known[0], 1, 0.25)
            elif what != "kill":
                done[what](one, other)
                changed = not what.startswith("lose")
        except (ConfigError, CheckpointError):
            pass
        if changed and registry.database.exists():  # before anything is read, which would mend it
            assert_projected(registry)
        entries = registry.entries()
        if is_written(registry) and not what.startswith("lose"):
            assert_projected(registry)
            assert [entry.to_json() for entry in entries] == raw(registry)["experts"]


# -- many processes ------------------------------------------------------------------------------------------


def test_a_lock_that_is_held_is_waited_for_and_then_named(registry, monkeypatch):
    registry.create("a")
    monkeypatch.setattr(database, "PATIENCE", 0.05)
    with Registry(registry.root)._lock(), pytest.raises(CheckpointError, match="another process"):
        registry.freeze("a")
    assert not registry.get("a").is_frozen


WORKER = """
import os, sys
from pathlib import Path
from aios.store.experts import ExpertEntry, Registry
root, worker, writes = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
registry = Registry(root)
with open(root / f"acknowledged-{worker}", "a") as file:
    for number in range(writes):
        name = f"w{worker}-{number}"
        registry.upsert(ExpertEntry(expert_id=name, checkpoint_path=f"artifacts/experts/{name}/expert.safetensors"))
        file.write(name + "\\n")
        file.flush()
        os.fsync(file.fileno())
assert "torch" not in sys.modules
"""

READER = """
import json, sys, time
from pathlib import Path
root, reads, most = Path(sys.argv[1]), 0, 0
file = root / "artifacts/experts/registry.json"
while not (root / "stop").exists():
    if file.exists():
        found = len(json.loads(file.read_text(encoding="utf-8"))["experts"])
        assert found >= most, (found, most)
        reads, most = reads + 1, found
    time.sleep(0.002)
print(reads)
"""


def test_no_acknowledged_entry_is_lost_when_processes_are_killed(registry):
    workers, writes, rng = 8, 50, random.Random(0)

    def begin(code, *words, **options):
        return subprocess.Popen([sys.executable, "-c", code, str(registry.root), *map(str, words)], **options)

    reader = begin(READER, stdout=subprocess.PIPE, text=True)
    running = [begin(WORKER, worker, writes) for worker in range(workers)]
    for victim in rng.sample(running, 4):
        time.sleep(rng.uniform(0.3, 0.9))
        victim.send_signal(signal.SIGKILL)
    codes = [process.wait(timeout=60) for process in running]
    (registry.root / "stop").touch()
    reads, _ = reader.communicate(timeout=20)
    assert reader.returncode == 0
    assert int(reads) > 20
    assert sorted(set(codes)) == [-9, 0]
    acknowledged = set()
    for file in registry.root.glob("acknowledged-*"):
        acknowledged |= set(file.read_text().split())
    assert len(acknowledged) >= 4 * writes
    registered = {one.expert_id for one in registry.entries()}
    assert acknowledged <= registered
    assert len(registered - acknowledged) <= 4  # written, killed before it was acknowledged
    registry.create("last")
    assert sorted(file.name for file in registry.home.iterdir()) == ["registry.json", "registry.json.lock"]
