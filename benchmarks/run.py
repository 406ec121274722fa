"""Measure, write the table: ``python -m benchmarks.run [--only layer,step,...] [--rounds N] [--repeats N]``.

Writes benchmarks/results/<date>.md and .json; rows measured earlier on that day and machine stay. ``--quick`` is a
smoke test on tiny shapes: it has no goals and writes nothing, unless ``--out`` says where. Takes minutes; leave the
machine alone meanwhile. Goals are for two cores: set OMP_NUM_THREADS=2 on a larger machine.

The allocator setting of chronomoe (keep freed memory) cannot be undone in a process. All arms that share the process
therefore run with it, peers too; only ``vocab`` compares ours with transformers as it comes, each in its own process.
"""

import argparse
import json
import os
import platform
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks import arms
from benchmarks.arms import DEFAULT_ADAMW, DENSE, EAGER, EAGER_ADAMW, FUSED_ADAMW, GROUPED, OURS, Shape
from benchmarks.measure import Clocks, Comparison, Row, in_process, measure
from benchmarks.worker import worker
from chronomoe.allocator import keep_freed_memory
from chronomoe.routing.dispatch import can_compile

RESULTS = Path(__file__).parent / "results"
SHAPES = Shape(), Shape(num_experts=64, top_k=8, expert_width=128), Shape(vocab=32000)
TINY = {"expert_width": 32, "vocab": 64, "layers": 2, "hidden": 32, "heads": 2, "kv_heads": 1, "batch": 2, "length": 8}

LEGEND = """\
Ratios of median times (of means where it says so): `X / ours` is how many times faster ours is (for decode: its tokens
per second over theirs), `ours / dense` how much longer ours takes than a dense model of equal active size. Each is the
median over rounds of interleaved runs, with its range. `grouped_mm` and `eager` are transformers' experts
implementations. Both sides keep freed memory, except where it says that transformers does not.
"""


def suite(quick: bool = False) -> dict[str, list[Comparison]]:
    """All comparisons by the names ``--only`` knows; ``quick`` makes them tiny and takes their goals away."""
    few, many, vocab = (replace(shape, **TINY) if quick else shape for shape in SHAPES)
    prompt, new = (4, 4) if quick else (16, 64)
    decode = in_process(partial(arms.decode_arms, few, prompt, new))
    decode_name = f"decode, batch 1, {prompt}+{new} tokens, V={few.vocab}, {few}"
    vocab_name = f"step, V={vocab.vocab}, {vocab}; transformers without our allocator setting"
    comparisons = {
        "layer": [_layer(few, {DENSE: 1.15, GROUPED: 1.0}), _layer(many, {GROUPED: 1.4})],
        "step": [_step(few, {DEFAULT_ADAMW: 1.15}), _step(many, {DEFAULT_ADAMW: 1.35}, skip=EAGER_ADAMW)],
        "control": [_control(few, kappa) for kappa in (-0.3, 0.5)],
        "probes": [_probes(few, 110 if quick else 400)],
        "decode": [Comparison(decode_name, decode, 7, goals={GROUPED: 1.0, EAGER: 1.0})],
        "vocab": [Comparison(vocab_name, partial(_vocab_clocks, vocab), 5, goals={FUSED_ADAMW: 1.3})],
    }
    if quick:
        return {name: [replace(one, goals={}) for one in group] for name, group in comparisons.items()}
    return comparisons


def _layer(shape: Shape, goals: dict[str, float]) -> Comparison:
    name = f"layer forward+backward, T={shape.batch * shape.length}, {shape}"
    return Comparison(name, in_process(partial(arms.layer_arms, shape)), 15, goals=goals)


def _step(shape: Shape, goals: dict[str, float], skip: str | None = None) -> Comparison:
    arms_of = in_process(partial(arms.step_arms, shape, skip))
    return Comparison(f"step, V={shape.vocab}, {shape}", arms_of, 7, goals=goals)


