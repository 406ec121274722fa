"""What a goal may say and weigh: the rules for its text and its weight."""

import math
import unicodedata
from typing import Annotated

from chronomoe.errors import ConfigError
from chronomoe.settings import Bounds

LONGEST = 1000
"""Characters of a goal, at most."""


def goal_text(text: str) -> str:
    """The text of a goal, stripped; :class:`ConfigError` when it is empty, too long or no plain line of text."""
    text = text.strip()
    if not text:
        raise ConfigError("a goal needs words.")
    if len(text) > LONGEST:
        raise ConfigError(f"a goal has at most {LONGEST:,} characters; this one has {len(text):,}.")
    for sign in text:
        if unicodedata.category(sign) == "Cs":
            raise ConfigError(f"{sign!r} is not valid Unicode text; leave it out of the goal.")
        if _is_control(sign):
            raise ConfigError(f"a goal is one line of text; leave out the control character {sign!r}.")
    return text


def fitted_text(text: str) -> str:
    """The same of a text from elsewhere, with what is not allowed left out; it may become empty."""
    text = text.encode(errors="replace").decode()
    return "".join(" " if _is_control(sign) else sign for sign in text).strip()[:LONGEST].strip()


MAX_WEIGHT = 1.0
Weight = Annotated[float, Bounds(gt=0, le=MAX_WEIGHT)]
"""How much a goal counts beside others."""


def goal_weight(weight: float) -> float:
    """The weight of a goal; :class:`ConfigError` when it is not above 0 and at most 1."""
    if not (math.isfinite(weight) and 0 < weight <= MAX_WEIGHT):
        raise ConfigError(f"the weight of a goal is {weight:g}; it lies above 0 and is at most {MAX_WEIGHT:g}.")
    return float(weight)


def _is_control(sign: str) -> bool:
    return unicodedata.category(sign) in ("Cc", "Zl", "Zp")
