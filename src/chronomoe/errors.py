"""Every error a user of the library can meet.

    ChronoMoEError
    +-- ConfigError          a setting that cannot work; the message names it and a value that would
    +-- DataError            text or tokens that cannot be read or used
    +-- CheckpointError      a checkpoint that is missing, damaged, or belongs to something else
    +-- UnsupportedModelError  a model whose routers cannot be steered
    +-- TrainingError        a run that cannot go on (for example too many non-finite steps)

Messages are one sentence or two: what is wrong, named, and what to do about it.
"""

import math
from typing import Any


class ChronoMoEError(Exception):
    """Base of all errors raised on purpose by chronomoe and aios."""


class ConfigError(ChronoMoEError, ValueError):
    """A setting, or a combination of settings, that cannot work."""


class DataError(ChronoMoEError, ValueError):
    """Text or tokens that cannot be read or used."""


class CheckpointError(ChronoMoEError):
    """A checkpoint that is missing, damaged, or belongs to another model."""


class UnsupportedModelError(ChronoMoEError, TypeError):
    """A model whose routers chronomoe does not know how to steer."""


class TrainingError(ChronoMoEError, RuntimeError):
    """A training run that cannot go on."""


def require(
    settings: Any,
    *names: str,
    least: float = -math.inf,
    above: float = -math.inf,
    most: float = math.inf,
    below: float = math.inf,
    integer: bool = False,
    optional: bool = False,
    of: str = "",
) -> None:
    """:class:`ConfigError` unless each of these fields is a finite number within the bounds, or None if ``optional``.

    ``of`` comes before the field's name in the message.
    """
    for name in names:
        value = getattr(settings, name)
        number = isinstance(value, int) or (not integer and isinstance(value, float) and math.isfinite(value))
        fits = number and not isinstance(value, bool) and least <= value <= most and above < value < below
        if fits or (optional and value is None):
            continue
        bounds = {"at least": least, "above": above, "at most": most, "below": below}
        limits = " and ".join(f"{word} {bound:,}" for word, bound in bounds.items() if math.isfinite(bound))
        kind = f"{'whole' if integer else 'finite'} number"
        none = ", or None" * optional
        raise ConfigError(f"{of}{name} is {value!r}; it must be a {kind}{', ' * bool(limits)}{limits}{none}.")
