"""The experts of a workspace, and what may be done to them; registry.json says the same for people and programs."""

import math
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from aios.goal_text import goal_text
from aios.store.entry import ExpertEntry as ExpertEntry
from aios.store.entry import checkpoint_file, expert_folder, now, weights_path
from aios.store.folders import set_aside
from aios.store.tables import ancestors, find_expert, refuse_taken
from aios.store.transaction import Imported, Store, Tables, import_registry, registry_of
from aios.workspace import plain_name
from chronomoe.errors import ConfigError


class Registry(Store):
    """The experts of a workspace. Reading creates nothing; each change is one transaction.

    Raises :class:`ConfigError` for an unknown expert, and :class:`CheckpointError` for a database or registry.json that
    is damaged, of another version, or held by another process for a minute. Goals are linked by
    :class:`aios.store.goals.Goals`.
    """

    def entries(self) -> list[ExpertEntry]:
        """All experts, in the order in which they came."""
        with self.read() as tables:
            return list(tables.experts.all().values())

    def get(self, expert_id: str) -> ExpertEntry:
        """One expert."""
        with self.read() as tables:
            return tables.experts.find(expert_id)

    def refuse_foreign_weights(self, expert_id: str) -> None:
        """:class:`ConfigError` where the file of this expert holds another's weights, as after an id was edited."""
        for one in self.entries():
            if one.expert_id != expert_id and one.checkpoint_path == weights_path(expert_id):
                raise ConfigError(
                    f"{weights_path(expert_id)} holds the weights of expert {one.expert_id}; choose another id."
                )

    def stats(self) -> dict[str, Any]:
        """Counts, and each expert's share of the use."""
        with self.read() as tables:
            return _stats(tables)

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
        with self.change() as tables:
            tables.experts.add(entry)
            tables.goals.add_all(entry.goals, entry.expert_uid, "cli")
            return tables.experts.find(expert_id)

    def upsert(self, entry: ExpertEntry, source: str = "training") -> ExpertEntry:
        """Enter a trained expert, or the next version of one; returns it as it was written.

        The next version keeps what training does not change: uid, time of creation, hierarchy, goals (new ones are
        added, as from ``source``), use, brains, whether it is active or frozen, and any name, description or category
        that ``entry`` leaves empty. Raises :class:`ConfigError` for a new id that is no plain word or is taken but for
        upper and lower case, and :class:`CheckpointError` for a ``checkpoint_path`` outside artifacts/experts.
        """
        entry = replace(entry, checkpoint_path=self._relative(entry), last_trained=entry.last_trained or now())
        with self.change() as tables:
            if entry.expert_id not in tables.experts.ids().values():
                tables.experts.add(replace(entry, version=max(entry.version, 1)))
            else:
                entry = _next_version(tables.experts.find(entry.expert_id), entry)
                tables.experts.save(entry)
            tables.goals.add_all(entry.goals, entry.expert_uid, source)
            return tables.experts.find(entry.expert_id)

    def freeze(self, expert_id: str) -> ExpertEntry:
        """Exclude an expert from training."""
        return self._set(expert_id, is_frozen=True)

    def unfreeze(self, expert_id: str) -> ExpertEntry:
        """Allow training of an expert."""
        return self._set(expert_id, is_frozen=False)

    def activate(self, expert_id: str) -> ExpertEntry:
        """Allow routing to an expert."""
        return self._set(expert_id, is_active=True)

    def deactivate(self, expert_id: str) -> ExpertEntry:
        """Exclude an expert from routing."""
        return self._set(expert_id, is_active=False)

    def set_parent(self, expert_id: str, parent: str) -> ExpertEntry:
        """Set an expert's parent; :class:`ConfigError` when that one is the expert itself or below it."""
        with self._change() as tables:
            experts = tables.experts.all()
            entry = find_expert(experts, expert_id)
            find_expert(experts, parent)
            if parent == expert_id:
                raise ConfigError(f"expert {expert_id} cannot be its own parent.")
            if expert_id in ancestors(experts, parent):
                raise ConfigError(f"{parent} is below {expert_id} already; clear that first.")
            tables.experts.save(replace(entry, parent_expert_id=parent))
            return tables.experts.find(expert_id)

    def clear_parent(self, expert_id: str) -> ExpertEntry:
        """Leave an expert without a parent."""
        return self._set(expert_id, parent_expert_id=None)

    def note_attached(self, expert_id: str, brain: str) -> ExpertEntry:
        """Note that an expert is attached to a brain."""
        return self._edit(expert_id, lambda one: {"attached_to": _once([*one.attached_to, brain])})

    def note_detached(self, expert_id: str, brain: str) -> ExpertEntry:
        """Note that an expert is attached to a brain no more."""
        return self._edit(
            expert_id, lambda one: {"attached_to": tuple(other for other in one.attached_to if other != brain)}
        )

    def record_use(self, expert_id: str, activations: int, mean_weight: float) -> ExpertEntry:
        """Add tokens routed to an expert and their mean weight to its totals.

        :class:`ConfigError` for a negative number, or a weight that is not finite.
        """
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
        with self._change() as tables:
            experts = tables.experts.all()
            entry = find_expert(experts, expert_id)
            refuse_taken([one for one in experts if one != expert_id or new_id == expert_id], new_id)
            if target.exists() and new_id.casefold() != expert_id.casefold():
                raise ConfigError(f"{target} exists but is no expert's; move it away or choose another id.")
            path, old_place = entry.checkpoint_path, f"artifacts/experts/{expert_id}/"
            if path.startswith(old_place):
                path = f"artifacts/experts/{new_id}/{path.removeprefix(old_place)}"
            set_aside(self.home, entry)
            tables.experts.save(replace(entry, expert_id=new_id, checkpoint_path=path))
            return tables.experts.find(new_id)

    def delete(
        self, expert_id: str, children: Literal["refuse", "orphan", "cascade"] = "refuse", *, force: bool = False
    ) -> list[ExpertEntry]:
        """Remove an expert and its files, leaving a tombstone; returns what was removed.

        Its children are a reason to refuse, lose their parent, or go too. Raises :class:`ConfigError` when it has
        children and they forbid it, or when one that would go is attached to a brain, unless ``force``.
        """
        if children not in ("refuse", "orphan", "cascade"):
            raise ConfigError(f"children is {children!r}; give refuse, orphan or cascade.")
        with self._change() as tables:
            experts = tables.experts.all()
            entry = find_expert(experts, expert_id)
            if entry.child_expert_ids and children == "refuse":
                raise ConfigError(
                    f"expert {expert_id} has children: {', '.join(entry.child_expert_ids)}; orphan leaves them without "
                    "a parent, cascade deletes them too."
                )
            gone = [entry]
            if children == "cascade":
                gone += [one for one in experts.values() if expert_id in ancestors(experts, one.expert_id)]
            for one in gone:
                if one.attached_to and not force:
                    raise ConfigError(
                        f"expert {one.expert_id} is attached to {', '.join(one.attached_to)}; detach it first."
                    )
            for one in gone:
                set_aside(self.home, one)
                tables.experts.remove(one)
        return gone

    def import_file(self, file: Path | None = None, *, replace_all: bool = False) -> Imported:
        """Enter what a registry file says, of this workspace or another; experts that it lacks stay.

        With ``replace_all`` they are deleted, and leave tombstones and their folders. Raises :class:`CheckpointError`
        for a file that is missing, damaged or of another version.
        """
        self.entries()  # a file that a killed process left behind is written first
        own = file is None or file.resolve() == self.file.resolve()
        data = registry_of(self.file if file is None else file)
        with self.change(import_edits=not own) as tables:
            return import_registry(tables.sql, data, replace_all=replace_all)

    @contextmanager
    def _change(self) -> Iterator[Tables]:
        """A change of experts that are there; none are, as long as nothing was ever written."""
        if not (self.file.exists() or self.database.exists()):
            raise ConfigError(f"there is no expert in {self.root.resolve()} yet; `aios experts create` makes one.")
        with self.change() as tables:
            yield tables

    def _set(self, expert_id: str, **changes: Any) -> ExpertEntry:
        return self._edit(expert_id, lambda one: changes)

    def _edit(self, expert_id: str, changes: Callable[[ExpertEntry], dict[str, Any]]) -> ExpertEntry:
        with self._change() as tables:
            entry = tables.experts.find(expert_id)
            tables.experts.save(replace(entry, **changes(entry)))
            return tables.experts.find(expert_id)

    def _relative(self, entry: ExpertEntry) -> str:
        path = Path(entry.checkpoint_path.replace("\\", "/"))
        if path.is_absolute() and path.resolve().is_relative_to(self.root.resolve()):
            entry = replace(entry, checkpoint_path=path.resolve().relative_to(self.root.resolve()).as_posix())
        checkpoint_file(self.root, entry)
        return entry.checkpoint_path.replace("\\", "/")


