"""ChronoMoECallback: steer a plain transformers.Trainer run in one line.

Trainer(model=model, args=args, train_dataset=data, callbacks=[ChronoMoECallback(model)])
"""

import dataclasses
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from chronomoe.control.checkpoint import REST, ChronovisorCheckpoint
from chronomoe.control.controller import ChronovisorMixtralController
from chronomoe.hosts.attach import attach
from chronomoe.routing.state import SteeringConfig


class ChronoMoECallback(TrainerCallback):
    """Attaches steering to ``model`` if it has none, ticks its controller each step, and logs the routers' figures.

    It runs the controller with kappa as ``controller.set_knob`` leaves it. Probes of unhealthy experts, the gate and
    kappa's schedule need a training loop of their own: :class:`ChronoMoETrainer`.

    The Trainer tells a forward how many labels the whole step has, not how many tokens: router losses do not depend on
    how a step is split where every micro-batch has labels on the same share of its tokens, as packed text has.
    """

    def __init__(self, model: Any, config: SteeringConfig | None = None) -> None:
        controller: ChronovisorMixtralController | None = getattr(model, "controller", None)
        self.controller = attach(model, config) if controller is None else controller
        steering = self.controller.steering
        steering.config = dataclasses.replace(steering.config, balance_scope="step")
        self._latest: dict[str, float] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """A run that is resumed goes on with the control layer of its checkpoint."""
        folder = _checkpoint(args, state)
        if state.global_step and (folder / REST).is_file():
            ChronovisorCheckpoint.load(folder).restore_to_controller(self.controller, folder)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Save the control layer beside the model, whose state dict does not hold it."""
        if state.is_world_process_zero:
            ChronovisorCheckpoint.from_controller(self.controller).save(_checkpoint(args, state))

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Tick: one step's gradients are complete."""
        if (window := self.controller.tick()) is not None:
            balance = {"lb_loss": window.balance.mean().item()}
            self._latest = {**balance, "R": self.controller.coherence_history[-1], **window.summary()}

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the routers' figures to the Trainer's own log record."""
        if logs is not None and "loss" in logs:
            logs.update(self._latest)
            state.log_history[-1].update(self._latest)  # the record was copied before callbacks run


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
