"""What the tables of aios.db hold, as Python has it: experts, tombstones, goals, links. Nothing here commits."""

import json
import sqlite3
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, fields, replace
from datetime import UTC, datetime
from difflib import get_close_matches
from typing import Any

from aios.goal_text import fitted_text, goal_text, goal_weight
from aios.store.entry import ExpertEntry, now
from aios.workspace import plain_name
from chronomoe.errors import CheckpointError, ConfigError
from chronomoe.storage import finite

_FIELDS = tuple(one.name for one in fields(ExpertEntry))
_EXAMPLE = vars(ExpertEntry(expert_id="a"))
_JSON = {name for name in _FIELDS if isinstance(_EXAMPLE[name], tuple | dict)}
_FLAGS = {name for name in _FIELDS if isinstance(_EXAMPLE[name], bool)}
_DERIVED = {
    "goals": "(SELECT json_group_array(text) FROM (SELECT text FROM links JOIN goals ON id = goal_id "
    "WHERE links.expert_uid = experts.expert_uid ORDER BY links.number))",
    "parent_expert_id": "(SELECT expert_id FROM experts AS parent WHERE parent.expert_uid = experts.parent_uid)",
    "child_expert_ids": "(SELECT json_group_array(expert_id) FROM (SELECT expert_id FROM experts AS child "
    "WHERE child.parent_uid = experts.expert_uid ORDER BY child.number))",
}
"""Fields of an expert that other rows say."""
_COLUMNS = tuple(name for name in _FIELDS if name not in _DERIVED)
_GOAL_COLUMNS = "id, text, weight, active, created_ts, updated_ts, source"


@dataclass(frozen=True)
class Goal:
    """One goal, with what it is linked to: the uid of an expert, or a slot ``family/brain:LAYER.EXPERT``."""

    id: int
    text: str
    weight: float
    active: bool
    created_ts: str
    updated_ts: str
    source: str
    """Where it came from first: cli, training, registry or import."""
    experts: tuple[str, ...] = ()


def find_goal(goals: Iterable[Goal], goal_id: int) -> Goal:
    """One of the goals; :class:`CheckpointError` for an id that no goal has."""
    for goal in goals:
        if goal.id == goal_id:
            return goal
    raise CheckpointError(f"there is no goal {goal_id}; `aios goals list --all` shows all there are.")


def find_expert(experts: dict[str, ExpertEntry], expert_id: str) -> ExpertEntry:
    """One of the experts; :class:`ConfigError` for an id that no expert has."""
    if expert_id not in experts:
        near = " or ".join(get_close_matches(expert_id, experts))
        remedy = "`aios experts list` shows all there are" if experts else "`aios experts create` makes one"
        raise ConfigError(f"there is no expert {expert_id!r}{f' (is it {near}?)' if near else ''}; {remedy}.")
    return experts[expert_id]


def refuse_taken(ids: Iterable[str], expert_id: str) -> None:
    """:class:`ConfigError` when an expert has this id, be it in upper or lower case."""
    for other in ids:
        if other.casefold() == expert_id.casefold():
            raise ConfigError(f"there is an expert {other} already; choose another id or delete it first.")


def ancestors(experts: dict[str, ExpertEntry], expert_id: str) -> Iterator[str]:
    """Parent, its parent, and so on; ends where a cycle would begin again."""
    seen = {expert_id}
    while (parent := experts[expert_id].parent_expert_id) is not None and parent in experts:
        yield parent
        if parent in seen:
            return
        seen.add(parent)
        expert_id = parent


