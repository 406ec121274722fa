"""Is the recursion wired right? 4x4 Sudoku as text, recursive model beside a single pass of the same weights' size.

    python -m experiments.sudoku            under 10 minutes on two cores; writes experiments/results/
    python -m experiments.sudoku --quick    few steps: does the script run?

A text is a puzzle of 16 cells (0 for empty), a separator, and the puzzle twice more; there every cell is to be answered
at once. Loss is of both, the score of the last. Attention is causal, so an answer sees the puzzle, all answers in the
making of the copy before, and those before it in its own. Eight givens, one solution. Of the 12 grids that remain when
digits are renamed (288 in all) a third is held out with all their renamings. With so few grids this checks wiring and
claims nothing about generalisation.
"""

import argparse
import itertools
import json
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from chronomoe.hrm import HRMACTv1Config, HRMACTv1ForCausalLM

RESULTS = Path(__file__).parent / "results"
GIVENS, CELLS, SEPARATOR, VOCAB = 8, 16, 5, 6
COPIES = 2
"""Of the puzzle, to be answered."""
SHAPE: dict[str, Any] = {
    "hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "h_layers": 2, "l_layers": 2,
    "H_cycles": 1, "L_cycles": 1, "halt_max_steps": 3, "use_moe": False, "num_experts": 4, "num_experts_per_tok": 1,
    "pos_encodings": "learned", "grad_mode": "all", "max_position_embeddings": 64,
}  # fmt: skip
BATCH, RATE = 16, 1.5e-3
ARMS: dict[str, dict[str, Any]] = {
    "recursion, 3 segments": {},
    "single pass": {"halt_max_steps": 1},
    "recursion, 3 segments, 4 experts": {"use_moe": True},
}


def grids() -> tuple[Tensor, Tensor]:
    """All 288 solved grids (288, 16) of digits 1 to 4, and which of the 12 canonical ones each is."""
    rows = list(itertools.permutations(range(1, 5)))
    found = []
    for choice in itertools.product(rows, repeat=4):
        columns = all(len({row[c] for row in choice}) == 4 for c in range(4))
        boxes = all(len({choice[r + i][c + j] for i in (0, 1) for j in (0, 1)}) == 4 for r in (0, 2) for c in (0, 2))
        if columns and boxes:
            found.append([cell for row in choice for cell in row])
    solved = torch.tensor(found)
    names = torch.zeros(len(solved), 5, dtype=torch.long)
    names.scatter_(1, solved[:, :4], torch.arange(1, 5).expand(len(solved), 4))  # the first row becomes 1 2 3 4
    canonical = names.gather(1, solved)
    classes = {tuple(row): n for n, row in enumerate(sorted(set(map(tuple, canonical.tolist()))))}
    return solved, torch.tensor([classes[tuple(row)] for row in canonical.tolist()])


def puzzles(solved: Tensor, everything: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """``count`` rows of puzzle and answer (count, 32); each puzzle has one solution."""
    rows: list[Tensor] = []
    while len(rows) < count:
        answer = solved[torch.randint(len(solved), (count,), generator=generator)]
        keep = torch.rand(count, CELLS, generator=generator).argsort(dim=1) < GIVENS
        agrees = (everything.unsqueeze(0) == answer.unsqueeze(1)) | ~keep.unsqueeze(1)
        unique = agrees.all(dim=-1).sum(dim=-1) == 1
        rows += list(torch.cat([answer * keep, answer], dim=1)[unique])
    return torch.stack(rows[:count])


def text_of(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Token ids and labels (not to be shifted) of puzzles, both (count, 49)."""
    puzzle, answer = rows.split(CELLS, dim=1)
    separator = torch.full_like(puzzle[:, :1], SEPARATOR)
    nothing = torch.full((len(rows), CELLS + 1), -100)
    return torch.cat([puzzle, separator, *[puzzle] * COPIES], dim=1), torch.cat([nothing, *[answer] * COPIES], dim=1)


@torch.no_grad()
def solve(model: Any, rows: Tensor) -> tuple[float, float]:
    """Share of puzzles solved whole, and of cells."""
    tokens, labels = text_of(rows)
    model.eval()
    right = (model(tokens, use_cache=False).logits.argmax(dim=-1) == labels)[:, -CELLS:]
    return right.all(dim=1).float().mean().item(), right.float().mean().item()


def run(name: str, steps: int, seed: int, solved: Tensor, classes: Tensor) -> dict[str, Any]:
    """Train and score one arm."""
    torch.manual_seed(seed)
    config = HRMACTv1Config(vocab_size=VOCAB, **{**SHAPE, **ARMS[name]})
    model = HRMACTv1ForCausalLM(config).train()
    held_out = classes % 3 == 0
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.1, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps, pct_start=0.05)
    began = time.perf_counter()
    for _ in range(steps):
        tokens, labels = text_of(puzzles(solved[~held_out], solved, BATCH, generator))
        loss = model(tokens, shift_labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if config.use_moe:
            model.controller.tick()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    seconds = time.perf_counter() - began
    test = puzzles(solved[held_out], solved, 500, torch.Generator().manual_seed(1))
    exact, cells = solve(model, test)
    segments = model.model.mean_segments
    model.model.halting = "max"
    return {
        "arm": name, "seed": seed, "parameters": sum(p.numel() for p in model.parameters()), "steps": steps,
        "exact": exact, "cells": cells, "segments": segments, "exact at full depth": solve(model, test)[0],
        "seconds": seconds,
    }  # fmt: skip


def main() -> None:
    """Run every arm and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2200)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--arms", nargs="*", default=list(ARMS)[:2])
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    solved, classes = grids()
    lines = [
        f"# 4x4 Sudoku, {datetime.now(UTC):%Y-%m-%d}", "",
        f"{len(solved)} grids, {int(classes.max()) + 1} canonical, a third held out; {GIVENS} givens; 500 puzzles.", "",
        "| arm | seed | parameters | steps | solved, held out | cells | segments a token | solved at full depth | s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    runs = []
    for seed, name in itertools.product(range(arguments.seeds), arguments.arms):
        found = run(name, 5 if arguments.quick else arguments.steps, seed, solved, classes)
        runs.append(found)
        lines.append(
            f"| {name} | {seed} | {found['parameters']:,} | {found['steps']} | {found['exact']:.1%} | "
            f"{found['cells']:.1%} | {found['segments']:.2f} | {found['exact at full depth']:.1%} | "
            f"{found['seconds']:.0f} |"
        )
        print(lines[-1], flush=True)
    if not arguments.quick:
        RESULTS.mkdir(exist_ok=True)
        stem = f"sudoku-{datetime.now(UTC):%Y-%m-%d}"
        (RESULTS / f"{stem}.md").write_text("\n".join(lines) + "\n")
        (RESULTS / f"{stem}.json").write_text(json.dumps(runs, indent=1))


if __name__ == "__main__":
    main()
