"""expert.safetensors: what was written comes back, and nothing else is taken for it."""

import json
import pickle
import random
import struct

import pytest
import torch
from safetensors.torch import save_file

from chronomoe.errors import CheckpointError
from chronomoe.experts.attachment import attach_expert, detach_expert
from chronomoe.experts.file import base_fingerprint, base_of, read_expert, refuse_misfit, save_expert
from chronomoe.experts.listing import read_list
from tests.chronomoe.experts.conftest import BASES, build_base, build_expert


def header(base=None):
    return {
        "created": "2026-01-01", "base": base or {"hidden_size": 32, "act": "silu", "moe_layers": 3},
        "tokenizer_fingerprint": "t", "training": {}, "calibration": {}, "metrics": {}, "goals": ["write laws"],
    }  # fmt: skip


@pytest.fixture
def file(tmp_path):
    save_expert(build_expert(), header(), tmp_path / "expert.safetensors")
    return tmp_path / "expert.safetensors"


def test_an_expert_comes_back_bit_for_bit(file):
    expert, head = read_expert(file)
    mine = build_expert()
    assert (expert.expert_id, expert.uid, expert.layer_numbers) == ("licences", mine.uid, [1, 2])
    assert all(torch.equal(value, mine.state_dict()[name]) for name, value in expert.state_dict().items())
    assert head["goals"] == ["write laws"]


def test_two_hundred_mutations_are_refused(file):
    good, chance = file.read_bytes(), random.Random(0)
    (length,) = struct.unpack("<Q", good[:8])
    for number in range(200):
        kind = number % 4
        if kind == 0:  # a flipped bit anywhere
            place = chance.randrange(len(good))
            bad = bytearray(good)
            bad[place] ^= 1 << chance.randrange(8)
        elif kind == 1:
            bad = good[: chance.randrange(len(good))]
        elif kind == 2:  # a flipped bit in the header
            place = 8 + chance.randrange(length)
            bad = bytearray(good)
            bad[place] ^= 1 << chance.randrange(8)
        else:  # an edit that is good JSON
            head = json.loads(good[8 : 8 + length])
            content = json.loads(head["__metadata__"]["chronomoe_expert"])
            content[chance.choice(list(content))] = chance.choice([None, 7, "x", [], {}])
            if content == json.loads(head["__metadata__"]["chronomoe_expert"]):
                content["width"] = 41
            head["__metadata__"]["chronomoe_expert"] = json.dumps(content, sort_keys=True)
            text = json.dumps(head).encode()
            bad = struct.pack("<Q", len(text)) + text + good[8 + length :]
        file.write_bytes(bytes(bad))
        with pytest.raises(CheckpointError):
            read_expert(file)


def test_what_is_no_expert_is_refused(tmp_path, file):
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_expert(tmp_path / "nothing.safetensors")
    file.write_bytes(pickle.dumps({"w": 1}))
    with pytest.raises(CheckpointError, match="not an expert file"):
        read_expert(file)
    save_file({"w1.weight": torch.ones(2, 2)}, file)
    with pytest.raises(CheckpointError, match="not an expert file"):
        read_expert(file)


def test_values_that_are_not_finite_and_newer_versions_are_refused(tmp_path, monkeypatch):
    expert = build_expert()
    with torch.no_grad():
        expert.layers["1"].w1.weight[0, 0] = torch.nan
    save_expert(expert, header(), tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=r"not finite \(layers.1.w1"):
        read_expert(tmp_path / "x.safetensors")
    monkeypatch.setattr("chronomoe.experts.file.VERSION", 2)
    save_expert(build_expert(), header(), tmp_path / "x.safetensors")
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="version 2, which this chronomoe does not read"):
        read_expert(tmp_path / "x.safetensors")


