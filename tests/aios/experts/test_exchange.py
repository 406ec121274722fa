"""Expert files to and from other places."""

import json

from aios.store.experts import Registry
from tests.aios.experts.conftest import TRAIN


def test_an_expert_travels_as_a_file(aios, root, brain, expert, tmp_path):
    out = tmp_path / "laws.safetensors"
    assert aios("experts", "export", "laws", out, "--root", root).code == 0
    assert out.read_bytes() == expert.read_bytes()
    assert aios("experts", "export", "laws", out, "--root", root).code == 2
    outcome = aios("experts", "import", out, "--id", "copy", "--root", root)
    assert (outcome.code, "there is an expert laws already" in outcome.err) == (2, True)
    assert aios("experts", "delete", "laws", "--yes", "--root", root).code == 0
    assert aios("goals-remove", 1, "--root", root).code == 0
    assert aios("experts", "import", out, "--id", "copy", "--root", root).code == 0
    (goal,) = json.loads(aios("goals-list", "--root", root).out)["items"]
    assert (goal["text"], goal["source"], goal["expert_ids"]) == ("Read laws", "import", ["copy"])
    assert aios("experts", "attach", "copy", "--brain", "straight", "--root", root).code == 0
    assert aios("experts", "rename", "copy", "moved", "--root", root).code == 0
    assert json.loads((brain / "experts.json").read_text())["attached"][0]["expert_id"] == "moved"
    out.write_bytes(out.read_bytes()[:-7])
    outcome = aios("experts", "import", out, "--id", "broken", "--root", root)
    assert (outcome.code, "damaged" in outcome.err) == (1, True)
    assert not (root / "artifacts/experts/broken").exists()


def test_a_workspace_named_by_a_relative_path(aios, root, brain, expert, tmp_path, monkeypatch):
    """The path of an expert's weights is from the root of the workspace, wherever the command is called."""
    monkeypatch.chdir(root.parent)
    file = tmp_path / "laws.safetensors"
    file.write_bytes(expert.read_bytes())
    assert aios("experts", "delete", "laws", "--yes", "--root", root.name).code == 0
    outcome = aios("experts", "import", file, "--root", root.name)
    assert outcome.code == 0, outcome.err
    text = root / "training_data/python"
    where = ("--brain", "straight", "--root", root.name)
    outcome = aios("experts", "train", "code", "--dataset-file", text, *where, *TRAIN)
    assert outcome.code == 0, outcome.err
    assert Registry(root).get("code").checkpoint_path == "artifacts/experts/code/expert.safetensors"
    assert aios("experts", "attach", "laws", *where).code == 0


def test_an_id_that_was_edited_does_not_let_its_weights_be_overwritten(aios, root, brain, expert, tmp_path):
    copy, registry = tmp_path / "laws.safetensors", root / "artifacts/experts/registry.json"
    copy.write_bytes(expert.read_bytes())
    registry.write_text(registry.read_text().replace('"expert_id": "laws"', '"expert_id": "lex"'))
    text = root / "training_data/python"
    outcome = aios("experts", "train", "laws", "--brain", "straight", "--dataset-file", text, "--root", root, *TRAIN)
    assert (outcome.code, "holds the weights of expert lex" in outcome.err) == (2, True)
    assert aios("experts", "import", copy, "--root", root).code == 2
    assert expert.read_bytes() == copy.read_bytes()
    assert aios("experts", "attach", "lex", "--brain", "straight", "--root", root).code == 0
