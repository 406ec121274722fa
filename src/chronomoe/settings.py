"""Settings: base of every settings class and of every JSON file with a version. Imports nothing heavy.

A subclass is a frozen, keyword-only dataclass; its annotations are its checks:

    @dataclass(frozen=True, kw_only=True)
    class Example(Settings):
        steps: Annotated[int, Bounds(ge=1)] = 100
        schedule: Literal["cosine", "linear"] = "cosine"
        log_file: Path | None = None
        dry_run: Annotated[bool, TRANSIENT] = False

A value may be bool, int, finite float, str, Path, Literal, None, another Settings, or a tuple or dict of these.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, fields
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, ClassVar, Literal, Self, Union, get_args, get_origin, get_type_hints

from chronomoe.errors import CheckpointError, ChronoMoEError, ConfigError
from chronomoe.storage import write_json

_LONGEST_VALUE = 80
"""Characters of a wrong value that an error repeats."""


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """Limits of a number, as in ``Annotated[int, Bounds(ge=1)]``."""

    ge: float = -math.inf
    gt: float = -math.inf
    le: float = math.inf
    lt: float = math.inf

    def hold(self, value: float) -> bool:
        """Is ``value`` within the limits?"""
        return self.ge <= value <= self.le and self.gt < value < self.lt

    def __str__(self) -> str:
        limits = {"at least": self.ge, "above": self.gt, "at most": self.le, "below": self.lt}
        return " and ".join(f"{word} {limit:,}" for word, limit in limits.items() if math.isfinite(limit))


Count = Annotated[int, Bounds(ge=1)]
SequenceLength = Annotated[int, Bounds(ge=2)]
"""Tokens of a sequence, of which the first predicts the second."""
NonNegativeInt = Annotated[int, Bounds(ge=0)]
NonNegative = Annotated[float, Bounds(ge=0)]
Positive = Annotated[float, Bounds(gt=0)]
Share = Annotated[float, Bounds(ge=0, le=1)]

TRANSIENT = "transient"
"""``Annotated[bool, TRANSIENT]`` marks a field that concerns one call: it is neither saved nor taken from a file."""


@dataclass(frozen=True, kw_only=True)
class FileFormat:
    """How a class that is a file names itself on disk, and what its errors advise."""

    name: str
    version: int
    remedy: str = "put a copy back"
    """What to do about a damaged file."""
    outdated: str
    """What to do about a file that version 0.1.0 wrote."""
    error: type[ChronoMoEError] = CheckpointError


@dataclass(frozen=True)
class Settings:
    """Values that were checked: each has its annotation's type and bounds, or :class:`ConfigError` names the first
    that does not."""

    file_format: ClassVar[FileFormat | None] = None
    title: ClassVar[str] = ""
    """Comes before the name of a field in errors, with a space after it."""

    def __new__(cls, **given: Any) -> Self:
        made = super().__new__(cls)
        object.__setattr__(made, "_given", frozenset(given))
        return made

    def __post_init__(self) -> None:
        for name, kind in annotations_of(type(self)).items():
            if not _fits(value := getattr(self, name), kind):
                raise ConfigError(f"{self.title}{self.spelled(name)} is {_short(value)}; {_wanted(kind)}.")

    @classmethod
    def spelled(cls, name: str) -> str:
        """The name of a field in errors."""
        return name

    @property
    def given(self) -> frozenset[str]:
        """Names of the fields that the caller named; a field named at its default value is still given."""
        names: frozenset[str] = vars(self)["_given"]
        return names

    def replace(self, **changes: Any) -> Self:
        """The same with other values, which then count as given."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return self._made(values | changes, self.given | changes.keys())

    def over(self, lower: "Settings") -> Self:
        """These settings where they were given, else those of ``lower``; nested settings likewise.

        A field that concerns one call, or that ``lower`` does not have, keeps the value it has here.
        """
        values: dict[str, Any] = {}
        for name, kind in annotations_of(type(self)).items():
            mine = getattr(self, name)
            theirs = mine if is_transient(kind) else getattr(lower, name, mine)
            if isinstance(mine, Settings) and isinstance(theirs, Settings):
                values[name] = mine.over(theirs)
            else:
                values[name] = mine if name in self.given else theirs
        below = {name for name in lower.given & values.keys() if not is_transient(annotations_of(type(self))[name])}
        return self._made(values, self.given | below)

    def changes_from(self, before: "Settings") -> dict[str, tuple[Any, Any]]:
        """Old and new value of each field that differs, by name; nested settings are looked into."""
        found: dict[str, tuple[Any, Any]] = {}
        for name, kind in annotations_of(type(self)).items():
            old, new = getattr(before, name), getattr(self, name)
            if isinstance(old, Settings) and isinstance(new, Settings):
                found |= new.changes_from(old)
            elif old != new and not is_transient(kind):
                found[name] = old, new
        return found

    def _made(self, values: dict[str, Any], given: frozenset[str]) -> Self:
        made = type(self)(**values)
        object.__setattr__(made, "_given", frozenset(given))
        return made

    def to_json(self) -> dict[str, Any]:
        """JSON-ready values; a field that concerns one call is left out."""
        kinds = annotations_of(type(self))
        return {name: _plain(getattr(self, name)) for name, kind in kinds.items() if not is_transient(kind)}

    @classmethod
    def from_json(cls, raw: Any, where: str = "", *, exact: bool = False) -> Self:
        """The inverse of :meth:`to_json`; the names in ``raw`` count as given.

        :class:`ConfigError`, begun with ``where``, names what is unknown, missing or wrong. A name that is absent has
        its default, unless the fields are to be ``exact``.
        """
        begin = f"{where}: " if where else ""
        if not isinstance(raw, dict) or not all(isinstance(name, str) for name in raw):
            raise ConfigError(f"{begin}{_short(raw)} is no object with named values.")
        kinds = {name: kind for name, kind in annotations_of(cls).items() if not is_transient(kind)}
        if unknown := sorted(raw.keys() - kinds.keys()):
            raise ConfigError(f"{begin}there is no setting {_short(unknown[0])}.")
        needed = [one.name for one in fields(cls) if one.name in kinds and (exact or not _has_default(one))]
        if missing := [name for name in needed if name not in raw]:
            raise ConfigError(f"{begin}{missing[0]} is missing.")
        inside = f"{where}." if where else ""
        values = {name: _parsed(value, kinds[name], f"{inside}{name}", exact) for name, value in raw.items()}
        try:
            return cls(**values)
        except ConfigError as error:
            raise ConfigError(f"{begin}{error}") from error

    @classmethod
    def read_file(cls, path: Path, *, exact: bool = False) -> Self:
        """Read a file that :meth:`write_file` wrote; a missing one is a FileNotFoundError.

        The error of :attr:`file_format` says in one sentence what is damaged, or what made a file of another version.
        """
        form = _format_of(cls)
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(raw, dict):
                raise ValueError("it is no object with named values")
        except (ValueError, RecursionError) as error:
            raise form.error(f"{path} is damaged ({_clause(error)}); {form.remedy}.") from error
        name, version = raw.pop("format", form.name), raw.pop("version", 0)
        if name != form.name or type(version) is not int:
            raise form.error(f"{path} is not a file of the format {form.name}; {form.remedy}.")
        if version < form.version:
            raise form.error(f"{path} was made by version 0.1.0, which wrote it differently; {form.outdated}.")
        if version > form.version:
            raise form.error(f"{path} was made by a newer version than this one; update chronomoe-aios.")
        try:
            return cls.from_json(raw, exact=exact)
        except ConfigError as error:
            raise form.error(f"{path} is damaged ({_clause(error)}); {form.remedy}.") from error

    def write_file(self, path: Path) -> None:
        """Replace the file ``path`` by these settings in one step."""
        form = _format_of(type(self))
        write_json(path, {"format": form.name, "version": form.version, **self.to_json()})


