"""What the experts page shows of a registry: counts, the tree, and a search. No web in here."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aios.store.experts import ExpertEntry, Registry


@dataclass(frozen=True)
class Overview:
    """A registry at one moment."""

    entries: tuple[ExpertEntry, ...]
    orphaned: frozenset[str]
    """Ids of experts whose weights, or a brain they are attached to, are gone."""

    @property
    def counts(self) -> dict[str, int]:
        """How many there are of each kind."""
        return {
            "total": len(self.entries),
            "active": sum(one.is_active for one in self.entries),
            "frozen": sum(one.is_frozen for one in self.entries),
            "attached": sum(bool(one.attached_to) for one in self.entries),
            "orphaned": len(self.orphaned),
        }

    def found(self, words: str) -> list[ExpertEntry]:
        """The experts in which each of these words occurs: in id, name, category, description, goals, state, brains."""
        wanted = words.casefold().split()
        return [one for one in self.entries if all(word in self._text(one) for word in wanted)]

    def state(self, one: ExpertEntry) -> list[str]:
        """Words on its state."""
        words = ["active" if one.is_active else "inactive"]
        words += ["frozen"] * one.is_frozen
        words += [] if one.version else ["no weights"]
        return words + ["orphaned"] * (one.expert_id in self.orphaned)

    def _text(self, one: ExpertEntry) -> str:
        words = [one.expert_id, one.name, one.category, one.description, *one.goals, *one.attached_to, *self.state(one)]
        return "\n".join(words).casefold()


def read_overview(root: Path) -> Overview:
    """The registry as it is now; raises as :class:`Registry` does."""
    entries = Registry(root).entries()
    lost = (one.expert_id for one in entries if not all(place.exists() for place in needs(root, one)))
    return Overview(tuple(entries), frozenset(lost))


def needs(root: Path, one: ExpertEntry) -> list[Path]:
    """What must be on disk for an expert not to be orphaned: its weights, and the brains it is attached to."""
    weights = [root / one.checkpoint_path] if one.version and one.checkpoint_path else []
    return weights + [root / "artifacts/brains" / brain for brain in one.attached_to]


def tree(entries: Sequence[ExpertEntry], only: Collection[str] | None = None) -> list[dict[str, Any]]:
    """Experts below their parents, as nodes with ``id``, ``label`` and ``children``.

    With ``only`` these and all above them.
    """
    by_id = {one.expert_id: one for one in entries}
    shown = set(by_id) if only is None else set()
    for name in only or ():
        while name in by_id and name not in shown:
            shown.add(name)
            name = by_id[name].parent_expert_id or ""

    def node(one: ExpertEntry) -> dict[str, Any]:
        below = [by_id[name] for name in one.child_expert_ids if name in shown]
        return {"id": one.expert_id, "label": _label(one), "children": [node(child) for child in below]}

    return [node(one) for one in entries if one.parent_expert_id not in by_id and one.expert_id in shown]


def _label(one: ExpertEntry) -> str:
    marks = [] if one.is_active else ["inactive"]
    marks += ["frozen"] * one.is_frozen + [f"in {brain}" for brain in one.attached_to]
    return f"{one.expert_id} ({', '.join(marks)})" if marks else one.expert_id
