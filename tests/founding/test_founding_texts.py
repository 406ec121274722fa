"""What both founding texts tell a reader to run, pasted verbatim from them, runs in one workspace."""

import contextlib
import io
import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from aios.cli import run

HERE = Path(__file__).parent
SUBBRAINS = (HERE / "dynamic-subbrains.md").read_text(encoding="utf-8")
TRAINING = (HERE / "chronomoe-training.md").read_text(encoding="utf-8")
SHELL = re.sub(r"`\n\s*", "", SUBBRAINS)
"""The text with PowerShell's continued lines joined."""
COMMANDS = [line.strip() for line in SHELL.splitlines() if re.match(r"\t\taios ", line)]
SMALL = "--hidden-size 32 --num-heads 2 --h-layers 1 --l-layers 1 --halt-max-steps 1 --max-seq-len 16 --eval-batches 1"
"""Added to each training: a smaller model and nothing else. What the text says stands before it."""


def python_blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", TRAINING, re.DOTALL)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("founding")
    with contextlib.redirect_stdout(io.StringIO()):
        assert run(["init", "--root", str(root), "--max-bytes", "60000", "--vocab-size", "400"]) == 0
    return root


def test_commands_of_dynamic_subbrains(workspace, monkeypatch, capsys):
    monkeypatch.chdir(workspace)
    assert len(COMMANDS) == 10
    added = ""
    for number, command in enumerate(COMMANDS):
        words = shlex.split(command)[1:]
        if words[0] == "hrm-hf":
            words += SMALL.split()
        if "goals-link-expert" in words:  # the text's goal 42: the number that goals-add gave
            words[words.index("42")] = str(json.loads(added)["id"])
        capsys.readouterr()
        assert run(words) == 0, (number, command, capsys.readouterr())
        said = capsys.readouterr().out
        if words[0] == "goals-add":
            added = said

    experts = workspace / "artifacts/experts"
    assert (experts / "test-expert-004/expert.safetensors").is_file()
    registry = json.loads((experts / "registry.json").read_text())
    entry = next(one for one in registry["experts"] if one["expert_id"] == "test-expert-004")
    fields = (
        "expert_id name description category goals is_active is_frozen parent_expert_id child_expert_ids "
        "checkpoint_path training_config created_at last_trained"
    )
    assert set(fields.split()) <= set(entry)
    assert entry["goals"] == ["Improve summarization quality"]
    assert run(["goals-list-for-expert", "demo-expert-001"]) == 0
    assert "Focus on troubleshooting clarity" in capsys.readouterr().out

    records = [
        json.loads(line) for line in (workspace / "artifacts/brains/actv1/metrics.jsonl").read_text().splitlines()
    ]
    assert any({"lb_loss", "moe_layers"} <= set(record) for record in records)
    usage = next(record for record in records if record["event"] == "expert_usage")
    assert {"avg_routing_prob", "token_counts", "total_tokens"} <= set(usage)
    assert (experts / "test-expert-004/metrics.jsonl").is_file()


def test_example_of_chronomoe_training(workspace, monkeypatch, capsys):
    """The usage example, with a smaller model and fewer steps in place of its numbers."""
    monkeypatch.chdir(workspace)
    example = next(block for block in python_blocks() if "trainer.train()" in block)
    smaller = {
        "vocab_size=32000": "vocab_size=64",
        "hidden_dim=512": "hidden_dim=32",
        "num_layers=8": "num_layers=2",
        "num_experts=8": "num_experts=4",
        "max_steps=100000": "max_steps=6, save_every_n_steps=3, log_every_n_steps=1, kappa_warmup_steps=1",
        "step_50000": "step_3",
    }
    for there, here in smaller.items():
        assert there in example
        example = example.replace(there, here)
    sequences = [{"input_ids": row} for row in torch.randint(0, 64, (64, 16))]
    given = {
        "train_loader": DataLoader(sequences, batch_size=8),
        "eval_loader": DataLoader(sequences[:8], batch_size=8),
    }
    exec(compile(example, "example", "exec"), given)
    said = capsys.readouterr().out
    assert re.search(
        r"Step 6 \| Loss: \d\.\d{4} \| κ: -?\d\.\d\d \(cosine_anneal\) \| R: \d\.\d\d \| Gate: \d\.\d\d", said
    )
    assert re.search(r"  Landscape: var=\d\.\d{4}, valleys=\[.*\], ridges=\[.*\]", said)
    assert "healthy_valleys" in given["trainer"].controller.get_valley_health_diagnostics()
    states = list((workspace / "checkpoints/step_6").glob("chronovisor.*"))
    assert states, "the checkpoint holds the geology"


def test_settings_of_chronomoe_training():
    from chronomoe.training import TrainingConfig

    block = next(block for block in python_blocks() if block.startswith("TrainingConfig("))
    config = eval(block, {"TrainingConfig": TrainingConfig})
    assert (config.kappa_warmup_steps, config.save_chronovisor_state) == (1000, True)


@pytest.mark.parametrize("text", [TRAINING, SUBBRAINS], ids=["training", "subbrains"])
def test_every_name_is_in_the_list_of_names(text):
    names = (HERE.parents[1] / "docs/names.md").read_text(encoding="utf-8")
    pages = {name for name in re.findall(r"`([^`\n]+)`", text) if name.endswith(".md")}  # of AI-OS' own manual
    quoted = set(re.findall(r"`([^`\n]+)`", text)) - pages - {".safetensors"}
    flags = set(re.findall(r"(?<![\w-])--[a-z0-9][\w-]*", text))
    settings = set(re.findall(r"^    (\w+)=", text, re.MULTILINE)) - {"model", "config"}
    example = {"artifacts/experts/test-expert-004/expert.safetensors"}
    spelled = {"is_active/is_frozen": "`is_active`, `is_frozen`", "train-actv1": "train-actv1",
               "--num-experts-per-tok 1": "`--num-experts-per-tok <int>`"}  # fmt: skip
    missing = [name for name in quoted | flags | settings - example if spelled.get(name, name) not in names]
    assert not sorted(set(missing) - example)
