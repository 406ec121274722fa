"""GoalSettings: how much goals may do. Imports nothing heavy."""

from dataclasses import dataclass
from typing import Annotated, ClassVar

from chronomoe.settings import Bounds, Positive, Settings, Share

CAP = 1.0
"""Largest |g|, in logits: the router's own distribution then moves by half a nat at most (Lemma 3: range^2 / 8)."""
MAX_STRENGTH = 5.0
"""Most nats that a goal may add to a gate."""
Strength = Annotated[float, Bounds(ge=0, le=MAX_STRENGTH)]
Bias = Annotated[float, Bounds(ge=0, le=CAP)]


@dataclass(frozen=True, kw_only=True)
class GoalSettings(Settings):
    """How much goals may do."""

    title: ClassVar = "goal "

    strength: Strength = 3.0
    """Nats of log-odds that a goal of weight 1 gives the gate of its attached expert, 0 to 5."""
    kl: Positive = 0.01
    """Nats per token that the output may change on calibration text, for a model's own experts."""
    beta: Bias | None = None
    """The size of that bias by hand, in logits, instead of by the budget."""
    layers: tuple[int, ...] | None = None
    """MoE layers it acts in; all when not given."""
    likeness: Share = 0.0
    """Share, 0 to 1, of what the experts usually receive being like the goal's text, beside explicit links."""
