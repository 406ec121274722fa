"""An expert trained alone behind its domain gate, beside what else the same time could buy. Base: oratory and Python.

    python -m experiments.domain_expert --folder F    see --help; half an hour to an hour a seed; writes results/
    python -m experiments.domain_expert --quick       a minute: does every arm run? Its figures mean nothing.

With --folder all that is prepared and trained stays there (F/base, F/lic, F/seed0/base, F/seed0/<arm>,
F/seed0/result.json), and a run that was interrupted goes on where it was.

Text. Held-out documents are evaluated as sequences of their own, cut at 128 tokens, the first token predicted from the
separator, at most 16 windows a document, spread over it; so every window knows its document, and position means tokens
since the window began (a gate starts anew in each). Of each domain's held-out documents every second one is for
choosing, the others are reported; reported documents that nearly repeat a training or choosing document are left out.

Choosing. Where a row says "chosen", layers and false-alarm budget are those of the largest gain on the choosing
documents among settings whose harm there, and on training windows of each base domain, is at most 0.4 % (0.1 % in
hand); with none such, the least harm. The per-token threshold and the adapter take the expert's layers. Thresholds come
from choosing documents and training windows, the strictest.

Time. Processor time of training: the expert takes --expert-steps, other arms as many steps as a probe of 20 says cost
the same. On a shared machine the probe errs; the seconds each arm took are told, and differ by up to a quarter.
Intervals: 95 %, paired bootstrap over reported documents.
"""

import argparse
import contextlib
import dataclasses
import json
import math
import tempfile
from collections.abc import Callable, Sequence
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
from chronomoe.experts.gate import DomainGate
from chronomoe.experts.training import calibrate, fit_gate
from chronomoe.hosts.capture import kl
from chronomoe.storage import write_json
from experiments.domain_arms import SEQUENCE, Adapter, Arm, Gate, School, log_odds, thresholded, train_base
from experiments.domain_text import DOMAIN, GENERAL, Text, anywhere, documents, prepare_text, split_documents

RESULTS = Path(__file__).parent / "results"
BUDGETS = (0.0025, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05)
HARM, IN_HAND = 0.5, 0.4
POSITIONS = (8, 16, 32, 64, 128)
DRAWS = 2000
LISTENED = ((0,), (1,), (0, 1), (0, 1, 2))
LEAK = 0.99


# -- measuring -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def nats(model: Any, text: Text) -> Tensor:
    """What the targets of each window cost the model as it stands, (n,)."""
    parts = zip(text.inputs.split(16), text.targets.split(16), strict=True)
    return torch.cat([_nats(model(input_ids=ids, use_cache=False).logits, targets) for ids, targets in parts])


def _nats(logits: Tensor, targets: Tensor) -> Tensor:
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none")
    return loss.view_as(targets).double().sum(dim=1)


@torch.no_grad()
def measure(model: Any, arms: Sequence[Arm], text: Text, in_domain: bool) -> dict[str, Tensor]:
    """Sums over each window: nats of the base ("base") and each arm (n,), and "KL <arm>" of the base's output to it."""
    parts: dict[str, list[Tensor]] = {}
    for inputs, targets in zip(text.inputs.split(16), text.targets.split(16), strict=True):
        own = model(input_ids=inputs, use_cache=False).logits
        parts.setdefault("base", []).append(_nats(own, targets))
        for arm in arms:
            with arm.at_work(in_domain) as working:
                theirs = working(input_ids=inputs, use_cache=False).logits
            parts.setdefault(arm.name, []).append(_nats(theirs, targets))
            parts.setdefault(f"KL {arm.name}", []).append((kl(own, theirs) * (targets != IGNORED)).double().sum(dim=1))
    return {name: torch.cat(found) for name, found in parts.items()}


def change(text: Text, base: Tensor, arm: Tensor) -> float:
    """Of the token perplexity, in percent; a rise is positive."""
    return 100 * (math.exp(float((arm - base).sum() / text.tokens.sum())) - 1)