def annotations_of(kind: Any) -> dict[str, Any]:
    """The annotation of each field of a settings class, by name."""
    return _annotations(kind)


@cache
def _annotations(kind: Any) -> dict[str, Any]:
    hints = get_type_hints(kind, include_extras=True)
    return {field.name: hints[field.name] for field in fields(kind)}


def bounds_of(kind: type[Settings], name: str) -> Bounds:
    """The limits of a number among the fields; without any, limits that hold always."""
    return _bounds(annotations_of(kind)[name])


def is_transient(kind: Any) -> bool:
    """Does the field of this annotation concern one call only?"""
    return TRANSIENT in getattr(kind, "__metadata__", ())


def _has_default(field: Field[Any]) -> bool:
    return field.default is not MISSING or field.default_factory is not MISSING


def _format_of(kind: type[Settings]) -> FileFormat:
    assert kind.file_format is not None, f"{kind.__name__} is not a file"
    return kind.file_format


def _bounds(kind: Any) -> Bounds:
    return next((found for _, found in _members(kind) if found is not None), Bounds())


def _members(kind: Any, bounds: Bounds | None = None) -> list[tuple[Any, Bounds | None]]:
    """The plain types of an annotation, of which a union has several, each with its limits."""
    if get_origin(kind) is Annotated:
        limits = next((one for one in kind.__metadata__ if isinstance(one, Bounds)), bounds)
        return _members(get_args(kind)[0], limits)
    if get_origin(kind) in (Union, UnionType):
        return [member for one in get_args(kind) for member in _members(one, bounds)]
    return [(kind, bounds)]


