"""aios goals and the flat spelling aios goals-add, ...: what is wanted, and which experts serve it.

To a terminal each command prints a sentence or a table; with --json, or when something else reads it, one JSON object.
"""

import json as jsonlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from aios.cli.table import print_table
from aios.goals.slots import link, link_target
from aios.store.goals import Goal, Goals
from chronomoe.errors import CheckpointError

Number = Annotated[int, Parameter(help="Number of the goal.")]
Expert = Annotated[str, Parameter(help="Id or uid of an expert, or BRAIN:LAYER.EXPERT.")]
Text = Annotated[str, Parameter(allow_leading_hyphen=True)]
Json = Annotated[bool, Parameter(help="Print JSON, for programs.")]
Root = Annotated[Path, Parameter(help="Workspace folder.")]


def add_command(
    text: Text,
    /,
    *,
    expert_id: str | None = None,
    weight: float | None = None,
    json: Json = False,
    root: Root = Path(),
) -> None:
    """Enter a goal. One that is there already is not entered again, but is active again.

    Parameters
    ----------
    text
        What is wanted, in up to 1,000 characters.
    expert_id
        Link it to this expert, as `link-expert` does.
    weight
        How much it counts: above 0, at most 1. [1, or what it was]
    """
    asked: dict[str, Any] = {} if expert_id is None else {"expert_id": expert_id}
    with _told(json, {"added": 0, "text": text} | asked):
        goals = Goals(root)
        goal, new = goals.add(text, weight=weight, expert=expert_id and link_target(root, expert_id))
        sentence = f"{'Added' if new else 'There is already'} goal {goal.id}, {_linked(goals, goal)}."
        _tell(json, sentence, {"success": True, "added": int(new)} | _item(goals, goal) | asked)


def list_command(*, all: bool = False, json: Json = False, root: Root = Path()) -> None:
    """List the goals, the newest first.

    Parameters
    ----------
    all
        Inactive ones too.
    """
    with _told(json, {}):
        goals = Goals(root)
        _list(json, goals, goals.all(active_only=not all), {}, "No goal yet; `aios goals add` enters one.")


def list_for_expert_command(expert: Expert, /, *, json: Json = False, root: Root = Path()) -> None:
    """List the active goals of an expert, the newest first."""
    with _told(json, {"expert_id": expert}):
        goals = Goals(root)
        found = goals.for_expert(expert)
        if not found:
            link_target(root, expert)  # says so if there is no such slot
        _list(json, goals, found, {"expert_id": expert}, f"{expert} has no active goal.")


def get_expert_command(goal_id: Number, /, *, json: Json = False, root: Root = Path()) -> None:
    """Show whom a goal is linked to."""
    with _told(json, {"directive_id": goal_id}):
        goals = Goals(root)
        goal = goals.get(goal_id)
        _tell(json, f"Goal {goal_id} is {_linked(goals, goal)}.", {"directive_id": goal_id} | _item(goals, goal))


def link_expert_command(goal_id: Number, expert: Expert, /, *, json: Json = False, root: Root = Path()) -> None:
    """Link a goal to an expert that is active. A goal may have many experts, an expert many goals."""
    asked = {"directive_id": goal_id, "expert_id": expert}
    with _told(json, asked):
        goals = Goals(root)
        goal = link(root, goal_id, expert)
        _tell(json, f"Goal {goal_id} is {_linked(goals, goal)}.", {"success": True} | _item(goals, goal) | asked)


def unlink_expert_command(
    goal_id: Number, expert: Expert | None = None, /, *, json: Json = False, root: Root = Path()
) -> None:
    """Take the link of a goal to an expert away; without an expert, all its links."""
    asked: dict[str, Any] = {"directive_id": goal_id} | ({} if expert is None else {"expert_id": expert})
    with _told(json, asked):
        goals = Goals(root)
        goal = goals.unlink(goal_id, expert)
        _tell(json, f"Goal {goal_id} is {_linked(goals, goal)}.", {"success": True} | _item(goals, goal) | asked)


