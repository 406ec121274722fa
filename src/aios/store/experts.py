"""The experts of a workspace: artifacts/experts/registry.json and what may be done to it."""

import math
import re
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from aios.goal_text import goal_text
from aios.store.entry import ExpertEntry as ExpertEntry
from aios.store.entry import now
from aios.store.ledger import Ledger
from aios.workspace import Workspace, plain_name
from chronomoe.errors import CheckpointError, ConfigError
from chronomoe.storage import held

WEIGHTS = "expert.safetensors"
"""An expert's file in its folder."""


def expert_folder(root: Path, expert_id: str) -> Path:
    """Where an expert's files are; :class:`ConfigError` for an id that is not a plain word."""
    return Workspace(root).experts / plain_name(expert_id)


def checkpoint_file(root: Path, entry: ExpertEntry) -> Path:
    """The weights of an expert, backslashes read as /.

    Raises :class:`CheckpointError` when it has none yet, or its path is absolute or leaves artifacts/experts.
    """
    path = entry.checkpoint_path.replace("\\", "/")
    if not path:
        raise CheckpointError(f"expert {entry.expert_id} has no weights yet; train it first.")
    file = root / path
    home = Workspace(root).experts.resolve()
    absolute = path.startswith("/") or re.match("[A-Za-z]:", path)
    if absolute or "\0" in path or home not in file.resolve().parents:
        raise CheckpointError(f"the registry says that expert {entry.expert_id} is at {path!r}, outside {home}.")
    return file


def making(root: Path, expert_id: str) -> AbstractContextManager[None]:
    """Hold an expert's file for writing; :class:`CheckpointError` if another process trains or imports it."""
    lock = Workspace(root).experts / ".locks" / f"{plain_name(expert_id)}.lock"
    return held(lock, f"another process is making expert {expert_id}; wait for it.")