def _fits(value: Any, kind: Any) -> bool:
    """Is ``value`` what the annotation ``kind`` says?"""
    return any(_is_one(value, member, bounds) for member, bounds in _members(kind))


def _is_one(value: Any, kind: Any, bounds: Bounds | None) -> bool:
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Literal:
        return any(value == one and type(value) is type(one) for one in arguments)
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        kinds = arguments[:1] * len(value) if arguments[1:] == (...,) else arguments
        return len(value) == len(kinds) and all(map(_fits, value, kinds))
    if origin is dict:
        return isinstance(value, dict) and all(
            _fits(name, arguments[0]) and _fits(one, arguments[1]) for name, one in value.items()
        )
    if kind in (int, float):
        number = isinstance(value, int) or (kind is float and isinstance(value, float) and math.isfinite(value))
        return number and not isinstance(value, bool) and (bounds is None or bounds.hold(value))
    return kind is Any or isinstance(value, kind)


def _wanted(kind: Any) -> str:
    """What a value of this annotation must be, in words."""
    bounds, kinds = str(_bounds(kind)), [member for member, _ in _members(kind)]
    if literal := [one for one in kinds if get_origin(one) is Literal]:
        return f"use one of {', '.join(map(str, get_args(literal[0])))}"
    words = " or ".join(_NAMES.get(get_origin(one) or one, "a set of settings") for one in kinds if one is not NoneType)
    return f"it must be {words}{', ' * bool(bounds)}{bounds}{', or None' * (NoneType in kinds)}"


_NAMES: dict[Any, str] = {
    bool: "true or false", int: "a whole number", float: "a finite number", str: "text", Path: "a path",
    tuple: "a list of the right values", dict: "an object with the right values",
}  # fmt: skip


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]}..."


def _clause(error: Exception) -> str:
    return str(error).removesuffix(".")


def _plain(value: Any) -> Any:
    """The value as JSON has it."""
    if isinstance(value, Settings):
        return value.to_json()
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, tuple | list):
        return [_plain(one) for one in value]
    if isinstance(value, Mapping):
        return {name: _plain(one) for name, one in value.items()}
    return value


def _parsed(raw: Any, kind: Any, where: str, exact: bool) -> Any:
    """What JSON has, as the annotation's type where it can be; what cannot is left for the check to refuse."""
    kinds = [member for member, _ in _members(kind) if member is not NoneType]
    if raw is None or len(kinds) != 1:
        return raw
    kind, arguments = kinds[0], get_args(kinds[0])
    if isinstance(kind, type) and issubclass(kind, Settings) and not isinstance(raw, Settings):
        return kind.from_json(raw, where, exact=exact)
    if kind is Path and isinstance(raw, str):
        return Path(raw)
    if get_origin(kind) is tuple and isinstance(raw, list):
        inner = arguments[:1] * len(raw) if arguments[1:] == (...,) else arguments
        if len(inner) != len(raw):
            return tuple(raw)
        return tuple(_parsed(one, kind, where, exact) for one, kind in zip(raw, inner, strict=True))
    if get_origin(kind) is dict and isinstance(raw, dict):
        return {name: _parsed(one, arguments[1], f"{where}.{name}", exact) for name, one in raw.items()}
    return raw
