"""Which goals are on, as the command line tells. Imports nothing heavy."""

import dataclasses
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from chronomoe.errors import ConfigError, require

Switch = Annotated[bool, Parameter(negative="", show_default=False)]
Words = Annotated[tuple[str, ...], Parameter(negative="", show_default=False)]
Numbers = Annotated[tuple[int, ...], Parameter(negative="", show_default=False)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class GoalFlags:
    """Goals to turn on. Without --goal, --goals-active or --goals-remembered none is, and nothing changes."""

    goal: Words = ()
    """A goal to turn on: its number or its text; may be given again."""
    goals_active: Switch = False
    """Turn on all active goals of the workspace."""
    goals_remembered: Switch = False
    """Turn on the goals the brain was trained under, as they were then."""
    goal_strength: float = 3.0
    """Nats of log-odds that a goal adds to the gates of its attached experts, 0 to 5."""
    goal_kl: float = 0.01
    """Nats per token by which goals linked to a brain's own experts may change its output."""
    goal_beta: float | None = None
    """The size of their bias by hand, 0 to 1 logits, instead of by that budget."""
    goal_layers: Numbers = ()
    """MoE layers in which they act; all when not given."""
    goal_likeness: float = 0.0
    """0 to 1: how much it counts that what an expert usually receives is like the goal's text, beside links."""
    goals_learned: Switch = False
    """Let the routers act on what `aios goals teach` taught them of these goals, too."""
    goal_text: Path | None = None
    """Text to measure that budget on. [the data the brain was trained on]"""

    @property
    def any(self) -> bool:
        """Is any goal asked for?"""
        return bool(self.goal) or self.goals_active or self.goals_remembered

    @property
    def wanted(self) -> bool:
        """The same; :class:`ConfigError` where it is said how goals are to act but not which."""
        if not self.any:
            for setting in dataclasses.fields(self):
                if getattr(self, setting.name) != setting.default and setting.name != "goals_forget":
                    flag = setting.name.replace("_", "-")
                    raise ConfigError(
                        f"--{flag} needs a goal: name one with --goal, or say --goals-active or --goals-remembered."
                    )
        return self.any


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingGoals(GoalFlags):
    """Goals to train under."""

    goal_domain: Words = ()
    """With goals: domains of the data to be drawn more often; may be given again."""
    goal_domain_weight: float = 2.0
    """How many times as often."""
    goals_forget: Switch = False
    """With --resume: go on without the goals the brain was trained under, and remember them no more."""

    def __post_init__(self) -> None:
        require(self, "goal_domain_weight", above=0)
        if self.goals_learned:
            raise ConfigError("--goals-learned is for using a brain: what was taught is of no use to other weights.")
        if self.goals_forget and self.any:
            raise ConfigError("--goals-forget trains on without goals; leave it out to name some.")