class ExpertTable:
    """Experts and tombstones, within one transaction."""

    def __init__(self, sql: sqlite3.Connection) -> None:
        self._sql = sql

    def all(self) -> dict[str, ExpertEntry]:
        """Every expert by its id, in the order in which they came."""
        return {one.expert_id: one for one in self._entries("")}

    def ids(self) -> dict[str, str]:
        """The id of each expert by its uid, in the order in which they came."""
        return dict(self._sql.execute("SELECT expert_uid, expert_id FROM experts ORDER BY number").fetchall())

    def find(self, expert_id: str) -> ExpertEntry:
        """One expert; :class:`ConfigError` for an id that no expert has."""
        for one in self._entries("WHERE expert_id = ?", expert_id):
            return one
        return find_expert(self.all(), expert_id)

    def _entries(self, which: str, *arguments: str) -> Iterator[ExpertEntry]:
        values = ", ".join(_DERIVED.get(name, name) for name in _FIELDS)
        for row in self._sql.execute(f"SELECT {values} FROM experts {which} ORDER BY number", arguments).fetchall():
            yield ExpertEntry(**{name: _from_column(name, value) for name, value in zip(_FIELDS, row, strict=True)})

    def add(self, entry: ExpertEntry) -> None:
        """Enter a new expert, without its goals.

        :class:`ConfigError` when its id is not a plain word, or its id or uid is taken, or its parent is unknown.
        """
        refuse_taken(self.ids().values(), plain_name(entry.expert_id))
        if (other := self.ids().get(entry.expert_uid)) is not None:
            raise ConfigError(f"{entry.expert_id} and {other} are one expert (uid {entry.expert_uid}).")
        if entry.parent_expert_id is not None:
            self.find(entry.parent_expert_id)
        self.save(
            replace(
                entry,
                name=entry.name or f"Expert {entry.expert_id}",
                category=entry.category or "general",
                created_at=entry.created_at or now(),
            )
        )

    def save(self, entry: ExpertEntry) -> None:
        """Write the row of an expert, new or known by its uid; its goals and children are not written."""
        values = [_to_column(name, getattr(entry, name)) for name in _COLUMNS]
        marks = ", ".join("?" * len(_COLUMNS))
        changes = ", ".join(f"{name} = excluded.{name}" for name in (*_COLUMNS, "parent_uid"))
        self._sql.execute(
            f"INSERT INTO experts ({', '.join(_COLUMNS)}, parent_uid) VALUES "
            f"({marks}, (SELECT expert_uid FROM experts WHERE expert_id = ?)) "
            f"ON CONFLICT (expert_uid) DO UPDATE SET {changes}",
            [*values, entry.parent_expert_id],
        )

    def remove(self, entry: ExpertEntry) -> None:
        """Delete an expert and its links; a tombstone stays, and its children lose their parent."""
        self._sql.execute("DELETE FROM experts WHERE expert_uid = ?", (entry.expert_uid,))
        self.bury({"expert_id": entry.expert_id, "expert_uid": entry.expert_uid, "deleted_at": now()})

    def bury(self, tombstone: Any) -> None:
        """Keep a tombstone."""
        self._sql.execute("INSERT INTO tombstones (entry) VALUES (?)", (json.dumps(tombstone, ensure_ascii=False),))

    def tombstones(self) -> list[Any]:
        """What is left of deleted experts, and what registry.json had among them."""
        return [json.loads(entry) for (entry,) in self._sql.execute("SELECT entry FROM tombstones ORDER BY number")]


