"""An expert's life in a workspace: trained, attached, used, changed, detached, sent elsewhere; and what is refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from aios.brains.brain import Brain
from aios.brains.loaded import load_brain
from aios.store.experts import Registry
from chronomoe.experts.file import read_expert, save_expert

TRAIN = ("--steps", 4, "--batch-size", 2, "--max-seq-len", 32, "--eval-tokens", 300, "--calibration-windows", 12)


@pytest.fixture
def root(brain):
    return brain.parents[3]


@pytest.fixture
def expert(aios, root, brain):
    """A workspace with a trained expert that is attached to nothing."""
    text = root / "training_data/licences"
    outcome = aios(
        "experts", "train", "laws", "--brain", "straight", "--dataset-file", text, "--root", root, *TRAIN,
        "--default-goal", "Read laws",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    assert f"Next: aios experts attach laws --brain straight --root {root}" in outcome.out
    return root / "artifacts/experts/laws/expert.safetensors"


def files(bundle):
    return {path.relative_to(bundle): path.read_bytes() for path in bundle.rglob("*") if path.is_file()}


def logits(bundle):
    model = load_brain(Brain(Path(), bundle)).model
    with torch.no_grad():
        return model(torch.arange(20).unsqueeze(0)).logits


def test_training_writes_the_expert_and_the_registry(aios, root, brain, expert):
    entry = Registry(root).get("laws")
    assert entry.version == 1
    assert entry.goals == ("Read laws",)
    (goal,) = json.loads(aios("goals-list-for-expert", "laws", "--root", root).out)["items"]
    assert (goal["text"], goal["source"], goal["expert_ids"]) == ("Read laws", "training", ["laws"])
    assert entry.checkpoint_path == "artifacts/experts/laws/expert.safetensors"
    assert entry.training_config["steps"] == 4
    assert set(entry.performance_metrics["before"]) == {"domain", "oratory", "python", "licences"}
    assert entry.performance_metrics["always_open"]["domain"] != entry.performance_metrics["before"]["domain"]
    records = [json.loads(line) for line in expert.with_name("metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records if record["event"] == "train"] == [1, 2, 3, 4]
    assert all("anchor_kl" in record for record in records if record["event"] == "train")
    assert sorted(path.name for path in expert.parent.iterdir()) == ["expert.safetensors", "metrics.jsonl"]


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


def test_training_and_generating_count_what_was_heard(aios, root, brain, expert):
    trained = Registry(root).get("laws").total_activations
    assert trained == 4 * 2 * 32
    assert aios("experts", "attach", "laws", "--brain", "straight", "--root", root).code == 0
    found = json.loads(
        aios("experts", "gate", "laws", "--brain", "straight", "--text", "Licence", "--json", "--root", root).out
    )
    assert len(found["tokens"]) == len(found["log_odds"]) == len(found["open"]) > 1
    listed = json.loads((brain / "experts.json").read_text())["attached"][0]
    weights = brain / f"experts/{listed['expert_uid']}.safetensors"
    one, header = read_expert(weights)
    one.gate.threshold.fill_(-1e9)
    save_expert(one, header, weights)
    assert aios("generate", "straight", "--max-new-tokens", 5, "--root", root).code == 0
    stats = json.loads(aios("experts", "stats", "--json", "--root", root).out)
    heard = stats["usage"][0]["total_activations"] - trained
    assert heard == 5, "the separator, and four of the five new tokens"
    assert 0 < Registry(root).get("laws").avg_routing_weight < 1


def test_a_new_version_keeps_what_training_does_not_change(aios, root, brain, expert):
    uid, old = Registry(root).get("laws").expert_uid, expert.read_bytes()
    again = ("experts", "train", "laws", "--brain", "straight", "--root", root, *TRAIN)
    assert aios("experts", "freeze", "laws", "--root", root).code == 0
    outcome = aios(*again, "--dataset-file", root / "training_data/licences")
    assert (outcome.code, "is frozen" in outcome.err) == (2, True)
    assert aios("experts", "unfreeze", "laws", "--root", root).code == 0
    outcome = aios(*again, "--dataset-file", root / "nothing.txt")
    assert outcome.code != 0
    assert expert.read_bytes() == old
    assert aios("experts", "attach", "laws", "--brain", "straight", "--root", root).code == 0
    outcome = aios(*again, "--dataset-file", root / "training_data/python", "--default-goal", "two\nlines")
    assert (outcome.code, "one line of text" in outcome.err) == (2, True)
    again = (*again, "--default-goal", "Read laws", "--seed", 1)
    assert aios(*again, "--dataset-file", root / "training_data/python").code == 0
    assert json.loads(aios("goals-list", "--all", "--root", root).out)["count"] == 1
    entry = Registry(root).get("laws")
    assert (entry.version, entry.expert_uid, entry.goals) == (2, uid, ("Read laws",))
    assert len(entry.training_datasets) == 2
    assert expert.read_bytes() != old
    (root / "artifacts/aios.db").write_bytes(b"no database" * 99)
    new = expert.read_bytes()
    outcome = aios(*again, "--dataset-file", root / "training_data/python")
    assert (outcome.code, "aios.db is damaged" in outcome.err, outcome.out) == (1, True, "")
    assert expert.read_bytes() == new, "found out before the training"


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


def test_an_expert_of_no_general_text_hears_only_a_goal(aios, root, brain, tmp_path):
    alone = tmp_path / "alone"
    shutil.copytree(brain, alone)
    shutil.rmtree(root / "training_data/prepared")
    outcome = aios(
        "experts", "train", "laws", "--brain", alone, "--dataset-file", root / "training_data/licences",
        "--root", root, *TRAIN,
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    assert "No general text" in outcome.out
    metrics = Registry(root).get("laws").performance_metrics
    assert metrics["after"] == metrics["before"]
    (file,) = (root / "artifacts/experts").rglob("*.safetensors")
    gate = read_expert(file)[0].gate
    assert float(gate.threshold) == 0  # shut without evidence, open with any prior
    assert not gate.direction.any()


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


def test_the_old_version_stays_until_the_new_one_is_complete(aios, root, expert, monkeypatch):
    old = expert.read_bytes()
    seen = []

    def run(trainee, *rest):
        seen.append(expert.read_bytes())
        raise KeyboardInterrupt

    monkeypatch.setattr("aios.experts.train._run", run)
    text = ("--dataset-file", root / "training_data/python")
    assert aios("experts", "train", "laws", "--brain", "straight", *text, *TRAIN, "--root", root).code == 130
    assert seen == [old]
    assert expert.read_bytes() == old


def test_one_process_makes_an_expert_at_a_time(aios, root, expert):
    from aios.store.experts import making

    with making(root, "laws"):
        text = ("--dataset-file", root / "training_data/python")
        outcome = aios("experts", "train", "laws", "--brain", "straight", *text, *TRAIN, "--root", root)
    assert outcome.code == 1
    assert "another process is making expert laws" in outcome.err


def test_an_expert_learns_in_the_base_alone_whatever_is_attached(aios, root, brain, expert):
    assert aios("experts", "attach", "laws", "--brain", "straight", "--root", root).code == 0
    before = Registry(root).get("laws").performance_metrics["before"]
    text = ("--dataset-file", root / "training_data/licences")
    told = aios("experts", "train", "more", "--brain", "straight", *text, *TRAIN, "--root", root, "--json")
    assert told.code == 0, told.err
    assert json.loads(told.out)["performance_metrics"]["before"] == before


def test_a_gate_without_memory_judges_each_token_alone(aios, root, expert):
    text = ("--dataset-file", root / "training_data/licences", "--gate-memory", 0)
    assert aios("experts", "train", "alone", "--brain", "straight", *text, *TRAIN, "--root", root).code == 0
    one, _ = read_expert(expert.parents[1] / "alone/expert.safetensors")
    assert float(one.gate.leak) == 0


def test_a_training_that_diverged_keeps_the_earlier_version(aios, root, expert):
    old = expert.read_bytes()
    text = ("--dataset-file", root / "training_data/licences", "--lr", "1e30")
    outcome = aios("experts", "train", "laws", "--brain", "straight", *text, *TRAIN, "--root", root)
    assert outcome.code == 1
    assert "Lower --lr" in outcome.err
    assert expert.read_bytes() == old
    assert Registry(root).get("laws").version == 1


def test_an_expert_frozen_while_it_is_trained_is_not_written(aios, root, expert, monkeypatch):
    from chronomoe.experts import training

    old, calibrate = expert.read_bytes(), training.calibrate

    def frozen_meanwhile(*arguments):
        Registry(root).freeze("laws")
        return calibrate(*arguments)

    monkeypatch.setattr(training, "calibrate", frozen_meanwhile)
    text = ("--dataset-file", root / "training_data/licences")
    outcome = aios("experts", "train", "laws", "--brain", "straight", *text, *TRAIN, "--root", root)
    assert outcome.code == 1
    assert "while it was trained" in outcome.err
    assert expert.read_bytes() == old
