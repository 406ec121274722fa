"""A goal as the prior of an attached expert's gate: what it buys at the beginning of a document, and what it costs.

    python -m experiments.goal_prior --folder F     after experiments.domain_expert --folder F; under ten minutes
    python -m experiments.goal_prior --quick        after experiments.domain_expert --folder F --quick

Bases and experts are those of experiments/domain_expert.py, the gate is the product's with its defaults (2 % false
alarms, KL 0.003). Strength 0 is the goal off. Text: the reported documents, in windows of 128 tokens in which the gate
begins anew, so the prior acts at the beginning of each; "first 32" are the first tokens of documents. The placebo is an
expert of random weights as loud as the trained one, behind the same gate with the same goal. Intervals: 95 %, paired
bootstrap over documents.
"""

import argparse
import json
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from chronomoe import ChronovisorMixtralForCausalLM
from chronomoe.data.windows import IGNORED, training_windows
from chronomoe.experts.attachment import attach_expert
from chronomoe.experts.expert import DomainExpert
from chronomoe.experts.training import calibrate, fit_gate
from chronomoe.goals.settings import GoalSettings
from chronomoe.goals.steer import Goal, turn_off, turn_on
from experiments.domain_arms import SEQUENCE, School
from experiments.domain_text import DOMAIN, GENERAL, Text, documents, prepare_text, split_documents

RESULTS = Path(__file__).parent / "results"
STRENGTHS = {"expert": (0.0, 1.0, 2.0, 3.0, 4.0, 5.0), "placebo": (0.0, 3.0)}
USUAL, EARLY, DRAWS = 3.0, 32, 2000


@torch.no_grad()
def nats(model: Any, text: Text) -> Tensor:
    """What each target costs, (n, S); 0 where none counts."""
    parts = []
    for inputs, targets in zip(text.inputs.split(16), text.targets.split(16), strict=True):
        logits = model(input_ids=inputs, use_cache=False).logits.flatten(0, 1)
        loss = F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORED, reduction="none")
        parts.append(loss.view_as(targets).double())
    return torch.cat(parts)


def by_document(text: Text, values: Tensor) -> dict[str, list[float]]:
    """Sums over whole documents and over their first tokens."""
    _, row = text.document.unique(return_inverse=True)
    first = torch.ones(len(row), dtype=torch.bool)
    first[1:] = text.document[1:] != text.document[:-1]
    zeros = torch.zeros(int(row.max()) + 1, dtype=torch.double)
    early = values[:, :EARLY].sum(dim=1) * first
    return {
        "whole": zeros.index_add(0, row, values.sum(dim=1)).tolist(),
        "early": zeros.index_add(0, row, early).tolist(),
    }


def run_seed(seed: int, folder: Path, windows: int, most: int) -> dict[str, Any]:
    """Everything of one seed."""
    torch.set_num_threads(1)
    base, domain = prepare_text(folder, 0)
    split = split_documents(base, domain, folder)
    place = folder / f"seed{seed}"
    model: Any = ChronovisorMixtralForCausalLM.from_pretrained(place / "base").eval()
    inside = training_windows(domain, SEQUENCE, windows, seed + 1)[DOMAIN]
    general = training_windows(base, SEQUENCE, 2 * windows, seed + 1)
    school = School(model, base, domain, place, seed, 0, inside, 0, {})
    expert = school.beside("expert", DomainExpert)
    placebo = school.placebo(expert)
    attach_expert(model, expert)
    fit_gate(expert, model, inside, {name: text[:windows] for name, text in general.items()})
    found = calibrate(model, expert, {name: text[windows:] for name, text in general.items()}, 0.02, 0.003)
    placebo.gate = expert.gate
    attach_expert(model, placebo)
    stores = {DOMAIN: domain, **dict.fromkeys(GENERAL, base)}
    texts = {name: documents(stores[name], name, split[name]["reported"], most) for name in stores}
    result: dict[str, Any] = {"seed": seed, "gate": found, "figures": {}}
    for name, text in texts.items():
        figures = {"tokens": by_document(text, (text.targets != IGNORED).double())}
        for one, label in ((expert, "expert"), (placebo, "placebo")):
            expert.active, placebo.active = one is expert, one is placebo
            goal = Goal(text="licences", experts=(one.expert_id,))
            for strength in STRENGTHS[label]:
                turn_on(model, [goal], GoalSettings(strength=strength))
                figures[f"{label} {strength:g}"] = by_document(text, nats(model, text))
            turn_off(model)
        result["figures"][name] = figures
        print(f"  seed {seed}: {name}", flush=True)
    return result


