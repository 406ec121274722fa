"""What experiments/domain_expert.py compares: ways to teach a trained base a domain for the same time, and their gates.

All are trained by the product's own trainer with the same data, batch, schedule and clipping, for the same processor
time: the expert takes its steps, and each other arm as many of its own as cost the same. The adapter, LoRA and the
wrapper for tuning a whole model live here because they are baselines, not features.
"""

import copy
import json
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.data import DataLoader

from chronomoe import ChronovisorMixtralForCausalLM, MixtralConfig
from chronomoe.data.token_store import TokenStore
from chronomoe.data.windows import PackedDataset
from chronomoe.experts.expert import DomainExpert
from chronomoe.experts.gate import DomainGate, false_alarm_threshold
from chronomoe.experts.network import LayerExpert
from chronomoe.experts.training import ANCHOR_EVERY, WithAnchor, begin, trainee
from chronomoe.hosts.capture import gate_inputs, kl
from chronomoe.storage import whole_directory
from chronomoe.tensors import read_tensors, save_tensors
from chronomoe.training import Callback, ChronoMoETrainer, TrainingConfig
from chronomoe.training.step import StepResult

SEQUENCE, BATCH = 128, 8
WIDTH, LAYERS = 256, 4
LR = 2e-3
_SCALE = 2.0**20


class AdapterLayer(LayerExpert):
    """y + E(h) through the product's y + m (E'(h) - y): m is tiny and E' = E / m, so y stays to one in a million."""

    def __init__(self, hidden_size: int, width: int, act: str) -> None:
        super().__init__(hidden_size, width, act)
        nn.init.zeros_(self.w2.weight)
        self.mixing.requires_grad_(False).fill_(-math.log(_SCALE))

    def forward(self, h_TD: Tensor) -> Tensor:
        """(T, D) to (T, D)."""
        return super().forward(h_TD) * _SCALE


class Adapter(DomainExpert):
    """A parallel adapter of the expert's size in each layer, zero at first, behind the same kind of gate."""

    def __init__(self, name: str, **settings: Any) -> None:
        super().__init__(name, **settings)
        self.layers = nn.ModuleDict({n: AdapterLayer(self.hidden_size, self.width, self.act) for n in self.layers})


class LowRank(nn.Module):
    """W + B A, with B zero at first; of stacked experts each has its own."""

    def __init__(self, weight: Tensor, rank: int) -> None:
        super().__init__()
        *stack, out, into = weight.shape
        self.a = nn.Parameter(torch.randn(*stack, rank, into) / math.sqrt(into))
        self.b = nn.Parameter(torch.zeros(*stack, out, rank))

    def forward(self, weight: Tensor) -> Tensor:
        """The weight in use."""
        return weight + self.b @ self.a


def lora_targets(model: Any) -> list[tuple[Any, str]]:
    """(module, name of its weight): projections of the attention, matrices of the experts."""
    found: list[tuple[Any, str]] = []
    for layer in model.model.layers:
        attention = layer.self_attn
        found += [(getattr(attention, f"{name}_proj"), "weight") for name in "qkvo"]
        found += [(layer.mlp.experts, "gate_up_proj"), (layer.mlp.experts, "down_proj")]
    return found


