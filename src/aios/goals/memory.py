"""``goals.json`` of a brain: the goals it is trained under, and how they were turned on.

A run that is resumed trains under the same goals, and ``--goals-remembered`` turns them on in use.
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aios.brains.brain import Brain
from aios.goal_text import goal_text, goal_weight
from aios.settings.goals import TrainingGoals
from chronomoe.errors import CheckpointError
from chronomoe.goals.steer import Goal
from chronomoe.storage import write_json

GOALS_FILE = "goals.json"
FORMAT, VERSION = "aios-brain-goals", 2


@dataclass(frozen=True)
class GoalMemory:
    """What a brain remembers; empty where it was trained under no goal."""

    goals: tuple[Goal, ...] = ()
    """Without their tokens, which depend on the tokenizer."""
    flags: TrainingGoals = TrainingGoals()  # noqa: RUF009 (frozen)
    """How they were turned on, with ``goals_remembered`` set unless there are none."""

    @classmethod
    def of(cls, goals: list[Goal], flags: TrainingGoals) -> "GoalMemory":
        """What to remember of goals that are turned on as the flags say."""
        kept = {name: value for name, value in vars(flags).items() if name.startswith("goal_")}
        if flags.goal_text is not None:
            kept["goal_text"] = flags.goal_text.resolve()
        return cls(
            tuple(dataclasses.replace(goal, tokens=()) for goal in goals), TrainingGoals(goals_remembered=True, **kept)
        )

    def to_json(self) -> dict[str, Any]:
        """The contents of the file."""
        settings = {
            name: list(value) if isinstance(value, tuple) else str(value) if isinstance(value, Path) else value
            for name, value in vars(self.flags).items()
            if name.startswith("goal_")
        }
        goals = []
        for goal in self.goals:
            fields = dataclasses.asdict(goal)
            del fields["tokens"]
            goals.append(fields)
        return {"format": FORMAT, "version": VERSION, "goals": goals, "settings": settings}

    def write(self, brain: Brain) -> None:
        """Replace what the brain remembers."""
        write_json(brain.path / GOALS_FILE, self.to_json())


def forget(brain: Brain) -> None:
    """Leave the brain without remembered goals."""
    (brain.path / GOALS_FILE).unlink(missing_ok=True)


def read_memory(brain: Brain) -> GoalMemory:
    """What a brain remembers; :class:`CheckpointError` when the file is damaged or of another version."""
    file = brain.path / GOALS_FILE
    if not file.exists():
        return GoalMemory()
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        if (found.get("format"), found.get("version")) != (FORMAT, VERSION):
            raise CheckpointError(
                f"{file} was written by another version of aios (0.1.0 or a newer one); remove it and name the goals "
                "again with --goal."
            )
        goals = tuple(
            Goal(
                text=goal_text(one["text"]),
                weight=goal_weight(one["weight"]),
                experts=tuple(str(name) for name in _listed(one["experts"])),
                slots=tuple((None if layer is None else int(layer), int(expert)) for layer, expert in one["slots"]),
            )
            for one in found["goals"]
        )
        settings: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in found["settings"].items()
        }
        if settings.get("goal_text") is not None:
            settings["goal_text"] = Path(settings["goal_text"])
        flags = TrainingGoals(goals_remembered=bool(goals), **settings)
    except CheckpointError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{file} is damaged ({error}); put a copy back, or remove it to forget goals.") from error
    return GoalMemory(goals, flags)


def _listed(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise TypeError(f"{value!r} is no list")
    return value
