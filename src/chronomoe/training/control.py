"""The control layer within one run: kappa's schedule, the controller's tick, the gate, probes of suspect experts."""

import dataclasses
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from chronomoe.control.checkpoint import ChronovisorCheckpoint
from chronomoe.control.config import Ablation
from chronomoe.control.controller import ChronovisorMixtralController
from chronomoe.data.windows import IGNORED
from chronomoe.errors import ConfigError, UnsupportedModelError
from chronomoe.hosts.attach import attach
from chronomoe.knob import Agent, KnobScheduler, KnobState
from chronomoe.routing.losses import ChronoMoELoss
from chronomoe.routing.statistics import RoutingWindow
from chronomoe.settings import Settings
from chronomoe.training.callback import Callback
from chronomoe.training.config import TrainingConfig
from chronomoe.training.gating import CoherenceGatedOptimizer, gate_value
from chronomoe.training.micro_batches import Batch, labels_of
from chronomoe.training.step import StepResult

_FAST, _SLOW = 0.05, 0.01
"""Rates of the two averages whose difference is the trend of the loss."""


def controller_for(model: Any, loss: ChronoMoELoss, arm: Ablation | None) -> ChronovisorMixtralController | None:
    """The controller of ``model``, attached if need be, with these weights of the losses; None for a dense model.

    ``arm`` is the experimental arm it is to run, if any.
    """
    controller: ChronovisorMixtralController | None = getattr(model, "controller", None)
    if controller is None:
        try:
            controller = attach(model)
        except UnsupportedModelError:
            return None  # a dense model trains too
    steering = controller.steering
    steering.config = dataclasses.replace(steering.config, loss=loss, balance_scope="step")
    if arm is not None:
        controller.config = controller.config.ablate(arm)
        controller.release()
    return controller


def deployed(controller: ChronovisorMixtralController | None) -> AbstractContextManager[None]:
    """Within the block the model routes as it will when deployed."""
    return nullcontext() if controller is None else controller.deployed()


@dataclasses.dataclass(frozen=True, kw_only=True)
class ControlState(Settings):
    """What a resumed run must know that the controller does not hold."""

    title = "control."
    knob: dict[str, Any]
    knob_state: dict[str, float] | None
    loss_fast: float
    loss_slow: float
    fields_saved: bool
    """Does the checkpoint hold the controller's own state?"""


