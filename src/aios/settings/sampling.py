"""Settings of `aios chat` and `aios generate`."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from chronomoe.settings import Bounds, Count, NonNegative, NonNegativeInt, Settings


@dataclass(frozen=True, kw_only=True)
class Sampling(Settings):
    """How text is sampled."""

    max_new_tokens: Count = 100
    """Tokens to write, at most."""
    temperature: NonNegative = 0.8
    """0 takes the likeliest token each time."""
    top_p: Annotated[float, Bounds(gt=0, le=1)] = 0.95
    """Sample among the likeliest tokens that make up this probability."""
    top_k: NonNegativeInt = 50
    """And among so many of the likeliest; 0 for all."""
    seed: int = 0
    """The same seed and words give the same text."""
    halt: Literal["exact", "max"] = "exact"
    """exact: a token gets as many segments as the model says; max: always the most (brains that halt)."""
    segments: Count | None = None
    """At most this many segments a token (brains that halt)."""

    @property
    def settings(self) -> dict[str, Any]:
        """The part that :meth:`aios.brains.loaded.LoadedBrain.stream` takes."""
        return {name: value for name, value in self.to_json().items() if name not in ("halt", "segments")}
