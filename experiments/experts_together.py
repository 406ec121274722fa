"""Three experts of dissimilar domains in one brain: does each keep what it gains alone, and does the rest stay?

    python -m experiments.experts_together --folder F    three seeds, some ten minutes each; writes results/
    python -m experiments.experts_together --quick       does every part run? Its figures mean nothing.

Everything is made by the product's own commands: a base of oratory and Python, and three experts, each trained alone on
text that the base never saw: licences, C++ headers (of torch) and SVG icons (of mkdocs-material). One file in seven is
held out. Each expert is measured alone behind its gate; then all three are attached, one after the other, in each of
the six orders. What is done stays in F (F/seed0/result.json), and an interrupted run goes on where it was.

Gain is the fall of perplexity on held-out text, harm its rise on the base's held-out text. A gate opens where its
log-odds exceed its threshold; an expert is used where its gate has the largest margin as well.
"""

import argparse
import contextlib
import copy
import importlib.util
import io
import itertools
import json
import math
import tempfile
import time
from collections.abc import Iterable
from datetime import UTC, datetime
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from aios.brains.brain import Brain
from aios.brains.loaded import load_brain
from aios.cli import run
from aios.data.prepared import prepared_with
from chronomoe.data.windows import heldout_windows
from chronomoe.experts.together import fit_together
from chronomoe.hosts.capture import gate_inputs
from chronomoe.storage import write_json

RESULTS = Path(__file__).parent / "results"
EXPERTS = "licences", "headers", "icons"
GENERAL = "oratory", "python"
LENGTH = 128
FULL = {"bytes": 4_000_000, "domain": 1_500_000, "base_steps": 800, "steps": 400, "tokens": 20_000}
QUICK = {"bytes": 120_000, "domain": 60_000, "base_steps": 8, "steps": 4, "tokens": 600}
SHAPE = ("--hidden-dim", "128", "--num-layers", "4", "--num-experts", "8", "--seq-len", str(LENGTH))


def aios(root: Path, *words: str) -> None:
    """Run a command; its output is shown only when it fails."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        code = run([*words, "--root", str(root)])
    if code:
        raise SystemExit(f"aios {' '.join(words)} failed ({code})\n{output.getvalue()}")


def _package_files(package: str, pattern: str) -> Iterable[Path]:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"the package {package} is not installed, whose files are a domain here.")
    return sorted(Path(spec.submodule_search_locations[0]).rglob(pattern))


def write_domains(root: Path, size: int) -> None:
    """Texts of the experts, one file in seven held out: <root>/domains/<name>/{train,heldout}."""
    sources = {
        "licences": sorted((root / "training_data/licences").rglob("*")),
        "headers": _package_files("torch", "include/ATen/**/*.h"),
        "icons": _package_files("material", ".icons/**/*.svg"),
    }
    for name, files in sources.items():
        chosen = sorted((one for one in files if one.is_file()), key=lambda one: blake2b(one.name.encode()).digest())
        left = size
        for number, file in enumerate(chosen):
            text = file.read_text(encoding="utf-8", errors="replace")[:40_000]
            place = root / "domains" / name / ("heldout" if number % 7 == 0 else "train")
            place.mkdir(parents=True, exist_ok=True)
            (place / f"{number}.txt").write_text(text, encoding="utf-8")
            left -= len(text)
            if left < 0:
                break


def windows_of(root: Path, brain: Brain, tokens: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Held-out inputs and targets (n, S) of each domain."""
    texts = {name: root / "domains" / name / "heldout" for name in EXPERTS}
    found = {}
    for name, text in texts.items():
        store = prepared_with(brain.weights, text, root / "measured" / name, lambda line: None, held_out=True)
        found[name] = heldout_windows(store, name, LENGTH, tokens)
    store = prepared_with(brain.weights, root / "base_data", root / "base_data", lambda line: None)
    found |= {name: heldout_windows(store, name, LENGTH, tokens) for name in GENERAL}
    return {name: (one.input_ids, one.targets) for name, one in found.items()}


@torch.no_grad()
def measure(model: Any, texts: dict[str, tuple[Tensor, Tensor]]) -> dict[str, float]:
    """Perplexity of each text."""
    found = {}
    for name, (inputs, targets) in texts.items():
        total, count = 0.0, 0
        for ids, wanted in zip(inputs.split(16), targets.split(16), strict=True):
            logits = model(input_ids=ids, use_cache=False).logits.float()
            total += float(F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), ignore_index=-100, reduction="sum"))
            count += int((wanted != -100).sum())
        found[name] = math.exp(total / count)
    return found


@torch.no_grad()
def opened(model: Any, texts: dict[str, tuple[Tensor, Tensor]]) -> dict[str, dict[str, dict[str, float]]]:
    """Expert -> text -> share of its tokens at which the gate is ``open``, and at which the expert is ``used``."""
    experts = sorted(model.subbrains.attached, key=lambda one: one.expert_id)
    found: dict[str, dict[str, dict[str, float]]] = {one.expert_id: {} for one in experts}
    for name, (inputs, _) in texts.items():
        margins = []
        for one in experts:
            odds, _ = one.gate.log_odds(one.gate.evidence(gate_inputs(model, one.gate.layers, inputs)))
            margins.append(odds - one.gate.threshold)
        best = torch.stack(margins).amax(dim=0)
        for one, margin in zip(experts, margins, strict=True):
            is_open = margin > 0
            used = is_open & (margin == best)
            found[one.expert_id][name] = {"open": float(is_open.float().mean()), "used": float(used.float().mean())}
    return found


