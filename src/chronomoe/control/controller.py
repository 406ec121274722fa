"""ChronovisorMixtralController: moves the fields of all routers, one tick per optimizer step.

    state.py         what it remembers           judge.py         which experts are probed, masked, let back in
    tick.py          how one step moves it       diagnostics.py   what it says

A step without tokens, or one skipped for a loss that is not finite, moves nothing. In eval mode nothing counts;
every forward in training mode counts, with or without a gradient: call ``model.eval()`` before generating
within a step.

Shape suffixes: L MoE layers, N experts.
"""

import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from chronomoe.control import diagnostics, judge, tick
from chronomoe.control.config import ControlConfig
from chronomoe.control.state import ControlState
from chronomoe.errors import ConfigError
from chronomoe.knob import MetaKnob
from chronomoe.routing.statistics import RoutingWindow
from chronomoe.routing.steering import Steering

HISTORY = 1000
"""Entries kept of each history."""


class ChronovisorMixtralController(ControlState):
    """Drives ``steering``; found as ``model.controller``. Call :meth:`tick` once per optimizer step.

    ``experts`` are the modules of the experts, one a layer, in which broken ones are found. Raises :class:`ConfigError`
    for a steering that has a controller already.
    """

    steering: Steering
    experts: list[nn.Module]

    def __init__(
        self, steering: Steering, config: ControlConfig | None = None, experts: Sequence[nn.Module] = ()
    ) -> None:
        if steering.controlled:
            raise ConfigError("this steering has a controller already; use model.controller.")
        super().__init__(*steering.direction.shape)
        steering.controlled = True
        # Not submodules: the model owns them.
        vars(self).update(steering=steering, experts=list(experts))
        self.config = config or ControlConfig()
        self.meta_knob = MetaKnob()
        self.coherence_history: deque[float] = deque(maxlen=HISTORY)
        """R of the last ticks, newest last."""
        self.window: RoutingWindow | None = None
        """What the routers observed in the latest step."""

    def reset(self) -> None:
        """Forget everything and make every field neutral."""
        self.forget()
        self.steering.reset()

    @torch.no_grad()
    def forget(self) -> None:
        """Forget what was learned; the fields stay, but experts masked by health are available again."""
        self.steering.available.logical_or_(self.masked)
        self.clear()
        self.meta_knob.reset()
        self.coherence_history.clear()
        self.window = None

    @torch.no_grad()
    def release(self) -> None:
        """Undo the fields of mechanisms that the configuration has off: what they left would steer on for ever.

        Fields set by hand stay, where the controller has not moved them.
        """
        if int(self.ticks):
            tick.release(self, self.steering, self.config)

    def set_knob(self, kappa: float, intent: str = "manual") -> None:
        """Set kappa in [-1, 1]; :class:`ConfigError` for anything else, and then nothing changes."""
        self.meta_knob.set(kappa, intent)

    @torch.no_grad()
    def tick(self, *, finite: bool = True) -> RoutingWindow | None:
        """Close the routers' window and move every field; call it after backward, before the optimizer's step.

        ``finite=False`` (a loss or gradient was not finite) discards the window and moves nothing. Returns the window,
        or None when it was discarded, empty, or held something that is not finite; experts whose output is not finite
        are then masked, with a warning, if health is on.
        """
        if not finite:
            self.steering.discard_step()
        window = self.steering.end_step() if finite else None
        if window is None:
            if self.config.health and self.steering.config.enabled:
                for verdict in self.mask_broken():
                    warnings.warn(verdict, stacklevel=3)  # one is no_grad's
            return None
        self.window = window
        config, steering, factors = self.config, self.steering, self.meta_knob.factors
        tick.advance(self, window, config, factors, dense=steering.top_k == steering.num_experts)
        if steering.config.enabled:
            tick.steer(self, steering, window, config, factors)
        self.coherence_history.append(self.R)
        return window

    @torch.no_grad()
    def deploy(self) -> None:
        """From now on, until the next tick, the routers see the averaged pressure and no noise.

        The last pressure of a run is tuned to its last batches; the average holds on other text.
        """
        steering = self.steering
        if steering.config.enabled and self.config.pressure != "off" and int(self.ticks):
            steering.pressure.copy_(self.mean_pressure)
            steering.exploration.zero_()

    @contextmanager
    def deployed(self) -> Iterator[None]:
        """Within the block the model is as :meth:`deploy` leaves it; then it is live again."""
        steering = self.steering
        live = steering.pressure.clone(), steering.exploration.clone()
        self.deploy()
        try:
            yield
        finally:
            steering.pressure.copy_(live[0])
            steering.exploration.copy_(live[1])

    # -- health ----------------------------------------------------------------------------------------------------

    def suspects(self) -> list[tuple[int, int]]:
        """(layer, expert) to probe now: unhealthy ones, masked ones that may come back; empty if it is not time yet."""
        return judge.suspects(self, self.steering, self.config)

    def judge(self, loss: Callable[[], Tensor]) -> list[str]:
        """Probe the suspects with ``loss`` (one value a sequence) and act on the verdicts; returns sentences.

        Masking takes proof that the loss falls, coming back does not; see :mod:`chronomoe.control.judge`. Every rank
        must call this with its own sequences.
        """
        if not (suspected := self.suspects()):
            return []
        return judge.judge(self, self.steering, self.config, suspected, loss)

    def mask_broken(self) -> list[str]:
        """Mask experts whose weights or outputs are not finite, after a step that was not; returns sentences."""
        return judge.mask_broken(self, self.steering, self.experts)

    # -- what it says ----------------------------------------------------------------------------------------------

    @property
    def temperature_effective(self) -> Tensor:
        """(L, N) log temperature used for routing."""
        return tick.effective_temperature(self, self.config, self.steering.config.rho)

    @property
    def valley_weight(self) -> Tensor:
        """(L, N) how much an expert is an unhealthy valley: cold and bad, in [0, 1]; exactly 0 for all others."""
        return tick.valley_weight(self, self.config)

    def get_structural_temperature_diagnostics(self, layer: int | None = None) -> dict[str, Any]:
        """The landscape of one layer, or of the expert slots over all; see :func:`diagnostics.landscape_of`."""
        return diagnostics.landscape_of(self, self.config, layer)

    def get_valley_health_diagnostics(self, layer: int | None = None) -> dict[str, Any]:
        """Which valleys of a layer, or of all, hold healthy experts; see :func:`diagnostics.valley_health_of`."""
        return diagnostics.valley_health_of(self, self.config, layer)

    def get_diagnostics(self) -> dict[str, Any]:
        """Everything at a glance, JSON-ready."""
        return {
            "ticks": int(self.ticks),
            "kuramoto_R": self.R,
            "R_per_layer": self.R_per_layer.tolist(),
            "coherence_history_len": len(self.coherence_history),
            "kappa": self.meta_knob.kappa,
            "intent": self.meta_knob.intent,
            "pressure": self.live_pressure.tolist(),
            "logit_spread": self.spread.tolist(),
            "mean_load": self.mean_load.tolist(),
            "health": self.health.tolist(),
            "structural_T_diagnostics": self.get_structural_temperature_diagnostics(),
            "valley_health": self.get_valley_health_diagnostics(),
        }