class Registry(Ledger):
    """The registry of a workspace. Nothing is created by reading it.

    Whatever is asked of an unknown expert raises :class:`ConfigError`; a file that is damaged, of a newer version, or
    held by another process for a minute, :class:`CheckpointError`. Goals are linked by :class:`aios.store.goals.Goals`.
    """

    def entries(self) -> list[ExpertEntry]:
        """All experts, in the order in which they came."""
        return list(self.read().experts.values())

    def get(self, expert_id: str) -> ExpertEntry:
        """One expert."""
        return self.read().find(expert_id)

    def stats(self) -> dict[str, Any]:
        """Counts, and each expert's share of the use."""
        return self.read().stats()

    def create(
        self,
        expert_id: str,
        *,
        name: str = "",
        description: str = "",
        category: str = "",
        goals: Collection[str] = (),
        parent: str | None = None,
    ) -> ExpertEntry:
        """Enter an expert that is to be trained later.

        Raises :class:`ConfigError` when the id is taken or no plain word, or a goal is no line of text.
        """
        entry = ExpertEntry(
            expert_id=plain_name(expert_id),
            name=name,
            description=description,
            category=category,
            goals=_once([goal_text(goal) for goal in goals]),
            parent_expert_id=parent,
        )
        with self._change(first=True, source="cli") as book:
            book.add(entry)
        return book.experts[expert_id]

    def upsert(self, entry: ExpertEntry, source: str = "training") -> ExpertEntry:
        """Enter a trained expert, or the next version of one; returns it as it was written.

        The next version keeps what training does not change: uid, time of creation, hierarchy, goals (new ones are
        added, as from ``source``), use, brains, whether it is active or frozen, and any name, description or category
        that ``entry`` leaves empty. Raises :class:`ConfigError` for a new id that is no plain word or is taken but for
        upper and lower case, and :class:`CheckpointError` for a ``checkpoint_path`` outside artifacts/experts.
        """
        entry = replace(entry, checkpoint_path=self._relative(entry), last_trained=entry.last_trained or now())
        with self._change(first=True, source=source) as book:
            old = book.experts.get(entry.expert_id)
            if old is None:
                book.add(replace(entry, version=max(entry.version, 1)))
            else:
                book.experts[old.expert_id] = replace(
                    entry,
                    expert_uid=old.expert_uid,
                    created_at=old.created_at,
                    name=entry.name or old.name,
                    description=entry.description or old.description,
                    category=entry.category or old.category,
                    goals=_once([*old.goals, *entry.goals]),
                    training_datasets=_once([*old.training_datasets, *entry.training_datasets]),
                    total_activations=old.total_activations,
                    avg_routing_weight=old.avg_routing_weight,
                    is_active=old.is_active,
                    is_frozen=old.is_frozen,
                    parent_expert_id=old.parent_expert_id,
                    attached_to=old.attached_to,
                    version=old.version + 1,
                    extra=old.extra | entry.extra,
                )
        return book.experts[entry.expert_id]

    def freeze(self, expert_id: str) -> ExpertEntry:
        """Keep its weights from training."""
        return self._set(expert_id, is_frozen=True)

    def unfreeze(self, expert_id: str) -> ExpertEntry:
        """Let it be trained."""
        return self._set(expert_id, is_frozen=False)

    def activate(self, expert_id: str) -> ExpertEntry:
        """Let tokens be routed to it."""
        return self._set(expert_id, is_active=True)

    def deactivate(self, expert_id: str) -> ExpertEntry:
        """Keep tokens from it."""
        return self._set(expert_id, is_active=False)

    def set_parent(self, expert_id: str, parent: str) -> ExpertEntry:
        """Put an expert below another; :class:`ConfigError` when that one is the expert itself or below it."""
        with self._change() as book:
            entry = book.find(expert_id)
            book.find(parent)
            if parent == expert_id:
                raise ConfigError(f"expert {expert_id} cannot be its own parent.")
            if expert_id in book.above(parent):
                raise ConfigError(f"{parent} is below {expert_id} already; clear that first.")
            book.experts[expert_id] = replace(entry, parent_expert_id=parent)
        return book.experts[expert_id]

    def clear_parent(self, expert_id: str) -> ExpertEntry:
        """Take an expert from below its parent, if it has one."""
        return self._set(expert_id, parent_expert_id=None)

    def note_attached(self, expert_id: str, brain: str) -> ExpertEntry:
        """Remember that a brain holds the expert."""
        return self._edit(expert_id, lambda one: {"attached_to": _once([*one.attached_to, brain])})

    def note_detached(self, expert_id: str, brain: str) -> ExpertEntry:
        """Forget that a brain holds the expert."""
        return self._edit(
            expert_id, lambda one: {"attached_to": tuple(other for other in one.attached_to if other != brain)}
        )

    def record_use(self, expert_id: str, activations: int, mean_weight: float) -> ExpertEntry:
        """Add tokens routed to it and their mean weight to its totals; :class:`ConfigError` for a negative number."""
        if activations < 0 or not (math.isfinite(mean_weight) and mean_weight >= 0):
            raise ConfigError(f"{activations} activations of mean weight {mean_weight} cannot be.")

        def more(one: ExpertEntry) -> dict[str, Any]:
            total = one.total_activations + int(activations)
            step = activations / total * (mean_weight - one.avg_routing_weight) if activations else 0.0
            return {"total_activations": total, "avg_routing_weight": float(one.avg_routing_weight + step)}

        return self._edit(expert_id, more)

    def rename(self, expert_id: str, new_id: str) -> ExpertEntry:
        """Give an expert, and its folder, another id; :class:`ConfigError` when that is taken or no plain word."""
        target = expert_folder(self.root, new_id)
        with self._change() as book:
            entry = book.find(expert_id)
            book.refuse_taken(new_id, but=entry if new_id != expert_id else None)
            if target.exists() and new_id.casefold() != expert_id.casefold():
                raise ConfigError(f"{target} exists but is no expert's; move it away or choose another id.")
            path, old_place = entry.checkpoint_path, f"artifacts/experts/{expert_id}/"
            if path.startswith(old_place):
                path = f"artifacts/experts/{new_id}/{path.removeprefix(old_place)}"
            self._set_aside(entry)
            # Built anew: the order of the experts stays.
            renamed = {}
            for name, one in book.experts.items():
                if name == expert_id:
                    renamed[new_id] = replace(one, expert_id=new_id, checkpoint_path=path)
                else:
                    below = one.parent_expert_id == expert_id
                    renamed[name] = replace(one, parent_expert_id=new_id) if below else one
            book.experts = renamed
        return book.experts[new_id]

    def delete(
        self, expert_id: str, children: Literal["refuse", "orphan", "cascade"] = "refuse", *, force: bool = False
    ) -> list[ExpertEntry]:
        """Remove an expert and its files, leaving a tombstone; returns what was removed.

        Its children are a reason to refuse, lose their parent, or go too. Raises :class:`ConfigError` when it has
        children and they forbid it, or when one that would go is attached to a brain, unless ``force``.
        """
        if children not in ("refuse", "orphan", "cascade"):
            raise ConfigError(f"children is {children!r}; give refuse, orphan or cascade.")
        with self._change() as book:
            entry = book.find(expert_id)
            if entry.child_expert_ids and children == "refuse":
                raise ConfigError(
                    f"expert {expert_id} has children: {', '.join(entry.child_expert_ids)}; orphan leaves them without "
                    "a parent, cascade deletes them too."
                )
            gone = [entry]
            if children == "cascade":
                gone += [one for one in book.experts.values() if expert_id in book.above(one.expert_id)]
            for one in gone:
                if one.attached_to and not force:
                    raise ConfigError(
                        f"expert {one.expert_id} is attached to {', '.join(one.attached_to)}; detach it first."
                    )
            for one in gone:
                self._set_aside(one)
                del book.experts[one.expert_id]
                book.tombstones.append({"expert_id": one.expert_id, "expert_uid": one.expert_uid, "deleted_at": now()})
        return gone

    def _set(self, expert_id: str, **changes: Any) -> ExpertEntry:
        return self._edit(expert_id, lambda one: changes)

    def _edit(self, expert_id: str, changes: Callable[[ExpertEntry], dict[str, Any]]) -> ExpertEntry:
        with self._change() as book:
            entry = book.find(expert_id)
            book.experts[expert_id] = replace(entry, **changes(entry))
        return book.experts[expert_id]

    def _relative(self, entry: ExpertEntry) -> str:
        path = Path(entry.checkpoint_path.replace("\\", "/"))
        if path.is_absolute() and path.resolve().is_relative_to(self.root.resolve()):
            entry = replace(entry, checkpoint_path=path.resolve().relative_to(self.root.resolve()).as_posix())
        checkpoint_file(self.root, entry)
        return entry.checkpoint_path.replace("\\", "/")


def _once(values: Collection[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(values))
