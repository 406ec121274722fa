"""aios hrm-hf train-actv1: the seed's commands, what they write, what is refused, stopping and going on."""

import json
import re
import shutil

import pytest

from chronomoe.training.checkpoint import Checkpoint

SMALL = {
    "--hidden-size": [32], "--num-heads": [4], "--h-layers": [1], "--l-layers": [1], "--max-seq-len": [16],
    "--batch-size": [2], "--no-gradient-checkpointing": [], "--eval-batches": [2],
}  # fmt: skip
TEXT = "training_data/curated_datasets/test_sample.txt"


@pytest.fixture
def here(workspace, monkeypatch):
    """The seed's commands name paths relative to the workspace."""
    monkeypatch.chdir(workspace)
    return workspace


@pytest.fixture
def hrm(aios):
    def call(*options, text=TEXT, small=True):
        words = ["--dataset-file", text] if text else []
        given = [word for name, value in SMALL.items() if name not in options for word in (name, *value)]
        return aios("hrm-hf", "train-actv1", *words, *(given if small else []), *options)

    return call


def records(file, event=None):
    found = [json.loads(line) for line in file.read_text().splitlines()]
    return [record for record in found if event in (None, record["event"])]


SEED_RUN = [
    *("hrm-hf", "train-actv1", "--model", "artifacts/hf_implant/base_model"),
    *("--dataset-file", "training_data/curated_datasets/test_sample.txt"),
]


@pytest.mark.parametrize(
    "words",
    [
        ["--steps", 20, "--batch-size", 8, "--use-moe", "--num-experts", 8, "--num-experts-per-tok", 2,
         "--moe-capacity-factor", 1.25],
        ["--steps", 20, "--batch-size", 8, "--no-moe"],
        ["--steps", 30, "--batch-size", 4, "--use-moe", "--num-experts", 8, "--num-experts-per-tok", 2],
    ],
    ids=["moe", "dense", "quickly"],
)  # fmt: skip
def test_the_commands_of_the_seed(aios, here, words):
    """As written, but for a width and a length that take seconds."""
    log = here / "artifacts/brains/actv1/metrics.jsonl"
    tiny = ["--hidden-size", 32, "--num-heads", 4, "--max-seq-len", 32]
    outcome = aios(*SEED_RUN, *words, "--log-file", "artifacts/brains/actv1/metrics.jsonl", *tiny)
    assert outcome.code == 0, outcome.err
    steps = records(log, "train")
    assert steps[-1]["step"] == words[1]
    assert {"step", "lr", "loss", "ce", "bce_halt", "used_segments", "tokens_per_second"} <= set(steps[-1])
    moe = "--no-moe" not in words
    assert moe is ("load_by_depth" in steps[-1])
    assert moe is ({"lb_loss", "lb_coef", "moe_layers"} <= set(steps[-1]))
    (usage,) = records(log, "expert_usage") or [None]
    assert moe is (usage is not None)
    if usage is not None:
        assert len(usage["avg_routing_prob"]) == len(usage["token_counts"]) == 8
        assert sum(usage["avg_routing_prob"]) == pytest.approx(1, abs=1e-3)
        # Low blocks are called four times a segment, high ones twice, in two segments: all choices of all calls.
        tokens = words[1] * words[3] * 32 * 2
        assert usage["layers"]["total_tokens"] == [4 * tokens, 4 * tokens, 2 * tokens, 2 * tokens]
        assert sum(usage["token_counts"]) <= 2 * usage["total_tokens"], "some are dropped for want of capacity"
        assert sum(usage["token_counts"]) > 1.5 * usage["total_tokens"]
    assert [record["event"] for record in records(log)][-1] == "final"


def test_a_default_sized_brain_trains_and_talks(aios, here):
    assert aios(*SEED_RUN, "--steps", 1, "--batch-size", 2, "--brain-name", "big").code == 0
    config = json.loads((here / "artifacts/brains/actv1/big/config.json").read_text())
    assert (config["hidden_size"], config["num_local_experts"], config["intermediate_size"]) == (512, 8, 768)
    outcome = aios("generate", "--brain", "actv1/big", "--max-new-tokens", 3)
    assert outcome.code == 0


