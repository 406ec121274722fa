"""Two processes that share a batch do what one process does with all of it: same loss, load and weights."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

SCRIPT = """
import dataclasses, sys, torch
from torch.utils.data import DataLoader
from chronomoe import ChronovisorMixtralForCausalLM, MixtralConfig
from chronomoe.training import ChronoMoETrainer, TrainingConfig

folder, batch_size = sys.argv[1], int(sys.argv[2])
torch.set_num_threads(1)
torch.manual_seed(0)
model = ChronovisorMixtralForCausalLM(MixtralConfig(vocab_size=53, hidden_dim=32, num_layers=2, num_experts=4))
generator = torch.Generator().manual_seed(3)
rows = []
for index in range(16):
    row = torch.randint(0, 53, (12,), generator=generator)
    rows.append({"input_ids": row, "attention_mask": (torch.arange(12) < 12 - index % 5).long()})
config = TrainingConfig(checkpoint_dir=folder, batch_size=batch_size, max_steps=3, log_every_n_steps=1,
                        lambda_balance=0.5, learning_rate=1e-3, initial_kappa=0.0, precision="fp32")
trainer = ChronoMoETrainer(model, config, DataLoader(rows, batch_size=batch_size), show=lambda line: None)
model.controller.config = dataclasses.replace(model.controller.config, suspect_below=0.9, probe_every=3)
trainer.train()
"""


def train(folder: Path, processes: int) -> list[dict]:
    script = folder / "script.py"
    folder.mkdir()
    script.write_text(SCRIPT)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [*(launch if processes > 1 else [sys.executable]), str(script), str(folder), str(4 // processes)]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [record for record in found if record["event"] == "train"]


def test_two_processes_equal_one(tmp_path):
    one, two = train(tmp_path / "one", 1), train(tmp_path / "two", 2)
    assert len(one) == len(two) == 3
    for mine, theirs in zip(one, two, strict=True):
        for name in ("loss", "lm_loss", "lb_loss", "z_loss", "grad_norm"):
            assert mine[name] == pytest.approx(theirs[name], rel=1e-3), name
        assert mine["tokens"] == theirs["tokens"]
    assert one[0]["load"] == two[0]["load"]
    weights = [load_file(tmp_path / name / "step_3" / "model.safetensors") for name in ("one", "two")]
    for name, tensor in weights[0].items():
        torch.testing.assert_close(tensor, weights[1][name], rtol=1e-3, atol=3e-4)
    probed = [load_file(tmp_path / name / "step_3" / "chronovisor.safetensors")["evidence"] for name in ("one", "two")]
    assert probed[0][0].max() == 4  # sequences of the whole batch
    for mine, theirs in zip(*probed, strict=True):  # count, sum, sum of squares
        torch.testing.assert_close(theirs, mine, rtol=0.05, atol=0.01 * mine.abs().max().item())
