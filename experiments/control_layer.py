"""Does the control layer do what it says? Two domains of real text, a tiny Mixtral, paired seeds.

    python -m experiments.control_layer            about an hour on two cores; writes experiments/results/
    python -m experiments.control_layer --quick    one seed, few steps: does the script run?

Arms differ in the control of the load only; data order and initialisation are equal within a seed. MaxVio is that of
the worst layer: over the last 50 steps of training, and over held-out text with the deployed (averaged) pressure. A run
settled at the first step from which the MaxVio of the trailing 50 steps stays below 0.1; a baseline is balanced if it
did. The damage part freezes the trained weights, breaks one expert in each layer, lets the controller run on for a
hundred steps, and compares what health does with an oracle that masks just those.
"""

import argparse
import contextlib
import dataclasses
import json
import math
import statistics
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from chronomoe import ChronovisorMixtralForCausalLM, MixtralConfig
from chronomoe.control import pressure
from chronomoe.control.controller import ChronovisorMixtralController
from chronomoe.control.state import ControlState
from chronomoe.data.token_store import TokenStore
from chronomoe.data.windows import HeldoutWindows, PackedDataset, heldout_windows
from chronomoe.training import Callback, ChronoMoETrainer, TrainingConfig
from chronomoe.training.control import language_model_loss
from chronomoe.training.step import StepResult

