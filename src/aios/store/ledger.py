"""How the registry's file and the links of goals are changed: one process at a time, and whole or not at all.

Every change locks the file, reads it again, and replaces it in one step, so that many processes may work at once and a
killed one leaves either the old registry or the new. What else a change touches can be settled after a kill:

- A folder that changes its name or goes is first set aside under the uid of its expert; who the registry says owns
  that uid gets it back.
- When links of goals change too, the order is: a marker, the registry, COMMIT in the database, the marker away. Who
  finds the marker makes both agree again, see :func:`agree`. Experts come and go with the registry, links with COMMIT.
"""

import re
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path

from aios.goal_text import fitted_text
from aios.store.entry import Book, ExpertEntry, now, read_book
from aios.store.goal_store import GoalStore
from aios.workspace import Workspace
from chronomoe.errors import ConfigError
from chronomoe.storage import held, write_json

PATIENCE = 60.0
"""Seconds to wait for other processes."""
_ASIDE = ".aside-"
# Ids of the original may have dots and be longer; their folders are still ours to move.
_OLD_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,199}")


def agree(book: Book, store: GoalStore, before: dict[str, tuple[str, ...]], source: str = "registry") -> None:
    """Make the goals that the registry names and the links in the database agree.

    What the registry names and did not name ``before`` is entered in the database, and so is all that it names of an
    expert the database has not met. The links of deleted experts go. Then each expert's goals are what the database
    says.
    """
    met = store.met()
    for uid in before.keys() - met - book.named_goals().keys():  # deleted before the database met it: the goal stays
        for text in filter(None, map(fitted_text, before[uid])):
            store.add(text, source=source)
    for entry in book.experts.values():
        old = before.get(entry.expert_uid, ()) if entry.expert_uid in met else ()
        for text in map(fitted_text, entry.goals):
            if text and text not in old:
                goal_id, _ = store.add(text, source=source)
                store.link(goal_id, entry.expert_uid)
    for uid in met & book.deleted():
        store.forget(uid)
    store.meet(book.named_goals().keys() - met)
    texts = store.texts()
    for name, entry in book.experts.items():
        book.experts[name] = replace(entry, goals=texts.get(entry.expert_uid, ()))


class Ledger:
    """registry.json and the database of goals. Nothing is created by reading them."""

    def __init__(self, root: Path) -> None:
        self.root = Path(root)
        self.home = Workspace(self.root).experts
        self.file = self.home / "registry.json"
        self.database = Workspace(self.root).database
        self._marker = self.home / ".goals-pending"

    @contextmanager
    def goals(self) -> Iterator[tuple[Book, GoalStore]]:
        """Change goals and their links in the database; the registry follows. The book is only to be read."""
        self.home.mkdir(parents=True, exist_ok=True)
        with self._alone() as book, GoalStore.changing(self.database) as store:
            before = book.named_goals()
            agree(book, store, before)
            yield book, store
            agree(book, store, book.named_goals())
            if book.named_goals() == before:
                store.commit()
            else:
                self._write(book, store)

    def read(self) -> Book:
        """The registry as it is."""
        if self._marker.exists() or any(self.home.glob(f"{_ASIDE}*")):
            with self._lock():
                self._settle()
        return self._book()

    def _book(self) -> Book:
        return read_book(self.file) or Book({"created_at": now()})

    @contextmanager
    def _change(self, *, first: bool = False, source: str = "registry") -> Iterator[Book]:
        """Change the registry; ``source`` of goals that come with the change."""
        if not first and not self.file.exists():
            raise ConfigError(f"there is no expert in {self.root.resolve()} yet; `aios experts create` makes one.")
        self.home.mkdir(parents=True, exist_ok=True)
        with self._alone() as book:
            before = book.named_goals()
            yield book
            after = book.named_goals()
            any_goal = any(before.values()) or any(after.values()) or self.database.exists()
            if after == before or not any_goal:
                self._write(book)
            else:
                with GoalStore.changing(self.database) as store:
                    agree(book, store, before, source)
                    self._write(book, store)

    @contextmanager
    def _alone(self) -> Iterator[Book]:
        """Keep others out, settle what a killed process left, and after a failure what this one left."""
        with self._lock():
            self._settle()
            try:
                yield self._book()
            except UnicodeEncodeError as error:
                word = error.object[error.start : error.end]
                raise ConfigError(f"{word!r} is not valid Unicode text; the registry is as it was.") from error
            finally:
                self._settle()

    def _write(self, book: Book, store: GoalStore | None = None) -> None:
        for left in self.home.glob(".registry.json.*"):
            left.unlink(missing_ok=True)  # of a process that was killed while it wrote
        if store is None:
            write_json(self.file, book.to_json())
            return
        self._marker.touch()
        write_json(self.file, book.to_json())
        store.commit()
        self._marker.unlink()

    def _lock(self) -> AbstractContextManager[None]:
        lock, busy = self.home / f"{self.file.name}.lock", f"another process has been changing {self.file} for a minute"
        return held(lock, f"{busy}; try again.", PATIENCE)

    def _set_aside(self, entry: ExpertEntry) -> None:
        folder = self.home / entry.expert_id
        if _OLD_NAME.fullmatch(entry.expert_id) and folder.is_dir():
            folder.rename(self.home / f"{_ASIDE}{entry.expert_uid}")

    def _settle(self) -> None:
        """Give folders that were set aside to whom the registry names, remove those of nobody; make goals agree."""
        for folder in self.home.glob(f"{_ASIDE}*"):
            owners = {one.expert_uid: one.expert_id for one in self._book().experts.values()}
            owner = owners.get(folder.name.removeprefix(_ASIDE))
            if owner is not None and not (self.home / owner).exists():
                folder.rename(self.home / owner)
            elif folder.is_symlink():
                folder.unlink()
            else:  # deleted, or trained anew since
                shutil.rmtree(folder, ignore_errors=True)
        if self._marker.exists():
            book = self._book()
            before = book.named_goals()
            with GoalStore.changing(self.database) as store:
                agree(book, store, before)
                if book.named_goals() != before:
                    write_json(self.file, book.to_json())
                store.commit()
            self._marker.unlink()
