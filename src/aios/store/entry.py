"""One expert as the registry knows it, the registry file as it is on disk, and the reader for both."""

import json
import re
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, replace
from datetime import UTC, datetime
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from aios.workspace import plain_name
from chronomoe.errors import CheckpointError, ConfigError
from chronomoe.storage import finite

SCHEMA, VERSION = 2, "2.0"
_UID = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True, kw_only=True)
class ExpertEntry:
    """What is known of an expert. An empty name, description or category means that nobody has said."""

    expert_id: str
    expert_uid: str = field(default_factory=lambda: uuid.uuid4().hex)
    """Its identity; survives renaming and retraining."""
    name: str = ""
    description: str = ""
    category: str = ""
    goals: tuple[str, ...] = ()
    created_at: str = ""
    last_trained: str | None = None
    version: int = 0
    """How often it was trained; 0: it has no weights."""
    training_datasets: tuple[str, ...] = ()
    performance_metrics: dict[str, Any] = field(default_factory=dict)
    total_activations: int = 0
    avg_routing_weight: float = 0.0
    """Mean over ``total_activations``."""
    is_active: bool = True
    is_frozen: bool = False
    parent_expert_id: str | None = None
    child_expert_ids: tuple[str, ...] = ()
    """Follows from the parents of the others; the registry keeps it."""
    model_architecture: str = "feedforward"
    checkpoint_path: str = ""
    """From the root of the workspace, with forward slashes."""
    base_fingerprint: str = ""
    tokenizer_fingerprint: str = ""
    attached_to: tuple[str, ...] = ()
    """Names of brains."""
    training_config: dict[str, Any] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)
    """Keys this version does not know, kept as they are."""

    def to_json(self) -> dict[str, Any]:
        """The entry as it is written."""
        known = {entry.name: getattr(self, entry.name) for entry in fields(self) if entry.name != "extra"}
        return finite(known | {key: value for key, value in self.extra.items() if key not in known})


_KNOWN = {entry.name: entry.type for entry in fields(ExpertEntry) if entry.name != "extra"}
_TEXT = (str, type(None))
_FITS: dict[Any, Callable[[Any], bool]] = {
    str: lambda value: isinstance(value, str),
    str | None: lambda value: isinstance(value, _TEXT),
    bool: lambda value: isinstance(value, bool),
    int: lambda value: type(value) is int and value >= 0,
    float: lambda value: type(value) in (int, float) and abs(value) < float("inf"),
    tuple[str, ...]: lambda value: isinstance(value, list) and all(isinstance(one, str) for one in value),
    dict[str, Any]: lambda value: isinstance(value, dict),
}


