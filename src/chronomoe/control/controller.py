"""ChronovisorMixtralController: moves the fields of all routers, one tick per optimizer step.

    window of the routers -> load error -> pressure b
                          -> direction of inputs -> coherence R
                          -> gradient signal -> health r -> suspects -> probe -> availability
                          -> fast temperature -> structural temperature -> temperature T

State is (layers, experts) buffers in fp32: it moves with the model, is saved in checkpoints, and is the same on every
rank, since all ranks see the same summed window and do the same arithmetic. A step without tokens, or one skipped for a
loss that is not finite, moves nothing. Evaluation and generation never do in eval mode; every forward in training mode
counts, with or without a gradient: call ``model.eval()`` before generating within a step.

Shape suffixes: L MoE layers, N experts, D hidden size, B blocks of time.
"""

import math
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from chronomoe.control import diagnostics, landscape, pressure, temperature
from chronomoe.control import health as health_of
from chronomoe.control.coherence import expert_coherence, layer_coherence, update_direction
from chronomoe.control.config import ControlConfig
from chronomoe.control.landscape import BLOCK, BLOCKS
from chronomoe.errors import ConfigError
from chronomoe.knob import MetaKnob
from chronomoe.routing.statistics import RoutingWindow
from chronomoe.routing.steering import Fp32Module, Steering

HISTORY = 1000
"""Entries kept of each history."""
_SPREAD_FLOOR = 0.01
_OLD_EVIDENCE = 0.92
"""Weight of a probe after one probe interval: half after eight."""
_WELL = 0.15
"""So far above the trigger an expert is well again."""
_FEWEST, _ENOUGH = 4, 64
"""Sequences without which there is no verdict, and with which there is one or none."""
_DOUBLINGS = 4
"""An expert that stays bad is probed for ever: the wait grows to 2^this probe intervals, so that it costs little."""
_HEALING = 2
"""Doublings to begin with once masked: without tokens an expert does not learn, what changes is all the others."""


