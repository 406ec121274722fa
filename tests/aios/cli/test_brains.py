"""aios brains and aios chat."""

import json

import pytest
from transformers import AutoModelForCausalLM


@pytest.fixture
def root(brain):
    return brain.parents[3]


def test_list_and_show(aios, root):
    outcome = aios("brains", "list", "--root", root)
    assert "mixtral/straight" in outcome.out
    assert "24" in outcome.out
    (found,) = json.loads(aios("brains", "list", "--root", root, "--json").out)
    assert found["finished"]
    assert found["steps"] == 24
    assert 0 < found["bits_per_byte"] < 10
    shown = json.loads(aios("brains", "show", "straight", "--root", root, "--json").out)
    assert shown["family"] == "mixtral"
    assert "hidden_dim 32" in aios("brains", "show", "mixtral/straight", "--root", root).out


def test_a_damaged_brain_is_listed_with_its_problem(aios, root, brain):
    (brain / "run.json").write_text("{")
    assert "damaged" in " ".join(aios("brains", "list", "--root", root).out.split())


@pytest.mark.parametrize(
    "change",
    [
        {"bits_per_byte": "a"}, {"published_step": "a"}, {"training": {"checkpoint_dir": 5}}, {"shape": {"foo": 1}},
        {"shape": {"num_experts": [4]}}, {"settings": {"seq_len": "x"}},
    ],
    ids=str,
)  # fmt: skip
def test_an_entry_of_the_wrong_kind_is_a_damage_of_that_brain_alone(aios, root, brain, change):
    run = json.loads((brain / "run.json").read_text())
    (brain / "run.json").write_text(json.dumps(run | change))
    outcome = aios("brains", "list", "--root", root)
    assert outcome.code == 0
    assert "damaged" in " ".join(outcome.out.split())
    outcome = aios("generate", "straight", "--root", root)
    assert outcome.code == 1
    assert "is damaged" in outcome.err


def test_a_brain_that_is_not_there(aios, root):
    outcome = aios("brains", "show", "nobody", "--root", root)
    assert outcome.code == 2
    assert "there is no brain nobody; brains here: mixtral/straight" in outcome.err


def test_rename_and_delete(aios, root, brain):
    assert aios("brains", "rename", "straight", "better", "--root", root).code == 0
    assert not brain.exists()
    assert aios("generate", "better", "--root", root, "--max-new-tokens", 2).code == 0
    assert aios("brains", "rename", "better", "../x", "--root", root).code == 2
    outcome = aios("brains", "delete", "better", "--root", root)
    assert outcome.code == 2
    assert "--yes" in outcome.err
    assert aios("brains", "delete", "better", "--yes", "--root", root).code == 0
    assert json.loads(aios("brains", "list", "--root", root, "--json").out) == []
    outcome = aios("brains", "delete", "better", "--yes", "--root", root)
    assert outcome.code == 2
    assert "brains here: none" in outcome.err


def test_export_is_a_plain_model(aios, root, tmp_path):
    out = tmp_path / "plain"
    outcome = aios("brains", "export-hf", "straight", out, "--root", root)
    assert outcome.code == 0
    assert "mixtral" in outcome.out
    assert AutoModelForCausalLM.from_pretrained(out).config.model_type == "mixtral"
    assert (out / "tokenizer.json").is_file()
    assert aios("brains", "export-hf", "straight", out, "--root", root).code == 2


def test_chat(aios, root, monkeypatch):
    lines = iter(["My fellow citizens", "And then?", "/new", "Once more", ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    outcome = aios("chat", "straight", "--root", root, "--max-new-tokens", 4, "--experts")
    assert outcome.code == 0
    assert outcome.out.count("layer 0: experts") == 3
    assert "Answers end" not in outcome.out
    lines = iter([""])
    outcome = aios("chat", "straight", "--root", root, "--max-new-tokens", 10**6)
    assert (outcome.code, "Answers end after " in outcome.out) == (0, True)
    assert aios("chat", "straight", "--root", root, "--halt", "max").code == 2
