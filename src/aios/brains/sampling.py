"""How a brain is to speak, as the command line tells. Imports nothing heavy."""

import dataclasses
from typing import Any, Literal


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How text is sampled."""

    max_new_tokens: int = 100
    """Length of what is said."""
    temperature: float = 0.8
    """0 takes the likeliest token each time."""
    top_p: float = 0.95
    """Sample among the likeliest tokens that make up this probability."""
    top_k: int = 50
    """And among so many of the likeliest; 0 for all."""
    seed: int = 0
    """The same seed and words give the same text."""
    halt: Literal["exact", "max"] = "exact"
    """exact: a token stops thinking where the model says; max: never before the cap (brains that halt)."""
    segments: int | None = None
    """At most this many segments a token (brains that halt)."""

    @property
    def settings(self) -> dict[str, Any]:
        """What :func:`aios.brains.generate.stream_text` takes of it."""
        return {name: value for name, value in vars(self).items() if name not in ("halt", "segments")}