@pytest.mark.parametrize("family", BASES)
def test_another_base_or_tokenizer_is_refused_unless_forced(family):
    model = build_base(family)
    mine = {**header(base_of(model)), "expert_id": "licences"}
    refuse_misfit(mine, model, "t")
    with pytest.raises(CheckpointError, match="another tokenizer"):
        refuse_misfit(mine, model, "u")
    fingerprint = base_fingerprint(model)
    attach_expert(model, build_expert())
    model.steering.pressure += 1
    assert base_fingerprint(model) == fingerprint, "neither experts nor fields are the base"
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1
    with pytest.raises(CheckpointError, match="trained in another base"):
        refuse_misfit(mine, model, "t")
    refuse_misfit(mine, model, "u", force=True)
    wide = build_base(family, **({"hidden_dim": 64} if family == "mixtral" else {"hidden_size": 64}))
    with pytest.raises(CheckpointError, match="hidden_size 32, this 64"):
        refuse_misfit(mine, wide, "t", force=True)


@pytest.mark.parametrize("family", BASES)
def test_an_attached_model_saves_and_loads_with_its_experts_beside_an_unchanged_base(family, tokens, tmp_path):
    model = build_base(family)
    model.save_pretrained(tmp_path / "plain")
    for seed, name in ((1, "licences"), (2, "laws")):
        expert = build_expert(name, seed=seed)
        expert.header = header(base_of(model))
        attach_expert(model, expert)
    model.subbrains.by_id("laws").active = False
    model.save_pretrained(tmp_path / "attached")
    assert [one["expert_id"] for one in read_list(tmp_path / "attached")] == ["licences", "laws"]
    plain, beside = (tmp_path / name / "model.safetensors" for name in ("plain", "attached"))
    assert plain.read_bytes() == beside.read_bytes()
    loaded = type(model).from_pretrained(tmp_path / "attached").eval()
    assert [one.expert_id for one in loaded.subbrains.attached] == ["licences", "laws"]
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    (tmp_path / "attached/experts.json").write_text("{")
    with pytest.raises(CheckpointError, match="is damaged"):
        type(model).from_pretrained(tmp_path / "attached")
    # Detached and saved into the same folder: nothing is left of them.
    for name in ("licences", "laws"):
        detach_expert(model, name)
    model.save_pretrained(tmp_path / "attached")
    assert not (tmp_path / "attached/experts.json").exists()
    assert getattr(type(model).from_pretrained(tmp_path / "attached"), "subbrains", None) is None


def test_a_model_cast_in_loading_keeps_its_experts(tmp_path):
    model = build_base("mixtral")
    expert = build_expert()
    expert.header = header(base_of(model))
    attach_expert(model, expert)
    model.save_pretrained(tmp_path)
    cast = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert [one.expert_id for one in cast.subbrains.attached] == ["licences"]


@pytest.mark.parametrize(
    ("name", "value"), [("threshold", float("nan")), ("threshold", -float("inf")), ("leak", 3.0), ("leak", -0.1)]
)
def test_a_gate_that_cannot_be_is_refused(tmp_path, name, value):
    expert = build_expert()
    getattr(expert.gate, name).fill_(value)
    save_expert(expert, header(), tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=r"not finite|leak is"):
        read_expert(tmp_path / "x.safetensors")


@pytest.mark.parametrize("uid", ["laws-2", "../../x", "a.b", "1" * 33, ""])
def test_a_uid_that_is_none_is_refused(tmp_path, uid, monkeypatch):
    expert = build_expert()
    expert.uid = uid
    with monkeypatch.context() as patch:
        patch.setattr("chronomoe.experts.file._check_fields", lambda *_: None)
        save_expert(expert, header(), tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match="an impossible expert_uid"):
        read_expert(tmp_path / "x.safetensors")


def test_a_header_of_brackets_is_refused(tmp_path):
    for text in (b"[" * 5000, json.dumps({"__metadata__": {"chronomoe_expert": "[" * 5000, "sha256": ""}}).encode()):
        (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)
        with pytest.raises(CheckpointError, match="not an expert file"):
            read_expert(tmp_path / "x.safetensors")
