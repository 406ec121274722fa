"""The goals of a workspace and what they are linked to."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from aios.goal_text import goal_text, goal_weight
from aios.store.entry import ExpertEntry
from aios.store.experts import Registry
from aios.store.slots import Slot, read_slot
from aios.store.tables import ExpertTable, find_expert, find_goal
from aios.store.tables import Goal as Goal
from aios.store.transaction import Tables
from chronomoe.errors import CheckpointError, ConfigError


@dataclass(frozen=True)
class ResolvedGoal:
    """A goal, and what it is linked to."""

    goal: Goal
    entries: tuple[ExpertEntry, ...]
    """Experts of the workspace, inactive ones too."""
    slots: tuple[Slot, ...]
    """Experts of brains' own routers."""


class Goals:
    """The goals of a workspace. Reading creates nothing; each change is one transaction.

    ``expert`` is an expert's id or uid, or a slot ``BRAIN:LAYER.EXPERT``; links are made to slots as they are written
    (:func:`aios.goals.slots.link_target` checks that one exists). Raises :class:`ConfigError` for a text, a weight or a
    slot that cannot be, and :class:`CheckpointError` for a goal or expert that is not there, a link that is refused,
    and a database or registry that cannot be used; nothing is changed then.
    """

    def __init__(self, root: Path) -> None:
        self.root = Path(root)
        self.registry = Registry(self.root)

    def all(self, *, active_only: bool = True) -> list[Goal]:
        """The goals, the newest first."""
        with self.registry.read() as tables:
            return [goal for goal in tables.goals.all() if goal.active or not active_only]

    def get(self, goal_id: int) -> Goal:
        """One goal."""
        return find_goal(self.all(active_only=False), goal_id)

    def active(self) -> list[ResolvedGoal]:
        """The active goals, the newest first, with their links followed."""
        with self.registry.read() as tables:
            by_uid = {one.expert_uid: one for one in tables.experts.all().values()}
            goals = [goal for goal in tables.goals.all() if goal.active]
        return [
            ResolvedGoal(
                goal,
                tuple(by_uid[expert] for expert in goal.experts if expert in by_uid),
                tuple(read_slot(expert) for expert in goal.experts if ":" in expert),
            )
            for goal in goals
        ]

    def for_expert(self, expert: str, *, active_only: bool = True) -> list[Goal]:
        """The goals of one expert, the newest first; of a slot also those of its expert in all layers."""
        with self.registry.read() as tables:
            goals = tables.goals.all()
            words = {expert, str(replace(read_slot(expert), layer=None))} if ":" in expert else {_uid(tables, expert)}
        links = {link for goal in goals for word in words for link in _matching(goal, word)}
        _refuse_two_brains(expert, links)
        return [goal for goal in goals if links & {*goal.experts} and (goal.active or not active_only)]

    def expert_ids(self) -> dict[str, str]:
        """The id of each expert by its uid, to show links as people know them."""
        return {one.expert_uid: one.expert_id for one in self.registry.entries()}

    def add(
        self, text: str, *, weight: float | None = None, expert: str | None = None, source: str = "cli"
    ) -> tuple[Goal, bool]:
        """Enter a goal, or activate the one of this text again; returns it, and whether it is new."""
        goal_text(text)
        if weight is not None:
            goal_weight(weight)
        with self.registry.change() as tables:
            goal_id, new = tables.goals.add(text, weight=weight, source=source)
            if expert is not None:
                tables.goals.link(goal_id, _linkable(tables.experts, expert))
            return tables.goals.find(goal_id), new

    def link(self, goal_id: int, expert: str) -> Goal:
        """Link a goal to an expert that is active, or to a slot."""
        with self._change(goal_id) as tables:
            tables.goals.link(goal_id, _linkable(tables.experts, expert))
            return tables.goals.find(goal_id)

    def unlink(self, goal_id: int, expert: str | None = None) -> Goal:
        """Delete the link to an expert, or all links."""
        with self._change(goal_id) as tables:
            goal = tables.goals.find(goal_id)
            gone = goal.experts
            if expert is not None:
                gone = _matching(goal, str(read_slot(expert)) if ":" in expert else _uid(tables, expert))
                _refuse_two_brains(expert, gone)
                if not gone:
                    raise CheckpointError(f"goal {goal_id} is not linked to {expert}.")
            for one in gone:
                tables.goals.unlink(goal_id, one)
            return tables.goals.find(goal_id)

    def weigh(self, goal_id: int, weight: float) -> Goal:
        """Set how much a goal, active or not, counts."""
        with self._change(goal_id) as tables:
            tables.goals.set_weight(goal_id, weight)
            return tables.goals.find(goal_id)

    def activate(self, goal_id: int) -> Goal:
        """Activate a goal."""
        return self._set_active(goal_id, True)

    def deactivate(self, goal_id: int) -> Goal:
        """Deactivate a goal; its links stay."""
        return self._set_active(goal_id, False)

    def remove(self, goal_id: int) -> Goal:
        """Delete a goal and its links for good; returns what it was."""
        with self._change(goal_id) as tables:
            goal = tables.goals.find(goal_id)
            tables.goals.remove(goal_id)
            return goal

    def remove_like(self, text: str) -> list[Goal]:
        """Delete all goals that hold this text, in upper or lower case, active or not; returns what they were."""
        if not text.strip():
            raise ConfigError("say which goals: a part of their text.")
        words = goal_text(text).casefold()
        if not any(words in goal.text.casefold() for goal in self.all(active_only=False)):
            return []
        with self.registry.change() as tables:
            gone = [goal for goal in tables.goals.all() if words in goal.text.casefold()]
            for goal in gone:
                tables.goals.remove(goal.id)
            return gone

    def brain_moved(self, old: str, new: str | None) -> None:
        """Move links to slots of a brain (family/name) to its new name, or delete them with it."""
        if not any(expert.startswith(f"{old}:") for goal in self.all(active_only=False) for expert in goal.experts):
            return
        with self.registry.change() as tables:
            for expert in {expert for goal in tables.goals.all() for expert in goal.experts}:
                if expert.startswith(f"{old}:"):
                    tables.goals.move_slot(expert, None if new is None else new + expert.removeprefix(old))

    @contextmanager
    def _change(self, goal_id: int) -> Iterator[Tables]:
        self.get(goal_id)  # a goal that is not there is no reason to create a database
        with self.registry.change() as tables:
            yield tables

    def _set_active(self, goal_id: int, active: bool) -> Goal:
        with self._change(goal_id) as tables:
            tables.goals.find(goal_id)
            tables.goals.set_active(goal_id, active)
            return tables.goals.find(goal_id)


