"""Records to text: the field that holds it, conversations, JSON lines."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from aios.data.sources import FlagNeededError
from chronomoe.errors import DataError

TEXT_FIELDS = ("text", "content", "document", "article", "body")
"""Fields taken for the text when none is named."""
_CONVERSATIONS = ("messages", "conversations", "conversation")
_PAIRS = (("prompt", "completion"), ("prompt", "response"), ("instruction", "output"), ("question", "answer"))
_LISTED = 30
"""Fields that an error lists."""


def json_documents(where: str, lines: Iterable[str], field: str | None) -> Iterator[str]:
    """The text of each line that is not blank: a string, or a field of an object."""
    for number, line in enumerate(lines, start=1):
        if line.isspace():
            continue
        place = f"{where}, line {number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{place} is not JSON ({error}); mend or remove it.") from error
        if isinstance(record, dict):
            text = record_text(record, field, place)
        elif isinstance(record, str):
            text = record
        else:
            raise DataError(f"{place} holds neither text nor an object with a field of text; mend or remove it.")
        # JSON can spell half a surrogate pair, which no tokenizer can encode.
        yield text.encode("utf-8", "replace").decode()


def record_text(record: Mapping[str, Any], field: str | None, where: str) -> str:
    """The text of a record: that of ``field``, or of the first of :data:`TEXT_FIELDS` that has any."""
    if field is None:
        for name in TEXT_FIELDS:
            if name in record and isinstance(record[name], str | bytes | None):
                return _text(record[name]) or ""
        raise no_text_field(where, text_fields(record), None, record)
    texts = [_text(_at(record, name, where, field)) for name in parts_of(field, record)]
    if None in texts:
        raise no_text_field(where, text_fields(record), field, record, present=True)
    return "".join(text for text in texts if text)


def parts_of(field: str, names: Iterable[str]) -> list[str]:
    """The fields that ``field`` names: itself, or those with a + between them."""
    return [field] if field in names else field.split("+")


def _at(record: Mapping[str, Any], name: str, where: str, field: str) -> Any:
    if name in record:
        return record[name]
    value: Any = record
    for step in name.split("."):
        if not isinstance(value, Mapping) or step not in value:
            raise no_text_field(where, text_fields(record), field, record)
        value = value[step]
    return value


def _text(value: Any) -> str | None:
    """A value as text: a conversation turn by turn; empty for null, None for what holds no text."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if _is_conversation(value):
        return "\n\n".join(filter(None, map(_turn, value)))
    return None


def _is_conversation(value: Any) -> bool:
    return isinstance(value, Sequence) and all(isinstance(one, Mapping) and _content(one) is not None for one in value)


def _content(turn: Mapping[str, Any]) -> Any:
    return next((turn[name] or "" for name in ("content", "value") if name in turn), None)


def _turn(turn: Mapping[str, Any]) -> str:
    content = _content(turn)
    if isinstance(content, Sequence) and not isinstance(content, str):  # parts, of which some may be pictures
        parts = [part.get("text") if isinstance(part, Mapping) else part for part in content]
        content = "".join(part for part in parts if isinstance(part, str))
    role = turn.get("role", turn.get("from"))
    return f"{role}: {content}" if role and content else str(content)


def text_fields(record: Mapping[str, Any]) -> list[str]:
    """The fields that hold text, those of inner objects with a dot between the names."""
    found: list[str] = []

    def collect(value: Mapping[str, Any], before: str) -> None:
        for name, one in value.items():
            if isinstance(one, Mapping):
                collect(one, f"{before}{name}.")
            elif one and _text(one) is not None:
                found.append(f"{before}{name}")

    collect(record, "")
    return found


def no_text_field(
    where: str, names: Sequence[str], field: str | None, every: Iterable[str], *, present: bool = False
) -> FlagNeededError:
    """The error of a record or table without the field that was named, or without one that is obviously text.

    ``names`` are its fields with text, ``every`` all at the top; ``present``: the field is there, but holds no text.
    """
    if field is None:
        if found := next((name for name in _CONVERSATIONS if name in names), None):
            return FlagNeededError(
                f"{where} holds a conversation ({found}), and training as chat is not supported yet",
                f"train on it as plain text, one turn after another, with --field {found}",
            )
        for prompt, answer in _PAIRS:
            if prompt in names and answer in names:
                return FlagNeededError(
                    f"{where} holds a {prompt} and its {answer}, and training as chat is not supported yet",
                    f"train on both as plain text with --field {prompt}+{answer}",
                )
    missing = f"no {'text in the ' * present}field {field!r}" if field else "no obvious text field"
    if not names:
        seen = ", ".join(map(repr, list(every)[:_LISTED])) or "nothing"
        return FlagNeededError(f"{where} has {missing}, and no other text (it holds {seen})", "mend or remove it")
    listed = ", ".join(map(repr, names[:_LISTED])) + f" and {len(names) - _LISTED} more" * (len(names) > _LISTED)
    return FlagNeededError(f"{where} has {missing}", f"choose one of {listed} with --field")