class Tuned(nn.Module):
    """Trains a model's own parameters, in evaluation mode (routing as deployed), with the expert's anchor or none."""

    def __init__(self, model: Any, reference: Any, anchored: bool) -> None:
        super().__init__()
        self.config, self.dtype, self.anchored = model.config, model.dtype, anchored
        # Neither is a submodule: the trainer would attach a controller, and switch the routing to training.
        vars(self)["model"], vars(self)["reference"] = model.eval(), reference
        self.trained = nn.ParameterList([p for p in model.parameters() if p.requires_grad])
        self.loss_terms: dict[str, Tensor] = {}

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor,
        anchor_ids: Tensor | None = None,
        num_items_in_batch: Any = None,
        **_: Any,
    ) -> Any:
        """The loss of chronomoe.experts.training.Trainee."""
        model: Any = vars(self)["model"]
        with parametrize.cached():
            output = model(input_ids=input_ids, labels=labels, num_items_in_batch=num_items_in_batch, use_cache=False)
            if self.anchored and anchor_ids is not None:
                rows = anchor_ids[: max(1, len(anchor_ids) // ANCHOR_EVERY)]
                with torch.no_grad():
                    own = vars(self)["reference"](input_ids=rows, use_cache=False).logits
                output.loss = output.loss + kl(own, model(input_ids=rows, use_cache=False).logits).mean()
        return output

    def save_pretrained(self, path: Any, **_: Any) -> None:
        """Nothing to keep: the experiment keeps the result itself."""
        Path(path).mkdir(parents=True, exist_ok=True)


# -- training ------------------------------------------------------------------------------------------------------


def train_base(store: TokenStore, seed: int, steps: int, out: Path) -> None:
    """Train a Mixtral of 3.9 M parameters on oratory and Python and save it as it would be deployed."""
    torch.manual_seed(seed)
    model = ChronovisorMixtralForCausalLM(
        MixtralConfig(
            vocab_size=store.info.vocab_size, hidden_dim=128, intermediate_dim=WIDTH, num_layers=LAYERS,
            num_attention_heads=4, num_key_value_heads=4, num_experts=8, max_seq_length=256,
            tie_word_embeddings=True, rope_theta=1e4,
        )
    )  # fmt: skip
    config = TrainingConfig(
        checkpoint_dir=tempfile.mkdtemp(), max_steps=steps, batch_size=BATCH, learning_rate=3e-3, weight_decay=0.1,
        kappa_warmup_steps=steps // 10, log_every_n_steps=steps, save_every_n_steps=steps, seed=seed,
    )  # fmt: skip
    data = PackedDataset(store, SEQUENCE, seed, steps * BATCH)
    trainer = ChronoMoETrainer(model, config, DataLoader(data, batch_size=BATCH))
    trainer.train()
    assert trainer.controller is not None
    with trainer.controller.deployed(), whole_directory(out) as stage:
        model.save_pretrained(stage)


def train(module: Any, domain: TokenStore, general: TokenStore | None, seed: int, steps: int) -> float:
    """Train for that many steps, with anchor text if there is any; returns processor seconds a step."""
    data: Any = PackedDataset(domain, SEQUENCE, seed, steps * BATCH)
    if general is not None:
        data = WithAnchor(data, PackedDataset(general, SEQUENCE, seed, steps * BATCH))
    with tempfile.TemporaryDirectory() as place:
        config = TrainingConfig(
            checkpoint_dir=place, max_steps=steps, batch_size=BATCH, learning_rate=LR, weight_decay=0.0, seed=seed,
            log_every_n_steps=steps, save_every_n_steps=steps,
        )  # fmt: skip
        times = [0.0]

        class Clock(Callback):
            def after_step(self, step: StepResult) -> None:
                times.append(time.process_time())

        ChronoMoETrainer(module, config, DataLoader(data, batch_size=BATCH), callbacks=[Clock()]).train()
    return (times[-1] - times[1]) / (len(times) - 2)  # the first step warms up


@dataclass
class School:
    """All trained arms of one seed; each is kept in ``folder`` and read from there when it is there already."""

    model: Any
    base: TokenStore
    domain: TokenStore
    folder: Path
    seed: int
    expert_steps: int
    windows: Tensor
    probe: int
    costs: dict[str, dict[str, Any]]
    """Name -> steps, processor seconds and parameters of what was trained."""

    def _make(self, kind: type[DomainExpert], name: str) -> Any:
        torch.manual_seed(self.seed)
        return kind(
            name, hidden_size=self.model.config.hidden_size, width=WIDTH, layers=range(1, LAYERS), gate_layers=(0, 1)
        )

    def _kept(self, name: str, empty: Callable[[], Any], run: Callable[[int], tuple[Any, float, int]]) -> Any:
        """The arm's module, trained for the expert's time (the expert: for its steps)."""
        place = self.folder / name
        if place.is_dir():
            found = json.loads((place / "cost.json").read_text())
            module = empty()
            module.load_state_dict(read_tensors(place / "state.safetensors"))
        else:
            steps = self.expert_steps
            if name != "expert":
                steps = max(2, round(self.costs["expert"]["seconds"] / run(self.probe)[1]))
            module, each, size = run(steps)
            found = {"steps": steps, "seconds": each * steps, "parameters": size}
            with whole_directory(place) as stage:
                save_tensors(stage / "state.safetensors", module.state_dict())
                (stage / "cost.json").write_text(json.dumps(found))
        self.costs[name] = found
        print(f"  seed {self.seed}: {name}, {found}", flush=True)
        return module.eval()

    def beside(self, name: str, kind: type[DomainExpert]) -> Any:
        """The expert, or an adapter: trained open everywhere, with the anchor, by the product's trainee."""

        def run(steps: int) -> tuple[Any, float, int]:
            expert = self._make(kind, name)
            if kind is DomainExpert:
                begin(expert, self.model, self.windows[:32], 0.5, self.seed)
            with trainee(self.model, expert, 1.0) as module:
                each = train(module, self.domain, self.base, self.seed, steps)
            return expert, each, _size(expert)

        return self._kept(name, lambda: self._make(kind, name), run)

    def placebo(self, like: DomainExpert) -> Any:
        """Random weights with the base's mean and deviation, as loud as the trained expert."""
        expert = self._make(DomainExpert, "placebo")
        begin(expert, self.model, self.windows[:32], 1.0, self.seed)
        for mine, its in zip(expert.layers.values(), like.layers.values(), strict=True):
            mine.mixing.data.copy_(its.mixing.data)
        return expert.eval()

    def inside(self, name: str, *, lora: bool, anchored: bool) -> Any:
        """A copy of the base with its own weights tuned: all of them, or by low-rank changes of the expert's size."""

        def run(steps: int) -> tuple[Any, float, int]:
            torch.manual_seed(self.seed)
            model = copy.deepcopy(self.model)
            targets = lora_targets(model) if lora else []
            if lora:
                model.requires_grad_(False)
                shapes = [getattr(module, weight).shape for module, weight in targets]
                one_rank = sum(math.prod(shape[:-2]) * (shape[-2] + shape[-1]) for shape in shapes)
                rank = max(1, round(self.costs["expert"]["parameters"] / one_rank))
                for module, weight in targets:
                    parametrize.register_parametrization(
                        module, weight, LowRank(getattr(module, weight), rank), unsafe=True
                    )
            size = _size(model)
            each = train(
                Tuned(model, self.model, anchored), self.domain, self.base if anchored else None, self.seed, steps
            )
            for module, weight in targets:
                parametrize.remove_parametrizations(module, weight, leave_parametrized=True)
            return model, each, size

        return self._kept(name, lambda: copy.deepcopy(self.model), run)


def _size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


# -- gates ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Gate:
    """How one arm decides where to speak."""

    layers: tuple[int, ...]
    leak: float
    false_alarm: float
    threshold: float
    direction: Tensor
    offset: Tensor

    def put_into(self, expert: DomainExpert) -> None:
        """Make the expert's own gate this one."""
        gate = expert.gate = DomainGate(expert.hidden_size, self.layers)
        for name in ("leak", "threshold", "offset", "direction"):
            getattr(gate, name).copy_(torch.as_tensor(getattr(self, name)))


@dataclass(frozen=True)
class Arm:
    """One row of the table: a model, and if it has one the expert beside it and where that speaks."""

    name: str
    model: Any
    trained: str
    expert: DomainExpert | None = None
    gate: Gate | None = None
    forced: bool = False
    """Open everywhere; with ``oracle`` in the domain only."""
    oracle: bool = False

    @contextmanager
    def at_work(self, in_domain: bool) -> Iterator[Any]:
        """The model as this arm has it, on text of the domain or of another."""
        expert = self.expert
        if expert is None:
            yield self.model
            return
        if self.gate is not None:
            self.gate.put_into(expert)
        else:
            expert.gate = DomainGate(expert.hidden_size, (0, 1))
            expert.forced = in_domain or not self.oracle
        expert.active = True
        try:
            yield self.model
        finally:
            expert.active, expert.forced = False, None


def thresholded(gate: Gate, odds: list[Tensor], false_alarm: float) -> Gate:
    """The gate with the threshold that so many tokens of each general text exceed at most."""
    return replace(gate, false_alarm=false_alarm, threshold=false_alarm_threshold(odds, false_alarm))


def log_odds(model: Any, expert: DomainExpert, gate: Gate, windows: Tensor) -> Tensor:
    """Running log-odds (n, S) of windows from their beginning."""
    gate.put_into(expert)
    return expert.gate.log_odds(expert.gate.evidence(gate_inputs(model, gate.layers, windows)))[0]