class GoalTable:
    """Goals and links, within one transaction."""

    def __init__(self, sql: sqlite3.Connection) -> None:
        self._sql = sql

    def all(self) -> list[Goal]:
        """Every goal, the newest first."""
        links: dict[int, list[str]] = {}
        for goal_id, expert in self._sql.execute("SELECT goal_id, ifnull(expert_uid, slot) FROM links ORDER BY number"):
            links.setdefault(goal_id, []).append(expert)
        return [
            Goal(id, text, weight, bool(active), created, updated, source, tuple(links.get(id, ())))
            for id, text, weight, active, created, updated, source in self._sql.execute(
                f"SELECT {_GOAL_COLUMNS} FROM goals ORDER BY id DESC"
            )
        ]

    def find(self, goal_id: int) -> Goal:
        """One goal; :class:`CheckpointError` for an id that no goal has."""
        return find_goal(self.all(), goal_id)

    def add(self, text: str, *, weight: float | None = None, source: str) -> tuple[int, bool]:
        """Enter a goal, or activate the one of this text again; returns its id, and whether it is new.

        Raises :class:`ConfigError` for a text or weight that cannot be.
        """
        text = goal_text(text)
        value = None if weight is None else goal_weight(weight)
        for goal_id, active, old in self._sql.execute("SELECT id, active, weight FROM goals WHERE text = ?", (text,)):
            if not active or value not in (None, old):
                self._sql.execute(
                    "UPDATE goals SET active = 1, weight = ifnull(?, weight), updated_ts = ? WHERE id = ?",
                    (value, _now(), goal_id),
                )
            return goal_id, False
        made = self._sql.execute(
            "INSERT INTO goals (text, weight, created_ts, updated_ts, source) VALUES (?, ?, ?, ?, ?)",
            (text, 1.0 if value is None else value, _now(), _now(), source),
        )
        return int(made.lastrowid or 0), True

    def add_all(self, texts: Collection[str], expert_uid: str, source: str) -> None:
        """Enter goals that come with an expert and link them to it; what a goal may not say is left out of them."""
        for text in filter(None, map(fitted_text, texts)):
            self.link(self.add(text, source=source)[0], expert_uid)

    def set_active(self, goal_id: int, active: bool) -> None:
        """Count a goal, or not."""
        self._sql.execute(
            "UPDATE goals SET active = ?, updated_ts = ? WHERE id = ? AND active <> ?",
            (int(active), _now(), goal_id, int(active)),
        )

    def set_weight(self, goal_id: int, weight: float) -> None:
        """Set how much a goal counts; :class:`ConfigError` for a weight that cannot be."""
        value = goal_weight(weight)
        self._sql.execute(
            "UPDATE goals SET weight = ?, updated_ts = ? WHERE id = ? AND weight <> ?", (value, _now(), goal_id, value)
        )

    def remove(self, goal_id: int) -> None:
        """Delete a goal and its links."""
        self._sql.execute("DELETE FROM goals WHERE id = ?", (goal_id,))

    def link(self, goal_id: int, expert: str) -> None:
        """Link a goal to the uid of an expert or to a slot, if it is not."""
        made = self._sql.execute(
            f"INSERT OR IGNORE INTO links (goal_id, {_link_column(expert)}) VALUES (?, ?)", (goal_id, expert)
        )
        if made.rowcount:
            self._touch(goal_id)

    def unlink(self, goal_id: int, expert: str) -> None:
        """Delete the link of a goal to an expert or slot, if it has it."""
        gone = self._sql.execute(
            f"DELETE FROM links WHERE goal_id = ? AND {_link_column(expert)} = ?", (goal_id, expert)
        )
        if gone.rowcount:
            self._touch(goal_id)

    def move_slot(self, old: str, new: str | None) -> None:
        """Give the links of one slot to another, or delete them."""
        if new is not None:
            self._sql.execute("UPDATE OR IGNORE links SET slot = ? WHERE slot = ?", (new, old))
        self._sql.execute("DELETE FROM links WHERE slot = ?", (old,))

    def _touch(self, goal_id: int) -> None:
        self._sql.execute("UPDATE goals SET updated_ts = ? WHERE id = ?", (_now(), goal_id))


def _link_column(expert: str) -> str:
    return "slot" if ":" in expert else "expert_uid"


def _to_column(name: str, value: Any) -> Any:
    if name in _JSON:
        return json.dumps(finite(value), ensure_ascii=False)
    return int(value) if name in _FLAGS else value


def _from_column(name: str, value: Any) -> Any:
    if name in _FLAGS:
        return bool(value)
    if name not in _JSON:
        return value
    known = json.loads(value)
    return tuple(known) if isinstance(known, list) else known


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
