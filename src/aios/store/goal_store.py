"""The database of goals, artifacts/aios.db: SQLite, one short transaction for each change.

It knows nothing of the registry; who changes links does so through :meth:`aios.store.ledger.Ledger.goals`.
"""

import sqlite3
from collections.abc import Collection, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from aios.goal_text import goal_text, goal_weight
from chronomoe.errors import CheckpointError

PATIENCE = 30.0
"""Seconds to wait for another program that writes."""
MIGRATIONS = (
    (
        """CREATE TABLE goals (
            id INTEGER PRIMARY KEY AUTOINCREMENT,
            text TEXT NOT NULL UNIQUE CHECK (text <> ''),
            weight REAL NOT NULL DEFAULT 1 CHECK (weight > 0 AND weight <= 1),
            active INTEGER NOT NULL DEFAULT 1 CHECK (active IN (0, 1)),
            created_ts TEXT NOT NULL,
            updated_ts TEXT NOT NULL,
            source TEXT NOT NULL
        ) STRICT""",
        """CREATE TABLE links (
            goal_id INTEGER NOT NULL REFERENCES goals (id) ON DELETE CASCADE,
            expert TEXT NOT NULL,
            PRIMARY KEY (goal_id, expert)
        ) STRICT""",
        "CREATE INDEX links_of_expert ON links (expert)",
        # Experts whose goals are kept here; what the registry says of any other is yet to be entered.
        "CREATE TABLE met (expert_uid TEXT PRIMARY KEY) STRICT",
    ),
)
"""What makes each version of the schema from the one before."""


@dataclass(frozen=True)
class Goal:
    """One goal, with the experts it is linked to: the uid of an expert, or a slot ``family/brain:LAYER.EXPERT``."""

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
    """One of the goals; :class:`CheckpointError` when there is none of that id."""
    for goal in goals:
        if goal.id == goal_id:
            return goal
    raise CheckpointError(f"there is no goal {goal_id}; `aios goals list --all` shows all there are.")


class GoalStore:
    """The database, opened. What fails raises :class:`CheckpointError`, with the file and a remedy."""

    def __init__(self, file: Path, connection: sqlite3.Connection) -> None:
        self.file = file
        self._sql = connection

    @classmethod
    @contextmanager
    def changing(cls, file: Path) -> Iterator["GoalStore"]:
        """Open for a change, creating the file; what is not committed when the block ends is undone."""
        with _explained(file):
            file.parent.mkdir(parents=True, exist_ok=True)
            with closing(_connect(file, create=True)) as connection:
                _migrate(file, connection)
                connection.execute("BEGIN IMMEDIATE")
                yield cls(file, connection)  # closing without a commit undoes

    @classmethod
    @contextmanager
    def reading(cls, file: Path) -> Iterator["GoalStore | None"]:
        """Open to read, all of it as of one moment; None while no change has made or updated the file."""
        if not file.exists():
            yield None
            return
        with _explained(file), closing(_connect(file, create=False)) as connection:
            connection.execute("BEGIN")
            yield cls(file, connection) if _version(file, connection) == len(MIGRATIONS) else None

    def commit(self) -> None:
        """Make the change last."""
        self._sql.execute("COMMIT")

    def all(self) -> list[Goal]:
        """Every goal, the newest first."""
        links: dict[int, list[str]] = {}
        for goal_id, expert in self._sql.execute("SELECT goal_id, expert FROM links ORDER BY rowid"):
            links.setdefault(goal_id, []).append(expert)
        rows = self._sql.execute(
            "SELECT id, text, weight, active, created_ts, updated_ts, source FROM goals ORDER BY id DESC"
        )
        return [
            Goal(id, text, weight, bool(active), created, updated, source, tuple(links.get(id, ())))
            for id, text, weight, active, created, updated, source in rows
        ]

    def get(self, goal_id: int) -> Goal:
        """One goal; :class:`CheckpointError` when there is none of that id."""
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
                    "UPDATE goals SET active = 1, weight = coalesce(?, weight), updated_ts = ? WHERE id = ?",
                    (value, _now(), goal_id),
                )
            return goal_id, False
        now = _now()
        made = self._sql.execute(
            "INSERT INTO goals (text, weight, created_ts, updated_ts, source) VALUES (?, ?, ?, ?, ?)",
            (text, 1.0 if value is None else value, now, now, source),
        )
        return int(made.lastrowid or 0), True

    def set_active(self, goal_id: int, active: bool) -> None:
        """Let a goal count, or not."""
        self._sql.execute(
            "UPDATE goals SET active = ?, updated_ts = ? WHERE id = ? AND active <> ?",
            (int(active), _now(), goal_id, int(active)),
        )

    def set_weight(self, goal_id: int, weight: float) -> None:
        """Let a goal count for more or less; :class:`ConfigError` for a weight that cannot be."""
        value = goal_weight(weight)
        self._sql.execute(
            "UPDATE goals SET weight = ?, updated_ts = ? WHERE id = ? AND weight <> ?", (value, _now(), goal_id, value)
        )

    def remove(self, goal_id: int) -> None:
        """Delete a goal and its links."""
        self._sql.execute("DELETE FROM goals WHERE id = ?", (goal_id,))

    def link(self, goal_id: int, expert: str) -> None:
        """Link a goal to an expert, if it is not."""
        made = self._sql.execute("INSERT OR IGNORE INTO links (goal_id, expert) VALUES (?, ?)", (goal_id, expert))
        if made.rowcount:
            self._touch(goal_id)

    def unlink(self, goal_id: int, expert: str) -> None:
        """Take the link of a goal to an expert away, if it is there."""
        gone = self._sql.execute("DELETE FROM links WHERE goal_id = ? AND expert = ?", (goal_id, expert))
        if gone.rowcount:
            self._touch(goal_id)

    def move_links(self, old: str, new: str | None) -> None:
        """Give the links of one expert to another, or to nobody."""
        if new is not None:
            self._sql.execute("UPDATE OR IGNORE links SET expert = ? WHERE expert = ?", (new, old))
        self._sql.execute("DELETE FROM links WHERE expert = ?", (old,))

    def texts(self) -> dict[str, tuple[str, ...]]:
        """The texts of each expert's goals, in the order in which they were linked."""
        found: dict[str, list[str]] = {}
        rows = self._sql.execute("SELECT expert, text FROM links JOIN goals ON id = goal_id ORDER BY links.rowid")
        for expert, text in rows:
            found.setdefault(expert, []).append(text)
        return {expert: tuple(texts) for expert, texts in found.items()}

    def met(self) -> set[str]:
        """Uids of the experts whose goals are kept here."""
        return {uid for (uid,) in self._sql.execute("SELECT expert_uid FROM met")}

    def meet(self, uids: Collection[str]) -> None:
        """From now on the goals of these experts are kept here."""
        self._sql.executemany("INSERT OR IGNORE INTO met VALUES (?)", [(uid,) for uid in uids])

    def forget(self, uid: str) -> None:
        """Remove an expert that was deleted, with its links."""
        self.move_links(uid, None)
        self._sql.execute("DELETE FROM met WHERE expert_uid = ?", (uid,))

    def _touch(self, goal_id: int) -> None:
        self._sql.execute("UPDATE goals SET updated_ts = ? WHERE id = ?", (_now(), goal_id))


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _connect(file: Path, *, create: bool) -> sqlite3.Connection:
    if sqlite3.sqlite_version_info < (3, 37):
        raise CheckpointError(f"goals need SQLite 3.37; this Python has {sqlite3.sqlite_version}: use a newer one.")
    place = f"{file.absolute().as_uri()}?mode={'rwc' if create else 'rw'}"
    connection = sqlite3.connect(place, uri=True, timeout=PATIENCE, isolation_level=None)
    connection.execute("PRAGMA foreign_keys = ON")
    connection.execute("PRAGMA synchronous = FULL")
    return connection