class ChronovisorMixtralController(Fp32Module):
    """Drives ``steering``; found as ``model.controller``. Call :meth:`tick` once per optimizer step.

    Buffers of shape (L, N) are named for what they hold; ``ticks`` counts. ``coherence_history`` holds the last R's.
    """

    steering: Steering
    experts: list[nn.Module]
    integral: Tensor
    live_pressure: Tensor
    mean_pressure: Tensor
    smooth_load: Tensor
    slow_load: Tensor
    mean_load: Tensor
    spread: Tensor
    direction: Tensor
    forgotten: Tensor
    coherence: Tensor
    contrast: Tensor
    gradient_size: Tensor
    health: Tensor
    masked: Tensor
    recovering: Tensor
    temperature_fast: Tensor
    structural_T_local: Tensor
    structural_T_global: Tensor
    fast_blocks: Tensor
    block_rates: Tensor
    evidence: Tensor
    last_probe: Tensor
    fruitless: Tensor
    ticks: Tensor

    def __init__(
        self, steering: Steering, config: ControlConfig | None = None, experts: Sequence[nn.Module] = ()
    ) -> None:
        super().__init__()
        if vars(steering).get("_controlled"):
            raise ConfigError("this steering has a controller already; use model.controller.")
        vars(steering)["_controlled"] = True
        # Not submodules: the model owns them.
        vars(self).update(steering=steering, experts=list(experts))
        self.config = config or ControlConfig()
        self.meta_knob = MetaKnob()
        layers, num_experts = steering.pressure.shape
        hidden = steering.direction.shape[-1]
        for name in (
            "integral", "live_pressure", "mean_pressure", "smooth_load", "slow_load", "mean_load", "forgotten",
            "coherence", "contrast", "health", "recovering", "temperature_fast", "structural_T_local",
        ):  # fmt: skip
            self.register_buffer(name, torch.zeros(layers, num_experts, dtype=torch.float32))
        for name, shape in {
            "spread": (layers,),
            "gradient_size": (layers,),
            "direction": (layers, num_experts, hidden),
            "structural_T_global": (num_experts,),
            "fast_blocks": (BLOCKS, layers, num_experts),
            "block_rates": (BLOCKS,),
            "evidence": (3, layers, num_experts),
        }.items():
            self.register_buffer(name, torch.zeros(shape, dtype=torch.float32))
        self.register_buffer("masked", torch.zeros(layers, num_experts, dtype=torch.bool))
        for name in ("last_probe", "fruitless"):  # the tick of it, and how many in a row led to no verdict
            self.register_buffer(name, torch.zeros(layers, num_experts, dtype=torch.int64))
        self.register_buffer("ticks", torch.zeros((), dtype=torch.int64))
        self.coherence_history: deque[float] = deque(maxlen=HISTORY)
        self.window: RoutingWindow | None = None
        """What the routers observed in the latest step."""
        self._now = 0
        self.keep_dtypes()
        self.forget()

    def reset(self) -> None:
        """As new: nothing learned, every field neutral."""
        self.forget()
        self.steering.reset()

    @torch.no_grad()
    def forget(self) -> None:
        """Nothing learned; the fields stay, but for experts masked by health, which are let in again."""
        self.steering.available.logical_or_(self.masked)
        for buffer in self.buffers():
            buffer.zero_()
        self.forgotten.fill_(1)
        for load in (self.smooth_load, self.slow_load, self.mean_load):
            load.fill_(1 / load.shape[-1])
        self.meta_knob.reset()
        self.coherence_history.clear()
        self.window = None

    @torch.no_grad()
    def release(self) -> None:
        """Undo the fields of mechanisms that the configuration has off: what they left would steer on for ever.

        Fields set by hand stay, where the controller has not moved them.
        """
        if not int(self.ticks):
            return
        config, steering = self.config, self.steering
        if config.pressure == "off":
            for buffer in (self.integral, self.live_pressure, self.mean_pressure, steering.pressure):
                buffer.zero_()
        if not config.temperature:
            steering.log_temperature.zero_()
        if config.initial_noise == 0:
            steering.base_temperature.fill_(1)
            steering.exploration.zero_()
        if not config.health:
            steering.available.logical_or_(self.masked)
            for buffer in (self.masked, self.evidence, self.fruitless):
                buffer.zero_()

    # -- one step --------------------------------------------------------------------------------------------------

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
        self.ticks += 1
        self._now = int(self.ticks)
        config, steering = self.config, self.steering
        available_LN = steering.available
        target_LN = health_of.equal_target(available_LN)
        if config.health_target:
            target_LN = health_of.health_target(self.health, available_LN, config.health_floor)
        load_LN = window.load_without_goals  # pressure must not fight a goal
        error_LN = pressure.load_error(load_LN, target_LN)
        self._move_pressure(window, load_LN, error_LN, target_LN)
        self._move_coherence(window)
        self._move_health(window)
        self._move_temperature(error_LN)
        if steering.config.enabled:
            self._steer()
        self.coherence_history.append(self.R)
        return window

    def _move_pressure(self, window: RoutingWindow, load_LN: Tensor, error_LN: Tensor, target_LN: Tensor) -> None:
        config = self.config
        first = self._now == 1
        self.spread.lerp_(window.logit_std / window.tokens, 1.0 if first else 0.1)
        self.mean_load.lerp_(window.load, max(0.02, 1 / self._now))
        self.smooth_load.lerp_(load_LN, 1.0 if first else config.load_smoothing)
        self.slow_load.lerp_(load_LN, 1.0 if first else 0.2)
        if config.pressure == "sign":
            self.live_pressure.copy_(
                pressure.sign_update(
                    self.live_pressure, error_LN, config.sign_step * self.meta_knob.factors.pressure_scale
                )
            )
        elif config.pressure == "pi":
            # Calm at rest, for pressure that chases the noise of single batches disturbs what is learned; quick early
            # and when an error persists.
            early = math.exp(-(self._now - 1) / config.early_ticks)
            alarm_L1 = pressure.alarm(pressure.load_error(self.slow_load, target_LN), config.alarm)
            scale_L1 = self.meta_knob.factors.pressure_scale * self.spread.clamp(min=_SPREAD_FLOOR).unsqueeze(-1)
            calm = config.gamma + (config.gamma_early - config.gamma) * early
            gamma_L1 = calm + (config.gamma_alarm - calm) * alarm_L1
            bound_L1 = None
            if config.bound is not None:
                bound_L1 = config.bound * self.spread.clamp(min=_SPREAD_FLOOR).unsqueeze(-1)
            integral_LN, b_LN = pressure.pi_update(
                self.integral,
                error_LN,
                pressure.load_error(self.smooth_load, target_LN),
                gamma_L1 * scale_L1,
                config.gamma_p * scale_L1,
                bound_L1,
                leak=config.leak,
                anti_windup=config.anti_windup,
                centred=config.centred,
            )
            self.integral.copy_(integral_LN)
            self.live_pressure.copy_(b_LN)
        self.mean_pressure.lerp_(self.live_pressure, max(config.deploy_smoothing, 1 / self._now))

    def _move_coherence(self, window: RoutingWindow) -> None:
        memory = self.config.coherence_memory
        if self.steering.top_k == self.steering.num_experts:
            self.coherence.fill_(1)  # every expert gets everything: nothing could be steadier
            return
        update_direction(self.direction, self.forgotten, window.centred_direction, memory)
        self.coherence.copy_(expert_coherence(self.direction, self.forgotten, memory))

    def _move_health(self, window: RoutingWindow) -> None:
        health_of.update_signal(
            self.contrast,
            self.gradient_size,
            window.gradient,
            window.absolute_gradient,
            window.assignments,
            self.config.health_memory,
        )
        self.health.copy_(health_of.health(self.contrast, self.gradient_size, self.config.health_scale))
        self.recovering.mul_(0.98)
        opened = self.masked & self.steering.available  # by hand: it is judged as any other, from the beginning
        self.masked.logical_xor_(opened)
        self.evidence.mul_(~opened)
        # Whoever is well again begins with short waits when it next falls ill.
        self.fruitless.mul_((self.health < self.config.suspect_below + _WELL) | self.masked)

    def _move_temperature(self, error_LN: Tensor) -> None:
        config, rate = self.config, self.meta_knob.factors.rate_scale
        fast = temperature.fast_temperature(error_LN, self.recovering, self.coherence, self.health, config)
        self.temperature_fast.copy_(fast)
        local, slots = self.structural_T_local, self.structural_T_global
        local.lerp_(fast, min(1.0, rate * config.eta_structural_T_local))
        slots.lerp_(fast.mean(dim=0), min(1.0, rate * config.eta_structural_T_global))
        block, place = divmod(self._now - 1, BLOCK)
        weight = 1 / (place + 1)  # the plain mean of the block so far
        self.block_rates[block % BLOCKS] += (rate - self.block_rates[block % BLOCKS]) * weight
        self.fast_blocks[block % BLOCKS].lerp_(fast, weight)

    def _steer(self) -> None:
        config, steering, factors = self.config, self.steering, self.meta_knob.factors
        if config.pressure != "off":
            steering.pressure.copy_(self.live_pressure)
        if config.temperature:
            steering.log_temperature.copy_(self.temperature_effective)
        if config.initial_noise > 0:
            # T0 matters only against exploration noise: a common factor changes no order.
            steering.base_temperature.fill_(factors.temp_scale)
            # Noise in units of the logits' spread, as pressure: at the start logits are all but equal.
            steering.exploration.copy_(config.initial_noise * max(0.0, factors.kappa) * self.spread.mean())
        steering.direction.copy_(nn.functional.normalize(self.direction, dim=-1))
        if self.window is not None:
            steering.input_mean.copy_(self.window.input_sum / self.window.tokens.unsqueeze(-1))
        steering.valley_weight.copy_(self.valley_weight)

    @contextmanager
    def deployed(self) -> Iterator[None]:
        """Within the block the routers see the averaged pressure and no noise, as a deployed model does.

        The last pressure of a run is tuned to its last batches; the average holds on other text.
        """
        steering = self.steering
        live = steering.pressure.clone(), steering.exploration.clone()
        if steering.config.enabled and self.config.pressure != "off" and int(self.ticks):
            steering.pressure.copy_(self.mean_pressure)
            steering.exploration.zero_()
        try:
            yield
        finally:
            steering.pressure.copy_(live[0])
            steering.exploration.copy_(live[1])

    # -- health: trigger, judge, verdict ---------------------------------------------------------------------------

    def suspects(self) -> list[tuple[int, int]]:
        """(layer, expert) to probe now: unhealthy ones, masked ones that may come back; empty if it is not time yet."""
        config, steering = self.config, self.steering
        if not (config.health and steering.config.enabled):
            return []
        now = int(self.ticks)
        since = now - int(self.last_probe.max())
        if since != 1 and since < config.probe_every:
            return []
        candidates = torch.zeros_like(self.masked)
        if since == 1:  # a close call goes on with the sequences of the next step, and the next
            count, total, _ = self.evidence
            hopeful = (total < -config.probe_margin * count) & (count < _ENOUGH)
            candidates = (self.last_probe == now - 1) & hopeful & steering.available
        if since >= config.probe_every:  # together: they share one loss to compare with
            unhealthy = (self.health < config.suspect_below) & (self.recovering < 0.5) & steering.available
            waited = now - self.last_probe >= config.probe_every << self.fruitless.clamp(0, _DOUBLINGS)
            candidates |= (unhealthy | self.masked) & waited  # who closed an expert by hand may open it
        return [(layer, expert) for layer, expert in candidates.nonzero().tolist() if self._can_spare(layer, expert)]

    def _can_spare(self, layer: int, expert: int) -> bool:
        steering = self.steering
        return bool(self.masked[layer, expert]) or int(steering.available[layer].sum()) > steering.top_k

    def judge(self, loss: Callable[[], Tensor]) -> list[str]:
        """Probe the suspects with ``loss`` (one value a sequence) and act on the verdicts; returns sentences.

        An expert is masked when its absence lowers the loss by more than ``probe_margin`` and 3 + 8 / n standard errors
        (n sequences; with few of them an error is little known). While it is more than the margin and not proven, the
        next steps' sequences are asked too, up to 64; else the next probe waits twice as long. An expert is let back in
        when its return raises the loss by no more than the margin: masking takes proof, coming back does not.
        Every rank must call this with its own sequences.
        """
        if not (suspects := self.suspects()):
            return []
        # Each is compared with the model as it is; only then does anything change.
        gains = {}
        for layer, expert, change in health_of.probe(loss, self.steering.available, suspects):
            if (found := self._gain(layer, expert, health_of.sums_of(change))) is not None:
                gains[layer, expert] = found
        verdicts = []
        for layer, expert in sorted(gains, key=gains.__getitem__):
            if self._can_spare(layer, expert):  # another verdict may have taken the last that can be
                masked = bool(self.masked[layer, expert])
                self._mask(layer, expert, masked=not masked)
                what = "back" if masked else "masked"
                verdicts.append(
                    f"expert {expert} of layer {layer} is {what}: {gains[layer, expert]:+.4f} nats per token."
                )
        return verdicts

    def _gain(self, layer: int, expert: int, sums: Tensor) -> float | None:
        """Add a probe to the evidence; the change of the loss if that calls for a verdict."""
        ticks = int(self.ticks - self.last_probe[layer, expert])
        self.last_probe[layer, expert] = self.ticks
        if ticks >= self.config.probe_every:  # else a close call goes on
            self.fruitless[layer, expert] = (self.fruitless[layer, expert] + 1).clamp(max=_DOUBLINGS)
        # Evidence of earlier probes counts too, the less the older: a batch has few sequences.
        evidence = _OLD_EVIDENCE ** (ticks / self.config.probe_every) * self.evidence[:, layer, expert]
        if sums.isfinite().all():  # one masked because its output is not finite spoils every loss
            evidence += sums
        self.evidence[:, layer, expert] = evidence
        if (count := evidence[0].item()) < _FEWEST:
            return None
        mean, error = health_of.mean_and_error(evidence)
        margin, masked = self.config.probe_margin, bool(self.masked[layer, expert])
        verdict = mean <= margin if masked else mean < -max(margin, (3 + 8 / count) * error)
        return mean if verdict else None

    def mask_broken(self) -> list[str]:
        """Mask experts whose weights or outputs are not finite, after a step that was not; returns sentences."""
        verdicts = []
        for layer, module in enumerate(self.experts):
            for expert in health_of.broken_experts(module, self.steering.num_experts, self.steering.input_mean[layer]):
                name = f"expert {expert} of layer {layer}"
                if not self.steering.available[layer, expert]:
                    continue
                if self._can_spare(layer, expert):
                    self._mask(layer, expert, masked=True)
                    verdicts.append(f"{name} is masked: what it computes is not finite.")
                else:
                    verdicts.append(f"what {name} computes is not finite, and it cannot be spared.")
        return verdicts

    @torch.no_grad()
    def _mask(self, layer: int, expert: int, *, masked: bool) -> None:
        self.masked[layer, expert] = masked
        self.steering.available[layer, expert] = not masked
        self.contrast[layer, expert] = 0
        self.health[layer, expert] = 0
        self.evidence[:, layer, expert] = 0
        self.fruitless[layer, expert] = _HEALING if masked else 0
        self.recovering[layer, expert] = 0.0 if masked else 1.0

    # -- what it knows -----------------------------------------------------------------------------------------------

    def set_knob(self, kappa: float, intent: str = "manual") -> None:
        """Set kappa in [-1, 1]; :class:`ConfigError` for anything else, and then nothing changes."""
        self.meta_knob.set(kappa, intent)

    @property
    def R(self) -> float:  # noqa: N802 (the name of the order parameter)
        """Coherence: mean over layers of the load-weighted coherence of their experts, in [0, 1]."""
        return layer_coherence(self.coherence, self.smooth_load).mean().item()

    @property
    def temperature_effective(self) -> Tensor:
        """(L, N) log temperature used for routing."""
        return temperature.effective_temperature(
            self.temperature_fast,
            self.structural_T_local,
            self.structural_T_global,
            self.config,
            self.steering.config.rho,
        )

    @property
    def valley_weight(self) -> Tensor:
        """(L, N) how much an expert is an unhealthy valley: cold and bad, in [0, 1]; exactly 0 for all others."""
        cold_LN = -landscape.contrast(self.structural_T_local)
        weight_LN = (2 * (cold_LN - landscape.Z)).sigmoid() * (4 * (self.config.suspect_below - self.health)).sigmoid()
        unhealthy_LN = (cold_LN > landscape.Z) & (self.health < self.config.suspect_below)
        return torch.where(unhealthy_LN, weight_LN, 0.0)

    def get_structural_temperature_diagnostics(self, layer: int | None = None) -> dict[str, Any]:
        """The landscape of one layer, or of the expert slots over all; see :func:`diagnostics.landscape_of`."""
        return diagnostics.landscape_of(self, layer)

    def get_valley_health_diagnostics(self, layer: int | None = None) -> dict[str, Any]:
        """Which valleys of a layer, or of all, hold healthy experts; see :func:`diagnostics.valley_health_of`."""
        return diagnostics.valley_health_of(self, layer)

    def get_diagnostics(self) -> dict[str, Any]:
        """Everything at a glance, JSON-ready."""
        return {
            "ticks": int(self.ticks),
            "kuramoto_R": self.R,
            "R_per_layer": layer_coherence(self.coherence, self.smooth_load).tolist(),
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
