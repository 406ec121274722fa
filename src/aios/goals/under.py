"""Goals that a brain is trained under: found before training, turned on when it starts, remembered by the brain."""

import json
from collections.abc import Callable
from typing import Any

from aios.brains.brain import Brain
from aios.brains.loaded import LoadedBrain
from aios.goals.memory import GOALS_FILE, GoalMemory, forget, read_memory
from aios.goals.use import find_goals, turn_on_these
from aios.settings.goals import TrainingGoals
from chronomoe.errors import ConfigError
from chronomoe.goals.steer import Goal


def goals_to_train_under(brain: Brain, tokenizer: Any, flags: TrainingGoals) -> list[Goal]:
    """The goals that the flags name and that have something to act on.

    Raises :class:`ConfigError` for goals that do not exist, or where none has anything to act on.
    """
    goals = [one for one in find_goals(brain, tokenizer, flags) if one.slots or flags.goal_likeness]
    if not goals:
        raise ConfigError(
            "none of these goals is linked to an expert of this brain's own, so there is nothing to train under; link "
            f"one with `aios goals link-expert ID {brain.name}:LAYER.EXPERT` (a brain has experts once it is "
            "trained: go on with --resume then), or give --goal-likeness."
        )
    return goals


class UnderGoals:
    """What :func:`aios.brains.train.train` needs to train a brain under goals."""

    def remembered(self, brain: Brain) -> TrainingGoals:
        """The flags under which the brain was trained."""
        return read_memory(brain).settings

    def check(self, brain: Brain, tokenizer: Any, flags: TrainingGoals) -> None:
        """As of :func:`goals_to_train_under`."""
        goals_to_train_under(brain, tokenizer, flags)

    def start(self, loaded: LoadedBrain, flags: TrainingGoals) -> tuple[Callable[[], dict[str, Any] | None], str]:
        """As of :func:`goals_for_training`."""
        return goals_for_training(loaded, flags)

    def forget(self, brain: Brain) -> None:
        """Leave the brain without remembered goals."""
        forget(brain)


def goals_for_training(loaded: LoadedBrain, flags: TrainingGoals) -> tuple[Callable[[], dict[str, Any] | None], str]:
    """What a trainer calls to turn the goals on, and its ``goals_key``; the brain remembers them.

    Raises as :func:`goals_to_train_under`.
    """
    goals = goals_to_train_under(loaded.brain, loaded.tokenizer, flags)
    memory = GoalMemory.of(goals, flags)

    def steer() -> dict[str, Any] | None:
        # What experts usually receive is not known before training.
        is_known = not flags.goal_likeness or bool(loaded.model.steering.direction.any())
        event = turn_on_these(loaded, goals, flags).to_json() if is_known else None
        # Only now: what cannot be turned on must not be in the way of the next run.
        memory.write_file(loaded.brain.path / GOALS_FILE)
        return event

    return steer, json.dumps(memory.to_json(), sort_keys=True)
