"""Actions on goals: what is wanted, and which experts serve it."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from aios.actions import BrainName, Done, Flat, Show, Text, action
from aios.brains.brain import Brain
from aios.goals import slots
from aios.settings.goals import GoalFlags, Lesson
from aios.store.goals import Goal, Goals

Number = Annotated[int, Parameter(help="Number of the goal.")]
Expert = Annotated[str, Parameter(help="Id or uid of an expert, or BRAIN:LAYER.EXPERT.")]
GoalText = Annotated[str, Parameter(allow_leading_hyphen=True)]


def _named(goal_id: int, expert: str | None = None, **given: Any) -> dict[str, Any]:
    """The goal and the expert that were named, under the keys that programs read."""
    return {"directive_id": goal_id} | ({} if expert is None else {"expert_id": expert})


def _adding(text: str, *, expert_id: str | None = None, **given: Any) -> dict[str, Any]:
    return {"added": 0, "text": text} | ({} if expert_id is None else {"expert_id": expert_id})


@action(failure=_adding)
def add(workspace: Path, text: GoalText, /, *, expert_id: str | None = None, weight: float | None = None) -> Done:
    """Add a goal.

    A goal with the same text is not added again, but activated.

    Parameters
    ----------
    text
        What is wanted, in up to 1,000 characters.
    expert_id
        Link it to this expert, as `link-expert` does.
    weight
        How much it counts: above 0, at most 1. [1, or what it was]
    """
    goals = Goals(workspace)
    goal, new = goals.add(text, weight=weight, expert=expert_id and slots.link_target(workspace, expert_id))
    value = {"success": True, "added": int(new)} | _item(goals, goal)
    value |= {} if expert_id is None else {"expert_id": expert_id}
    return Done(f"{'Added' if new else 'There is already'} goal {goal.id}, {_linked(goals, goal)}.", value)


@action(failure=lambda **given: {})
def list_goals(workspace: Path, *, all: bool = False) -> Done:
    """List active goals, the newest first.

    Parameters
    ----------
    all
        Inactive ones too.
    """
    goals = Goals(workspace)
    return _list(goals, goals.all(active_only=not all), {}, "No goal yet; `aios goals add` makes one.")


@action(failure=lambda expert: {"expert_id": expert})
def list_for_expert(workspace: Path, expert: Expert, /) -> Done:
    """List the active goals of an expert, the newest first."""
    goals = Goals(workspace)
    found = goals.for_expert(expert)
    if not found:
        slots.link_target(workspace, expert)  # raises for a slot that its brain does not have
    return _list(goals, found, {"expert_id": expert}, f"{expert} has no active goal.")


@action(failure=_named)
def get_expert(workspace: Path, goal_id: Number, /) -> Done:
    """Show the experts a goal is linked to."""
    goals = Goals(workspace)
    goal = goals.get(goal_id)
    return Done(f"Goal {goal_id} is {_linked(goals, goal)}.", {"directive_id": goal_id} | _item(goals, goal))


@action(failure=_named)
def link(workspace: Path, goal_id: Number, expert: Expert, /) -> Done:
    """Link a goal to an active expert.

    A goal may have many experts, an expert many goals.
    """
    return _changed(Goals(workspace), slots.link(workspace, goal_id, expert), _named(goal_id, expert))


@action(failure=_named)
def unlink(workspace: Path, goal_id: Number, expert: Expert | None = None, /) -> Done:
    """Unlink a goal from an expert; without an expert, from all of them."""
    goals = Goals(workspace)
    return _changed(goals, goals.unlink(goal_id, expert), _named(goal_id, expert))


@action(failure=_named)
def weigh(workspace: Path, goal_id: Number, weight: float, /) -> Done:
    """Set the weight of a goal, active or not.

    Parameters
    ----------
    weight
        How much it counts: above 0, at most 1.
    """
    goals = Goals(workspace)
    goal = goals.weigh(goal_id, weight)
    return _changed(goals, goal, _named(goal_id), f"Goal {goal_id} has weight {goal.weight:g}.")


@action(failure=_named)
def activate(workspace: Path, goal_id: Number, /) -> Done:
    """Activate a goal."""
    goals = Goals(workspace)
    return _changed(goals, goals.activate(goal_id), _named(goal_id), f"Goal {goal_id} is active.")


@action(failure=_named)
def deactivate(workspace: Path, goal_id: Number, /) -> Done:
    """Deactivate a goal; its links stay."""
    goals = Goals(workspace)
    return _changed(goals, goals.deactivate(goal_id), _named(goal_id), f"Goal {goal_id} is inactive.")


@action(failure=lambda goal_id: {"removed": False, "id": goal_id})
def remove(workspace: Path, goal_id: Number, /) -> Done:
    """Remove a goal and its links for good."""
    goal = Goals(workspace).remove(goal_id)
    return Done(f"Removed goal {goal_id}.", {"success": True, "removed": True, "id": goal_id, "text": goal.text})


@action(failure=lambda text: {"removed_count": 0, "match": text})
def remove_like(workspace: Path, text: GoalText, /) -> Done:
    """Remove all goals that contain a text, active or not, for good.

    Parameters
    ----------
    text
        A piece of the goal, in upper or lower case.
    """
    gone = Goals(workspace).remove_like(text)
    removed = {"removed_count": len(gone), "match": text, "ids": [goal.id for goal in gone]}
    return Done(f"Removed {len(gone)} goal{'s' * (len(gone) != 1)}.", {"success": True} | removed)


@action(heavy=True)
def explain(
    workspace: Path,
    *,
    brain: BrainName,
    text: Text,
    goals: Annotated[GoalFlags, Flat] = GoalFlags(),  # noqa: B008 (frozen)
) -> Done:
    """Show what goals do to a text in a brain.

    Where its tokens go with goals off and on: to which of each layer's experts, and through which gates. Without --goal
    all active goals of the workspace are on.
    """
    from aios.brains.loaded import load_brain
    from aios.goals.explain import explain as explain_goals
    from aios.goals.use import describe_effect

    if not goals.any:
        goals = dataclasses.replace(goals, goals_active=True)
    effect, found = explain_goals(load_brain(Brain.at(workspace, brain)), goals, text)
    return Done("\n".join(describe_effect(effect)), found)


@action(heavy=True)
def teach(
    workspace: Path,
    *,
    brain: BrainName,
    goal: tuple[str, ...],
    dataset_file: tuple[Path, ...],
    lesson: Annotated[Lesson, Flat] = Lesson(),  # noqa: B008 (frozen)
    show: Show = print,
) -> Done:
    """Teach the routers of a brain what goals mean.

    Each goal by a text of its own; nothing else changes. --goals-learned uses what was taught.

    Parameters
    ----------
    goal
        Number or text of a goal; may be given again.
    dataset_file
        Its text: a file, a folder, or prepared data; one for each goal, in their order.
    """
    from aios.goals.teach import teach as teach_goals

    found = teach_goals(Brain.of_workspace(workspace, brain), goal, dataset_file, lesson, show)
    return Done(value=found, code=0 if found["finished"] else 130)


def _changed(goals: Goals, goal: Goal, named: dict[str, Any], sentence: str = "") -> Done:
    sentence = sentence or f"Goal {goal.id} is {_linked(goals, goal)}."
    return Done(sentence, {"success": True, "directive_id": goal.id} | _item(goals, goal) | named)


def _item(goals: Goals, goal: Goal, ids: dict[str, str] | None = None) -> dict[str, Any]:
    ids = goals.expert_ids() if ids is None else ids
    experts = [ids.get(expert, expert) for expert in goal.experts]
    return {
        "id": goal.id,
        "text": goal.text,
        "created_ts": goal.created_ts,
        "active": goal.active,
        "protected": False,  # the founding text has the field; no goal is protected
        "expert_id": experts[0] if experts else None,
        "expert_ids": experts,
        "weight": goal.weight,
        "updated_ts": goal.updated_ts,
        "source": goal.source,
    }


def _linked(goals: Goals, goal: Goal) -> str:
    return f"linked to {', '.join(_item(goals, goal)['expert_ids']) or 'no expert'}"


def _list(goals: Goals, found: list[Goal], named: dict[str, Any], empty: str) -> Done:
    ids = goals.expert_ids()
    items = [_item(goals, goal, ids) for goal in found]
    value = {"count": len(items)} | named | {"directives": [goal.text for goal in found], "items": items}
    return Done("" if items else empty, value)