def run_seed(root: Path, seed: int, size: dict[str, int]) -> dict[str, Any]:
    """All figures of one seed."""
    if not (root / "domains").is_dir():
        aios(root, "init", "--max-bytes", str(size["bytes"]))
        write_domains(root, size["domain"])
    brain = Brain(root, root / "artifacts/brains/mixtral/base")
    if not (root / "base_data").is_dir():
        sources = [f"{name}={root / 'training_data' / name}" for name in GENERAL]
        tokenizer = str(root / "artifacts/hf_implant/base_model")
        aios(root, "data", "prepare", *sources, "--out", str(root / "base_data"), "--tokenizer", tokenizer)
    if not brain.is_published:
        training = ("--max-steps", str(size["base_steps"]), "--learning-rate", "4e-3", "--seed", str(seed))
        aios(root, "train", "--name", "base", "--data", str(root / "base_data"), *SHAPE, *training)
    for name in EXPERTS:
        if not (root / "artifacts/experts" / name / "expert.safetensors").is_file():
            text = ("--dataset-file", str(root / "domains" / name / "train"), "--seed", str(seed))
            aios(root, "experts", "train", name, "--brain", "base", *text, "--steps", str(size["steps"]))
    texts = windows_of(root, brain, size["tokens"])
    found: dict[str, Any] = {"seed": seed, "base": measure(load_brain(brain).model, texts), "alone": {}, "together": {}}
    for name in EXPERTS:
        aios(root, "experts", "attach", name, "--brain", "base")
        model = load_brain(brain).model
        found["alone"][name] = measure(model, texts) | {"gates": opened(model, texts)}
        aios(root, "experts", "detach", name, "--brain", "base")
    probe = torch.cat([inputs[:2] for inputs, _ in texts.values()])
    logits = []
    for order in itertools.permutations(EXPERTS):
        for name in order:
            aios(root, "experts", "attach", name, "--brain", "base")
        model = load_brain(brain).model
        found["together"][" ".join(order)] = measure(model, texts) | {"gates": opened(model, texts)}
        with torch.no_grad():
            logits.append(model(input_ids=probe, use_cache=False).logits)
        aios(root, "experts", "detach", *order, "--brain", "base")
    found["largest difference of logits between orders"] = max(float((one - logits[0]).abs().max()) for one in logits)
    found["seconds to fit five gates"] = _seconds_of_five(model)
    return found


def _seconds_of_five(model: Any) -> float:
    experts = list(model.subbrains.attached)
    for number, one in enumerate(experts[:2]):
        twin = copy.deepcopy(one)
        twin.uid = f"{number:032x}"
        experts.append(twin)
    began = time.perf_counter()
    fit_together(experts)
    return time.perf_counter() - began


def table(results: list[dict[str, Any]]) -> str:
    """The figures as markdown."""
    head = "| seed | expert | gain alone | gain together (worst order) | kept | largest opening elsewhere |"
    lines = [head, "|" + "---|" * 6]
    for one in results:
        for name in EXPERTS:
            alone = 1 - one["alone"][name][name] / one["base"][name]
            together = [1 - order[name] / one["base"][name] for order in one["together"].values()]
            others = [domain for domain in EXPERTS if domain != name]
            worst = max(order["gates"][name][domain]["open"] for order in one["together"].values() for domain in others)
            kept = min(together) / alone
            row = [one["seed"], name, f"{alone:.1%}", f"{min(together):.1%}", f"{kept:.1%}", f"{worst:.1%}"]
            lines.append(f"| {' | '.join(map(str, row))} |")
    lines += ["", "| seed | text of the base | perplexity | together (worst order) | change |", "|" + "---|" * 5]
    for one in results:
        for name in GENERAL:
            worst = max(order[name] for order in one["together"].values())
            change = worst / one["base"][name] - 1
            lines.append(f"| {one['seed']} | {name} | {one['base'][name]:.2f} | {worst:.2f} | {change:+.2%} |")
    difference = max(one["largest difference of logits between orders"] for one in results)
    seconds = max(one["seconds to fit five gates"] for one in results)
    lines += ["", f"Logits differ by at most {difference:g} between orders. Five gates are fitted in {seconds:.2f} s."]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run what is missing, write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where everything stays (a temporary folder)")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = options.folder or Path(place)
        results = []
        for seed in range(1 if options.quick else options.seeds):
            file = folder / f"seed{seed}/result.json"
            if not file.is_file():
                write_json(file, run_seed(file.parent, seed, QUICK if options.quick else FULL))
            results.append(json.loads(file.read_text(encoding="utf-8")))
            print(table(results), flush=True)
    if not options.quick:
        day = datetime.now(UTC).date().isoformat()
        head = f"# Experts together, {day}\n\n`python -m experiments.experts_together`, {len(results)} seeds.\n\n"
        (RESULTS / f"experts_together-{day}.md").write_text(head + table(results), encoding="utf-8")
        write_json(RESULTS / f"experts_together-{day}.json", {"seeds": results})


if __name__ == "__main__":
    main()