def _linkable(experts: ExpertTable, word: str) -> str:
    """The uid of an active expert, or a slot."""
    if ":" in word:
        slot = read_slot(word)
        if "/" not in slot.brain:
            raise ConfigError(f"{word!r} does not name the family of its brain; write it as in mixtral/small:2.5.")
        return str(slot)
    entry = _entry(experts, word)
    if not entry.is_active:
        raise CheckpointError(
            f"expert {entry.expert_id} is inactive; `aios experts activate {entry.expert_id}` before you link it."
        )
    return entry.expert_uid


def _uid(tables: Tables, word: str) -> str:
    return _entry(tables.experts, word).expert_uid


def _entry(experts: ExpertTable, word: str) -> ExpertEntry:
    """An expert by its id or uid; :class:`CheckpointError` for one that is not there."""
    known = experts.all()
    for one in (known.get(word), *known.values()):
        if one is not None and word in (one.expert_id, one.expert_uid):
            return one
    deleted = [one for one in experts.tombstones() if isinstance(one, dict)]
    if any(word in (one.get("expert_id"), one.get("expert_uid")) for one in deleted):
        raise CheckpointError(f"expert {word} was deleted; train or import it again.")
    try:
        return find_expert(known, word)
    except ConfigError as error:
        raise CheckpointError(str(error)) from None


def _matching(goal: Goal, word: str) -> tuple[str, ...]:
    """The links of a goal that a uid or slot names; a slot may leave out the family of its brain."""
    return tuple(link for link in goal.experts if link == word or (":" in word and link.endswith(f"/{word}")))


def _refuse_two_brains(word: str, links: Collection[str]) -> None:
    brains = sorted({read_slot(link).brain for link in links if ":" in link})
    if len(brains) > 1:
        raise ConfigError(f"{word} may be of {' or '.join(brains)}; write the family too.")