def test_loss_is_what_it_says_it_is(hrm, here):
    assert hrm("--steps", 4, "--log-every", 1, "--brain-name", "a").code == 0
    for record in records(here / "artifacts/brains/actv1/a/metrics.jsonl", "train"):
        router = 0.05 * record["lb_loss"]
        other = 0.001 * record["z_loss"] + 0.001 * record.get("coherence_loss", 0.0)
        assert record["lm_loss"] == pytest.approx(record["ce"] + record["bce_halt"], rel=1e-4)
        assert record["loss"] == pytest.approx(record["lm_loss"] + router + other, abs=3e-3)


def test_capacity_changes_what_is_dropped(hrm, here):
    dropped = []
    for factor in (0.5, 1.25, 0):
        name = f"c{len(dropped)}"
        assert hrm("--steps", 2, "--moe-capacity-factor", factor, "--brain-name", name).code == 0
        last = records(here / f"artifacts/brains/actv1/{name}/metrics.jsonl", "train")[-1]
        dropped.append(last["dropped_fraction"])
    assert dropped[0] > 0.3
    assert dropped[0] > dropped[1] > dropped[2] == 0


def test_stopping_and_resuming_changes_no_bit(hrm, here):
    bundle = here / "artifacts/brains/actv1"
    options = ("--steps", 8, "--save-every", 4, "--log-every", 1)
    assert hrm(*options, "--brain-name", "whole").code == 0
    stop = here / "stop"
    before = Checkpoint._write

    def stop_at_five(self, *rest):
        stop.touch()
        before(self, *rest)

    Checkpoint._write = stop_at_five
    try:
        outcome = hrm(*options, "--brain-name", "cut", "--stop-file", stop)
    finally:
        Checkpoint._write = before
    assert outcome.code == 0
    assert "Stopped at step 4, saved" in outcome.out
    assert "exists already" not in outcome.err
    assert hrm("--brain-name", "cut", "--resume", "--stop-file", stop, text=None, small=False).code == 2
    stop.unlink()
    outcome = hrm("--brain-name", "cut", "--resume", text=None, small=False)
    assert outcome.code == 0, outcome.err
    whole, cut = bundle / "whole/model.safetensors", bundle / "cut/model.safetensors"
    assert whole.read_bytes() == cut.read_bytes()
    mine, theirs = (
        {r["step"]: {k: v for k, v in r.items() if k != "tokens_per_second"} for r in records(file, "train")}
        for file in (bundle / "whole/metrics.jsonl", bundle / "cut/metrics.jsonl")
    )
    assert mine == theirs


def test_iterate_goes_on_in_cycles_until_stopped(hrm, here):
    stop, after = here / "stop", Checkpoint.after_step

    def watch(self, step):
        if step.number == 7:
            stop.touch()
        after(self, step)

    Checkpoint.after_step = watch
    try:
        outcome = hrm("--steps", 3, "--iterate", "--stop-file", stop, "--brain-name", "endless")
    finally:
        Checkpoint.after_step = after
    assert outcome.code == 0
    log = here / "artifacts/brains/actv1/endless/metrics.jsonl"
    assert [record["step"] for record in records(log, "checkpoint_save")] == [3, 6, 7]
    assert len(records(log, "eval")) == 2


def test_a_brain_without_a_name_makes_way_for_the_next(hrm, here):
    folder = here / "artifacts/training_datasets"
    for _ in range(2):
        outcome = hrm("--steps", 1)
        assert outcome.code == 0
    assert "actv1.1" in outcome.out
    assert (folder / "actv1/model.safetensors").is_file()
    assert (folder / "actv1.1/model.safetensors").is_file()


def test_named_brains_are_kept(hrm, here):
    assert hrm("--steps", 1, "--brain-name", "a").code == 0
    outcome = hrm("--steps", 1, "--brain-name", "a")
    assert outcome.code == 2
    assert "exists already" in outcome.err


def test_weights_of_another_brain_are_a_start(hrm, here):
    brains = here / "artifacts/brains/actv1"
    assert hrm("--steps", 3, "--brain-name", "a").code == 0
    for n, source in enumerate((brains / "a", brains / "a/model.safetensors")):
        assert hrm("--steps", 1, "--lr", 1e-12, "--brain-name", f"b{n}", "--student-init", source).code == 0
        first = records(brains / f"b{n}/metrics.jsonl", "eval")[-1]["text"]
        assert first == pytest.approx(records(brains / "a/metrics.jsonl", "eval")[-1]["text"], rel=1e-3)
    outcome = hrm("--steps", 1, "--brain-name", "c", "--student-init", brains / "a", "--num-experts", 4)
    assert outcome.code == 1
    assert "do not fit this model" in outcome.err


