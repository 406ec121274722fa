"""``goals.json`` of a brain: the goals it is trained under, and how they were turned on.

A run that is resumed trains under the same goals, and ``--goals-remembered`` turns them on in use.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from aios.brains.brain import Brain
from aios.goal_text import Weight, goal_text
from aios.settings.goals import TrainingGoals
from chronomoe.goals.steer import Goal
from chronomoe.settings import FileFormat, Settings

GOALS_FILE = "goals.json"


@dataclass(frozen=True, kw_only=True)
class RememberedGoal(Settings):
    """One goal, without its tokens, which depend on the tokenizer."""

    text: str
    weight: Weight
    experts: tuple[str, ...] = ()
    slots: tuple[tuple[int | None, int], ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        goal_text(self.text)

    @classmethod
    def of(cls, goal: Goal) -> "RememberedGoal":
        """What to remember of a goal."""
        return cls(text=goal.text, weight=goal.weight, experts=goal.experts, slots=goal.slots)

    @property
    def goal(self) -> Goal:
        """The goal as the library takes it."""
        return Goal(text=goal_text(self.text), weight=self.weight, experts=self.experts, slots=self.slots)


@dataclass(frozen=True, kw_only=True)
class GoalMemory(Settings):
    """What a brain remembers; empty where it was trained under no goal."""

    file_format: ClassVar = FileFormat(
        name="aios-brain-goals",
        version=2,
        remedy="put a copy back, or remove it to forget goals",
        outdated="remove it and name the goals again with --goal",
    )

    goals: tuple[RememberedGoal, ...] = ()
    settings: TrainingGoals = TrainingGoals()  # noqa: RUF009 (frozen)
    """How they were turned on, with ``goals_remembered`` set unless there are no goals."""

    @classmethod
    def of(cls, goals: Sequence[Goal], flags: TrainingGoals) -> "GoalMemory":
        """What to remember of goals that are turned on as the flags say."""
        text = None if flags.goal_text is None else flags.goal_text.resolve()
        kept = flags.replace(goal=(), goals_active=False, goals_forget=False, goals_remembered=True, goal_text=text)
        return cls(goals=tuple(map(RememberedGoal.of, goals)), settings=kept)


def forget(brain: Brain) -> None:
    """Leave the brain without remembered goals."""
    (brain.path / GOALS_FILE).unlink(missing_ok=True)


def read_memory(brain: Brain) -> GoalMemory:
    """What a brain remembers; :class:`CheckpointError` when the file is damaged or of another version."""
    file = brain.path / GOALS_FILE
    return GoalMemory.read_file(file) if file.exists() else GoalMemory()
