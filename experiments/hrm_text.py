"""An HRM beside a Mixtral of as many parameters, on real text, for the same time.

    python -m experiments.hrm_text                    10 minutes an arm, in turn; writes experiments/results/
    python -m experiments.hrm_text --minutes 0.1      does the script run?

Same text, tokenizer, batch and optimizer; each arm takes as many steps as fit into its time, its learning rate falling
to the end. Held-out bits per byte, with halting as learned and at full depth. Leave the machine alone meanwhile.
"""

import argparse
import json
import math
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from chronomoe import ChronovisorMixtralForCausalLM, MixtralConfig
from chronomoe.data.token_store import TokenStore
from chronomoe.data.windows import PackedDataset, heldout_windows
from chronomoe.hrm import HRMACTv1Config, HRMACTv1ForCausalLM
from chronomoe.training import Callback, ChronoMoETrainer, TrainingConfig
from chronomoe.training.step import StepResult
from experiments.control_layer import prepare_text

RESULTS = Path(__file__).parent / "results"
SEQUENCE, BATCH, EVALUATED = 128, 8, 60_000
HRM = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_experts": 8}
ARMS: dict[str, dict[str, Any]] = {
    "Mixtral, 4 layers": {},
    "HRM 1 x 1 cycle, 1 segment": {"H_cycles": 1, "L_cycles": 1, "halt_max_steps": 1},
    "HRM 1 x 2 cycles, 2 segments": {"H_cycles": 1, "L_cycles": 2, "halt_max_steps": 2},
    "HRM 2 x 2 cycles, 2 segments (default)": {"H_cycles": 2, "L_cycles": 2, "halt_max_steps": 2},
}


def build(name: str, vocab_size: int) -> Any:
    """The model of an arm; 4 blocks of 8 experts each."""
    torch.manual_seed(0)
    if name.startswith("Mixtral"):
        return ChronovisorMixtralForCausalLM(
            MixtralConfig(
                vocab_size=vocab_size, hidden_dim=128, intermediate_dim=256, num_layers=4, num_attention_heads=4,
                num_key_value_heads=4, num_experts=8, max_seq_length=256, tie_word_embeddings=True, rope_theta=1e4,
            )
        )  # fmt: skip
    return HRMACTv1ForCausalLM(
        HRMACTv1Config(
            vocab_size=vocab_size, h_layers=2, l_layers=2, max_position_embeddings=256, tie_word_embeddings=True,
            **HRM, **ARMS[name],
        )
    )  # fmt: skip


def trainer_of(name: str, store: TokenStore, steps: int, lr: float) -> ChronoMoETrainer:
    """A trainer for that many steps."""
    config = TrainingConfig(
        checkpoint_dir=tempfile.mkdtemp(), max_steps=steps, batch_size=BATCH, learning_rate=lr, weight_decay=0.1,
        kappa_warmup_steps=steps // 10, log_every_n_steps=max(1, steps // 20), eval_every_n_steps=steps,
        save_every_n_steps=steps,
    )  # fmt: skip
    data = DataLoader(PackedDataset(store, SEQUENCE, 0, steps * BATCH), batch_size=BATCH)
    windows = {domain: heldout_windows(store, domain, SEQUENCE, EVALUATED) for domain in store.domains}
    model = build(name, store.info.vocab_size)
    return ChronoMoETrainer(model, config, data, windows, show=lambda line: print(f"  {line}", flush=True))


def steps_within(name: str, store: TokenStore, minutes: float, lr: float) -> int:
    """How many steps of an arm fit into that time on this machine, left alone."""
    times: list[float] = []

    class Clock(Callback):
        def after_step(self, step: StepResult) -> None:
            times.append(time.perf_counter())

    probe = trainer_of(name, store, 40, lr)
    probe.stop_after = 30
    probe.callbacks[:] = [probe.control, Clock()]
    probe.train()
    seconds = (times[-1] - times[9]) / (len(times) - 10)
    return max(20, int(minutes * 60 / seconds))


def measure(name: str, store: TokenStore, minutes: float, lr: float, steps: int | None = None) -> dict[str, Any]:
    """Train one arm for that time, or that many steps, and evaluate it."""
    steps = steps or steps_within(name, store, minutes, lr)
    began = time.perf_counter()
    trainer = trainer_of(name, store, steps, lr)
    found: dict[str, Any] = {"exact": trainer.train()["evaluation"]["mean"]}
    found["seconds"] = time.perf_counter() - began
    model = trainer.model
    if not name.startswith("Mixtral"):
        for halting in ("exact", "max"):
            model.model.halting = halting
            model.model.reset_segments()
            found[halting] = trainer.evaluate()["mean"]
            found[f"segments, {halting}"] = model.model.mean_segments
    total = sum(p.numel() for p in model.parameters())
    return {"arm": name, "lr": lr, "parameters": total, "steps": steps, "tokens": steps * BATCH * SEQUENCE, **found}


def main() -> None:
    """Run every arm and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--arms", nargs="*", default=list(ARMS))
    parser.add_argument("--steps", type=int, nargs="*", default=None, help="steps of each arm, if known already")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--folder", type=Path, default=None, help="where to keep the prepared text")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        store = prepare_text(arguments.folder or Path(scratch))
        steps = arguments.steps or [None] * len(arguments.arms)
        runs = [
            measure(name, store, arguments.minutes, arguments.lr, known)
            for name, known in zip(arguments.arms, steps, strict=True)
        ]
    lines = [
        f"# HRM and Mixtral on text, {datetime.now(UTC):%Y-%m-%d}", "",
        f"Oratory and Python, vocabulary {store.info.vocab_size}, {arguments.minutes:g} minutes an arm, learning rate "
        f"{arguments.lr:g}, {torch.get_num_threads()} threads.", "",
        "| arm | parameters | steps | tokens | bits per byte | at full depth | segments a token | behind the Mixtral |",
        "|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    base = next((run["exact"] for run in runs if run["arm"].startswith("Mixtral")), math.nan)
    for run in runs:
        lines.append(
            f"| {run['arm']} | {run['parameters']:,} | {run['steps']:,} | {run['tokens']:,} | {run['exact']:.4f} | "
            f"{run.get('max', run['exact']):.4f} | {run.get('segments, exact', 1):.2f} | "
            f"{run['exact'] / base - 1:+.1%} |"
        )
    print("\n".join(lines))
    if arguments.minutes >= 1:
        RESULTS.mkdir(exist_ok=True)
        stem = f"hrm_text-{datetime.now(UTC):%Y-%m-%d}"
        (RESULTS / f"{stem}.md").write_text("\n".join(lines) + "\n")
        (RESULTS / f"{stem}.json").write_text(json.dumps(runs, indent=1))


if __name__ == "__main__":
    main()
