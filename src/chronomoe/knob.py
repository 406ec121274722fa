"""The meta-knob kappa in [-1, 1]: one number from exploration (+1) to exploitation (-1), and what sets it.

That is a schedule, a rule-based controller that watches the run, or an agent outside (a person, a script, a language
model) that reads a compact state as JSON and answers with kappa and a reason.
"""

import contextlib
import json
import math
import re
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from numbers import Real
from typing import Annotated, Any, Literal, Protocol

from chronomoe.errors import ConfigError
from chronomoe.settings import Bounds, Settings

Intent = Literal["neutral", "explore_unbalanced", "explore_stuck", "stabilize_improving"]
"""What the rules are after."""
Schedule = Literal["linear", "cosine", "step", "adaptive"]
SCHEDULES = ("linear", "cosine", "step", "adaptive")
INITIAL_KAPPA, FINAL_KAPPA = 0.5, -0.3
"""A run begins exploring and ends exploiting."""
HISTORY = 1000


@dataclass(frozen=True, kw_only=True)
class KnobFactors:
    """What kappa multiplies; every factor satisfies f(kappa) f(-kappa) = 1."""

    kappa: float = 0.0
    pressure_scale: float = 1.0
    """Gains of the pressure controller, e^(0.5 kappa)."""
    temp_scale: float = 1.0
    """Base temperature, e^(0.4 kappa)."""
    rate_scale: float = 1.0
    """Rates of the controller's own learning, e^(0.7 kappa)."""


@dataclass(frozen=True, kw_only=True)
class KnobDecision:
    """A value for kappa and why."""

    kappa: float
    intent: str
    reasoning: str = ""

    def __post_init__(self) -> None:
        checked_kappa(self.kappa)
        for name in ("intent", "reasoning"):
            if not isinstance(getattr(self, name), str):
                raise ConfigError(f"{name} is {getattr(self, name)!r}; it must be text.")


def checked_kappa(kappa: object) -> float:
    """``kappa`` as a float; :class:`ConfigError` unless it is a number in [-1, 1]."""
    if isinstance(kappa, bool) or not isinstance(kappa, Real) or kappa < -1 or not kappa <= 1:
        raise ConfigError(f"kappa is {kappa!r}; it must be a number between -1 and 1.")
    return float(kappa)


class MetaKnob:
    """Holds kappa, its intent, and a bounded history of both."""

    def __init__(self) -> None:
        self.history: deque[tuple[float, str]] = deque(maxlen=HISTORY)
        self.reset()

    def reset(self) -> None:
        """Set kappa to 0 and clear the history."""
        self.kappa, self.intent = 0.0, "neutral"
        self.history.clear()

    def set(self, kappa: float, intent: str = "manual") -> None:
        """Set kappa; :class:`ConfigError` for a value outside [-1, 1] or not a number, and then nothing changes."""
        # An intent is a few words in a log line, also when an agent wrote it.
        self.kappa, self.intent = checked_kappa(kappa), " ".join(str(intent).split())[:80]
        self.history.append((self.kappa, self.intent))

    @property
    def factors(self) -> KnobFactors:
        """What the present kappa multiplies."""
        return KnobFactors(
            kappa=self.kappa,
            pressure_scale=math.exp(0.5 * self.kappa),
            temp_scale=math.exp(0.4 * self.kappa),
            rate_scale=math.exp(0.7 * self.kappa),
        )


@dataclass(frozen=True, kw_only=True)
class KnobState:
    """What a decision about kappa may rest on; small enough for a prompt."""

    step: int
    """Steps done."""
    loss: float
    """Smoothed training loss, nats per token."""
    loss_trend: float
    """Its relative change over the last hundred steps or so; negative is better."""
    coherence_R: float
    load_entropy: float
    """Entropy of the load over log N: 1 when balanced."""
    router_entropy: float
    """Entropy of the routers over log N: 1 for routers that know nothing."""
    dead_experts: int
    kappa: float

    def to_json(self) -> str:
        """One line of JSON, four digits."""
        return json.dumps(
            {name: round(value, 4) if isinstance(value, float) else value for name, value in asdict(self).items()}
        )