RESULTS = Path(__file__).parent / "results"
SEQUENCE, BATCH, EVALUATED = 128, 8, 100_000
TEXT: dict[str, Any] = {
    "max_bytes": 13_000_000, "without": "encodings.*", "heldout_fraction": 0.45, "max_heldout_bytes": 13_000_000,
}  # fmt: skip
"""All there is, almost half held out: the load of few documents tells which documents they are. Character tables
resemble each other so much that they would be dropped from the held-out side alone, and MaxVio would tell that."""
HELD_OUT = 2000
"""Sequences of each domain, from all its documents, whose load is told."""
BALANCED = 0.1
QUIET: dict[str, Any] = {
    "lambda_balance": 0.0, "lambda_coherence": 0.0, "lambda_valley": 0.0, "lambda_z": 0.0, "initial_kappa": 0.0,
    "final_kappa": 0.0, "use_coherence_gating": False,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Arm:
    """One way to run the control layer."""

    name: str
    ablation: str
    control: dict[str, Any] = dataclasses.field(default_factory=dict)
    training: dict[str, Any] = dataclasses.field(default_factory=dict)
    health_target: bool = False
    """The target load follows health instead of being equal: an arm that lost, kept here and not in the library."""
    close: bool = False
    """Its loss is compared with one that is hardly another; that takes more seeds."""


ARMS = [
    Arm("none", "none"),
    Arm("aux loss 0.01", "aux", training={"lambda_balance": 0.01}),
    Arm("sign u=0.01", "loss_free", {"sign_step": 0.01}, close=True),
    Arm("sign u=0.03", "loss_free", {"sign_step": 0.03}, close=True),
    Arm("sign u=0.1", "loss_free", {"sign_step": 0.1}, close=True),
    Arm("PI", "pi", close=True),
    Arm("PI + temperature", "pi_temperature"),
    Arm("PI + health target", "pi_health", health_target=True),
    Arm("none, lr x 4", "none", training={"learning_rate": 4e-3}),
    Arm("PI, lr x 4", "pi", training={"learning_rate": 4e-3}),
    Arm(
        "seed defaults",
        "full",
        training={
            "lambda_balance": 0.01, "lambda_coherence": 0.001, "lambda_valley": 0.0001, "lambda_z": 0.001,
            "initial_kappa": 0.5, "final_kappa": -0.3, "kappa_warmup_steps": None, "use_coherence_gating": True,
        },
    ),
]  # fmt: skip


def prepare_text(folder: Path, *, max_bytes: int = 6_000_000, without: str = "", **settings: Any) -> TokenStore:
    """Two sample domains of equal weight, without some Python files, part of each held out."""
    from aios.data.corpora import DATA, write_samples
    from aios.data.prepare import prepare
    from aios.settings.data import PrepareConfig

    if not (folder / "prepared").is_dir():
        sources = write_samples(folder, max_bytes=max_bytes, report=lambda line: None)
        for unwanted in (folder / DATA / "python").glob(without) if without else ():
            unwanted.unlink()
        two = [dataclasses.replace(source, weight=1.0) for source in sources if source.name != "licences"]
        config = PrepareConfig(**{"vocab_size": 2048, "heldout_fraction": 0.2, **settings})
        prepare(two, folder / "prepared", config, report=lambda line: None)
    return TokenStore.open(folder / "prepared")


def trained(store: TokenStore, arm: Arm, seed: int, steps: int) -> tuple[ChronoMoETrainer, float, list[Tensor]]:
    """Train one arm; returns the trainer, its mean bits per byte and the load counts (L, N) of each step."""
    torch.manual_seed(seed)
    shape = {"hidden_dim": 96, "intermediate_dim": 192, "num_layers": 2, "num_experts": 8, "num_attention_heads": 3}
    config = MixtralConfig(
        vocab_size=store.info.vocab_size, max_seq_length=256, tie_word_embeddings=True, rope_theta=1e4,
        control=arm.control, **shape,
    )  # fmt: skip
    settings = {**QUIET, "learning_rate": 1e-3, **arm.training}
    training = TrainingConfig(
        checkpoint_dir=tempfile.mkdtemp(), max_steps=steps, batch_size=BATCH, weight_decay=0.1, seed=seed,
        control=arm.ablation, log_every_n_steps=steps, eval_every_n_steps=steps, save_every_n_steps=steps, **settings,
    )  # fmt: skip
    data = DataLoader(PackedDataset(store, SEQUENCE, seed, steps * BATCH), batch_size=BATCH)
    windows = {name: heldout_windows(store, name, SEQUENCE, EVALUATED) for name in store.domains}
    counts: list[Tensor] = []

    class Counts(Callback):
        def after_step(self, step: StepResult) -> None:
            assert step.window is not None
            counts.append(step.window.assignments)

    model = ChronovisorMixtralForCausalLM(config)
    trainer = ChronoMoETrainer(model, training, data, windows, show=lambda line: None, callbacks=[Counts()])
    with following_health(trainer.controller) if arm.health_target else contextlib.nullcontext():
        return trainer, trainer.train()["evaluation"]["mean"], counts


@contextlib.contextmanager
def following_health(state: ControlState, floor: float = 0.1) -> Iterator[None]:
    """Within the block target shares are (floor + h) normalised over available experts, h = sigmoid(4 r)."""

    def health_target(available_LN: Tensor) -> Tensor:
        wish_LN = (floor + (4 * state.health).sigmoid()) * available_LN
        return wish_LN / wish_LN.sum(dim=-1, keepdim=True)

    with mock.patch.object(pressure, "equal_target", health_target):
        yield


def max_violation(counts: Tensor) -> float:
    """Of the worst layer."""
    share = counts / counts.sum(dim=-1, keepdim=True)
    return (share.amax(dim=-1) * share.shape[-1] - 1).max().item()


@torch.no_grad()
def held_out_load(trainer: ChronoMoETrainer, windows: dict[str, HeldoutWindows]) -> float:
    """MaxVio over held-out text, equal parts of each domain, with the deployed pressure."""
    assert trainer.controller is not None
    assert trainer.steering is not None
    least = min(HELD_OUT, *(len(domain.input_ids) for domain in windows.values()))
    trainer.model.train()  # only training counts
    with trainer.controller.deployed():
        for domain in windows.values():
            order = torch.randperm(len(domain.input_ids), generator=torch.Generator().manual_seed(0))[:least]
            for part in domain.input_ids[order].split(32):
                trainer.model(input_ids=part)
    window = trainer.steering.statistics.window()
    trainer.steering.discard_step()
    return max_violation(window.assignments)


def measure(arm: Arm, seed: int, steps: int, folder: Path) -> dict[str, Any]:
    """The figures of one run."""
    torch.set_num_threads(1)
    store = prepare_text(folder, **TEXT)
    with _probes() as probed:
        trainer, evaluation, counts = trained(store, arm, seed, steps)
    assert trainer.controller is not None
    rolling = [max_violation(torch.stack(counts[max(0, end - 50) : end]).sum(dim=0)) for end in range(1, steps + 1)]
    late = torch.stack(counts[-50:]).sum(dim=0)
    held = {name: heldout_windows(store, name, SEQUENCE) for name in store.domains}
    landscapes = [trainer.controller.get_structural_temperature_diagnostics(layer) for layer in range(2)]
    return {
        "arm": arm.name,
        "seed": seed,
        "bits_per_byte": evaluation,
        "max_violation": rolling[-1],
        "least_share_times_n": (late / late.sum(dim=-1, keepdim=True)).min().item() * late.shape[-1],
        "settled": next((n for n in range(50, steps + 1) if max(rolling[n - 1 :]) < BALANCED), None),
        "held_out_max_violation": held_out_load(trainer, held),
        "R": trainer.controller.coherence_history[-1],
        "probed_experts": len(probed),
        "landscape_over_null": [found["log_variance"] / (found["null_variance"] or math.inf) for found in landscapes],
        "damage": damage(trainer, store, seed) if arm.name == "PI" else {},
    }


@contextlib.contextmanager
def _probes() -> Iterator[list[tuple[int, int]]]:
    """The experts probed in the block: each takes a forward of some sequences, and each occasion one more."""
    probed: list[tuple[int, int]] = []
    suspects = ChronovisorMixtralController.suspects

    def noting(controller: ChronovisorMixtralController) -> list[tuple[int, int]]:
        found = suspects(controller)
        probed.extend(found)
        return found

    with mock.patch.object(ChronovisorMixtralController, "suspects", noting):
        yield probed


def damage(trainer: ChronoMoETrainer, store: TokenStore, seed: int) -> dict[str, Any]:
    """Held-out loss (nats per token) whole, with one expert of each layer broken, and what masking makes of it."""
    model, steering = trainer.model, trainer.steering
    assert steering is not None
    torch.manual_seed(seed)
    windows = [heldout_windows(store, name, SEQUENCE, 12_000).input_ids[:48] for name in store.domains]
    text = torch.cat(windows)
    fresh = PackedDataset(store, SEQUENCE, seed + 1000, 100 * BATCH)
    loss = language_model_loss(model, {"input_ids": text, "attention_mask": torch.ones_like(text)}, len(text))
    victims = [(layer, int(torch.randint(0, 8, ()))) for layer in range(2)]
    found: dict[str, Any] = {"whole": _deployed_loss(trainer, loss)}
    for kind in ("zeroed", "noised"):
        saved = {layer: model.model.layers[layer].mlp.experts.down_proj.data.clone() for layer, _ in victims}
        for layer, expert in victims:
            weight = model.model.layers[layer].mlp.experts.down_proj.data[expert]
            noise = 0.2 * weight.std() * torch.randn_like(weight)
            weight.copy_(torch.zeros_like(weight) if kind == "zeroed" else weight + noise)
        found[kind] = _deployed_loss(trainer, loss)
        for layer, expert in victims:
            steering.available[layer, expert] = False
        found[f"{kind}, oracle mask"], _ = _watched_loss(trainer, loss, fresh, health=False)
        steering.available.fill_(True)
        found[f"{kind}, left alone"], _ = _watched_loss(trainer, loss, fresh, health=False)
        found[f"{kind}, health"], masked = _watched_loss(trainer, loss, fresh, health=True)
        found[f"{kind}, masked"] = [masked.count(victim) for victim in victims]
        found[f"{kind}, others masked"] = len(set(masked) - set(victims))
        steering.available.fill_(True)
        for layer, weight in saved.items():
            model.model.layers[layer].mlp.experts.down_proj.data.copy_(weight)
    return found


@torch.no_grad()
def _deployed_loss(trainer: ChronoMoETrainer, loss: Any) -> float:
    assert trainer.controller is not None
    with trainer.controller.deployed():
        return float(loss().mean())


def _watched_loss(
    trainer: ChronoMoETrainer, loss: Any, fresh: PackedDataset, *, health: bool
) -> tuple[float, list[tuple[int, int]]]:
    """Loss and masked experts after the controller ran on for a hundred steps; all but availability is put back."""
    from chronomoe.control.checkpoint import ChronovisorCheckpoint

    controller, model = trainer.controller, trainer.model
    assert controller is not None
    before = ChronovisorCheckpoint.from_controller(controller)
    config = controller.config
    controller.config = dataclasses.replace(config, health=health)
    model.train()
    for batch in DataLoader(fresh, batch_size=BATCH):
        model(**batch, use_cache=False).loss.backward()
        model.zero_grad(set_to_none=True)
        controller.tick()
        controller.judge(language_model_loss(model, batch, controller.config.probe_sequences))
    result = _deployed_loss(trainer, loss)
    masked = [(layer, expert) for layer, expert in controller.masked.nonzero().tolist()]
    before.restore_to_controller(controller)
    controller.config = config
    return result, masked


def coherence_nulls(store: TokenStore) -> dict[str, float]:
    """R of a trained router, frozen, over fresh text; and of random choices over the same."""
    trainer, _, _ = trained(store, ARMS[5], 0, 300)
    controller, model = trainer.controller, trainer.model
    assert controller is not None
    found = {}
    for name in ("frozen", "random"):
        controller.forget()
        controller.steering.pressure.zero_()
        controller.config = controller.config.ablate("none")
        controller.steering.exploration.fill_(1e4 if name == "random" else 0.0)
        model.train()
        with torch.no_grad():
            for batch in DataLoader(PackedDataset(store, SEQUENCE, 77, 150 * BATCH), batch_size=BATCH):
                model(input_ids=batch["input_ids"], use_cache=False)
                controller.tick()
        found[name] = controller.coherence_history[-1]
    return found


def table(runs: list[dict[str, Any]], nulls: dict[str, float], steps: int) -> str:
    """Everything measured, as Markdown."""
    by_arm = {arm.name: [run for run in runs if run["arm"] == arm.name] for arm in ARMS}
    few, many = (len({run["seed"] for run in by_arm[name]}) for name in ("none", "PI"))
    lines = [
        f"# The control layer, {datetime.now(UTC):%Y-%m-%d}",
        "",
        f"1.1 M-parameter Mixtral (d=96, 2 layers, N=8, k=2), {steps} steps of {SEQUENCE * BATCH} tokens, oratory and "
        f"Python, {few} seeds ({many} of sign rules and PI); no router loss unless named; worst seed in the columns of "
        "MaxVio, shares and settling, there with the median seed's and the mean in brackets.",
        "",
        "| arm | bits per byte (mean) | against the best balanced arm, paired (upper 95 %) | MaxVio, last 50 steps | "
        "least share x N | settled at step | held-out MaxVio, deployed | R |",
        "|---|---|---|---|---|---|---|---|",
    ]
    baselines = ["aux loss 0.01", "sign u=0.01", "sign u=0.03", "sign u=0.1"]
    balanced = [name for name in baselines if _worst(by_arm[name], "max_violation") < BALANCED] or baselines
    best = min(balanced, key=lambda name: _mean(by_arm[name], "bits_per_byte"))
    for name, found in by_arm.items():
        settled = [run["settled"] for run in found]
        lines.append(
            f"| {name} | {_mean(found, 'bits_per_byte'):.4f} | {_bound(_ratios(found, by_arm[best]))} | "
            f"{_worst(found, 'max_violation'):.3f} | {min(run['least_share_times_n'] for run in found):.2f} | "
            f"{_settling(settled)} | {_worst(found, 'held_out_max_violation'):.3f} | "
            f"{_mean(found, 'R'):.3f} |"
        )
    lines += ["", f"Best balanced baseline by loss: {best} (of {', '.join(balanced)}).", "", "## Temperature", ""]
    cost = _ratios(by_arm["PI + temperature"], by_arm["PI"])
    over_null = {
        name: ", ".join(f"{value:.2f}" for run in by_arm[name] for value in run["landscape_over_null"])
        for name in ("PI + temperature", "PI", "none")
    }
    probed = [run["probed_experts"] for name in ("PI + health target", "seed defaults") for run in by_arm[name]]
    lines += [
        f"PI + temperature against PI: {_bound(cost)} bits per byte.",
        "Variance of the landscape over the 95 % quantile of its block-permutation null, each layer and seed (above 1 "
        f"it is more than noise): {over_null['PI + temperature']}; where it steers nothing, under PI alone: "
        f"{over_null['PI']}; without any control: {over_null['none']}.",
        "", "## Coherence", "",
        f"R of a trained router, frozen, over fresh text: {nulls['frozen']:.3f}; of random choices: "
        f"{nulls['random']:.3f}.",
        "", "## Damage, frozen weights, one expert of each layer", "",
        "| seed | whole | zeroed | oracle mask | health (masked) | share of the oracle's gain | noised | masking it | "
        "health (masked) | change |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    gains: list[float] = []
    possible: list[float] = []
    for run in by_arm["PI"]:
        d = run["damage"]
        alone = d["zeroed, left alone"]
        gains.append(alone - d["zeroed, health"])
        possible.append(alone - d["zeroed, oracle mask"])
        lines.append(
            f"| {run['seed']} | {d['whole']:.4f} | {alone:.4f} | {d['zeroed, oracle mask']:.4f} | "
            f"{d['zeroed, health']:.4f} ({_masked(d, 'zeroed')}) | {gains[-1] / (possible[-1] or math.nan):.2f} | "
            f"{d['noised, left alone']:.4f} | {d['noised, oracle mask']:.4f} | "
            f"{d['noised, health']:.4f} ({_masked(d, 'noised')}) | "
            f"{d['noised, health'] / d['noised, left alone'] - 1:+.2%} |"
        )
    lines += [
        "",
        f"Of what the oracle recovers in all seeds together, health recovers {sum(gains) / sum(possible):.0%}. In "
        "brackets which of the two victims it masks, and how many others.",
        "",
        f"Experts probed in a run with health on, while nothing is broken: {', '.join(map(str, probed))}.",
    ]
    return "\n".join(lines) + "\n"


_T95 = 6.314, 2.920, 2.353, 2.132, 2.015, 1.943, 1.895, 1.860, 1.833, 1.812, 1.796
"""One-sided 95 % quantiles of Student's t, from one degree of freedom; with more than these the last is too careful."""


def _settling(steps: list[int | None]) -> str:
    reached = [math.inf if step is None else step for step in steps]
    return " ".join(
        text.format("never" if value == math.inf else f"{value:.0f}")
        for text, value in (
            ("{}", max(reached)),
            ("({},", statistics.median(reached)),
            ("{})", statistics.fmean(reached)),
        )
    )


def _masked(found: dict[str, Any], kind: str) -> str:
    return "+".join(map(str, found[f"{kind}, masked"])) + f", {found[f'{kind}, others masked']}"


def _mean(runs: list[dict[str, Any]], name: str) -> float:
    return statistics.fmean(run[name] for run in runs)


def _worst(runs: list[dict[str, Any]], name: str) -> float:
    return max(float(run[name]) for run in runs)


def _ratios(mine: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> list[float]:
    other = {run["seed"]: run["bits_per_byte"] for run in theirs}
    return [run["bits_per_byte"] / other[run["seed"]] - 1 for run in mine if run["seed"] in other]


def _bound(values: list[float]) -> str:
    mean = statistics.fmean(values)
    if len(values) < 2:
        return f"{mean:+.2%} (one seed)"
    error = statistics.stdev(values) / math.sqrt(len(values))
    return f"{mean:+.2%} ({mean + _T95[min(len(values) - 1, len(_T95)) - 1] * error:+.2%})"


def main() -> None:
    """Run everything and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--close", type=int, default=12, help="seeds of the arms whose losses are close")
    parser.add_argument("--onto", type=Path, default=None, help="results whose runs need not be run again")
    parser.add_argument("--steps", type=int, default=450)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--folder", type=Path, default=None, help="where to keep the prepared text")
    arguments = parser.parse_args()
    seeds, close, steps = (1, 1, 60) if arguments.quick else (arguments.seeds, arguments.close, arguments.steps)
    runs: list[dict[str, Any]] = json.loads(arguments.onto.read_text())["runs"] if arguments.onto else []
    done = {(run["arm"], run["seed"]) for run in runs}
    wanted = [(arm, seed) for arm in ARMS for seed in range(close if arm.close else seeds)]
    missing = [(arm, seed) for arm, seed in wanted if (arm.name, seed) not in done]
    with contextlib.ExitStack() as stack:
        folder = arguments.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        torch.set_num_threads(1)
        store = prepare_text(folder, **TEXT)
        with ProcessPoolExecutor(arguments.jobs) as pool:
            futures = [pool.submit(measure, arm, seed, steps, folder) for arm, seed in missing]
            for future in futures:
                runs.append(future.result())
                print({name: value for name, value in runs[-1].items() if name != "damage"}, flush=True)
        nulls = coherence_nulls(store)
    text = table(runs, nulls, steps)
    print(text)
    if not arguments.quick:
        RESULTS.mkdir(exist_ok=True)
        stem = f"control_layer-{datetime.now(UTC):%Y-%m-%d}"
        (RESULTS / f"{stem}.md").write_text(text)
        (RESULTS / f"{stem}.json").write_text(json.dumps({"runs": runs, "nulls": nulls}, indent=1))


if __name__ == "__main__":
    main()
