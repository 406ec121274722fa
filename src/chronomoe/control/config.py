"""ControlConfig: every number of the control layer and one switch per mechanism. Imports nothing heavy."""

from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from chronomoe.errors import ConfigError, require

PressureRule = Literal["off", "sign", "pi"]
Ablation = Literal["none", "aux", "loss_free", "pi", "pi_temperature", "pi_health", "full"]


@dataclass(frozen=True, kw_only=True)
class ControlConfig:
    """Settings of :class:`ChronovisorMixtralController`. Rates are per tick, gains in units of the logits' spread."""

    pressure: PressureRule = "pi"
    """pi: proportional-integral control of the load; sign: loss-free balancing (Wang et al. 2024); off: none."""
    temperature: bool = True
    """Give each expert a temperature, hot where it is under-used or recovering, cold where it is a specialist."""
    health: bool = True
    """Watch each expert's worth through its gradient, probe suspects, mask the ones that do harm."""
    health_target: bool = False
    """Let the target load follow health instead of being equal."""

    gamma: float = 0.07
    """Integral gain of the pressure at rest."""
    gamma_p: float = 0.02
    """Proportional gain of the pressure."""
    gamma_early: float = 0.3
    """Integral gain at the first tick."""
    early_ticks: float = 300.0
    """Ticks after which the early gain has fallen to 1/e of its excess."""
    gamma_alarm: float = 0.8
    """Integral gain while some load stays far from its target: at the start, after a shift, with an expert masked."""
    alarm: float = 0.3
    """Persistent relative load error at which the gain begins to rise; at twice this it is ``gamma_alarm``."""
    leak: float = 0.0
    """Share of the integral forgotten each tick."""
    anti_windup: float = 0.5
    """How fast the integral gives back what the bound took."""
    bound: float | None = 3.0
    """Largest pressure, in standard deviations of the logits; none for no bound."""
    centred: bool = True
    """Keep the PI pressures of a layer summing to 0; the sign rule, as published, never does."""
    sign_step: float = 0.01
    """Step of the sign rule, in logits."""
    load_smoothing: float = 0.5
    """Weight of the newest load in the proportional term."""
    deploy_smoothing: float = 0.1
    """Weight of the newest pressure in the average that is deployed."""

    coherence_memory: float = 0.98
    """Memory of the direction each expert's inputs come from."""

    health_memory: float = 0.98
    """Memory of the gradient signal."""
    health_scale: float = 0.25
    """Gradient contrast at which health saturates."""
    health_floor: float = 0.1
    """Target share, in parts of 1/N, that an unhealthy expert keeps when health sets the target."""
    suspect_below: float = -0.3
    """Health below which an expert is probed."""
    probe_every: int = 25
    """Ticks between probes, at least; after each without a verdict that expert waits twice as long, up to 16 times."""
    probe_margin: float = 0.002
    """Loss in nats per token that masking must win at least, and surely; and that coming back may cost."""
    probe_sequences: int = 16
    """Sequences a probe looks at."""

    beta_usage: float = 0.3
    """Heat of an expert without load."""
    beta_recovery: float = 0.35
    """Heat of an expert that has just been let back in."""
    beta_specialist: float = 0.2
    """Cold of a coherent, healthy expert."""
    eta_structural_T_local: float = 0.01
    """Rate of the structural temperature of each layer."""
    eta_structural_T_global: float = 0.005
    """Rate of the structural temperature of each expert slot over all layers."""
    fast_weight: float = 0.5
    """Part of the fast temperature in the effective one; the rest is structural."""
    global_weight: float = 0.0
    """Part of the slot's global temperature in the structural one; expert numbers mean nothing across layers."""

    initial_noise: float = 0.3
    """Exploration noise at kappa = 1, falling to none at kappa <= 0."""

    def __post_init__(self) -> None:
        if self.pressure not in ("off", "sign", "pi"):
            raise ConfigError(f"pressure is {self.pressure!r}; use off, sign or pi.")
        for entry in fields(self):
            if entry.type is bool and not isinstance(value := getattr(self, entry.name), bool):
                raise ConfigError(f"{entry.name} is {value!r}; it must be true or false.")
        require(self, "suspect_below")
        others = (entry.name for entry in fields(self) if entry.type is float and entry.name not in _SHARES)
        require(self, *(name for name in others if name != "suspect_below"), least=0)
        require(self, *_SHARES, least=0, most=1)
        require(self, "coherence_memory", "health_memory", below=1)
        require(self, "health_scale", "early_ticks", above=0)
        require(self, "bound", above=0, optional=True)
        require(self, "probe_every", "probe_sequences", least=1, whole=True)

    def ablate(self, name: Ablation) -> "ControlConfig":
        """These settings with the mechanisms of one experimental arm switched on and the others off."""
        if name not in ABLATIONS:
            raise ConfigError(f"there is no control setting {name!r}; use one of {', '.join(ABLATIONS)}.")
        return replace(self, **ABLATIONS[name])


_SHARES = (
    "leak", "anti_windup", "load_smoothing", "deploy_smoothing", "coherence_memory", "health_memory",
    "eta_structural_T_local", "eta_structural_T_global", "fast_weight", "global_weight",
)  # fmt: skip
_OFF: dict[str, Any] = {
    "pressure": "off",
    "temperature": False,
    "health": False,
    "health_target": False,
    "initial_noise": 0.0,
}
ABLATIONS: dict[str, dict[str, Any]] = {
    "none": _OFF,
    "aux": _OFF,
    "loss_free": {**_OFF, "pressure": "sign"},
    "pi": {**_OFF, "pressure": "pi"},
    "pi_temperature": {**_OFF, "pressure": "pi", "temperature": True},
    "pi_health": {**_OFF, "pressure": "pi", "health": True, "health_target": True},
    "full": {"pressure": "pi", "temperature": True, "health": True, "health_target": False},
}
"""Experimental arms. ``aux`` is ``none`` with the balance loss; see :meth:`TrainingConfig.ablated` for what a trainer
takes from the loss, the gate and kappa in each."""
