"""aios brains upcycle: a dense brain becomes one with experts, that loads, generates, is listed and trains on."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from aios.brains.brain import Brain
from aios.brains.loaded import load_brain
from chronomoe import storage

SMALL = [
    *("--hidden-size", 32, "--num-heads", 4, "--h-layers", 1, "--l-layers", 1, "--max-seq-len", 16),
    *("--batch-size", 2, "--no-gradient-checkpointing", "--eval-batches", 2, "--steps", 2),
]


@pytest.fixture
def here(workspace, monkeypatch):
    monkeypatch.chdir(workspace)
    return workspace


@pytest.fixture
def brains(here):
    return here / "artifacts/brains/actv1"


@pytest.fixture
def hrm(aios):
    def call(name, *options):
        text = ("--dataset-file", "training_data/curated_datasets/test_sample.txt")
        return aios("hrm-hf", "train-actv1", *text, "--brain-name", name, *SMALL, *options)

    return call


@pytest.fixture
def dense(hrm, brains):
    assert hrm("dense", "--no-moe").code == 0
    return brains / "dense"


def test_from_dense_to_experts_and_on(aios, hrm, dense, brains):
    outcome = aios("brains", "upcycle", "dense", "wide", "--num-experts", 4, "--num-experts-per-tok", 1)
    assert outcome.code == 0, outcome.err
    assert "same to rounding" in outcome.out
    models = [load_brain(Brain(Path(), brain)).model for brain in (dense, brains / "wide")]
    x = torch.arange(24).view(2, 12)
    expected, found = (model(x).logits for model in models)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    texts = [aios("generate", name, "--max-new-tokens", 6, "--temperature", 0) for name in ("dense", "wide")]
    assert [text.code for text in texts] == [0, 0]
    assert texts[0].out == texts[1].out
    listed = {brain["name"]: brain for brain in json.loads(aios("brains", "list", "--json").out)}
    assert listed["wide"]["finished"]
    assert listed["wide"]["bits_per_byte"] == listed["dense"]["bits_per_byte"] > 0
    assert listed["wide"]["shape"] == listed["dense"]["shape"] | {
        "use_moe": True, "num_experts": 4, "num_experts_per_tok": 1,
    }  # fmt: skip
    assert "4 experts, top-1" in (brains / "wide/README.md").read_text()
    assert aios("brains", "show", "wide").code == 0

    outcome = hrm("wide", "--resume")
    assert outcome.code == 1
    assert "no checkpoint to continue from; --student-init starts" in outcome.err
    outcome = hrm("wide", "--num-experts", 4)
    assert outcome.code == 2
    assert "exists already" in outcome.err
    further = ["--student-init", "artifacts/brains/actv1/wide", "--num-experts", 4, "--num-experts-per-tok", 1]
    outcome = hrm("further", *further)
    assert outcome.code == 0, outcome.err
    experts = load_brain(Brain(Path(), brains / "further")).model.model.H_module.layers[0].mlp.experts.down_proj
    assert not torch.equal(experts[0], experts[1])
    outcome = aios("hrm-hf", "train-actv1", "--brain-name", "further", "--resume", "--steps", 3)
    assert outcome.code == 0, outcome.err


def test_the_latest_checkpoint_of_a_brain_in_training_will_do(aios, dense, brains):
    for file in dense.glob("model*"):
        file.unlink()
    assert aios("brains", "upcycle", "dense", "wide").code == 0
    made = json.loads(aios("brains", "show", "wide", "--json").out)
    assert (made["finished"], made["bits_per_byte"]) == (True, None)
    assert aios("generate", "wide", "--max-new-tokens", 2).code == 0


def test_redrawn_experts_differ_and_it_says_so(aios, dense, brains):
    words = ["brains", "upcycle", "actv1/dense", "odd", "--redraw", 0.5, "--seed", 3]
    outcome = aios(*words)
    assert outcome.code == 0
    assert "128 of 256 units of each but the first" in outcome.out
    assert "not the same" in outcome.out
    assert json.loads((brains / "odd/run.json").read_text())["upcycled"] == {
        "from": "actv1/dense", "redraw": 0.5, "redrawn_units": 128, "seed": 3,
    }  # fmt: skip
    shutil.move(brains / "odd", brains / "first")
    made = json.loads(aios(*words, "--json").out)
    assert (made["name"], made["bits_per_byte"], made["finished"]) == ("odd", None, True)
    assert made["upcycled"]["redrawn_units"] == 128
    assert made["active_parameters"] < made["parameters"]
    assert (brains / "odd/model.safetensors").read_bytes() == (brains / "first/model.safetensors").read_bytes()


def test_what_cannot_be_upcycled_is_refused(aios, dense, brains):
    assert aios("brains", "upcycle", "dense", "wide", "--num-experts", 2).code == 0
    before = sorted(brains.rglob("*"))
    for words, sentence in (
        (["dense", "wide"], "there is a brain wide already"),
        (["dense", "dense"], "there is a brain dense already"),
        (["dense", "../x"], "is not a name"),
        (["nothere", "x"], "there is no brain nothere; brains here: actv1/dense"),
        (["wide", "x"], "has experts already"),
        (
            ["dense", "x", "--num-experts", 2, "--num-experts-per-tok", 3],
            "(3) exceeds the 2 experts",
        ),
        (["dense", "x", "--num-experts", 0], "num_experts is 0"),
        (["dense", "x", "--redraw", 1], "redraw is 1"),
    ):
        outcome = aios("brains", "upcycle", *words)
        assert outcome.code == 2, words
        assert sentence in outcome.err
    assert sorted(brains.rglob("*")) == before


def test_a_mixtral_is_refused(aios, brain):
    outcome = aios("brains", "upcycle", "straight", "x", "--root", brain.parents[3])
    assert outcome.code == 2
    assert "is a Mixtral, which has experts already" in outcome.err


def test_whole_or_not_at_all(aios, dense, brains, monkeypatch):
    def full(work, path):
        raise OSError(28, "No space left on device")

    # Killed at the last moment: what it leaves is no brain. Failed: nothing is left.
    shutil.copytree(dense, brains / ".wide.abc")
    with monkeypatch.context() as patched:
        patched.setattr(storage, "_put_in_place", full)
        outcome = aios("brains", "upcycle", "dense", "wide")
    assert outcome.code == 1
    assert "disk is full" in outcome.err
    assert sorted(path.name for path in brains.iterdir()) == [".wide.abc", "dense"]
    assert [found["name"] for found in json.loads(aios("brains", "list", "--json").out)] == ["dense"]


def test_a_name_taken_meanwhile_is_left_alone(aios, dense, brains, monkeypatch):
    from aios.brains import upcycle

    def slow(*arguments):
        (brains / "wide").mkdir()
        (brains / "wide/precious").touch()
        upcycle_card(*arguments)

    upcycle_card = upcycle.write_upcycled_card
    monkeypatch.setattr(upcycle, "write_upcycled_card", slow)
    outcome = aios("brains", "upcycle", "dense", "wide")
    assert outcome.code == 1
    assert "exists already" in outcome.err
    assert [path.name for path in (brains / "wide").iterdir()] == ["precious"]
