"""Reading and changing a workspace's database, with registry.json written after each change.

aios.db is the truth. A change holds the registry's lock and is one transaction; the new registry.json is complete
beside its place before COMMIT and takes its place after it, so that a change that cannot be written is not made. The
database remembers the digest of the file that belongs to it:

- the file is missing, or still the one before: a process was killed after COMMIT, and the next to open the store
  writes it;
- the file is another: somebody edited it or put a copy back. Readers see what it says, and the next change imports it.
"""

import json
import logging
import os
import sqlite3
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from aios.store import database
from aios.store.entry import now
from aios.store.folders import folders_set_aside, give_back
from aios.store.registry_file import RegistryData, digest, parse_registry, read_bytes, registry_text, with_revision
from aios.store.tables import ExpertTable, GoalTable
from aios.workspace import Workspace
from chronomoe.errors import CheckpointError, ConfigError
from chronomoe.storage import held, whole_file

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Tables:
    """One transaction."""

    experts: ExpertTable
    goals: GoalTable
    sql: sqlite3.Connection

    @classmethod
    def of(cls, sql: sqlite3.Connection) -> "Tables":
        """The tables of a connection."""
        return cls(ExpertTable(sql), GoalTable(sql), sql)


@dataclass(frozen=True)
class Imported:
    """What a registry brought. Ids of experts."""

    entered: tuple[str, ...]
    """New here."""
    absent: tuple[str, ...]
    """Here and not in the registry: kept, or deleted if it was to replace what is here."""
    refused: tuple[str, ...]
    """Left out: another expert has this id here."""


class Store:
    """aios.db and registry.json of a workspace. Reading creates nothing."""

    def __init__(self, root: Path) -> None:
        self.root = Path(root)
        self.home = Workspace(self.root).experts
        self.file = self.home / "registry.json"
        self.database = Workspace(self.root).database

    @contextmanager
    def read(self) -> Iterator[Tables]:
        """What the workspace knows, as of one moment.

        Raises :class:`CheckpointError` for a database or a registry.json that is damaged or of another version.
        """
        with ExitStack() as stack:
            sql = stack.enter_context(database.read(self.database))
            if folders_set_aside(self.home) or self._state(sql) != "current":
                stack.close()
                sql = stack.enter_context(closing(self._settled_copy()))
            yield Tables.of(sql)

    @contextmanager
    def change(self, *, import_edits: bool = True) -> Iterator[Tables]:
        """One change: kept when the block ends, undone when it fails.

        Raises what :meth:`read` raises, and :class:`CheckpointError` when another process is changing the workspace for
        a minute.
        """
        self.home.mkdir(parents=True, exist_ok=True)
        with self._lock():
            self._settle_folders()
            try:
                with database.change(self.database) as sql:
                    content = read_bytes(self.file)
                    if import_edits and self._state(sql) == "edited" and content is not None:
                        self._notice(import_registry(sql, parse_registry(self.file, content)))
                    yield Tables.of(sql)
                    self._commit(sql, content)
            except UnicodeEncodeError as error:
                word = error.object[error.start : error.end]
                raise ConfigError(f"{word!r} is not valid Unicode text; nothing was changed.") from error
            finally:
                self._settle_folders()

    def _lock(self) -> AbstractContextManager[None]:
        lock, busy = self.home / f"{self.file.name}.lock", f"another process has been changing {self.file} for a minute"
        return held(lock, f"{busy}; try again.", database.PATIENCE)

    def _state(self, sql: sqlite3.Connection) -> Literal["current", "stale", "edited"]:
        """How registry.json stands to the database: it belongs to it, is older or missing, or is somebody else's."""
        content = read_bytes(self.file)
        row = sql.execute("SELECT digest, replaced_digest FROM registry").fetchone()
        if digest(content) == ("" if row is None else row[0]):
            return "current"
        return "stale" if row is not None and (content is None or digest(content) == row[1]) else "edited"

    def _settled_copy(self) -> sqlite3.Connection:
        """Finish what a killed process left; then a copy of the database in memory, with what the file brings."""
        known = self.database.exists()
        with self._lock() if known else nullcontext():
            if known:
                self._settle_folders()
                with database.read(self.database) as sql:
                    stale = self._state(sql) == "stale"
                if stale:
                    with database.change(self.database) as sql:
                        self._commit(sql, read_bytes(self.file))
            with database.read(self.database) as sql:
                return self._copy(sql)

    def _copy(self, sql: sqlite3.Connection) -> sqlite3.Connection:
        copy = database.copy_of(sql)
        content = read_bytes(self.file)
        if content is not None and self._state(copy) == "edited":
            import_registry(copy, parse_registry(self.file, content))
        return copy

    def _settle_folders(self) -> None:
        if folders_set_aside(self.home):
            with database.read(self.database) as sql, closing(self._copy(sql)) as copy:
                ids = ExpertTable(copy).ids()
            give_back(self.home, ids)

    def _commit(self, sql: sqlite3.Connection, content: bytes | None) -> None:
        """COMMIT, and write registry.json if it is to say something else than ``content``, which it holds."""
        sql.execute("INSERT OR IGNORE INTO registry (id, top) VALUES (1, ?)", (json.dumps({"created_at": now()}),))
        revision, written = sql.execute("SELECT revision, digest FROM registry").fetchone()
        text = registry_text(registry_data(sql), revision)
        if digest(text.encode()) != written:
            text = with_revision(text, revision, revision + 1)
            revision += 1
        elif digest(content) == written:
            sql.execute("COMMIT")
            return
        sql.execute(
            "UPDATE registry SET revision = ?, digest = ?, replaced_digest = ?",
            (revision, digest(text.encode()), digest(content)),
        )
        for left in self.home.glob(f".{self.file.name}.*"):
            left.unlink(missing_ok=True)  # of a process that was killed while it wrote
        with whole_file(self.file) as file:
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())  # a full disk is found out before COMMIT
            sql.execute("COMMIT")
        with suppress(sqlite3.Error):  # an edit that restores the replaced file is meant; need not survive a power cut
            sql.execute("PRAGMA synchronous = NORMAL")
            sql.execute("UPDATE registry SET replaced_digest = NULL")

    def _notice(self, found: Imported) -> None:
        """Tell the user what a changed registry.json does not do by itself."""
        if found.absent:
            _LOG.warning(
                f"{self.file} was changed by another program and lacks {', '.join(found.absent)}, which stay; "
                "`aios experts import-registry --replace` deletes them."
            )
        if found.refused:
            _LOG.warning(f"{self.file} was changed by another program; {_refusal(found)}")


