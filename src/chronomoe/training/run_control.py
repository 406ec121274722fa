"""The control layer within one run: kappa's schedule, the controller's tick, the gate, probes of suspect experts."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from chronomoe.control.controller import ChronovisorMixtralController
from chronomoe.data.windows import IGNORED
from chronomoe.errors import UnsupportedModelError
from chronomoe.hosts.attach import attach
from chronomoe.knob import Agent, KnobScheduler, KnobState
from chronomoe.routing.losses import ChronoMoELoss
from chronomoe.routing.statistics import RoutingWindow
from chronomoe.training.config import TrainingConfig
from chronomoe.training.evaluation import labels_of
from chronomoe.training.gating import CoherenceGatedOptimizer, gate_value

_FAST, _SLOW = 0.05, 0.01
"""Rates of the two averages whose difference is the trend of the loss."""


def controller_for(model: Any, config: TrainingConfig) -> ChronovisorMixtralController | None:
    """The controller of ``model``, attached if need be and set as ``config`` says; None for a model without experts."""
    controller: ChronovisorMixtralController | None = getattr(model, "controller", None)
    if controller is None:
        try:
            controller = attach(model)
        except UnsupportedModelError:
            return None  # a dense model trains too
    loss = ChronoMoELoss(
        lambda_balance=config.lambda_balance,
        lambda_coherence=config.lambda_coherence,
        lambda_valley=config.lambda_valley,
        lambda_z=config.lambda_z,
    )
    steering = controller.steering
    steering.config = dataclasses.replace(steering.config, loss=loss, balance_scope="step")
    if config.control is not None:
        controller.config = controller.config.ablate(config.control)
        controller.release()
    return controller


class ExpertUsage:
    """What each expert was given since the last report, all its assignments, padding left out."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def add(self, window: RoutingWindow) -> None:
        """One step."""
        for name in ("assignments", "probability", "tokens"):
            value = getattr(window, name).double()
            self._sums[name] = self._sums[name] + value if name in self._sums else value.clone()

    def report(self) -> dict[str, Any]:
        """Means over the MoE layers, and each layer's own; then it counts anew. Empty when nothing was routed."""
        if not self._sums:
            return {}
        counts_LN, tokens_L = self._sums["assignments"], self._sums["tokens"]
        share_LN = self._sums["probability"] / tokens_L.unsqueeze(-1)
        self._sums = {}
        return {
            "avg_routing_prob": [round(p, 4) for p in share_LN.mean(dim=0).tolist()],
            "token_counts": [round(n) for n in counts_LN.mean(dim=0).tolist()],
            "total_tokens": round(tokens_L.mean().item()),
            "layers": {
                "avg_routing_prob": [[round(p, 4) for p in row] for row in share_LN.tolist()],
                "token_counts": [[round(n) for n in row] for row in counts_LN.tolist()],
                "total_tokens": [round(n) for n in tokens_L.tolist()],
            },
        }

    def state_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {name: value.tolist() for name, value in self._sums.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        self._sums = {name: torch.tensor(value, dtype=torch.float64) for name, value in state.items()}


class RunControl:
    """What the trainer calls; does nothing for a model without a controller."""

    def __init__(
        self,
        model: nn.Module,
        controller: ChronovisorMixtralController | None,
        config: TrainingConfig,
        total_steps: int,
        show: Callable[[str], None],
        agent: Agent | None = None,
    ) -> None:
        self.model, self.controller, self.config, self.show = model, controller, config, show
        self.optimizer: CoherenceGatedOptimizer | None = None
        """Set when updates are gated."""
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
        self.usage = ExpertUsage()
        self.state: KnobState | None = None
        """What an agent sees, after the first step of an adaptive schedule."""
        self._complaint = ""

    @property
    def active(self) -> bool:
        """Does anything here move?"""
        return self.controller is not None and self.controller.steering.config.enabled

    def announce(self) -> None:
        """Say what the user may not expect of the settings."""
        if self.active and self.knob.too_short:
            self.show(
                f"kappa stays at {self.knob.initial_kappa}: its warm-up of {self.knob.warmup_steps} steps is not "
                "shorter than the run; set kappa_warmup_steps lower to let it move."
            )
        if self.active and self.controller is not None:
            steering = self.controller.steering
            if steering.top_k == steering.num_experts:
                self.show("every token uses every expert: there is no routing to control.")

    def after_backward(
        self, batches: Sequence[Mapping[str, Any]], lm_loss: float, *, finite: bool
    ) -> RoutingWindow | None:
        """One step's gradients are complete: turn the knob, tick, gate the update, judge suspects.

        Returns the step's window; None when the step is not finite or nothing was routed.
        """
        controller = self.controller
        if controller is None:
            return None
        if not finite:
            self.knob.step()
            controller.steering.discard_step()
            if self.active and controller.config.health:
                self._say(controller.mask_broken())
            return None
        first = self.loss_slow == 0.0
        self.loss_fast = lm_loss if first else self.loss_fast + _FAST * (lm_loss - self.loss_fast)
        self.loss_slow = lm_loss if first else self.loss_slow + _SLOW * (lm_loss - self.loss_slow)
        decision = self.knob.step(self.state)
        if self.knob.complaint != self._complaint:
            self._complaint = self.knob.complaint
            if self._complaint:
                self.show(f"  The knob's agent failed, kappa stays: {self._complaint}")
        if self.active:
            controller.set_knob(decision.kappa, decision.intent)
        window = controller.tick()
        if window is not None:
            self.usage.add(window)
        if window is not None and self.config.kappa_schedule == "adaptive":
            self.state = self._state(controller, window)
        if self.optimizer is not None and window is not None:
            self.optimizer.coherence = controller.coherence_history[-1]
            self.gate = self.optimizer.gate
        self._say(controller.judge(lambda: self._probed_loss(batches)))
        return window

    def _probed_loss(self, batches: Sequence[Mapping[str, Any]]) -> Tensor:
        assert self.controller is not None
        # A sequence that is trained in pieces would not fit whole.
        wanted, length = self.controller.config.probe_sequences, self.config.chunk_size
        losses: list[Tensor] = []
        for batch in batches:
            if (left := wanted - sum(map(len, losses))) > 0:
                losses.append(language_model_loss(self.model, batch, left, length)())
        return torch.cat(losses)

    def _say(self, verdicts: list[str]) -> None:
        for verdict in verdicts:
            self.show(f"  Health: {verdict}")

    def _state(self, controller: ChronovisorMixtralController, window: RoutingWindow) -> KnobState:
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

    def deployed(self) -> AbstractContextManager[None]:
        """Within the block the model routes as it will when deployed."""
        return nullcontext() if self.controller is None else self.controller.deployed()

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
        """What the controller does not hold, JSON-ready."""
        state = None if self.state is None else dataclasses.asdict(self.state)
        knob = {"knob": self.knob.state_dict(), "knob_state": state, "usage": self.usage.state_dict()}
        return {**knob, "loss_fast": self.loss_fast, "loss_slow": self.loss_slow}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`; raises KeyError, TypeError or ValueError for anything else."""
        if wrong := set(state) ^ set(self.state_dict()):
            raise KeyError(f"control.{min(wrong)} is missing or unknown")
        losses = [float(state[name]) for name in ("loss_fast", "loss_slow")]
        if not all(map(math.isfinite, losses)):
            raise ValueError("a smoothed loss is not finite")
        self.knob.load_state_dict(state["knob"])
        self.loss_fast, self.loss_slow = losses
        self.usage.load_state_dict(state["usage"])
        self.state = None if state["knob_state"] is None else KnobState(**state["knob_state"])
        if self.optimizer is not None and self.controller is not None and self.controller.coherence_history:
            coherence = self.controller.coherence_history[-1]
            self.gate = gate_value(coherence, self.config.min_coherence, self.config.gating_strength)


def language_model_loss(
    model: Any, batch: Mapping[str, Any], sequences: int, length: int | None = None
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
        told = (targets != IGNORED).sum(dim=-1)
        return losses.view_as(targets).sum(dim=-1)[told > 0] / told[told > 0]

    return loss
