"""Training one expert alone: what it writes, what keeps the earlier version, what is refused."""

import json
import shutil

from aios.store.experts import Registry
from chronomoe.experts.file import read_expert
from tests.aios.experts.conftest import TRAIN


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


def test_an_expert_without_general_text_opens_for_a_goal_only(aios, root, brain, tmp_path):
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
    from aios.store.entry import making

    with making(root, "laws"):
        text = ("--dataset-file", root / "training_data/python")
        outcome = aios("experts", "train", "laws", "--brain", "straight", *text, *TRAIN, "--root", root)
    assert outcome.code == 1
    assert "another process is making expert laws" in outcome.err


def test_an_expert_learns_in_the_base_alone_whatever_is_attached(aios, root, brain, expert):
    assert aios("experts", "attach", "laws", "--brain", "straight", "--root", root).code == 0
    before = Registry(root).get("laws").performance_metrics["before"]
    text = ("--dataset-file", root / "training_data/licences")
    outcome = aios("experts", "train", "more", "--brain", "straight", *text, *TRAIN, "--root", root, "--json")
    assert outcome.code == 0, outcome.err
    assert json.loads(outcome.out)["performance_metrics"]["before"] == before


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
