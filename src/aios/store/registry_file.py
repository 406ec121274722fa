"""artifacts/experts/registry.json: what is known of each expert, written from the database for people and programs.

Read are registries of this version and of version 1.0, which the founding text describes.
"""

import hashlib
import json
import re
import uuid
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from aios.store.entry import ExpertEntry
from aios.store.tables import ancestors
from chronomoe.errors import CheckpointError, ConfigError
from chronomoe.storage import finite

SCHEMA, VERSION = 3, "3.0"
_UID = re.compile(r"[0-9a-f]{32}")
_OURS = ("schema_version", "version", "revision", "experts", "tombstones")


@dataclass(frozen=True, kw_only=True)
class RegistryData:
    """A registry as a file has it."""

    top: dict[str, Any] = field(default_factory=dict)
    """What it says of itself, with keys that this version does not know."""
    experts: dict[str, ExpertEntry] = field(default_factory=dict)
    """By their ids; a parent is one of them, and never below its child."""
    tombstones: list[Any] = field(default_factory=list)


def registry_text(data: RegistryData, revision: int) -> str:
    """The file that says this, as its ``revision``."""
    head = {"schema_version": SCHEMA, "version": VERSION, "revision": revision, "created_at": None, "base_model": None}
    lists = {"experts": [one.to_json() for one in data.experts.values()], "tombstones": data.tombstones}
    return json.dumps(head | data.top | lists, indent=2, ensure_ascii=False) + "\n"


def with_revision(text: str, old: int, new: int) -> str:
    """The same file as another revision; the number stands before anything else of that name."""
    return text.replace(f'"revision": {old},', f'"revision": {new},', 1)


def digest(content: bytes | None) -> str:
    """SHA-256 of a file's bytes, in hexadecimal; empty for a file that is not there."""
    return "" if content is None else hashlib.sha256(content).hexdigest()


def read_bytes(file: Path) -> bytes | None:
    """What a file holds; None when it is not there."""
    try:
        return file.read_bytes()
    except FileNotFoundError:
        return None


def parse_registry(file: Path, content: bytes) -> RegistryData:
    """The registry that ``file`` holds as ``content``.

    Raises :class:`CheckpointError` when it is damaged, or another version wrote it.
    """
    try:
        top = json.loads(content.decode("utf-8"))
        if not isinstance(top, dict) or not isinstance(top.get("experts"), list):
            raise ValueError("it has no list of experts")
        schema = top.get("schema_version", 1)
        if type(schema) is not int or schema < 1:
            raise ValueError(f"its schema_version is {schema!r}")
        _refuse_other_versions(file, schema, top)
        tombstones = top.get("tombstones", [])
        if not isinstance(tombstones, list):
            raise ValueError("tombstones is no list")
        experts: dict[str, ExpertEntry] = {}
        uids: set[str] = set()
        for raw in top["experts"]:
            one = _parse_entry(raw, version=int(schema < SCHEMA))
            if one.expert_id in experts or one.expert_uid in uids:
                raise ValueError(f"{one.expert_id!r} is in it twice")
            uids.add(one.expert_uid)
            experts[one.expert_id] = one
    except (ValueError, ConfigError, RecursionError) as error:
        raise CheckpointError(
            f"{file} is damaged ({str(error).removesuffix('.')}); put a copy back, or move it away: it is written "
            "again from aios.db."
        ) from error
    kept = finite({key: value for key, value in top.items() if key not in _OURS})
    return RegistryData(top=kept, experts=_without_wrong_parents(experts), tombstones=finite(tombstones))


def _refuse_other_versions(file: Path, schema: int, top: dict[str, Any]) -> None:
    version = top.get("version", "1.0")
    if schema > SCHEMA or ("schema_version" not in top and not str(version).startswith("1.")):
        raise CheckpointError(
            f"{file} was written by a newer version of aios (version {version}, schema {schema}; known here up to "
            f"schema {SCHEMA}); update aios. The file is as it was."
        )
    if schema == 2:
        raise CheckpointError(
            f"{file} was made by version 0.1.0, whose registry this version does not read; move it and ../aios.db "
            "away, then train or import the experts again."
        )


def _parse_entry(raw: Any, version: int) -> ExpertEntry:
    if not isinstance(raw, dict) or not isinstance(raw.get("expert_id"), str) or not raw["expert_id"]:
        raise ValueError("an expert in it has no expert_id")
    names = ExpertEntry.__dataclass_fields__.keys() - {"extra"}
    known: dict[str, Any] = {"version": version, "expert_uid": _original_uid(raw)}
    known |= {name: value for name, value in raw.items() if name in names and value is not None}
    if not isinstance(known["expert_uid"], str) or not _UID.fullmatch(known["expert_uid"]):
        raise ValueError(f"expert_uid of expert {raw['expert_id']!r} is {known['expert_uid']!r}")
    entry = ExpertEntry.from_json(known, f"expert {raw['expert_id']!r}").checked()
    return replace(
        entry,
        checkpoint_path=entry.checkpoint_path.replace("\\", "/"),
        extra={key: value for key, value in raw.items() if key not in names},
    )


def _original_uid(raw: dict[str, Any]) -> str:
    # The same at each reading until it is written down: version 1.0 knew no uid.
    return uuid.uuid5(uuid.NAMESPACE_OID, f"{raw['expert_id']}/{raw.get('created_at')}").hex


def _without_wrong_parents(experts: dict[str, ExpertEntry]) -> dict[str, ExpertEntry]:
    """The same experts, without parents that are missing or below their child; a list of children names parents too."""
    for one in list(experts.values()):
        for child in one.child_expert_ids:
            if child in experts and experts[child].parent_expert_id is None:
                experts[child] = replace(experts[child], parent_expert_id=one.expert_id)
    for one in list(experts.values()):
        parent = one.parent_expert_id
        if parent is not None and (parent not in experts or one.expert_id in ancestors(experts, one.expert_id)):
            experts[one.expert_id] = replace(one, parent_expert_id=None)
    return experts