def registry_data(sql: sqlite3.Connection) -> RegistryData:
    """What registry.json is to say."""
    experts = ExpertTable(sql)
    row = sql.execute("SELECT top FROM registry").fetchone()
    return RegistryData(
        top={} if row is None else json.loads(row[0]), experts=experts.all(), tombstones=experts.tombstones()
    )


def import_registry(sql: sqlite3.Connection, data: RegistryData, *, replace_all: bool = False) -> Imported:
    """Enter what a registry says, within a transaction.

    Known experts, by their uids, become what it says; their goals stay. New ones enter with their goals. Experts that
    it lacks stay, unless it is to ``replace_all``; their folders stay in any case.
    """
    experts, goals = ExpertTable(sql), GoalTable(sql)
    known = {one.expert_uid: one for one in experts.all().values()}
    named = {one.expert_uid for one in data.experts.values()}
    absent = [one for one in known.values() if one.expert_uid not in named]
    for one in absent if replace_all else ():
        experts.remove(one)
    owners = {one.expert_id: one.expert_uid for one in experts.all().values()}
    entering = [one for one in data.experts.values() if owners.get(one.expert_id, one.expert_uid) == one.expert_uid]
    ids = {one.expert_id for one in entering}
    for one in entering:  # first all, then their parents, which may come later in the file
        experts.save(replace(one, parent_expert_id=None))
    for one in entering:
        if one.parent_expert_id in ids:
            experts.save(one)
        if one.expert_uid not in known:
            goals.add_all(one.goals, one.expert_uid, "registry")
    buried = experts.tombstones()
    for tombstone in data.tombstones:
        if tombstone not in buried:
            experts.bury(tombstone)
    top = {"created_at": now()} | registry_data(sql).top | data.top
    sql.execute(
        "INSERT INTO registry (id, top) VALUES (1, ?) ON CONFLICT (id) DO UPDATE SET top = excluded.top",
        (json.dumps(top, ensure_ascii=False),),
    )
    return Imported(
        entered=tuple(one.expert_id for one in entering if one.expert_uid not in known),
        absent=tuple(one.expert_id for one in absent),
        refused=tuple(one.expert_id for one in data.experts.values() if one.expert_id not in ids),
    )


def _refusal(found: Imported) -> str:
    return f"left out, since another expert has the id here: {', '.join(found.refused)}; rename or delete that first."


def registry_of(file: Path) -> RegistryData:
    """The registry in a file; :class:`CheckpointError` when it is missing, damaged or of another version."""
    content = read_bytes(file)
    if content is None:
        raise CheckpointError(f"there is no file {file}.")
    return parse_registry(file, content)