class Chooser:
    """Finds the gate of an expert on the choosing documents and training windows."""

    def __init__(self, model: Any, texts: dict[str, Text]) -> None:
        self.model, self.texts = model, texts
        self.base = {name: nats(model, text) for name, text in texts.items()}
        self.odds: dict[tuple[tuple[int, ...], float], dict[str, Tensor]] = {}
        self.tried: dict[str, list[dict[str, Any]]] = {}

    def odds_of(self, gate: Gate, expert: DomainExpert) -> dict[str, Tensor]:
        """Log-odds of each text; they depend on the base and the gate alone."""
        key = gate.layers, gate.leak
        if key not in self.odds:
            self.odds[key] = {name: log_odds(self.model, expert, gate, t.inputs) for name, t in self.texts.items()}
        return self.odds[key]

    def at(self, gate: Gate, expert: DomainExpert, false_alarm: float) -> Gate:
        """That gate with the threshold of a false-alarm budget."""
        odds = self.odds_of(gate, expert)
        general = [o[self.texts[name].targets != IGNORED] for name, o in odds.items() if name != DOMAIN]
        return thresholded(gate, general, false_alarm)

    def changes(self, gate: Gate, expert: DomainExpert) -> dict[str, float]:
        """What the expert behind the gate does to each text; where it stays shut, windows are the base's."""
        arm, found = Arm("it", self.model, "", expert, gate), {}
        for name, text in self.texts.items():
            rows = (self.odds_of(gate, expert)[name] > gate.threshold - 1e-3).any(dim=1).nonzero().squeeze(1)
            after = self.base[name].clone()
            if len(rows):
                with arm.at_work(name == DOMAIN) as working:
                    after[rows] = nats(working, text.select(rows))
            found[name] = change(text, self.base[name], after)
        return found

    def choose(self, label: str, expert: DomainExpert, gates: Sequence[Gate]) -> Gate:
        """The gate of the largest gain whose harm is small enough, or of the least harm."""
        tried: list[tuple[float, float, Gate]] = []
        for start in gates:
            for budget in BUDGETS:
                gate = self.at(start, expert, budget)
                found = self.changes(gate, expert)
                harm, gain = max(value for name, value in found.items() if name != DOMAIN), -found[DOMAIN]
                tried.append((harm, gain, gate))
                self.tried.setdefault(label, []).append({"layers": gate.layers, "false_alarm": budget, **found})
        allowed = [one for one in tried if one[0] <= IN_HAND]
        return max(allowed, key=lambda one: one[1])[2] if allowed else min(tried, key=lambda one: one[0])[2]


