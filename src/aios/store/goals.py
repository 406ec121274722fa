"""The goals of a workspace and the experts they are linked to."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from aios.goal_text import goal_text, goal_weight
from aios.store.entry import Book, ExpertEntry
from aios.store.experts import Registry
from aios.store.goal_store import Goal as Goal
from aios.store.goal_store import GoalStore, find_goal
from aios.store.slots import Slot, read_slot
from chronomoe.errors import CheckpointError, ConfigError


@dataclass(frozen=True)
class ResolvedGoal:
    """A goal, and whom it is linked to."""

    goal: Goal
    entries: tuple[ExpertEntry, ...]
    """Experts of the registry, inactive ones too; those it does not know are left out."""
    slots: tuple[Slot, ...]
    """Experts of brains' own routers."""


class Goals:
    """What there is to do with goals. Reading creates nothing, but enters goals that only the registry has.

    ``expert`` is an expert's id or uid, or a slot ``BRAIN:LAYER.EXPERT``; links are made to slots as they are written
    (:func:`aios.goals.slots.link_target` checks that one exists). Raises :class:`ConfigError` for a text, a weight or a
    slot that cannot be, and :class:`CheckpointError` for whatever is not there, a link that is refused,
    and a database or registry that cannot be used; nothing is changed then.
    """

    def __init__(self, root: Path) -> None:
        self.root = Path(root)
        self.registry = Registry(self.root)

    def all(self, *, active_only: bool = True) -> list[Goal]:
        """The goals, the newest first."""
        return [goal for goal in self._read()[1] if goal.active or not active_only]

    def get(self, goal_id: int) -> Goal:
        """One goal."""
        return find_goal(self._read()[1], goal_id)

    def active(self) -> list[ResolvedGoal]:
        """The active goals, the newest first, with their links followed."""
        book, goals = self._read()
        by_uid = {one.expert_uid: one for one in book.experts.values()}
        return [
            ResolvedGoal(
                goal,
                tuple(by_uid[expert] for expert in goal.experts if expert in by_uid),
                tuple(read_slot(expert) for expert in goal.experts if ":" in expert),
            )
            for goal in goals
            if goal.active
        ]

    def for_expert(self, expert: str, *, active_only: bool = True) -> list[Goal]:
        """The goals of one expert, the newest first; of a slot also those of its expert in all layers."""
        book, goals = self._read()
        words = {expert, str(replace(read_slot(expert), layer=None))} if ":" in expert else {_uid(book, goals, expert)}
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
        with self.registry.goals() as (book, store):
            goal_id, new = store.add(text, weight=weight, source=source)
            if expert is not None:
                store.link(goal_id, _linkable(book, expert))
            return store.get(goal_id), new

    def link(self, goal_id: int, expert: str) -> Goal:
        """Link a goal to an expert that is active."""
        with self._changing(goal_id) as (book, store):
            store.link(goal_id, _linkable(book, expert))
            return store.get(goal_id)

    def unlink(self, goal_id: int, expert: str | None = None) -> Goal:
        """Take the link to an expert away, or all links."""
        with self._changing(goal_id) as (book, store):
            goal = store.get(goal_id)
            gone = goal.experts
            if expert is not None:
                gone = _matching(goal, str(read_slot(expert)) if ":" in expert else _uid(book, [goal], expert))
                _refuse_two_brains(expert, gone)
                if not gone:
                    raise CheckpointError(f"goal {goal_id} is not linked to {expert}.")
            for one in gone:
                store.unlink(goal_id, one)
            return store.get(goal_id)

    def weigh(self, goal_id: int, weight: float) -> Goal:
        """Let a goal, active or not, count for more or less."""
        with self._changing(goal_id) as (_, store):
            store.set_weight(goal_id, weight)
            return store.get(goal_id)

    def activate(self, goal_id: int) -> Goal:
        """Let a goal count."""
        return self._set_active(goal_id, True)

    def deactivate(self, goal_id: int) -> Goal:
        """Let a goal rest; its links stay."""
        return self._set_active(goal_id, False)

    def remove(self, goal_id: int) -> Goal:
        """Delete a goal and its links for good; returns what it was."""
        with self._changing(goal_id) as (_, store):
            goal = store.get(goal_id)
            store.remove(goal_id)
            return goal

    def remove_like(self, text: str) -> list[Goal]:
        """Delete all goals that hold this text, in upper or lower case, active or not; returns what they were."""
        if not text.strip():
            raise ConfigError("say which goals: a part of their text.")
        part = goal_text(text).casefold()
        if not any(part in goal.text.casefold() for goal in self.all(active_only=False)):
            return []
        with self.registry.goals() as (_, store):
            gone = [goal for goal in store.all() if part in goal.text.casefold()]
            for goal in gone:
                store.remove(goal.id)
            return gone

    def brain_moved(self, old: str, new: str | None) -> None:
        """Links to slots of a brain (family/name) follow it to another name, or go with it."""
        if not any(expert.startswith(f"{old}:") for goal in self.all(active_only=False) for expert in goal.experts):
            return
        with self.registry.goals() as (_, store):
            for expert in {expert for goal in store.all() for expert in goal.experts}:
                if expert.startswith(f"{old}:"):
                    store.move_links(expert, None if new is None else new + expert.removeprefix(old))

    def _read(self) -> tuple[Book, list[Goal]]:
        book, goals, met = self.registry.read(), *self._stored()
        if any(one.goals and one.expert_uid not in met for one in book.experts.values()):
            with self.registry.goals():
                pass  # enters what only the registry has
            book, goals, _ = self.registry.read(), *self._stored()
        return book, goals

    def _stored(self) -> tuple[list[Goal], set[str]]:
        with GoalStore.reading(self.registry.database) as store:
            return ([], set()) if store is None else (store.all(), store.met())

    @contextmanager
    def _changing(self, goal_id: int) -> Iterator[tuple[Book, GoalStore]]:
        self.get(goal_id)  # a goal that is not there is no reason to create a database
        with self.registry.goals() as (book, store):
            yield book, store

    def _set_active(self, goal_id: int, active: bool) -> Goal:
        with self._changing(goal_id) as (_, store):
            store.get(goal_id)
            store.set_active(goal_id, active)
            return store.get(goal_id)


