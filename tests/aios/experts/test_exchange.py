"""Expert files to and from other places."""

import json


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