class Agent(Protocol):
    """Anything that turns the knob: given a state, a decision, or None to leave it as it is.

    If it has ``state_dict()`` and ``load_state_dict()`` (JSON-ready), checkpoints remember it.
    """

    def __call__(self, state: KnobState) -> KnobDecision | None: ...


def parse_decision(text: str) -> KnobDecision:
    """The decision in an agent's answer: one JSON object with ``kappa``, and optionally ``intent`` and ``reasoning``.

    Text around the object is allowed, a number outside it is not taken. :class:`ConfigError` when there is none.
    """
    answer = next((found for found in _objects(str(text)) if "kappa" in found), None)
    if answer is None:
        raise ConfigError(
            'the answer holds no JSON object with kappa, for example {"kappa": 0.2, "intent": "explore"}.'
        )
    return KnobDecision(
        kappa=checked_kappa(answer["kappa"]),
        intent=str(answer.get("intent", "agent")),
        reasoning=str(answer.get("reasoning", ""))[:500],
    )


def _objects(text: str) -> Iterator[dict[str, Any]]:
    """JSON objects that begin anywhere in a text."""
    for brace in re.finditer("{", text):
        with contextlib.suppress(ValueError, RecursionError):
            found, _ = json.JSONDecoder().raw_decode(text, brace.start())
            if isinstance(found, dict):
                yield found