def _control(shape: Shape, kappa: float) -> Comparison:
    name = f"control layer, kappa {kappa}, V={shape.vocab}, {shape}"
    # So small a difference takes many rounds to see.
    return Comparison(name, in_process(partial(arms.control_arms, shape, kappa)), 16, 12, goals={"unsteered": 0.98})


def _probes(shape: Shape, steps: int) -> Comparison:
    name = f"control layer, {steps} steps with an expert that stays masked, mean, V={shape.vocab}, {shape}"
    arms_of = in_process(partial(arms.control_arms, shape, -0.3, bad_expert=True))
    return Comparison(name, arms_of, steps, goals={"unsteered": 0.98}, rare=True)


@contextmanager
def _vocab_clocks(shape: Shape) -> Iterator[Clocks]:
    with worker(OURS, shape, keep_memory=True) as ours, worker(FUSED_ADAMW, shape, keep_memory=False) as theirs:
        yield {OURS: ours, FUSED_ADAMW: theirs}


def machine() -> dict[str, str | int]:
    """What the figures depend on, and nothing that names the machine."""
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "compiled kernel": "yes" if can_compile() else "no",
        "keeps freed memory": "yes" if keep_freed_memory() else "no",
    }


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows in Markdown."""
    text = "| comparison | ratio | median | range | goal | met | ours, ms | peer, ms |\n" + "|---" * 8 + "|\n"
    for row in rows:
        ratio = f"{row['ratio']:.2f} | {min(row['ratios']):.2f} .. {max(row['ratios']):.2f}"
        times = f"{row['ours_ms']:.1f} | {row['peer_ms']:.1f}"
        met = {None: "", True: "yes", False: "**no**"}[row["met"]]
        text += f"| {row['comparison']} | {row['figure']} | {ratio} | {row['goal']} | {met} | {times} |\n"
    return text


def write(rows: list[Row], out: Path, day: str) -> Path:
    """Write <day>.md and <day>.json in ``out``; rows of other comparisons on that day and machine stay."""
    out.mkdir(parents=True, exist_ok=True)
    facts, path, new = machine(), out / f"{day}.json", [asdict(row) for row in rows]
    before = json.loads(path.read_text()) if path.exists() else {}
    if before.get("machine") == facts:
        measured = {row.comparison for row in rows}
        new = [row for row in before["rows"] if row["comparison"] not in measured] + new
    path.write_text(json.dumps({"date": day, "machine": facts, "rows": new}, indent=1) + "\n")
    described = ", ".join(f"{name}: {value}" for name, value in facts.items())
    page = path.with_suffix(".md")
    page.write_text(f"# Benchmarks, {day}\n\n{described}\n\n{LEGEND}\n{table(new)}")
    return page


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description="Measure and write the table.")
    everything = ",".join(suite())
    parser.add_argument("--only", default=everything, help="comparisons to run (%(default)s)")
    parser.add_argument("--rounds", type=int, help="rounds of each comparison (3 or 12)")
    parser.add_argument("--repeats", type=int, help="turns of each arm in a round (5 to 400, by comparison)")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, a smoke test")
    parser.add_argument("--out", type=Path, help="folder of the results (benchmarks/results)")
    options = parser.parse_args(arguments)
    chosen, names = suite(options.quick), options.only.split(",")
    if unknown := sorted(set(names) - set(chosen)):
        parser.error(f"--only does not know {', '.join(unknown)}; use some of {','.join(chosen)}.")
    if any(given is not None and given < 1 for given in (options.rounds, options.repeats)):
        parser.error("--rounds and --repeats must be at least 1.")
    keep_freed_memory()
    rows: list[Row] = []
    for comparison in (one for name in names for one in chosen[name]):
        print(f"{comparison.name} ...", flush=True)
        rows += measure(comparison, options.rounds, options.repeats)
    print(f"\n{table([asdict(row) for row in rows])}")
    if out := options.out or (None if options.quick else RESULTS):
        print(f"written: {write(rows, out, date.today().isoformat()).name}")


if __name__ == "__main__":
    main()
