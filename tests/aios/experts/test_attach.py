"""Attaching experts to brains and detaching them; keeping brains in step with the registry; what is refused."""

import json
from pathlib import Path

import torch

from aios.brains.brain import Brain
from aios.brains.loaded import load_brain
from aios.store.experts import Registry
from chronomoe.experts.listing import gates_name, read_list
from tests.aios.experts.conftest import TRAIN


def files(bundle):
    return {path.relative_to(bundle): path.read_bytes() for path in bundle.rglob("*") if path.is_file()}


def logits(bundle):
    model = load_brain(Brain(Path(), bundle)).model
    with torch.no_grad():
        return model(torch.arange(20).unsqueeze(0)).logits


def test_attached_and_detached_a_brain_is_what_it_was_byte_for_byte(aios, root, brain, expert):
    before, said = files(brain), logits(brain)
    outcome = aios("experts", "attach", "laws", "--brain", "straight", "--root", root)
    assert outcome.code == 0, outcome.err
    assert Registry(root).get("laws").attached_to == ("mixtral/straight",)
    assert {name: content for name, content in files(brain).items() if name in before} == before
    model = load_brain(Brain(root, brain)).model
    model.subbrains.by_id("laws").forced = True
    with torch.no_grad():
        assert not torch.equal(model(torch.arange(20).unsqueeze(0)).logits, said)
    assert aios("experts", "deactivate", "laws", "--root", root).code == 0
    assert torch.equal(logits(brain), said)
    assert aios("experts", "freeze", "laws", "--root", root).code == 0
    model = load_brain(Brain(root, brain)).model
    assert not any(p.requires_grad for p in model.subbrains.by_id("laws").parameters())
    outcome = aios("experts", "attach", "laws", "--brain", "straight", "--root", root)
    assert (outcome.code, "attached to straight already" in outcome.err) == (2, True)
    assert aios("experts", "detach", "laws", "--brain", "straight", "--root", root).code == 0
    assert files(brain) == before
    assert torch.equal(logits(brain), said)
    assert Registry(root).get("laws").attached_to == ()
    outcome = aios("experts", "detach", "laws", "--brain", "straight", "--root", root)
    assert (outcome.code, "is not attached to straight" in outcome.err) == (2, True)


def test_a_brain_with_experts_is_not_trained_on_nor_exported_and_may_be_renamed(aios, root, brain, expert, tmp_path):
    assert aios("experts", "attach", "laws", "--brain", "straight", "--root", root).code == 0
    outcome = aios("train", "--root", root, "--name", "straight", "--resume", "--max-steps", 30)
    assert (outcome.code, "detach it before" in outcome.err) == (2, True)
    outcome = aios("brains", "export-hf", "straight", tmp_path / "out", "--root", root)
    assert (outcome.code, "detach them" in outcome.err) == (2, True)
    assert aios("brains", "rename", "straight", "better", "--root", root).code == 0
    assert Registry(root).get("laws").attached_to == ("mixtral/better",)
    better = brain.with_name("better")
    weights = better / "model.safetensors"
    from safetensors.torch import load_file, save_file

    tensors = load_file(weights)
    good = weights.read_bytes()
    tensors["model.embed_tokens.weight"][0, 0] += 1
    save_file(tensors, weights, {"format": "pt"})
    outcome = aios("generate", "better", "--root", root)
    assert (outcome.code, "are not those expert laws was attached to" in outcome.err) == (1, True)
    weights.write_bytes(good)
    assert aios("brains", "delete", "better", "--yes", "--root", root).code == 0
    assert Registry(root).get("laws").attached_to == ()


def test_what_does_not_fit_is_refused_and_nothing_is_touched(aios, root, brain, expert, train):
    attach = ("experts", "attach", "laws", "--root", root, "--brain")
    assert train(root, "other", "--seed", 5).code == 0
    before = files(brain.parent)
    outcome = aios(*attach, "other")
    assert (outcome.code, "trained in another base" in outcome.err) == (1, True)
    assert aios(*attach, "nobody").code == 2
    assert aios("experts", "attach", "nothing", "--brain", "straight", "--root", root).code == 2
    with Brain(root, brain).lock():
        outcome = aios(*attach, "straight")
    assert (outcome.code, "another process" in outcome.err) == (1, True)
    good = expert.read_bytes()
    expert.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    outcome = aios(*attach, "straight")
    assert (outcome.code, "changed after it was written" in outcome.err) == (1, True)
    expert.write_bytes(good)
    assert {name: content for name, content in files(brain.parent).items() if name in before} == before
    assert not (brain / "experts.json").exists()
    assert aios(*attach, "other", "--force").code == 0
    assert json.loads((brain.parent / "other/experts.json").read_text())["attached"][0]["forced"] is True