def _version(file: Path, connection: sqlite3.Connection) -> int:
    found = int(connection.execute("PRAGMA user_version").fetchone()[0])
    if found > len(MIGRATIONS):
        raise CheckpointError(
            f"{file} was written by a newer version of aios (goals of schema {found}; known here up to "
            f"{len(MIGRATIONS)}); update aios. The file is as it was."
        )
    return found


def _migrate(file: Path, connection: sqlite3.Connection) -> None:
    if _version(file, connection) < len(MIGRATIONS):
        connection.execute("PRAGMA journal_mode = WAL")  # stays with the file
    while _version(file, connection) < len(MIGRATIONS):
        connection.execute("BEGIN IMMEDIATE")
        if (number := _version(file, connection)) < len(MIGRATIONS):  # nobody else has done it meanwhile
            for statement in MIGRATIONS[number]:
                connection.execute(statement)
            connection.execute(f"PRAGMA user_version = {number + 1}")
        connection.execute("COMMIT")


@contextmanager
def _explained(file: Path) -> Iterator[None]:
    """Turn what SQLite says into a :class:`CheckpointError`: the file, and what to do."""
    try:
        yield
    except sqlite3.Error as error:
        raise CheckpointError(f"{file} {_remedy(error)}") from error


def _remedy(error: sqlite3.Error) -> str:
    code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF  # without the details in the higher bits
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return f"has been held by another program for {PATIENCE:g} seconds; end that, or try again."
    if code in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_PERM, sqlite3.SQLITE_AUTH):
        return f"cannot be written ({error}); make it and its folder writable."
    if code == sqlite3.SQLITE_CANTOPEN:
        return f"cannot be opened ({error}); it must be a file, readable and writable like its folder."
    if code == sqlite3.SQLITE_FULL:
        return "could not be written: the disk is full. What was saved before is untouched; free some space."
    if code == sqlite3.SQLITE_IOERR:
        return f"cannot be read or written ({error}); check the disk, then try again."
    return (
        f"is damaged or no database of goals ({error}); put a copy back, or move it away: goals of experts then come "
        "back from the registry."
    )