def test_text_that_is_evaluated_only(hrm, here):
    other = here / "other.txt"
    other.write_text("Let us see what it makes of this text, which is another. " * 40)
    assert hrm("--steps", 1, "--eval-file", other, "--brain-name", "a").code == 0
    (found,) = records(here / "artifacts/brains/actv1/a/metrics.jsonl", "eval")
    assert {"text", "eval", "segments"} <= set(found)
    assert hrm("--steps", 1, "--eval-batches", 0, "--brain-name", "b").code == 0
    assert records(here / "artifacts/brains/actv1/b/metrics.jsonl", "eval") == []


def test_lines_that_are_not_ascii_can_be_left_out(hrm, here):
    text = here / "mixed.txt"
    text.write_text("plain words again and again\n" * 60 + "g\u00e4nzlich \u00fcberfl\u00fcssig\n" * 60)
    sizes = []
    for name, flags in (("all", []), ("ascii", ["--ascii-only"])):
        assert hrm("--steps", 1, *flags, "--brain-name", name, text=text).code == 0
        data = json.loads((here / f"artifacts/brains/actv1/{name}/data/data.json").read_text())
        sizes.append(data["domains"][0]["train"]["bytes"] + data["domains"][0]["heldout"]["bytes"])
    assert sizes[1] < 0.6 * sizes[0]
    text.write_text("\u00e4\u00f6\u00fc\n" * 60)
    outcome = hrm("--steps", 1, "--ascii-only", "--brain-name", "none", text=text)
    assert outcome.code == 1
    assert "no ASCII text" in outcome.err


def test_a_long_text_is_read_in_pieces(hrm, here):
    options = ("--steps", 2, "--max-seq-len", 64, "--use-chunked-training", "--chunk-size", 16)
    assert hrm(*options, "--brain-name", "a").code == 0
    last = records(here / "artifacts/brains/actv1/a/metrics.jsonl", "train")[-1]
    assert last["tokens"] == 2 * 2 * 64
    assert last["ce"] < 8


def test_a_plan_is_printed_and_nothing_else_happens(hrm, aios, here):
    before = sorted(here.rglob("*"))
    outcome = hrm("--steps", 5, "--dry-run")
    assert outcome.code == 0
    assert "active per token" in outcome.out
    assert sorted(here.rglob("*")) == before
    summary = aios("hrm-hf", "arch-summary", "--hidden-size", 512, "--vocab-size", 50257)
    assert summary.code == 0
    assert "operations" in summary.out


def test_the_summary_is_of_the_model_that_is_trained(hrm, aios, here):
    shape = ("--hidden-size", 32, "--num-heads", 4, "--pos-encodings", "learned", "--max-seq-len", 32)
    plan = hrm("--steps", 5, "--dry-run", *shape, small=False).out
    tokenizer = json.loads((here / "artifacts/hf_implant/base_model/tokenizer.json").read_text())
    tokens = len(tokenizer["model"]["vocab"] | {added["content"]: 0 for added in tokenizer["added_tokens"]})
    summary = aios("hrm-hf", "arch-summary", *shape, "--vocab-size", tokens).out
    total = re.search(r"[\d,]{4,}", summary)[0]
    assert total in plan


@pytest.mark.parametrize(
    ("options", "code", "sentence"),
    [
        (["--num-experts", 2, "--num-experts-per-tok", 3], 2, "(3) exceeds the 2 experts"),
        (["--hidden-size", 30], 2, "not a multiple of 4 attention heads"),
        (["--model", "nowhere"], 2, "aios init"),
        (["--max-seq-len", 0], 2, "max_seq_len"),
        (["--batch-size", 0], 2, "batch_size"),
        (["--steps", 0], 2, "steps"),
        (["--lr", 0], 2, "lr is 0"),
        (["--eval-batches", -1], 2, "eval_batches"),
        (["--zero-stage", "zero2"], 2, "accelerate launch"),
        (["--zero-stage", "zero9"], 2, "zero"),
        (["--pos-encodings", "sine"], 2, "sine"),
        (["--ddp"], 2, "accelerate launch --num_processes 2"),
        (["--device", "cuda"], 2, "no cuda device"),
        (["--device", "toaster"], 2, "no device 'toaster'"),
        (["--use-8bit-optimizer"], 2, "bitsandbytes"),
        (["--brain-name", "../x"], 2, "is not a name"),
        (["--student-init", "nowhere.safetensors"], 1, "nowhere.safetensors"),
    ],
)
def test_bad_input_is_named(hrm, here, options, code, sentence):
    outcome = hrm("--steps", 1, *options)
    assert outcome.code == code, outcome.err
    assert sentence in outcome.err
    assert not (here / "artifacts/training_datasets/actv1/model.safetensors").exists()


