"""Settings of goals: which are on and how strongly, and how they are taught."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from aios.settings.expert import ExpertTraining
from chronomoe.errors import ConfigError
from chronomoe.goals.settings import Bias, GoalSettings, Strength
from chronomoe.settings import Count, NonNegative, Positive, SequenceLength, Settings, Share
from chronomoe.training.config import TrainingConfig

Switch = Annotated[bool, Parameter(negative="", show_default=False)]
Words = Annotated[tuple[str, ...], Parameter(negative="", show_default=False)]
Numbers = Annotated[tuple[int, ...], Parameter(negative="", show_default=False)]


@dataclass(frozen=True, kw_only=True)
class GoalFlags(Settings):
    """Goals to turn on. Without --goal, --goals-active or --goals-remembered all are off, and nothing changes."""

    goal: Words = ()
    """A goal to turn on: its number or its text; may be given again."""
    goals_active: Switch = False
    """Turn on all active goals of the workspace."""
    goals_remembered: Switch = False
    """Turn on the goals the brain was trained under, as they were then."""
    goal_strength: Strength = GoalSettings.strength
    """Nats of log-odds that a goal adds to the gates of its attached experts, 0 to 5."""
    goal_kl: Positive = GoalSettings.kl
    """Nats per token by which goals linked to a brain's own experts may change its output."""
    goal_beta: Bias | None = None
    """The size of their bias by hand, 0 to 1 logits, instead of by that budget."""
    goal_layers: Numbers = ()
    """MoE layers in which they act; all when not given."""
    goal_likeness: Share = 0.0
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
        """The same; :class:`ConfigError` where flags say how goals are to act but not which."""
        if not self.any:
            for field in fields(self):
                if getattr(self, field.name) != field.default and field.name != "goals_forget":
                    flag = field.name.replace("_", "-")
                    raise ConfigError(
                        f"--{flag} needs a goal: name one with --goal, or say --goals-active or --goals-remembered."
                    )
        return self.any

    @property
    def effect(self) -> GoalSettings:
        """How much the goals may do, as the library takes it."""
        return GoalSettings(
            strength=self.goal_strength,
            kl=self.goal_kl,
            beta=self.goal_beta,
            layers=self.goal_layers or None,
            likeness=self.goal_likeness,
        )


@dataclass(frozen=True, kw_only=True)
class TrainingGoals(GoalFlags):
    """Goals to train under."""

    goal_domain: Words = ()
    """With goals: domains of the data to be drawn more often; may be given again."""
    goal_domain_weight: Positive = 2.0
    """How many times as often."""
    goals_forget: Switch = False
    """With --resume: train on without the goals the brain was trained under, and forget them."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.goals_learned:
            raise ConfigError("--goals-learned is for using a brain: what was taught is of no use to other weights.")
        if self.goals_forget and self.any:
            raise ConfigError("--goals-forget trains on without goals; leave it out to name some.")


@dataclass(frozen=True, kw_only=True)
class Lesson(Settings):
    """How goals are taught."""

    steps: Count = 200
    """Optimizer steps, the goals in turn."""
    batch_size: Count = TrainingConfig.batch_size
    """Sequences per step."""
    max_seq_len: SequenceLength = ExpertTraining.max_seq_len
    """Tokens per sequence."""
    lr: Positive = 1e-2
    """Learning rate."""
    anchor_weight: NonNegative = ExpertTraining.anchor_weight
    """Weight of the anchor: KL between the brain with the goal off and on, on its own training data."""
    eval_tokens: Count = 16384
    """Held-out tokens per goal measured before and after."""
    seed: int = 0
    """Seed of the data order."""
