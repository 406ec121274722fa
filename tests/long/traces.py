"""What 60 steps of both model families compute, number by number, so that two versions of the code can be compared.

    python -m tests.long.traces traces.json                          writes the traces, some ten minutes on one core
    python -m tests.long.traces traces.json --against before.json    and compares them with those of another version

Each variant (a family and a way to split or interrupt its run) trains in a process of its own and is recorded step by
step: losses, gradient norm, learning rate, load and pressure of every expert, usage, evaluations, and in the end a
digest of the weights. Numbers are written as Python prints them, which loses no bit. A variant that is in the file
already is not run again. Only public names of the library are used, and the source is whatever PYTHONPATH finds, so
an older version is traced by the same script:

    PYTHONPATH=../before/src python -m tests.long.traces before.json

The numbers hold for one machine and one version of torch: make both files on the same one. ``traces-result.json``
beside this script holds the last comparison.
"""

import argparse
import dataclasses
import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.utils.data import DataLoader

from chronomoe import ChronovisorMixtralForCausalLM, MixtralConfig
from chronomoe.hrm import HRMACTv1Config, HRMACTv1ForCausalLM
from chronomoe.training import ChronoMoETrainer, TrainingConfig

STEPS, STOP = 60, 17
VOCAB, LENGTH, ROWS, BATCH = 97, 24, 50, 4
FAMILIES = ("mixtral", "hrm")
VARIANTS = ("straight", "resumed", "accumulated", "pieces", "two_processes")
NAMES = tuple(f"{family}.{variant}" for family in FAMILIES for variant in VARIANTS)
RESULT = Path(__file__).with_name("traces-result.json")
TRACED = {
    "train": (
        "step", "loss", "lm_loss", "lb_loss", "coherence_loss", "valley_loss", "z_loss", "halt_loss", "segments", "lr",
        "grad_norm", "tokens", "skipped_steps", "kappa", "intent", "R", "gate", "load", "load_by_depth", "pressure",
        "health", "T_bar", "max_violation", "router_entropy", "dead_experts", "flips", "masked_experts",
    ),
    "expert_usage": ("step", "avg_routing_prob", "token_counts", "total_tokens", "layers"),
    "eval": ("step", "loss", "segments"),
}  # fmt: skip


def build_model(family: str, seed: int = 0) -> Any:
    """A small model of ``family``."""
    torch.manual_seed(seed)
    if family == "mixtral":
        return ChronovisorMixtralForCausalLM(
            MixtralConfig(vocab_size=VOCAB, hidden_dim=32, num_layers=2, num_experts=4, max_seq_length=64)
        )
    shape = {
        "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "h_layers": 1,
        "l_layers": 1, "num_experts": 4, "halt_max_steps": 3, "halt_bias": -1.0, "max_position_embeddings": 64,
    }  # fmt: skip
    return HRMACTv1ForCausalLM(HRMACTv1Config(**shape))


def build_data() -> list[dict[str, torch.Tensor]]:
    """Sequences in which a token mostly follows from the one before, padded to one length."""
    generator = torch.Generator().manual_seed(3)
    rows = []
    for index in range(ROWS):
        noise = torch.randint(0, 5, (LENGTH,), generator=generator)
        start = int(torch.randint(0, VOCAB, (1,), generator=generator))
        tokens = (start + torch.arange(LENGTH) * (3 + index % 2) + (noise == 0) * 11) % VOCAB
        rows.append({"input_ids": tokens, "attention_mask": (torch.arange(LENGTH) < LENGTH - index % 7).long()})
    return rows


def build_trainer(family: str, variant: str, folder: Path, steps: int, seed: int = 0) -> ChronoMoETrainer:
    """A trainer of one variant."""
    batch = BATCH // int(os.environ.get("WORLD_SIZE", "1"))
    config = TrainingConfig(
        checkpoint_dir=str(folder), batch_size=batch, max_steps=steps, learning_rate=3e-3, lambda_balance=0.1,
        lambda_coherence=0.01, lambda_valley=0.01, kappa_warmup_steps=5, log_every_n_steps=1, usage_every_n_steps=1,
        eval_every_n_steps=20, save_every_n_steps=steps, keep_last=1, precision="fp32", seed=7,
        gradient_accumulation_steps=3 if variant == "accumulated" else 1,
        chunk_size=10 if variant == "pieces" else None,
    )  # fmt: skip
    rows = build_data()
    loader = DataLoader(rows[:-6], batch_size=batch, shuffle=True)  # type: ignore[arg-type]
    held_out = DataLoader(rows[-6:], batch_size=3)  # type: ignore[arg-type]
    trainer = ChronoMoETrainer(build_model(family, seed), config, loader, held_out, show=lambda line: None)
    controller = trainer.controller
    assert controller is not None
    # Suspects are many and probed often, so that probes are in the trace too.
    controller.config = dataclasses.replace(controller.config, suspect_below=0.9, probe_every=9)
    return trainer


def run(family: str, variant: str, folder: Path, steps: int = STEPS, stop: int = STOP) -> dict[str, Any]:
    """Train one variant in this process and return its trace."""
    if variant == "resumed":
        first = build_trainer(family, variant, folder, steps)
        first.stop_after = stop
        first.train()
    trainer = build_trainer(family, variant, folder, steps, seed=1 if variant == "resumed" else 0)
    if variant == "resumed":
        trainer.load_checkpoint("latest")
    trainer.train()
    return {"records": read_records(folder / "metrics.jsonl"), "weights": digest(trainer.model)}


