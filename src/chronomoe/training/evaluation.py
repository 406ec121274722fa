"""Evaluation on held-out text, in bits per byte: comparable between tokenizers and with any compressor."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.nn import functional as F

from chronomoe.control.controller import ChronovisorMixtralController
from chronomoe.data.windows import IGNORED, HeldoutWindows
from chronomoe.errors import ConfigError
from chronomoe.settings import Settings
from chronomoe.training.callback import Callback, Run
from chronomoe.training.config import TrainingConfig
from chronomoe.training.control import deployed
from chronomoe.training.micro_batches import labels_of
from chronomoe.training.step import StepResult

GoalSteering = Callable[[], dict[str, Any] | None]
"""Turns goals on in the model; returns what the log is to say of it."""


@torch.no_grad()
def bits_per_byte(model: nn.Module, windows: HeldoutWindows, batch_size: int = TrainingConfig.batch_size) -> float:
    """Mean code length of the held-out bytes under ``model``, in bits; the model is evaluated as it stands."""
    device = next(model.parameters()).device
    nats = torch.zeros((), dtype=torch.float64, device=device)
    pairs = zip(torch.split(windows.input_ids, batch_size), torch.split(windows.targets, batch_size), strict=True)
    for inputs, targets in pairs:
        logits = model(input_ids=inputs.to(device), use_cache=False).logits.float()
        nats += F.cross_entropy(
            logits.flatten(0, 1), targets.to(device).flatten(), ignore_index=IGNORED, reduction="sum"
        )
    return nats.item() / math.log(2) / windows.num_bytes


@torch.no_grad()
def mean_loss(model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> float:
    """Mean next-token cross-entropy in nats over batches with ``input_ids`` and ``labels`` (not yet shifted)."""
    device = next(model.parameters()).device
    total, count = torch.zeros((), dtype=torch.float64, device=device), 0
    for batch in batches:
        inputs = {name: value.to(device) for name, value in batch.items() if name in ("input_ids", "attention_mask")}
        logits = model(**inputs, use_cache=False).logits.float()
        targets = labels_of(batch)[:, 1:].to(device)
        total += F.cross_entropy(logits[:, :-1].flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum")
        count += int((targets != IGNORED).sum())
    return total.item() / max(1, count)


@dataclass(frozen=True, kw_only=True)
class EvaluationState(Settings):
    """What a resumed run must know of its evaluations."""

    title = "evaluation."
    best_step: int | None
    best_loss: float | None
    goals: str
    """Which goals are on, by the run's ``goals_key``."""
    goal_bias: tuple[tuple[float, ...], ...]
    """(layers, experts) what they add to the routers; no file beside the model holds it."""


class Evaluation(Callback):
    """Turns goals on, evaluates, logs a sample, and saves a checkpoint of the best step so far.

    Goals are turned on before the first step and again before each evaluation, since a bias means less as routers
    learn; a run that is resumed with the ``goals_key`` of its checkpoint has them on already.
    """

    name = "evaluation"

    def __init__(
        self,
        run: Run,
        model: Any,
        data: Any,
        accelerator: Accelerator,
        controller: ChronovisorMixtralController | None,
        save: Callable[[], Path],
        *,
        sample: Callable[[Any], str] | None = None,
        goals: GoalSteering | None = None,
        goals_key: str = "",
    ) -> None:
        if isinstance(data, Mapping) and not data:
            raise ConfigError("eval_dataloader is empty; give held-out windows by domain, a loader, or nothing.")
        self.run, self.model, self.data, self.accelerator, self.controller = run, model, data, accelerator, controller
        self.save_checkpoint, self.sample, self.goals = save, sample, goals
        self.goals_key = "" if goals is None else goals_key
        self.goals_on = ""
        self.best_loss: float | None = None
        self.latest: dict[str, float] = {}
        """The result of the latest evaluation of this call of ``train``."""

    def before_training(self) -> None:
        """Turn the goals of this run on, unless they are on already."""
        self.latest = {}
        if self.goals_on != self.goals_key:
            if self.controller is not None:
                self.controller.steering.goal_bias.zero_()
            self.goals_on = self.goals_key
            self._turn_on_goals()

    def after_step(self, step: StepResult) -> None:
        """Evaluate when it is time."""
        if step.number % self.run.config.eval_every_n_steps == 0:
            with self.run.report.paused():
                self._evaluate_and_log()

    def after_training(self) -> None:
        """Evaluate a finished run, unless its last step was."""
        step = self.run.state.step
        if step >= self.run.total_steps and (not self.latest or step % self.run.config.eval_every_n_steps):
            self._evaluate_and_log()

    def evaluate(self) -> dict[str, float]:
        """Bits per byte by domain and their ``mean`` (held-out windows), or ``loss`` (a loader). Moves nothing."""
        if self.data is None:
            return {}
        was_training = self.model.training
        self.model.eval()
        try:
            with self.accelerator.autocast(), deployed(self.controller):
                if not isinstance(self.data, Mapping):
                    return {"loss": mean_loss(self.model, self.data)}
                result = {
                    name: bits_per_byte(self.model, windows, self.run.config.batch_size)
                    for name, windows in self.data.items()
                    if isinstance(windows, HeldoutWindows)
                }
        finally:
            self.model.train(was_training)
        if not result:
            raise ConfigError("there is nothing to evaluate on: eval_dataloader has no held-out windows.")
        return {**result, "mean": sum(result.values()) / len(result)}

    def _turn_on_goals(self) -> None:
        event = None if self.goals is None else self.goals()
        if event is not None:
            self.run.report.record({**event, "step": self.run.state.step})

    def _evaluate_and_log(self) -> None:
        step, report = self.run.state.step, self.run.report
        self._turn_on_goals()
        inner: Any = getattr(self.model, "model", None)
        recurrent = hasattr(inner, "reset_segments")
        if recurrent:
            inner.reset_segments()
        result = self.evaluate()
        self.latest = result or self.latest
        if result:
            report.evaluation(step, result, inner.mean_segments if recurrent else None)
        if self.sample is not None:
            with torch.random.fork_rng():
                torch.manual_seed(self.run.config.seed)
                with deployed(self.controller):
                    report.sample(step, self.sample(self.model))
            self.model.train()
        headline = result.get("mean", result.get("loss", math.nan))
        if math.isfinite(headline) and (self.best_loss is None or headline < self.best_loss):
            self.best_loss, self.run.best_step = headline, step
            self.save_checkpoint()

    def state_dict(self) -> dict[str, Any]:
        """The best evaluation so far, and the goals that are on where the checkpoint keeps the control layer."""
        best = EvaluationState(best_step=self.run.best_step, best_loss=self.best_loss, goals="", goal_bias=())
        if self.controller is None or not self.run.config.save_chronovisor_state:
            return best.to_json()
        bias = self.controller.steering.goal_bias.tolist()
        return best.replace(goals=self.goals_on, goal_bias=tuple(map(tuple, bias))).to_json()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        saved = EvaluationState.from_json(state, "evaluation", exact=True)
        if saved.goal_bias and self.controller is not None:
            bias = self.controller.steering.goal_bias
            if [len(row) for row in saved.goal_bias] != [bias.shape[1]] * bias.shape[0]:
                raise ConfigError("evaluation.goal_bias has another shape than in this model.")
            bias.copy_(torch.tensor(saved.goal_bias))
        self.run.best_step, self.best_loss, self.goals_on = saved.best_step, saved.best_loss, saved.goals
