"""Minutes of training under a goal, with the whole control layer on: does pressure give the goal's share back?

    python -m experiments.goal_training --folder F     after experiments.domain_expert --folder F
    python -m experiments.goal_training --quick        a minute, on a fresh model: does it run?

The base of seed 0 is trained on, on its own text, with a goal linked to expert 3 of every layer (bias found for a KL
budget of 0.01, anew at each twentieth of the run). Arms: the goal; no goal; and the goal with a controller that counts
what goals moved, as one would that did not know of them. Told: the share of expert 3, mean over layers, and MaxVio of
the load the goal did not ask for, means over each fifth of the run.
"""

import argparse
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from chronomoe import ChronovisorMixtralForCausalLM
from chronomoe.data.windows import PackedDataset, heldout_windows, training_windows
from chronomoe.goals.settings import GoalSettings
from chronomoe.goals.steer import Goal, turn_on
from chronomoe.routing.statistics import RoutingWindow
from chronomoe.training import Callback, ChronoMoETrainer, TrainingConfig
from chronomoe.training.step import StepResult
from experiments.domain_arms import BATCH, SEQUENCE, train_base
from experiments.domain_text import prepare_text

RESULTS = Path(__file__).parent / "results"
EXPERT, PARTS = 3, 5
ARMS = ("goal", "no goal", "goal, counted by the controller")


def run(arm: str, folder: Path, steps: int) -> dict[str, Any]:
    """One arm: by fifth of the run, share of the expert and MaxVio of the load that was not asked for."""
    torch.set_num_threads(1)
    store, _ = prepare_text(folder, 0)
    model: Any = ChronovisorMixtralForCausalLM.from_pretrained(folder / "seed0/base")
    windows = torch.cat(list(training_windows(store, SEQUENCE, 16, 7).values()))
    goal = [Goal(text="expert 3", slots=((None, EXPERT),))]
    told: list[dict[str, Any]] = []

    def steer() -> dict[str, Any]:
        told.append(turn_on(model, goal, GoalSettings(), windows).to_json())
        return told[-1]

    if arm == ARMS[2]:
        RoutingWindow.load_without_goals = RoutingWindow.load  # type: ignore[method-assign]
    config = TrainingConfig(
        checkpoint_dir=tempfile.mkdtemp(), max_steps=steps, batch_size=BATCH, learning_rate=1e-3, weight_decay=0.1,
        lr_schedule="constant", kappa_schedule="linear", initial_kappa=0.0, final_kappa=0.0, kappa_warmup_steps=0,
        log_every_n_steps=steps, save_every_n_steps=steps, eval_every_n_steps=max(1, steps // 20), seed=7,
    )  # fmt: skip
    data = DataLoader(PackedDataset(store, SEQUENCE, 7, steps * BATCH), batch_size=BATCH)
    held = {name: heldout_windows(store, name, SEQUENCE, 4096) for name in store.domains}
    shares, violations = [], []

    class Watch(Callback):
        def after_step(self, step: StepResult) -> None:
            if (window := step.window) is None:
                return
            shares.append(window.load[:, EXPERT].mean().item())
            unasked = (window.assignments - window.goal_shift) / window.assignments.sum(dim=-1, keepdim=True)
            violations.append((unasked * unasked.shape[-1]).double())

    goals = None if arm == ARMS[1] else steer
    trainer = ChronoMoETrainer(model, config, data, held, goals=goals, callbacks=[Watch()])
    began = time.perf_counter()
    results = trainer.train()
    each = len(shares) // PARTS
    parts = [slice(part * each, (part + 1) * each) for part in range(PARTS)]
    return {
        "arm": arm,
        "seconds": time.perf_counter() - began,
        "share": [sum(shares[part]) / each for part in parts],
        "violation": [float(torch.stack(violations[part]).mean(dim=0).amax() - 1) for part in parts],
        "bits": results["evaluation"]["mean"],
        "beta": [round(one["beta"], 3) for one in told],
    }


def table(runs: list[dict[str, Any]], steps: int) -> str:
    """What was measured, as Markdown."""
    lines = [
        f"# Training under a goal, {datetime.now(UTC):%Y-%m-%d}", "", str(__doc__).split("\n\n", 2)[2].strip(), "",
        f"{steps} steps of {BATCH * SEQUENCE} tokens an arm. A fair share is 0.125.", "",
        "| arm | share of expert 3, by fifth | MaxVio without the goal, by fifth | bits per byte | seconds |",
        "|---|---|---|---|---|",
    ]  # fmt: skip
    for run_ in runs:
        share, violation = (", ".join(f"{value:.3f}" for value in run_[name]) for name in ("share", "violation"))
        lines.append(f"| {run_['arm']} | {share} | {violation} | {run_['bits']:.4f} | {run_['seconds']:.0f} |")
    goal, none, counted = runs
    gained, left = goal["share"][-1] - none["share"][-1], counted["share"][-1] - none["share"][-1]
    kept = goal["share"][-1] >= 0.8 * goal["share"][0] and gained > 0.02
    lines += [
        "",
        f"Bias found over the run: {goal['beta'][0]:.2f} to {goal['beta'][-1]:.2f} logits.",
        f"Claim (the goal's share stays): {'holds' if kept else 'does NOT hold'}: {goal['share'][0]:.3f} at first, "
        f"{goal['share'][-1]:.3f} at last, {none['share'][-1]:.3f} without a goal. Where the controller counts what "
        f"the goal moved, {left / max(gained, 1e-9):.0%} of the gain is left.",
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run the arms and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=None, help="the folder of experiments.domain_expert")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    if options.quick:
        folder = Path(tempfile.mkdtemp())
        train_base(prepare_text(folder, 500_000)[0], 0, 4, folder / "seed0/base")
        options.steps = 10
    elif options.folder is None or not (options.folder / "seed0/base").is_dir():
        raise SystemExit("name the folder of experiments.domain_expert with --folder.")
    else:
        folder = options.folder
    with ProcessPoolExecutor(options.jobs, max_tasks_per_child=1) as pool:
        runs = list(pool.map(run, ARMS, [folder] * len(ARMS), [options.steps] * len(ARMS)))
    text = table(runs, options.steps)
    print(text)
    if not options.quick:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"goal_training-{datetime.now(UTC):%Y-%m-%d}.md").write_text(text)


if __name__ == "__main__":
    main()
