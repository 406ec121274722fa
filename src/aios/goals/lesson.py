"""Settings of `aios goals teach`. Imports nothing heavy."""

import dataclasses

from chronomoe.errors import require


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lesson:
    """How goals are taught."""

    steps: int = 200
    """Optimizer steps, the goals in turn."""
    batch_size: int = 8
    """Sequences per step."""
    max_seq_len: int = 128
    """Tokens per sequence."""
    lr: float = 1e-2
    """Learning rate."""
    anchor_weight: float = 1.0
    """Weight of the anchor: KL between the brain with the goal off and on, on its own training data."""
    eval_tokens: int = 16384
    """Held-out tokens per goal measured before and after."""
    seed: int = 0
    """Seed of the data order."""

    def __post_init__(self) -> None:
        require(self, "steps", "batch_size", "max_seq_len", "eval_tokens", least=1, integer=True)
        require(self, "lr", above=0)
        require(self, "anchor_weight", least=0)