def interval(runs: list[dict[str, Any]], name: str, part: str, arm: str, off: str) -> tuple[float, float, float]:
    """Change of perplexity in percent from ``off`` to ``arm``, mean over seeds, and 95 % over documents."""
    tokens, before, after = (
        np.asarray([run["figures"][name][key][part] for run in runs]) for key in ("tokens", off, arm)
    )
    draws = np.random.default_rng(0).integers(0, tokens.shape[1], (DRAWS, tokens.shape[1]))

    def percent(rows: Any) -> Any:
        more = (after - before)[:, rows].sum(axis=-1) / tokens[:, rows].sum(axis=-1)
        return 100 * (np.exp(more) - 1).mean(axis=0)

    low, high = np.quantile(percent(draws), [0.025, 0.975])
    return float(percent(np.arange(tokens.shape[1]))), float(low), float(high)


def table(runs: list[dict[str, Any]]) -> str:
    """Everything measured, as Markdown."""
    names = (DOMAIN, *GENERAL)
    lines = [
        f"# A goal as the prior of a domain gate, {datetime.now(UTC):%Y-%m-%d}", "",
        str(__doc__).split("\n\n", 2)[2].strip(), "",
        f"Seeds {[run['seed'] for run in runs]}; thresholds "
        f"{', '.join(format(run['gate']['threshold'], '.2f') for run in runs)} nats. Change of token perplexity in "
        "percent against the goal off (the same expert attached), mean over seeds.", "",
    ]  # fmt: skip
    for label in ("expert", "placebo"):
        lines += [
            f"## {label.capitalize()}", "",
            "| strength | " + " | ".join(f"{name}, {part}" for name in names for part in ("first 32", "whole")) + " |",
            "|---" * 7 + "|",
        ]  # fmt: skip
        for strength in STRENGTHS[label][1:]:
            cells = []
            for name in names:
                for part in ("early", "whole"):
                    value, low, high = interval(runs, name, part, f"{label} {strength:g}", f"{label} 0")
                    cells.append(f"{value:+.2f} ({low:+.2f} .. {high:+.2f})")
            lines.append(f"| {strength:g} | {' | '.join(cells)} |")
        lines.append("")
    lines += ["## Each seed, expert", "", "| seed | strength | " + " | ".join(
        f"{name}, {part}" for name in names for part in ("first 32", "whole")) + " |", "|---" * 8 + "|"]  # fmt: skip
    for run in runs:
        for strength in STRENGTHS["expert"][1:]:
            cells = [
                f"{interval([run], name, part, f'expert {strength:g}', 'expert 0')[0]:+.2f}"
                for name in names
                for part in ("early", "whole")
            ]
            lines.append(f"| {run['seed']} | {strength:g} | {' | '.join(cells)} |")

    def at(name: str, part: str, label: str = "expert") -> float:
        return interval(runs, name, part, f"{label} {USUAL:g}", f"{label} 0")[0]

    wrong = [at(name, "whole") for name in GENERAL]
    held = at(DOMAIN, "early") <= -10 and at(DOMAIN, "whole") <= 0 and max(wrong) <= 1.5
    idle = at(DOMAIN, "early", "placebo") > -1
    lines += [
        "",
        f"Claim at strength {USUAL:g} (first 32 tokens at least 10 % better, whole documents no worse, base domains at "
        f"most 1.5 % worse): {'holds' if held else 'does NOT hold'}: {at(DOMAIN, 'early'):+.1f} %, "
        f"{at(DOMAIN, 'whole'):+.1f} %, {wrong[0]:+.2f} and {wrong[1]:+.2f} %. A goal for a placebo "
        f"{'does nothing useful' if idle else 'DOES something'}: {at(DOMAIN, 'early', 'placebo'):+.2f} %.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run every seed that domain_expert has left in the folder, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="the folder of experiments.domain_expert")
    parser.add_argument("--jobs", type=int, default=2, help="seeds at a time, one thread each")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    folder = options.folder / "quick" if options.quick else options.folder
    seeds = sorted(int(place.parent.name.removeprefix("seed")) for place in folder.glob("seed*/expert"))
    if not seeds:
        raise SystemExit(f"{folder} holds no trained expert; run experiments.domain_expert --folder {options.folder}.")
    windows, most = (32, 1) if options.quick else (400, 4)
    with ProcessPoolExecutor(options.jobs) as pool:
        count = len(seeds)
        runs = list(pool.map(run_seed, seeds, [folder] * count, [windows] * count, [most] * count))
    text = table(runs)
    print(text)
    if not options.quick:
        RESULTS.mkdir(exist_ok=True)
        stem = f"goal_prior-{datetime.now(UTC):%Y-%m-%d}"
        (RESULTS / f"{stem}.md").write_text(text)
        (RESULTS / f"{stem}.json").write_text(json.dumps(runs, indent=1))


if __name__ == "__main__":
    main()