def weigh_command(goal_id: Number, weight: float, /, *, json: Json = False, root: Root = Path()) -> None:
    """Let a goal, active or not, count for more or less.

    Parameters
    ----------
    weight
        How much it counts: above 0, at most 1.
    """
    with _told(json, {"directive_id": goal_id}):
        goals = Goals(root)
        goal = goals.weigh(goal_id, weight)
        told = {"success": True, "directive_id": goal_id} | _item(goals, goal)
        _tell(json, f"Goal {goal_id} has weight {goal.weight:g}.", told)


def activate_command(goal_id: Number, /, *, json: Json = False, root: Root = Path()) -> None:
    """Let a goal count."""
    with _told(json, {"directive_id": goal_id}):
        goals = Goals(root)
        goal = goals.activate(goal_id)
        _tell(json, f"Goal {goal_id} is active.", {"success": True, "directive_id": goal_id} | _item(goals, goal))


def deactivate_command(goal_id: Number, /, *, json: Json = False, root: Root = Path()) -> None:
    """Let a goal rest; its links stay."""
    with _told(json, {"directive_id": goal_id}):
        goals = Goals(root)
        goal = goals.deactivate(goal_id)
        _tell(json, f"Goal {goal_id} is inactive.", {"success": True, "directive_id": goal_id} | _item(goals, goal))


def remove_command(goal_id: Number, /, *, json: Json = False, root: Root = Path()) -> None:
    """Delete a goal and its links for good."""
    with _told(json, {"removed": False, "id": goal_id}):
        goal = Goals(root).remove(goal_id)
        _tell(json, f"Removed goal {goal_id}.", {"success": True, "removed": True, "id": goal_id, "text": goal.text})


def remove_like_command(text: Text, /, *, json: Json = False, root: Root = Path()) -> None:
    """Delete all goals that hold a text, active or not, for good.

    Parameters
    ----------
    text
        Any part of the goal, in upper or lower case.
    """
    with _told(json, {"removed_count": 0, "match": text}):
        gone = Goals(root).remove_like(text)
        removed = {"removed_count": len(gone), "match": text, "ids": [goal.id for goal in gone]}
        _tell(json, f"Removed {len(gone)} goal{'s' * (len(gone) != 1)}.", {"success": True} | removed)


def _item(goals: Goals, goal: Goal, ids: dict[str, str] | None = None) -> dict[str, Any]:
    ids = goals.expert_ids() if ids is None else ids
    experts = [ids.get(expert, expert) for expert in goal.experts]
    return {
        "id": goal.id,
        "text": goal.text,
        "created_ts": goal.created_ts,
        "active": goal.active,
        "protected": False,  # the original has the field; nothing is
        "expert_id": experts[0] if experts else None,
        "expert_ids": experts,
        "weight": goal.weight,
        "updated_ts": goal.updated_ts,
        "source": goal.source,
    }


def _linked(goals: Goals, goal: Goal) -> str:
    experts = _item(goals, goal)["expert_ids"]
    return f"linked to {', '.join(experts) or 'no expert'}"


def _list(json: bool, goals: Goals, found: list[Goal], asked: dict[str, Any], none: str) -> None:
    ids = goals.expert_ids()
    items = [_item(goals, goal, ids) for goal in found]
    if _wants_json(json):
        _print({"count": len(items)} | asked | {"directives": [goal.text for goal in found], "items": items})
    elif not items:
        print(none)
    else:
        rows = [
            [str(one["id"]), one["text"], f"{one['weight']:g}", "active" if one["active"] else "inactive",
             ", ".join(one["expert_ids"])]
            for one in items
        ]  # fmt: skip
        print_table(["goal", "text", "weight", "state", "experts"], rows)


def _tell(json: bool, sentence: str, value: dict[str, Any]) -> None:
    if _wants_json(json):
        _print(value)
    else:
        print(sentence)


@contextmanager
def _told(json: bool, asked: dict[str, Any]) -> Iterator[None]:
    """Print a failure as JSON too, before the command line says it in a sentence."""
    from aios.sentence import sentence

    try:
        yield
    except (CheckpointError, OSError) as error:
        if _wants_json(json) and not isinstance(error, BrokenPipeError):
            _print({"success": False} | asked | {"error": sentence(error)})
        raise


def _wants_json(json: bool) -> bool:
    return json or not sys.stdout.isatty()


def _print(value: Any) -> None:
    print(jsonlib.dumps(value, indent=2))