def test_text_that_is_missing_empty_or_a_stop_file_that_is_there(hrm, here):
    assert "nothere.txt" in hrm("--steps", 1, text="nothere.txt").err
    (here / "empty.txt").write_text("\n")
    assert "holds no text" in hrm("--steps", 1, text="empty.txt").err
    (here / "utf16.txt").write_bytes("words in another encoding ".encode("utf-16") * 40)
    outcome = hrm("--steps", 1, text="utf16.txt")
    assert "save it as UTF-8" in outcome.err
    (here / "stop").touch()
    outcome = hrm("--steps", 1, "--stop-file", "stop")
    assert outcome.code == 2
    assert "is there already" in outcome.err
    assert "--dataset-file" in hrm("--steps", 1, text=None).err


def test_a_brain_is_continued_as_what_it_is(hrm, here):
    assert hrm("--steps", 2, "--brain-name", "a").code == 0
    outcome = hrm("--brain-name", "a", "--resume", "--num-experts", 4, text=None, small=False)
    assert outcome.code == 2
    assert "shape cannot change" in outcome.err
    shutil.rmtree(here / "artifacts/hf_implant/base_model")
    assert hrm("--brain-name", "a", "--resume", text=None, small=False).code == 2


def test_the_shape_reaches_the_model(hrm, here):
    options = [
        *("--pos-encodings", "learned", "--window-size", 4, "--grad-mode", "one_step", "--h-cycles", 1),
        *("--l-cycles", 3, "--halt-max-steps", 3, "--h-layers", 2, "--expansion", 4, "--num-experts", 4),
    ]
    assert hrm("--steps", 1, "--brain-name", "a", "--bundle-dir", here / "elsewhere", *options).code == 0
    config = json.loads((here / "elsewhere/a/config.json").read_text())
    wanted = {
        "pos_encodings": "learned", "window_size": 4, "grad_mode": "one_step", "H_cycles": 1, "L_cycles": 3,
        "halt_max_steps": 3, "h_layers": 2, "l_layers": 1, "num_local_experts": 4, "max_position_embeddings": 16,
    }  # fmt: skip
    assert {name: config[name] for name in wanted} == wanted


def test_what_is_settled_cannot_change_and_nothing_is_lost(hrm, aios, here):
    other = here / "other.txt"
    other.write_text("quite another text to train on, again and again. " * 60)
    assert hrm("--steps", 2, "--brain-name", "a").code == 0
    data = here / "artifacts/brains/actv1/a/data/data.json"
    before = data.read_bytes()
    assert hrm("--steps", 2, "--brain-name", "a", text=other).code == 2
    assert data.read_bytes() == before, "a refused run touches nothing"
    for extra in (["--dataset-file", other], ["--ascii-only"], ["--student-init", "x"], ["--chunk-size", 8]):
        assert hrm("--brain-name", "a", "--resume", *extra, text=None, small=False).code == 2, extra
    assert hrm("--brain-name", "a", "--resume", "--steps", 3, "--no-auto-adjust-lr", small=False).code == 0
    assert aios("brains", "rename", "actv1/a", "b").code == 0
    assert hrm("--brain-name", "b", "--resume", "--steps", 4, text=None, small=False).code == 0
    (listed,) = json.loads(aios("brains", "list", "--json").out)
    assert (listed["name"], listed["steps"], listed["finished"]) == ("b", 4, True)
    assert aios("brains", "export-hf", "b", here / "plain").code == 2
    assert not (here / "plain").exists()
    assert aios("chat", "b", "--root", here, "--segments", 9).code == 2