def run_seed(seed: int, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Everything of one seed; figures by document."""
    torch.set_num_threads(1)
    place = folder / f"seed{seed}"
    place.mkdir(parents=True, exist_ok=True)
    settings = {name: getattr(options, name) for name in ("base_steps", "expert_steps")}
    if (place / "settings.json").is_file() and json.loads((place / "settings.json").read_text()) != settings:
        raise SystemExit(f"{place} was begun with other settings; give another --folder, or remove it.")
    write_json(place / "settings.json", settings)
    if (place / "result.json").is_file():
        return dict(json.loads((place / "result.json").read_text()))
    base, domain = prepare_text(folder, options.size)
    split = split_documents(base, domain, folder)
    if not (place / "base").is_dir():
        train_base(base, seed, options.base_steps, place / "base")
    model: Any = ChronovisorMixtralForCausalLM.from_pretrained(place / "base").eval()
    model.requires_grad_(True)
    windows = training_windows(domain, SEQUENCE, options.windows, seed + 1)[DOMAIN]
    general = training_windows(base, SEQUENCE, 2 * options.windows, seed + 1)
    school = School(model, base, domain, place, seed, options.expert_steps, windows, options.probe, {})
    expert, adapter = school.beside("expert", DomainExpert), school.beside("adapter", Adapter)
    placebo = school.placebo(expert)
    arms = [
        Arm(f"{name}{', anchored' * anchored}", school.inside(file, lora=lora, anchored=anchored), file)
        for file, name, lora, anchored in (
            ("lora", "LoRA", True, False), ("lora_anchored", "LoRA", True, True),
            ("full", "full fine-tuning", False, False), ("full_anchored", "full fine-tuning", False, True),
        )
    ]  # fmt: skip
    for one in (expert, adapter, placebo):
        attach_expert(model, one)
        one.active = False

    def fitted(layers: tuple[int, ...], leak: float) -> Gate:
        expert.gate = DomainGate(expert.hidden_size, layers)
        expert.gate.leak.fill_(leak)
        fit_gate(expert, model, windows, {name: text[: len(windows)] for name, text in general.items()})
        return Gate(layers, leak, 1.0, math.inf, expert.gate.direction, expert.gate.offset)

    gates = [fitted(layers, LEAK) for layers in options.listened]
    general = {name: text[len(windows) :] for name, text in general.items()}
    stores = {DOMAIN: domain, **dict.fromkeys(GENERAL, base)}
    held = {
        kind: {name: documents(stores[name], name, split[name][kind], options.most) for name in (DOMAIN, *GENERAL)}
        for kind in ("choosing", "reported")
    }
    chooser = Chooser(model, {**held["choosing"], **{f"{n}, training": anywhere(w) for n, w in general.items()}})
    chosen = chooser.choose("expert", expert, gates)
    alone = fitted(chosen.layers, 0.0)
    token = chooser.choose("per-token", expert, [alone])
    same_token = chooser.at(alone, expert, chosen.false_alarm)
    for_adapter = chooser.choose("adapter", adapter, [chosen])
    usual = next((gate for gate in gates if gate.layers == (0, 1)), gates[0])
    shipped = []
    for harm_kl in (math.inf, 0.003):
        usual.put_into(expert)
        expert.active = True
        found = calibrate(model, expert, general, 0.02, harm_kl)
        expert.active = False
        alarms = max(found["measured_false_alarm"].values())
        shipped.append(dataclasses.replace(usual, threshold=found["threshold"], false_alarm=alarms))
    arms = [
        Arm("expert, gate chosen", model, "expert", expert, chosen),
        Arm("expert, gate as shipped at 2 %", model, "expert", expert, shipped[0]),
        Arm("expert, gate as shipped at 2 %, KL .003", model, "expert", expert, shipped[1]),
        Arm("expert, oracle gate", model, "expert", expert, oracle=True),
        Arm("expert, always on", model, "expert", expert),
        Arm("placebo, the chosen gate", model, "", placebo, chosen),
        Arm("expert, per token, the chosen gate's layers and false alarms", model, "expert", expert, same_token),
        Arm("expert, per token, chosen", model, "expert", expert, token),
        Arm("adapter, gate chosen", model, "adapter", adapter, for_adapter),
        Arm("adapter, the expert's chosen gate", model, "adapter", adapter, chosen),
        Arm("adapter, oracle gate", model, "adapter", adapter, oracle=True),
        Arm("adapter, always on", model, "adapter", adapter),
        *arms,
    ]
    result: dict[str, Any] = {"seed": seed, "costs": school.costs, "tried": chooser.tried, "gates": {}, "figures": {}}
    result["trained"] = {arm.name: arm.trained for arm in arms}
    for name, text in held["reported"].items():
        sums = {"tokens": text.tokens.double(), **measure(model, arms, text, name == DOMAIN)}
        _, row = text.document.unique(return_inverse=True)
        result["figures"][name] = {
            key: torch.zeros(int(row.max()) + 1, dtype=torch.double).index_add_(0, row, values).tolist()
            for key, values in sums.items()
        }
    for arm in arms:
        if arm.gate is not None and arm.expert is not None:
            gate = arm.gate
            result["gates"][arm.name] = {"layers": gate.layers, "leak": gate.leak, "false_alarm": gate.false_alarm}
            for name, text in held["reported"].items():
                is_open = log_odds(model, arm.expert, gate, text.inputs) > gate.threshold
                counts = text.targets != IGNORED
                result["gates"][arm.name][name] = {
                    "all": float(is_open[counts].float().mean()),
                    **{str(p): float(is_open[counts[:, p - 1], p - 1].float().mean()) for p in POSITIONS},
                }
    write_json(place / "result.json", result)
    return result


# -- the table -----------------------------------------------------------------------------------------------------


def interval(runs: Sequence[dict[str, Any]], name: str, arm: str) -> tuple[float, float, float]:
    """Change of perplexity in percent, mean over runs, and its 95 % interval over documents."""
    tokens, base, after = (np.asarray([run["figures"][name][key] for run in runs]) for key in ("tokens", "base", arm))
    draws = np.random.default_rng(0).integers(0, tokens.shape[1], (DRAWS, tokens.shape[1]))

    def percent(rows: Any) -> Any:
        more = (after - base)[:, rows].sum(axis=-1) / tokens[:, rows].sum(axis=-1)
        return 100 * (np.exp(more) - 1).mean(axis=0)

    low, high = np.quantile(percent(draws), [0.025, 0.975])
    return float(percent(np.arange(tokens.shape[1]))), float(low), float(high)


def table(runs: list[dict[str, Any]], split: dict[str, dict[str, Any]], options: argparse.Namespace) -> str:
    """Everything measured, as Markdown."""
    arms = list(runs[0]["trained"])
    names = (DOMAIN, *GENERAL)
    duplicates = "; ".join(
        f"{name} {found['dropped in preparing']} dropped in preparing, of {found['candidates']} candidates for "
        f"reporting {found['repeat own training text']} nearly repeat training text of their own domain, "
        f"{found['repeat other training text']} that of another, {found['repeat a choosing document']} a choosing "
        f"document; {len(found['reported'])} reported, {len(found['choosing'])} choosing"
        for name, found in split.items()
    )

    perplexities = "; ".join(
        f"{name} "
        + ", ".join(
            f"{math.exp(sum(run['figures'][name]['base']) / sum(run['figures'][name]['tokens'])):.1f}" for run in runs
        )
        for name in names
    )

    def words(found: tuple[float, float, float], sign: int = 1) -> str:
        low, high = sorted(sign * value for value in found[1:])
        return f"{sign * found[0]:.2f} ({low:.2f} .. {high:.2f})"

    def spoken(runs: list[dict[str, Any]], arm: str) -> str:
        kls = []
        for name in names:
            shares = [np.sum(r["figures"][name][f"KL {arm}"]) / np.sum(r["figures"][name]["tokens"]) for r in runs]
            kls.append(f"{np.mean(shares):.4f}")
        gain, oracle = interval(runs, DOMAIN, arm), interval(runs, DOMAIN, "expert, oracle gate")
        rises = " | ".join(words(interval(runs, name, arm)) for name in GENERAL)
        return f"{words(gain, -1)} | {rises} | {gain[0] / oracle[0]:.2f} | {' / '.join(kls)}"

    def cost(runs: list[dict[str, Any]], arm: str) -> str:
        found = [run["costs"].get(run["trained"][arm]) for run in runs]
        if found[0] is None:
            return "untrained"
        each = "; ".join(f"{one['steps']}, {one['seconds']:.0f}" for one in found)
        return f"{found[0]['parameters']:,}; {each}"

    lines = [
        f"# A domain expert and its alternatives, {datetime.now(UTC):%Y-%m-%d}", "",
        f"Base: 3.9 M-parameter Mixtral (d=128, 4 layers, N=8), {options.base_steps} steps of 1,024 tokens of oratory "
        f"and Python; expert on licences, {options.expert_steps} steps; seeds {[run['seed'] for run in runs]}. "
        "Percent of held-out token perplexity, 95 % over documents in brackets; KL(base || arm) in nats a token. "
        "About the same processor time of training for every trained arm (see Time); learning rate 2e-3, not tuned for "
        "the baselines. The per-token gate is fitted to one token in eight, as the other.",
        "",
        f"Near-duplicates (8-word shingles, half of them in one document): {duplicates}.", "",
        str(__doc__).split("\n\n", 3)[3].strip(), "",
        f"Token perplexity of the base, by seed: {perplexities}.", "",
        "## Mean over seeds", "",
        "| arm | fall on licences % | rise on oratory % | rise on Python % | share of the oracle's gain | "
        "KL licences / oratory / Python | parameters; steps, seconds by seed |",
        "|---|---|---|---|---|---|---|",
        *(f"| {arm} | {spoken(runs, arm)} | {cost(runs, arm)} |" for arm in arms), "",
        "## Each seed", "",
        "| arm | seed | fall on licences % | rise on oratory % | rise on Python % | share of the oracle's gain | "
        "KL licences / oratory / Python | parameters, steps, seconds |",
        "|---|---|---|---|---|---|---|---|",
        *(f"| {arm} | {run['seed']} | {spoken([run], arm)} | {cost([run], arm)} |" for arm in arms for run in runs), "",
        "## Gates", "",
        f"Share open after {', '.join(map(str, POSITIONS))} tokens of a window, and of all tokens; reported text.", "",
        "| arm | seed | layers | leak | calibrated false alarms | recall, licences | false alarms, oratory | "
        "false alarms, Python |",
        "|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for arm in runs[0]["gates"]:
        for run in runs:
            gate = run["gates"][arm]
            curves = [
                f"{', '.join(f'{gate[name][str(p)]:.3f}' for p in POSITIONS)} ({gate[name]['all']:.4f})"
                for name in names
            ]
            numbers = f"{' '.join(map(str, gate['layers']))} | {gate['leak']:g} | {gate['false_alarm']:.4f}"
            lines.append(f"| {arm} | {run['seed']} | {numbers} | {' | '.join(curves)} |")
    lines += ["", "## Tried in choosing: change of perplexity %", ""]
    texts = [key for key in runs[0]["tried"]["expert"][0] if key not in ("layers", "false_alarm")]
    lines += [f"| gate | seed | layers | false alarms | {' | '.join(texts)} |", "|---" * (4 + len(texts)) + "|"]
    for label in runs[0]["tried"]:
        for run in runs:
            for one in run["tried"][label]:
                values = " | ".join(f"{one[name]:+.2f}" for name in texts)
                heard = " ".join(map(str, one["layers"]))
                lines.append(f"| {label} | {run['seed']} | {heard} | {one['false_alarm']} | {values} |")
    gain, *harm = (interval(runs, name, "expert, gate chosen")[0] for name in names)
    held = -gain >= 30 and max(harm) <= HARM
    lines += [
        "",
        f"Claim (at least 30 % on licences, at most {HARM} % harm in each base domain, means): "
        f"{'holds' if held else 'does NOT hold'}: {-gain:.1f} %, harm {harm[0]:.2f} and {harm[1]:.2f} %.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run every seed and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--base-steps", type=int, default=1500)
    parser.add_argument("--expert-steps", type=int, default=400)
    parser.add_argument("--jobs", type=int, default=1, help="seeds at a time, one thread each")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--folder", type=Path, default=None, help="where to keep text and what was trained")
    options = parser.parse_args()
    options.windows, options.most, options.probe, options.size = 400, 16, 20, 6_000_000
    options.listened = LISTENED
    if options.quick:
        options.seeds, options.base_steps, options.expert_steps, options.listened = 1, 12, 8, ((0, 1),)
        options.windows, options.most, options.probe, options.size = 32, 1, 4, 500_000
    run: Callable[[int, Path, argparse.Namespace], dict[str, Any]] = run_seed
    with contextlib.ExitStack() as stack:
        folder = options.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder = folder / "quick" if options.quick else folder
        folder.mkdir(parents=True, exist_ok=True)
        torch.set_num_threads(1)
        split = split_documents(*prepare_text(folder, options.size), folder)
        seeds = range(options.seeds)
        if options.jobs > 1:
            pool = stack.enter_context(ProcessPoolExecutor(options.jobs))
            runs = list(pool.map(run, seeds, [folder] * len(seeds), [options] * len(seeds)))
        else:
            runs = [run(seed, folder, options) for seed in seeds]
    text = table(runs, split, options)
    print(text)
    if not options.quick:
        RESULTS.mkdir(exist_ok=True)
        stem = f"domain_expert-{datetime.now(UTC):%Y-%m-%d}"
        (RESULTS / f"{stem}.md").write_text(text)
        (RESULTS / f"{stem}.json").write_text(json.dumps(runs, indent=1))


if __name__ == "__main__":
    main()