class RuleBasedKnobController:
    """Explores when the smoothed loss is stuck or routing has collapsed, settles when the loss falls; with hysteresis.

    A state must hold for ``patience`` calls before kappa moves towards it, by at most ``rate`` a call.
    """

    STUCK, FALLING = -0.0005, -0.005
    """Relative loss trends above and below which the loss is stuck, or falls."""

    def __init__(self, *, patience: int = 20, rate: float = 0.02) -> None:
        if not patience >= 1 or not 0 < rate <= 2:
            raise ConfigError(f"patience is {patience} and rate {rate}; use at least 1 and a rate above 0.")
        self.patience, self.rate = patience, rate
        self.intent: Intent = "neutral"
        self._candidate: Intent = "neutral"
        self._held = 0

    def __call__(self, state: KnobState) -> KnobDecision:
        """The next kappa."""
        wish = self._wish(state)
        self._held = self._held + 1 if wish == self._candidate else 1
        self._candidate = wish
        if self._held >= self.patience:
            self.intent = wish
        goal = _TARGETS[self.intent]
        kappa = state.kappa + max(-self.rate, min(self.rate, goal - state.kappa))
        return KnobDecision(kappa=max(-1.0, min(1.0, kappa)), intent=self.intent)

    def _wish(self, state: KnobState) -> Intent:
        # A band between two thresholds keeps what is, so that noise at one of them changes nothing.
        if state.dead_experts or state.load_entropy < 0.7:
            return "explore_unbalanced"
        if state.load_entropy < 0.8 and self.intent == "explore_unbalanced":
            return self.intent
        if state.loss_trend > self.STUCK:
            return "explore_stuck"
        if state.loss_trend < self.FALLING:
            return "stabilize_improving"
        return self.intent

    def state_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {"intent": self.intent, "candidate": self._candidate, "held": self._held}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state_dict` returned; :class:`ConfigError`, and nothing changed, for anything else."""
        saved = _RulesState.from_json(state, "agent", exact=True)
        self.intent, self._candidate, self._held = saved.intent, saved.candidate, saved.held


@dataclass(frozen=True, kw_only=True)
class _RulesState(Settings):
    title = "agent."
    intent: Intent
    candidate: Intent
    held: Annotated[int, Bounds(ge=0)]


_TARGETS: dict[Intent, float] = {
    "neutral": 0.0,
    "explore_unbalanced": 0.5,
    "explore_stuck": 0.3,
    "stabilize_improving": -0.3,
}


@dataclass(frozen=True, kw_only=True)
class _SchedulerState(Settings):
    title = "knob."
    current: Annotated[int, Bounds(ge=0)]
    decision: dict[str, Any]
    agent: dict[str, Any] | None


class KnobScheduler:
    """kappa over a run: ``initial_kappa`` during warm-up, then to ``final_kappa`` at ``total_steps``.

    ``linear`` and ``cosine`` anneal, ``step`` moves at 1/3 and 2/3, ``adaptive`` asks ``agent`` (the rules by default)
    after warm-up. A warm-up as long as the run keeps kappa at its initial value.
    """

    def __init__(
        self,
        initial_kappa: float = INITIAL_KAPPA,
        final_kappa: float = FINAL_KAPPA,
        warmup_steps: int = 1000,
        total_steps: int = 10000,
        schedule: Schedule = "cosine",
        agent: Agent | None = None,
    ) -> None:
        self.initial_kappa, self.final_kappa = checked_kappa(initial_kappa), checked_kappa(final_kappa)
        if schedule not in SCHEDULES:
            raise ConfigError(f"there is no kappa schedule {schedule!r}; use one of {', '.join(SCHEDULES)}.")
        if not (warmup_steps >= 0 and total_steps >= 1):
            raise ConfigError(f"{warmup_steps} warm-up steps of {total_steps}; use at least 0 of at least 1.")
        self.warmup_steps, self.total_steps, self.schedule = warmup_steps, total_steps, schedule
        if agent is not None and not callable(agent):
            raise ConfigError(f"the agent is a {type(agent).__name__}; give something to call with a KnobState.")
        self.agent: Agent = agent or RuleBasedKnobController()
        self.current = 0
        self.complaint = ""
        """What was wrong with the agent's latest answer."""
        self._decision = KnobDecision(kappa=self.initial_kappa, intent="warmup_explore")

    @property
    def too_short(self) -> bool:
        """Does the run end within its warm-up?"""
        return self.warmup_steps >= self.total_steps

    def step(self, state: KnobState | None = None) -> KnobDecision:
        """Count one step and return its kappa. ``adaptive`` needs ``state``; without one, or without a valid answer, it
        keeps the decision it has."""
        self.current += 1
        if self.current <= self.warmup_steps:
            self._decision = KnobDecision(kappa=self.initial_kappa, intent="warmup_explore")
        elif self.schedule == "adaptive":
            if state is not None:
                self._ask(state)
        else:
            self._decision = self._scheduled()
        return self._decision

    def _ask(self, state: KnobState) -> None:
        """Take the agent's decision; one that fails or answers nonsense leaves kappa where it is."""
        try:
            answer = self.agent(state)
            if answer is not None:
                self._decision = KnobDecision(kappa=answer.kappa, intent=answer.intent, reasoning=answer.reasoning)
            self.complaint = ""
        except Exception as error:  # whatever an agent may raise, the run goes on
            self.complaint = f"{type(error).__name__}: {error}"

    def _scheduled(self) -> KnobDecision:
        a, b = self.initial_kappa, self.final_kappa
        progress = min(1.0, (self.current - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps))
        if self.schedule == "linear":
            return KnobDecision(kappa=a + (b - a) * progress, intent="linear_anneal")
        if self.schedule == "cosine":
            kappa = b + (a - b) * 0.5 * (1 + math.cos(math.pi * progress))
            return KnobDecision(kappa=kappa, intent="cosine_anneal")
        if progress < 1 / 3:
            return KnobDecision(kappa=a, intent="step_explore")
        if progress < 2 / 3:
            return KnobDecision(kappa=(a + b) / 2, intent="step_transition")
        return KnobDecision(kappa=b, intent="step_exploit")

    def state_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        agent = self.agent.state_dict() if hasattr(self.agent, "state_dict") else None
        return {"current": self.current, "decision": asdict(self._decision), "agent": agent}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state_dict` returned; :class:`ConfigError`, and nothing changed, for anything else."""
        saved = _SchedulerState.from_json(state, "knob", exact=True)
        if wrong := set(saved.decision) ^ {field.name for field in fields(KnobDecision)}:
            raise ConfigError(f"knob.decision.{min(wrong)} is missing or unknown.")
        decision = KnobDecision(**saved.decision)
        if hasattr(self.agent, "load_state_dict") and saved.agent is not None:
            self.agent.load_state_dict(saved.agent)
        self.current, self._decision = saved.current, decision