@dataclass
class Book:
    """The whole registry, while it is being changed."""

    top: dict[str, Any]
    """Everything at the top level but the two lists, with keys this version does not know."""
    experts: dict[str, ExpertEntry] = field(default_factory=dict)
    tombstones: list[Any] = field(default_factory=list)

    def find(self, expert_id: str) -> ExpertEntry:
        """One expert; :class:`ConfigError` when there is none of that id."""
        if expert_id not in self.experts:
            near = get_close_matches(expert_id, self.experts, n=3, cutoff=0.4) or list(self.experts)[:3]
            raise ConfigError(f"there is no expert {expert_id!r}; there is {', '.join(near) or 'none'}.")
        return self.experts[expert_id]

    def add(self, entry: ExpertEntry) -> None:
        """Enter a new expert; :class:`ConfigError` when its id is no plain word, or its id or uid is taken."""
        self.refuse_taken(plain_name(entry.expert_id))
        for other in self.experts.values():
            if other.expert_uid == entry.expert_uid:
                raise ConfigError(f"{entry.expert_id} and {other.expert_id} are one expert (uid {entry.expert_uid}).")
        if entry.parent_expert_id is not None:
            self.find(entry.parent_expert_id)
        self.experts[entry.expert_id] = replace(
            entry,
            name=entry.name or f"Expert {entry.expert_id}",
            category=entry.category or "general",
            created_at=entry.created_at or now(),
        )

    def named_goals(self) -> dict[str, tuple[str, ...]]:
        """The goals of each expert, by its uid."""
        return {one.expert_uid: one.goals for one in self.experts.values()}

    def deleted(self) -> set[str]:
        """Uids of experts that were deleted and have not come back."""
        stones = [stone.get("expert_uid") for stone in self.tombstones if isinstance(stone, dict)]
        return {uid for uid in stones if isinstance(uid, str)} - {one.expert_uid for one in self.experts.values()}

    def refuse_taken(self, expert_id: str, but: ExpertEntry | None = None) -> None:
        """:class:`ConfigError` when another expert has this id, or one that is the same folder on some disks."""
        for other in self.experts.values():
            if other is not but and other.expert_id.casefold() == expert_id.casefold():
                raise ConfigError(
                    f"there is an expert {other.expert_id} already; choose another id or delete it first."
                )

    def above(self, expert_id: str) -> Iterator[str]:
        """Parent, its parent, and so on; ends where a cycle would begin again."""
        seen = {expert_id}
        while (parent := self.experts[expert_id].parent_expert_id) is not None and parent in self.experts:
            yield parent
            if parent in seen:
                return
            seen.add(parent)
            expert_id = parent

    def relink(self) -> None:
        """Make links agree: no parent that is missing or below its child, and children as the parents say."""
        for one in list(self.experts.values()):
            if one.parent_expert_id is not None and (
                one.parent_expert_id not in self.experts or one.expert_id in self.above(one.expert_id)
            ):
                self.experts[one.expert_id] = replace(one, parent_expert_id=None)
        children: dict[str, list[str]] = {name: [] for name in self.experts}
        for one in self.experts.values():
            if one.parent_expert_id is not None:
                children[one.parent_expert_id].append(one.expert_id)
        for name, below in children.items():
            if self.experts[name].child_expert_ids != tuple(below):
                self.experts[name] = replace(self.experts[name], child_expert_ids=tuple(below))

    def stats(self) -> dict[str, Any]:
        """Counts, and each expert's share of the use."""
        experts = sorted(self.experts.values(), key=lambda one: -one.total_activations)
        total = sum(one.total_activations for one in experts)
        return {
            "experts": len(experts),
            "trained": sum(one.version > 0 for one in experts),
            "active": sum(one.is_active for one in experts),
            "frozen": sum(one.is_frozen for one in experts),
            "attached": sum(bool(one.attached_to) for one in experts),
            "with_goals": sum(bool(one.goals) for one in experts),
            "deleted": len(self.tombstones),
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

    def to_json(self) -> dict[str, Any]:
        """The registry as it is written, links made to agree."""
        self.relink()
        head = {"schema_version": SCHEMA, "version": VERSION, "created_at": None, "base_model": None}
        kept = {key: value for key, value in self.top.items() if key not in ("schema_version", "version")}
        lists = {"experts": [one.to_json() for one in self.experts.values()], "tombstones": self.tombstones}
        return head | kept | lists


def read_book(file: Path) -> Book | None:
    """Read a registry, this version's or the original's 1.0; None when there is no file.

    Raises :class:`CheckpointError` when the file is damaged or written by a newer version.
    """
    try:
        top = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(top, dict) or not isinstance(top.get("experts"), list):
            raise ValueError("it has no list of experts")
        schema = top.get("schema_version", 1)
        if type(schema) is not int or schema < 1:
            raise ValueError(f"its schema_version is {schema!r}")
        version = top.get("version", "1.0")
        if schema > SCHEMA or ("schema_version" not in top and not str(version).startswith("1.")):
            raise CheckpointError(
                f"{file} was written by a newer version of aios (version {version}, schema {schema}; known here up to "
                f"schema {SCHEMA}); update aios. The file is as it was."
            )
        tombstones = top.get("tombstones", [])
        if not isinstance(tombstones, list):
            raise ValueError("tombstones is no list")
        book = Book({key: value for key, value in top.items() if key not in ("experts", "tombstones")})
        book.tombstones = tombstones
        uids = set()
        for raw in top["experts"]:
            one = _read_entry(raw, version=int(schema < SCHEMA))
            if one.expert_id in book.experts or one.expert_uid in uids:
                raise ValueError(f"{one.expert_id!r} is in it twice")
            uids.add(one.expert_uid)
            book.experts[one.expert_id] = one
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{file} is damaged ({error}); put a copy back, or move it away to begin an empty registry."
        ) from error
    book.relink()
    return book


def _read_entry(raw: Any, version: int) -> ExpertEntry:
    if not isinstance(raw, dict) or not isinstance(raw.get("expert_id"), str) or not raw["expert_id"]:
        raise ValueError("an expert in it has no expert_id")
    known: dict[str, Any] = {}
    for name, kind in _KNOWN.items():
        value = raw.get(name)
        if value is None:
            continue
        if not _FITS[kind](value):
            raise ValueError(f"{name} of expert {raw['expert_id']!r} is {value!r}")
        known[name] = tuple(value) if isinstance(value, list) else value
    if not _UID.fullmatch(known.setdefault("expert_uid", _original_uid(raw))):
        raise ValueError(f"expert_uid of expert {raw['expert_id']!r} is {known['expert_uid']!r}")
    known.setdefault("version", version)
    known["checkpoint_path"] = known.get("checkpoint_path", "").replace("\\", "/")
    return ExpertEntry(**known, extra={key: value for key, value in raw.items() if key not in _KNOWN})


def now() -> str:
    """The time as the registry writes it."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _original_uid(raw: dict[str, Any]) -> str:
    # The same at each reading until it is written down: version 1.0 knew no uid.
    return uuid.uuid5(uuid.NAMESPACE_OID, f"{raw['expert_id']}/{raw.get('created_at')}").hex