def test_what_a_kill_leaves_half_done_is_seen_and_mended(aios, root, brain, expert, monkeypatch):
    where = ("--brain", "straight", "--root", root)

    def killed(*_):
        raise KeyboardInterrupt

    # While attaching: the registry knows, the brain does not yet.
    with monkeypatch.context() as patch:
        patch.setattr("aios.experts.attach.write_list", killed)
        assert aios("experts", "attach", "laws", *where).code == 130
    assert Registry(root).get("laws").attached_to == ("mixtral/straight",)
    assert not (brain / "experts.json").exists()
    assert aios("experts", "detach", "laws", *where).code == 0
    assert Registry(root).get("laws").attached_to == ()
    # While an attached expert is changed: the same command once more.
    assert aios("experts", "attach", "laws", *where).code == 0
    with Brain(root, brain).lock():
        assert aios("experts", "deactivate", "laws", "--root", root).code == 1
    assert Registry(root).get("laws").is_active, "a brain in use: nothing is changed"
    # At the end of training: the file is of the next version, the registry is not.
    with monkeypatch.context() as patch:
        patch.setattr("aios.store.experts.Registry.upsert", killed)
        again = ("--dataset-file", root / "training_data/python", *TRAIN, "--seed", 9)
        assert aios("experts", "train", "laws", *again, *where).code == 130
    assert aios("experts", "detach", "laws", *where).code == 0
    outcome = aios("experts", "attach", "laws", *where)
    assert outcome.code == 1
    assert "cut short at its end; train laws again" in outcome.err


# -- several experts ---------------------------------------------------------------------------------------------------


def test_several_attach_at_once_in_any_order_and_leave_the_others_as_they_were_alone(aios, root, brain, three):
    before = files(brain)
    own = {path.relative_to(three): path.read_bytes() for path in three.rglob("expert.safetensors")}
    where = ("--brain", "straight", "--root", root)
    assert aios("experts", "attach", "laws", *where).code == 0
    alone = logits(brain), sorted(path.name for path in brain.rglob("*.safetensors"))
    found = []
    for order in (("code", "sums"), ("sums", "code")):
        outcome = aios("--json", "experts", "attach", *order, *where)
        assert outcome.code == 0, outcome.err
        assert [one["expert_id"] for one in json.loads(outcome.out)] == list(order)
        found.append(logits(brain))
        assert gates_name(brain) is not None
        assert aios("experts", "detach", *order, *where).code == 0
        assert torch.equal(logits(brain), alone[0])
        assert sorted(path.name for path in brain.rglob("*.safetensors")) == alone[1]
        assert gates_name(brain) is None
    assert torch.equal(*found)
    assert own == {path.relative_to(three): path.read_bytes() for path in three.rglob("expert.safetensors")}
    assert aios("experts", "detach", "laws", *where).code == 0
    assert files(brain) == before


def test_all_or_none_of_several_are_attached(aios, root, brain, three):
    where = ("--brain", "straight", "--root", root)
    file = three / "sums/expert.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    outcome = aios("experts", "attach", "laws", "code", "sums", *where)
    assert (outcome.code, "sums" in outcome.err) == (1, True)
    assert not (brain / "experts.json").exists()
    assert all(not one.attached_to for one in Registry(root).entries())
    assert aios("experts", "attach", "laws", "code", *where).code == 0
    outcome = aios("experts", "detach", "laws", "sums", *where)
    assert (outcome.code, "sums is not attached" in outcome.err) == (2, True)
    assert [one["expert_id"] for one in read_list(brain)] == ["laws", "code"]
    assert aios("experts", "rename", "laws", "statutes", "--root", root).code == 0
    assert gates_name(brain) is not None, "a change of one leaves the gates"


def test_which_gate_opens_where_is_listed_and_a_damaged_file_of_gates_heals(aios, root, brain, three):
    where = ("--brain", "straight", "--root", root)
    assert aios("experts", "attach", "laws", "code", *where).code == 0
    rows = json.loads(aios("--json", "experts", "list", "--against", *where).out)
    assert {(row["expert_id"], row["domain"]) for row in rows} >= {
        (gate, domain) for gate in ("laws", "code") for domain in ("laws", "code", "oratory", "python", "licences")
    }
    assert all(0 <= row["used"] <= row["open"] <= 1 for row in rows)
    shown = aios("experts", "list", "--against", *where).out
    assert "gate of" in shown
    assert [one["expert_id"] for one in json.loads(aios("--json", "experts", "list", *where).out)] == ["laws", "code"]
    outcome = aios("experts", "list", "--against", "--root", root)
    assert (outcome.code, "name it with --brain" in outcome.err) == (2, True)
    (brain / "experts" / gates_name(brain)).write_bytes(b"")
    outcome = aios("generate", "straight", "--root", root, "--max-new-tokens", 2)
    assert (outcome.code, "missing or damaged" in outcome.err) == (1, True)
    assert aios("experts", "detach", "code", *where).code == 0
    assert aios("generate", "straight", "--root", root, "--max-new-tokens", 2).code == 0