class Control(Callback):
    """Turns the knob, ticks the controller, gates the update and judges suspects; nothing without a controller.

    A tick needs the gradients of a whole step and comes before the optimizer moves.
    """

    name = "control"

    def __init__(
        self,
        model: nn.Module,
        controller: ChronovisorMixtralController | None,
        config: TrainingConfig,
        total_steps: int,
        *,
        show: Callable[[str], None],
        agent: Agent | None = None,
        gated: CoherenceGatedOptimizer | None = None,
    ) -> None:
        self.model, self.controller, self.config, self.show, self.gated = model, controller, config, show, gated
        self.knob = KnobScheduler(
            config.initial_kappa,
            config.final_kappa,
            config.kappa_warmup(total_steps),
            total_steps,
            config.kappa_schedule,
            agent,
        )
        self.loss_fast = self.loss_slow = 0.0
        self.gate = 1.0
        self.knob_state: KnobState | None = None
        """What an agent sees, after the first step of an adaptive schedule."""
        self._complaint = ""
        self._fields_saved = True

    @property
    def active(self) -> bool:
        """Does anything here move?"""
        return self.controller is not None and self.controller.steering.config.enabled

    def before_training(self) -> None:
        """Say what cannot be expected of the settings."""
        if self.active and self.knob.too_short:
            self.show(
                f"kappa stays at {self.knob.initial_kappa}: its warm-up of {self.knob.warmup_steps} steps is not "
                "shorter than the run; set kappa_warmup_steps lower to let it move."
            )
        if self.active and self.controller is not None:
            steering = self.controller.steering
            if steering.top_k == steering.num_experts:
                self.show("every token uses every expert: there is no routing to control.")

    def after_backward(self, step: StepResult) -> None:
        """Knob, tick, gate, judge; sets the step's window. A step that is skipped moves the knob alone."""
        controller = self.controller
        if controller is None:
            return
        if step.skip_reason:
            self.knob.step()
            controller.steering.discard_step()
            if self.active and controller.config.health:
                self._report(controller.mask_broken())
            return
        self._average(step.losses.get("lm_loss", step.losses["loss"]))
        self._turn_knob(controller)
        window = step.window = controller.tick()
        if window is not None and self.config.kappa_schedule == "adaptive":
            self.knob_state = self._state_of(controller, window)
        if self.gated is not None and window is not None:
            self.gated.coherence = controller.coherence_history[-1]
            self.gate = self.gated.gate
        self._report(controller.judge(lambda: self._probed_loss(step.batches)))

    def _average(self, loss: float) -> None:
        first = self.loss_slow == 0.0
        self.loss_fast = loss if first else self.loss_fast + _FAST * (loss - self.loss_fast)
        self.loss_slow = loss if first else self.loss_slow + _SLOW * (loss - self.loss_slow)

    def _turn_knob(self, controller: ChronovisorMixtralController) -> None:
        decision = self.knob.step(self.knob_state)
        if self.knob.complaint != self._complaint:
            self._complaint = self.knob.complaint
            if self._complaint:
                self.show(f"  The knob's agent failed, kappa stays: {self._complaint}")
        if self.active:
            controller.set_knob(decision.kappa, decision.intent)

    def _probed_loss(self, batches: Sequence[Batch]) -> Tensor:
        assert self.controller is not None
        # A sequence that is trained in pieces would not fit as one.
        wanted, length = self.controller.config.probe_sequences, self.config.chunk_size
        losses: list[Tensor] = []
        for batch in batches:
            if (left := wanted - sum(map(len, losses))) > 0:
                losses.append(language_model_loss(self.model, batch, left, length)())
        return torch.cat(losses)

    def _report(self, verdicts: list[str]) -> None:
        for verdict in verdicts:
            self.show(f"  Health: {verdict}")

    def _state_of(self, controller: ChronovisorMixtralController, window: RoutingWindow) -> KnobState:
        summary = window.summary()
        return KnobState(
            step=self.knob.current,
            loss=self.loss_fast,
            loss_trend=(self.loss_fast - self.loss_slow) / max(self.loss_slow, 1e-9),
            coherence_R=controller.coherence_history[-1],
            load_entropy=summary["load_entropy"],
            router_entropy=summary["router_entropy"],
            dead_experts=int(summary["dead_experts"]),
            kappa=controller.meta_knob.kappa,
        )

    def metrics(self) -> dict[str, Any]:
        """Fields of a metrics record."""
        controller = self.controller
        if controller is None or controller.window is None:
            return {}
        landscape = controller.get_structural_temperature_diagnostics()
        layers = [controller.get_structural_temperature_diagnostics(layer) for layer in range(len(controller.health))]
        excess = controller.mean_load.amax(dim=-1) * controller.steering.available.sum(dim=-1) - 1
        gradients = {name: norm.item() for name, norm in controller.steering.gradient_norms.items()}
        lm = gradients.pop("lm", 0.0)
        return {
            "kappa": controller.meta_knob.kappa,
            "intent": controller.meta_knob.intent,
            "R": controller.coherence_history[-1],
            "gate": self.gate,
            "max_violation_global": excess.max().item(),
            "T_bar_variance": landscape["variance"],
            "T_bar": [layer["structural_T"] for layer in layers],
            "landscape_formed": [layer["landscape_formed"] for layer in layers],
            "valleys": landscape["valleys"],
            "ridges": landscape["ridges"],
            "layer_valleys": [layer["valleys"] for layer in layers],
            "pressure": controller.live_pressure.tolist(),
            "health": controller.health.tolist(),
            "masked_experts": controller.masked.nonzero().tolist(),
            "router_gradient_ratios": {name: norm / lm for name, norm in gradients.items()} if lm > 0 else {},
        }

    def state_dict(self) -> dict[str, Any]:
        """The knob and the averages of the loss."""
        seen = None if self.knob_state is None else dataclasses.asdict(self.knob_state)
        return ControlState(
            knob=self.knob.state_dict(),
            knob_state=seen,
            loss_fast=self.loss_fast,
            loss_slow=self.loss_slow,
            fields_saved=self.config.save_chronovisor_state,
        ).to_json()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        saved = ControlState.from_json(state, "control", exact=True)
        names = {one.name for one in dataclasses.fields(KnobState)}
        if saved.knob_state is not None and (wrong := names ^ set(saved.knob_state)):
            raise ConfigError(f"control.knob_state.{min(wrong)} is missing or unknown.")
        self.knob.load_state_dict(saved.knob)
        self.loss_fast, self.loss_slow, self._fields_saved = saved.loss_fast, saved.loss_slow, saved.fields_saved
        self.knob_state = None if saved.knob_state is None else KnobState(**state["knob_state"])

    def load(self, folder: Path) -> None:
        """Restore the controller, which is saved with the model; it starts new where it was not saved."""
        controller = self.controller
        if controller is None:
            return
        if not self._fields_saved:
            controller.reset()
            return
        saved = ChronovisorCheckpoint.load(folder)
        saved.refuse_unfit(controller, folder)
        controller.reset()
        saved.restore_to_controller(controller, folder)
        if self.gated is not None and controller.coherence_history:
            coherence = controller.coherence_history[-1]
            self.gate = gate_value(coherence, self.config.min_coherence, self.config.gating_strength)
        if saved.record.control != controller.config:
            controller.release()  # what they had on may be off now
            self.show("  The control layer's settings differ from the checkpoint's; today's apply.")


def language_model_loss(
    model: nn.Module, batch: Batch, sequences: int, length: int | None = None
) -> Callable[[], Tensor]:
    """Next-token loss of ``model`` as evaluated, one mean for each of the first sequences of a batch, (sequences,).

    ``length`` limits how much of each is read. Sequences without a target are left out.
    """
    names = ("input_ids", "attention_mask")
    inputs = {name: value[:sequences, :length] for name, value in batch.items() if name in names}
    # Nothing follows the last token. Transposed logits would make the loss several times as slow.
    targets = F.pad(labels_of(batch)[:sequences, 1:length], (0, 1), value=IGNORED)

    @torch.no_grad()
    def loss() -> Tensor:
        was_training = model.training
        model.eval()
        try:
            logits = model(**inputs, use_cache=False).logits.float()
        finally:
            model.train(was_training)
        losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none")
        count = (targets != IGNORED).sum(dim=-1)
        return losses.view_as(targets).sum(dim=-1)[count > 0] / count[count > 0]

    return loss
