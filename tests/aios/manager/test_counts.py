"""What is shown of a registry."""

import dataclasses

import pytest

from aios.manager.counts import read_overview, tree
from aios.store.experts import Registry


@pytest.fixture
def registry(tmp_path):
    registry = Registry(tmp_path)
    registry.create("laws", name="<script>alert(1)</script>", goals=["Quote licences"])
    registry.create("patents", parent="laws")
    registry.create("poems", category="verse")
    registry.freeze("laws")
    registry.deactivate("poems")
    return registry


def test_an_empty_workspace(tmp_path):
    overview = read_overview(tmp_path)
    assert set(overview.counts.values()) == {0}
    assert tree(overview.entries) == []
    assert not any(tmp_path.iterdir())


def test_counts(registry, tmp_path):
    assert read_overview(tmp_path).counts == {"total": 3, "active": 2, "frozen": 1, "attached": 0, "orphaned": 0}


def test_orphaned_are_those_whose_weights_or_brain_are_gone(registry, tmp_path):
    weights = tmp_path / "artifacts/experts/trained/expert.safetensors"
    weights.parent.mkdir(parents=True)
    weights.write_bytes(b"")
    entry = dataclasses.replace(registry.get("poems"), expert_id="trained", expert_uid="0" * 32)
    registry.upsert(dataclasses.replace(entry, checkpoint_path=str(weights)))
    (tmp_path / "artifacts/brains/mixtral/here").mkdir(parents=True)
    registry.note_attached("trained", "mixtral/here")
    assert read_overview(tmp_path).orphaned == set()
    weights.unlink()
    registry.note_attached("patents", "mixtral/gone")
    overview = read_overview(tmp_path)
    assert overview.orphaned == {"trained", "patents"}
    assert overview.counts["attached"] == 2
    assert "orphaned" in overview.state(registry.get("patents"))


def test_search_looks_at_everything_that_is_shown(registry, tmp_path):
    overview = read_overview(tmp_path)

    def found(words):
        return [one.expert_id for one in overview.found(words)]

    assert found("") == ["laws", "patents", "poems"]
    assert found("LICENCES quote") == ["laws"]
    assert found("verse inactive") == ["poems"]
    assert found("no weights") == ["laws", "patents", "poems"]
    assert found("nowhere") == []


def test_the_tree_keeps_those_above_what_was_found(registry, tmp_path):
    entries = read_overview(tmp_path).entries
    nodes = tree(entries)
    assert [(node["id"], [child["id"] for child in node["children"]]) for node in nodes] == [
        ("laws", ["patents"]),
        ("poems", []),
    ]
    assert nodes[0]["label"] == "laws (frozen)"
    assert [node["id"] for node in tree(entries, ["patents"])] == ["laws"]
    assert tree(entries, ["poems"])[0]["label"] == "poems (inactive)"