def read_records(file: Path) -> list[dict[str, Any]]:
    """The traced fields of a run's metrics."""
    found = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return [
        {"event": record["event"]} | {name: record[name] for name in TRACED[record["event"]] if name in record}
        for record in found
        if record["event"] in TRACED
    ]


def digest(model: Any) -> str:
    """A hash of every parameter and its name."""
    total = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        total.update(name.encode())
        total.update(parameter.detach().contiguous().numpy().tobytes())
    return total.hexdigest()


def machine() -> dict[str, Any]:
    """On what the numbers were made."""
    names = [line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    return {
        "processor": names[0] if names else platform.processor(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "capability": torch.backends.cpu.get_cpu_capability(),
    }


def _lines(path: str) -> list[str]:
    return Path(path).read_text(encoding="utf-8").splitlines() if Path(path).exists() else []


def in_process(name: str, folder: Path) -> dict[str, Any]:
    """Trace one variant in a process of its own, or in two for ``two_processes``."""
    trace = folder / "trace.json"
    launch = [sys.executable, "-m"]
    if name.endswith("two_processes"):
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]
    environment = {
        **os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false",
    }  # fmt: skip
    command = [*launch, "tests.long.traces", str(trace), "--one", name]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800, check=False)
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(trace.read_text(encoding="utf-8"))
    return found


def differences(mine: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    """Where two sets of traces differ: the first place of each variant, and variants that one of them lacks."""
    found = [f"{name} is in one file only" for name in sorted(set(mine) ^ set(theirs))]
    for name in sorted(set(mine) & set(theirs)):
        found += [f"{name}: {place}" for place in _first_difference(mine[name], theirs[name])]
    return found


def _first_difference(mine: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    if len(mine["records"]) != len(theirs["records"]):
        return [f"{len(mine['records'])} records, not {len(theirs['records'])}"]
    for one, other in zip(mine["records"], theirs["records"], strict=True):
        for field in sorted(set(one) | set(other)):
            if repr(one.get(field)) != repr(other.get(field)):
                return [f"{one['event']} {one['step']}: {field} is {one.get(field)!r}, not {other.get(field)!r}"]
    return [] if mine["weights"] == theirs["weights"] else ["the final weights differ"]


def same_run(traces: dict[str, Any], family: str) -> list[str]:
    """How a resumed run differs from the one that never stopped, in one set of traces."""
    pair = [traces.get(f"{family}.{variant}") for variant in ("resumed", "straight")]
    if pair[0] is None or pair[1] is None:
        return [f"{family} was not traced"]
    return [f"{family} resumed is not {family} straight: {place}" for place in _first_difference(pair[0], pair[1])]


def summary(traces: dict[str, Any]) -> dict[str, Any]:
    """A few numbers and two digests of each trace: what fits beside the script."""
    made = {}
    for name, trace in traces.items():
        steps = [record for record in trace["records"] if record["event"] == "train"]
        made[name] = {
            "steps": len(steps),
            "loss": [steps[0]["loss"], steps[-1]["loss"]],
            "grad_norm": [steps[0]["grad_norm"], steps[-1]["grad_norm"]],
            "records": hashlib.sha256(json.dumps(trace["records"], sort_keys=True).encode()).hexdigest(),
            "weights": trace["weights"],
        }
    return made


def main() -> int:
    """Trace what is missing in the file, then compare."""
    parser = argparse.ArgumentParser(description="Trace 60 steps of both model families, and compare two versions.")
    parser.add_argument("file", type=Path, help="file of the traces; variants that are in it are not run again")
    parser.add_argument("--against", type=Path, help="traces of another version")
    parser.add_argument("--only", default="", help="variants whose name contains this")
    parser.add_argument("--result", type=Path, help=f"write a summary there, such as {RESULT.name}")
    parser.add_argument("--one", choices=NAMES, help="trace this variant in this process")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.one:
        folder = options.file.parent / "run"
        trace = run(*options.one.split("."), folder)
        if os.environ.get("RANK", "0") == "0":
            options.file.write_text(json.dumps(trace), encoding="utf-8")
        return 0
    found: dict[str, Any] = {"machine": machine(), "traces": {}}
    if options.file.exists():
        found = json.loads(options.file.read_text(encoding="utf-8"))
        if found["machine"] != machine():
            raise SystemExit(f"{options.file} was made on another machine or with other versions; give another file.")
    for name in (name for name in NAMES if options.only in name and name not in found["traces"]):
        began = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            found["traces"][name] = in_process(name, Path(folder))
        work = options.file.with_suffix(".new")
        work.write_text(json.dumps(found), encoding="utf-8")
        work.replace(options.file)
        print(f"{name}: traced in {time.monotonic() - began:.0f} s", flush=True)
    wrong = [place for family in FAMILIES if not options.only for place in same_run(found["traces"], family)]
    if options.against is not None:
        other = json.loads(options.against.read_text(encoding="utf-8"))
        if other["machine"] != found["machine"]:
            raise SystemExit(f"{options.against} was made on another machine or with other versions.")
        chosen = {name: trace for name, trace in other["traces"].items() if options.only in name}
        wrong += differences({name: trace for name, trace in found["traces"].items() if options.only in name}, chosen)
    for place in wrong:
        print(place)
    if options.result is not None:
        verdict = {"compared": options.against is not None, "differences": wrong}
        content = {"machine": found["machine"], **verdict, "traces": summary(found["traces"])}
        options.result.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    if not wrong:
        print(f"{len(found['traces'])} traces" + (" equal to the bit" if options.against else ""))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
