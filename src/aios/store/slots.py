"""Slots: names of experts in a brain's own routers, ``BRAIN:LAYER.EXPERT``, which goals may be linked to."""

import re
from dataclasses import dataclass

from chronomoe.errors import ConfigError

_SLOT = re.compile(r"(?P<brain>[^:]+):(?P<layer>\*|\d{1,6})\.(?P<expert>\d{1,6})")


@dataclass(frozen=True)
class Slot:
    """One expert of a brain, in one of its layers or in all of them (None); both count from 0."""

    brain: str
    """family/name."""
    layer: int | None
    expert: int

    def __str__(self) -> str:
        return f"{self.brain}:{'*' if self.layer is None else self.layer}.{self.expert}"


def read_slot(word: str) -> Slot:
    """A slot as it is written; :class:`ConfigError` for what is none."""
    found = _SLOT.fullmatch(word)
    if found is None:
        raise ConfigError(f"{word!r} is no slot; write BRAIN:LAYER.EXPERT, for example small:2.5 or small:*.5.")
    layer = None if found["layer"] == "*" else int(found["layer"])
    return Slot(found["brain"], layer, int(found["expert"]))