def _linkable(book: Book, word: str) -> str:
    """The uid of an active expert, or a slot."""
    if ":" in word:
        slot = read_slot(word)
        if "/" not in slot.brain:
            raise ConfigError(f"{word!r} does not name the family of its brain; write it as in mixtral/small:2.5.")
        return str(slot)
    entry = book.find(_id_of(book, word))
    if not entry.is_active:
        raise CheckpointError(
            f"expert {entry.expert_id} is inactive; `aios experts activate {entry.expert_id}` before you link it."
        )
    return entry.expert_uid


def _uid(book: Book, goals: list[Goal], word: str) -> str:
    if any(word in goal.experts for goal in goals):
        return word  # also of an expert that the registry has lost
    return book.find(_id_of(book, word)).expert_uid


def _id_of(book: Book, word: str) -> str:
    """The id of an expert by its id or uid; :class:`CheckpointError` for one that is not there."""
    by_uid = {one.expert_uid: one.expert_id for one in book.experts.values()}
    if word in book.experts or word in by_uid:
        return word if word in book.experts else by_uid[word]
    stones = [stone for stone in book.tombstones if isinstance(stone, dict)]
    if any(word in (stone.get("expert_id"), stone.get("expert_uid")) for stone in stones):
        raise CheckpointError(f"expert {word} was deleted; train or import it again.")
    try:
        return book.find(word).expert_id
    except ConfigError as error:
        raise CheckpointError(str(error)) from None


def _matching(goal: Goal, word: str) -> tuple[str, ...]:
    """The links of a goal that a uid or slot names; a slot may leave out the family of its brain."""
    return tuple(link for link in goal.experts if link == word or (":" in word and link.endswith(f"/{word}")))


def _refuse_two_brains(word: str, links: Collection[str]) -> None:
    brains = sorted({read_slot(link).brain for link in links if ":" in link})
    if len(brains) > 1:
        raise ConfigError(f"{word} may be of {' or '.join(brains)}; write the family too.")