def _once(values: Collection[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(values))


def _next_version(old: ExpertEntry, trained: ExpertEntry) -> ExpertEntry:
    """The trained expert with what training does not change."""
    return replace(
        trained,
        expert_uid=old.expert_uid,
        created_at=old.created_at,
        name=trained.name or old.name,
        description=trained.description or old.description,
        category=trained.category or old.category,
        training_datasets=_once([*old.training_datasets, *trained.training_datasets]),
        total_activations=old.total_activations,
        avg_routing_weight=old.avg_routing_weight,
        is_active=old.is_active,
        is_frozen=old.is_frozen,
        parent_expert_id=old.parent_expert_id,
        attached_to=old.attached_to,
        version=old.version + 1,
        extra=old.extra | trained.extra,
    )


def _stats(tables: Tables) -> dict[str, Any]:
    experts = sorted(tables.experts.all().values(), key=lambda one: -one.total_activations)
    total = sum(one.total_activations for one in experts)
    return {
        "experts": len(experts),
        "trained": sum(one.version > 0 for one in experts),
        "active": sum(one.is_active for one in experts),
        "frozen": sum(one.is_frozen for one in experts),
        "attached": sum(bool(one.attached_to) for one in experts),
        "with_goals": sum(bool(one.goals) for one in experts),
        "deleted": len(tables.experts.tombstones()),
        "total_activations": total,
        "usage": [
            {
                "expert_id": one.expert_id,
                "total_activations": one.total_activations,
                "share": one.total_activations / total if total else 0.0,
                "avg_routing_weight": one.avg_routing_weight,
            }
            for one in experts
        ],
    }
