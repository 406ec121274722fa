"""ControlConfig: every number of the control layer and one switch per mechanism. Imports nothing heavy."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from chronomoe.errors import ConfigError
from chronomoe.settings import Bounds, Count, NonNegative, Positive, Settings, Share

PressureRule = Literal["off", "sign", "pi"]
Ablation = Literal["none", "aux", "loss_free", "pi", "pi_temperature", "pi_health", "full"]
Memory = Annotated[float, Bounds(ge=0, lt=1)]


@dataclass(frozen=True, kw_only=True)
class ControlConfig(Settings):
    """Settings of :class:`ChronovisorMixtralController`. Rates are per tick, gains in units of the logits' spread."""

    pressure: PressureRule = "pi"
    """pi: proportional-integral control of the load; sign: loss-free balancing (Wang et al. 2024); off: none."""
    temperature: bool = True
    """Give each expert a temperature, hot where it is under-used or recovering, cold where it is a specialist."""
    health: bool = True
    """Watch each expert's worth through its gradient, probe suspects, mask harmful ones."""

    gamma: NonNegative = 0.07
    """Integral gain of the pressure at rest."""
    gamma_p: NonNegative = 0.02
    """Proportional gain of the pressure."""
    gamma_early: NonNegative = 0.3
    """Integral gain at the first tick."""
    early_ticks: Positive = 300.0
    """Ticks after which the early gain has fallen to 1/e of its excess."""
    gamma_alarm: NonNegative = 0.8
    """Integral gain while some load stays far from its target: at the start, after a shift, with an expert masked."""
    alarm: NonNegative = 0.3
    """Persistent relative load error at which the gain begins to rise; at twice this it is ``gamma_alarm``."""
    leak: Share = 0.0
    """Share of the integral forgotten each tick."""
    bound: Positive | None = 3.0
    """Largest pressure, in standard deviations of the logits; none for no bound."""
    centred: bool = True
    """Keep the PI pressures of a layer summing to 0; the sign rule, as published, never does."""
    sign_step: NonNegative = 0.01
    """Step of the sign rule, in logits."""

    coherence_memory: Memory = 0.98
    """Memory of the direction each expert's inputs come from."""

    health_scale: Positive = 0.25
    """Gradient contrast at which health saturates."""
    suspect_below: float = -0.3
    """Health below which an expert is probed."""
    probe_every: Count = 25
    """Ticks between probes, at least; after each without a verdict that expert waits twice as long, up to 16 times."""
    probe_sequences: Count = 16
    """Sequences a probe compares the loss on."""

    beta_usage: NonNegative = 0.3
    """Heat of an expert without load."""
    beta_recovery: NonNegative = 0.35
    """Heat of an expert that has just been let back in."""
    beta_specialist: NonNegative = 0.2
    """Cold of a coherent, healthy expert."""
    eta_structural_T_local: Share = 0.01
    """Rate of the structural temperature of each layer."""
    eta_structural_T_global: Share = 0.005
    """Rate of the structural temperature of each expert slot over all layers."""
    fast_weight: Share = 0.5
    """Share of the fast temperature in the effective one; the rest is the structural one of the layer."""

    initial_noise: NonNegative = 0.3
    """Exploration noise at kappa = 1, falling to none at kappa <= 0."""

    def ablate(self, name: Ablation) -> "ControlConfig":
        """These settings with the mechanisms of one experimental arm switched on and the others off."""
        if name not in ABLATIONS:
            raise ConfigError(f"there is no control setting {name!r}; use one of {', '.join(ABLATIONS)}.")
        return self.replace(**ABLATIONS[name])


_OFF: dict[str, Any] = {
    "pressure": "off",
    "temperature": False,
    "health": False,
    "initial_noise": 0.0,
}
ABLATIONS: dict[str, dict[str, Any]] = {
    "none": _OFF,
    "aux": _OFF,
    "loss_free": {**_OFF, "pressure": "sign"},
    "pi": {**_OFF, "pressure": "pi"},
    "pi_temperature": {**_OFF, "pressure": "pi", "temperature": True},
    "pi_health": {**_OFF, "pressure": "pi", "health": True},
    "full": {"pressure": "pi", "temperature": True, "health": True},
}
"""Experimental arms. ``aux`` is ``none`` with the balance loss; see :meth:`TrainingConfig.ablated` for what a trainer
takes from the loss, the gate and kappa in each."""