def test_a_dense_brain_keeps_its_rate_on_resume(hrm, here):
    assert hrm("--steps", 1, "--no-moe", "--brain-name", "a").code == 0
    outcome = hrm("--brain-name", "a", "--resume", "--steps", 2, "--lr", 0.01, text=None, small=False)
    assert outcome.code == 0
    assert "mixture of experts" not in outcome.out
    run = json.loads((here / "artifacts/brains/actv1/a/run.json").read_text())
    assert run["run"]["learning_rate"] == 0.01


def test_a_brain_that_is_continued_speaks_from_its_latest_checkpoint(hrm, here, aios):
    from aios.brains.brain import Brain

    bundle = here / "artifacts/brains/actv1/a"
    assert hrm("--steps", 2, "--brain-name", "a").code == 0
    assert Brain(here, bundle).weights == bundle
    stop, after = here / "stop", Checkpoint.after_step

    def watch(self, step):
        stop.touch()
        after(self, step)

    Checkpoint.after_step = watch
    try:
        assert hrm("--brain-name", "a", "--resume", "--iterate", "--stop-file", stop, text=None, small=False).code == 0
    finally:
        Checkpoint.after_step = after
    assert Brain(here, bundle).weights == bundle / "checkpoints/step_3"
    assert not json.loads(aios("brains", "show", "a", "--json").out)["finished"]


def test_a_run_that_fails_leaves_no_half_a_brain(hrm, here):
    before = sorted(here.rglob("*"))
    for bad in (["--eval-file", "nothere"], ["--student-init", "nothere.safetensors"], ["--num-experts", 1]):
        assert hrm("--steps", 1, "--brain-name", "a", *bad).code != 0
    assert hrm("--steps", 1, "--moe-capacity-factor", -2).code == 2
    assert sorted(path for path in here.rglob("*") if path.is_file()) == [path for path in before if path.is_file()]


def test_help_is_short_to_wait_for_and_names_the_flags(aios):
    outcome = aios("hrm-hf", "train-actv1", "--help")
    assert outcome.code == 0
    for flag in ("--no-moe", "--num-experts-per-tok", "--moe-capacity-factor", "--expert-id", "--default-goal"):
        assert flag in outcome.out


def test_the_quick_expert_of_the_seed(aios, here):
    """As written, but for a width that takes seconds."""
    tiny = ("--hidden-size", 32, "--num-heads", 4)
    log = "artifacts/experts/test-expert-004/metrics.jsonl"
    options = ("--steps", 3, "--batch-size", 2, "--expert-id", "test-expert-004")
    goal = ("--default-goal", "Improve summarization quality", "--log-file", log)
    outcome = aios(*SEED_RUN, *options, *goal, *tiny)
    assert outcome.code == 0, outcome.err
    assert "will not transfer" in outcome.out
    assert (here / "artifacts/experts/test-expert-004/expert.safetensors").is_file()
    (entry,) = json.loads((here / "artifacts/experts/registry.json").read_text())["experts"]
    assert entry["expert_id"] == "test-expert-004"
    assert entry["goals"] == ["Improve summarization quality"]
    assert entry["is_active"]
    assert not entry["is_frozen"]
    assert entry["training_config"]["steps"] == 3
    assert [record["step"] for record in records(here / log, "train")] == [1, 2, 3]
    assert not (here / "artifacts/brains/actv1").exists()
    linked = json.loads(aios("goals-list-for-expert", "test-expert-004").out)
    assert (linked["count"], linked["directives"]) == (1, ["Improve summarization quality"])
    assert aios(*SEED_RUN, *options, "--resume").code == 2
    assert aios(*SEED_RUN, "--anchor-file", TEXT).code == 2


def test_an_expert_of_a_brain_that_halts(hrm, aios, here):
    assert hrm("--steps", 3, "--brain-name", "thinker").code == 0
    outcome = hrm("--steps", 3, "--brain-name", "thinker", "--expert-id", "one", "--anchor-file", TEXT, small=False)
    assert outcome.code == 0, outcome.err
    assert aios("experts", "attach", "one", "--brain", "thinker").code == 0
    assert aios("generate", "thinker", "--max-new-tokens", 3).code == 0
    weights = here / "artifacts/brains/actv1/thinker/model.safetensors"
    before = weights.read_bytes()
    assert aios("experts", "detach", "one", "--brain", "thinker").code == 0
    assert weights.read_bytes() == before
