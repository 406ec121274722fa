"""The database of a workspace, artifacts/aios.db: its schema, opening it, and what to say when it cannot be used."""

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from chronomoe.errors import CheckpointError

PATIENCE = 60.0
"""Seconds to wait for another process."""
FIRST = 2
"""The oldest schema that is read; version 0.1.0 wrote schema 1."""
MIGRATIONS = (
    (
        # What registry.json is to say beside experts and tombstones, and which file was last written.
        """CREATE TABLE registry (
            id INTEGER PRIMARY KEY CHECK (id = 1),
            revision INTEGER NOT NULL DEFAULT 0,
            digest TEXT NOT NULL DEFAULT '',
            replaced_digest TEXT,
            top TEXT NOT NULL CHECK (json_valid(top))
        ) STRICT""",
        """CREATE TABLE experts (
            number INTEGER PRIMARY KEY,
            expert_id TEXT NOT NULL UNIQUE CHECK (expert_id <> ''),
            expert_uid TEXT NOT NULL UNIQUE CHECK (length(expert_uid) = 32),
            name TEXT NOT NULL,
            description TEXT NOT NULL,
            category TEXT NOT NULL,
            created_at TEXT NOT NULL,
            last_trained TEXT,
            version INTEGER NOT NULL CHECK (version >= 0),
            training_datasets TEXT NOT NULL CHECK (json_valid(training_datasets)),
            performance_metrics TEXT NOT NULL CHECK (json_valid(performance_metrics)),
            total_activations INTEGER NOT NULL CHECK (total_activations >= 0),
            avg_routing_weight REAL NOT NULL,
            is_active INTEGER NOT NULL CHECK (is_active IN (0, 1)),
            is_frozen INTEGER NOT NULL CHECK (is_frozen IN (0, 1)),
            parent_uid TEXT REFERENCES experts (expert_uid) ON DELETE SET NULL,
            model_architecture TEXT NOT NULL,
            checkpoint_path TEXT NOT NULL,
            base_fingerprint TEXT NOT NULL,
            tokenizer_fingerprint TEXT NOT NULL,
            attached_to TEXT NOT NULL CHECK (json_valid(attached_to)),
            training_config TEXT NOT NULL CHECK (json_valid(training_config)),
            extra TEXT NOT NULL CHECK (json_valid(extra))
        ) STRICT""",
        "CREATE INDEX experts_of_parent ON experts (parent_uid)",
        "CREATE TABLE tombstones (number INTEGER PRIMARY KEY, entry TEXT NOT NULL CHECK (json_valid(entry))) STRICT",
        """CREATE TABLE goals (
            id INTEGER PRIMARY KEY AUTOINCREMENT,
            text TEXT NOT NULL UNIQUE CHECK (text <> ''),
            weight REAL NOT NULL DEFAULT 1 CHECK (weight > 0 AND weight <= 1),
            active INTEGER NOT NULL DEFAULT 1 CHECK (active IN (0, 1)),
            created_ts TEXT NOT NULL,
            updated_ts TEXT NOT NULL,
            source TEXT NOT NULL
        ) STRICT""",
        # To an expert of the workspace, or to a slot of a brain (family/name:LAYER.EXPERT).
        """CREATE TABLE links (
            number INTEGER PRIMARY KEY,
            goal_id INTEGER NOT NULL REFERENCES goals (id) ON DELETE CASCADE,
            expert_uid TEXT REFERENCES experts (expert_uid) ON DELETE CASCADE,
            slot TEXT,
            CHECK ((expert_uid IS NULL) <> (slot IS NULL)),
            UNIQUE (goal_id, expert_uid),
            UNIQUE (goal_id, slot)
        ) STRICT""",
        "CREATE INDEX links_of_expert ON links (expert_uid)",
        "CREATE INDEX links_of_slot ON links (slot)",
    ),
)
"""What makes schema 2 of an empty file, and each later one of the one before."""


@contextmanager
def change(file: Path) -> Iterator[sqlite3.Connection]:
    """Open for a change, creating the file and bringing its schema up to date; undone unless the block commits.

    Raises :class:`CheckpointError`, with the file and a remedy, for whatever SQLite refuses.
    """
    with _explained(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        with closing(_connect(file, create=True)) as connection:
            _migrate(file, connection)
            connection.execute("BEGIN IMMEDIATE")
            yield connection


@contextmanager
def read(file: Path) -> Iterator[sqlite3.Connection]:
    """Open to read, all of it as of one moment; an empty database in memory while no change has made the file.

    The same is true of a file whose schema is to be brought up to date: what is read is a copy in memory. Raises
    :class:`CheckpointError` as :func:`change` does.
    """
    with _explained(file), closing(_connect(file, create=False) if file.exists() else in_memory()) as connection:
        connection.execute("BEGIN")
        if _schema(file, connection) == latest():
            yield connection
        else:
            with closing(copy_of(connection)) as updated:
                _migrate(file, updated)
                yield updated


def in_memory() -> sqlite3.Connection:
    """A new database that no file holds."""
    connection = sqlite3.connect(":memory:", isolation_level=None)
    connection.execute("PRAGMA foreign_keys = ON")
    _migrate(Path(":memory:"), connection)
    return connection


def copy_of(connection: sqlite3.Connection) -> sqlite3.Connection:
    """A copy in memory, to be changed without changing the file."""
    copy = sqlite3.connect(":memory:", isolation_level=None)
    connection.backup(copy)
    copy.execute("PRAGMA foreign_keys = ON")
    return copy


def latest() -> int:
    """The schema that this version writes."""
    return FIRST - 1 + len(MIGRATIONS)


def _connect(file: Path, *, create: bool) -> sqlite3.Connection:
    if sqlite3.sqlite_version_info < (3, 38):
        raise CheckpointError(f"aios needs SQLite 3.38; this Python has {sqlite3.sqlite_version}: use a newer one.")
    place = f"{file.absolute().as_uri()}?mode={'rwc' if create else 'rw'}"
    connection = sqlite3.connect(place, uri=True, timeout=PATIENCE, isolation_level=None)
    connection.execute("PRAGMA foreign_keys = ON")
    connection.execute("PRAGMA synchronous = FULL")
    return connection


def _schema(file: Path, connection: sqlite3.Connection) -> int:
    found = int(connection.execute("PRAGMA user_version").fetchone()[0])
    if found > latest():
        raise CheckpointError(
            f"{file} was written by a newer version of aios (schema {found}; known here up to {latest()}); update "
            "aios. The file is as it was."
        )
    if 0 < found < FIRST:
        raise CheckpointError(
            f"{file} was made by version 0.1.0, whose database this version does not read; move it and "
            "experts/registry.json away, then enter experts and goals again."
        )
    return found


def _migrate(file: Path, connection: sqlite3.Connection) -> None:
    if _schema(file, connection) < latest():
        connection.execute("PRAGMA journal_mode = WAL")  # stays with the file
    while _schema(file, connection) < latest():
        connection.execute("BEGIN IMMEDIATE")
        found = _schema(file, connection)
        if found < latest():  # nobody else has done it meanwhile
            number = max(found, FIRST - 1) + 1
            for statement in MIGRATIONS[number - FIRST]:
                connection.execute(statement)
            connection.execute(f"PRAGMA user_version = {number}")
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
        f"is damaged or not a database of aios ({error}); put a copy back, or move it away with its -wal and -shm: "
        "experts and the texts of their goals then come back from registry.json."
    )
