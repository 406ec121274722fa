"""Settings of expert-only training. Imports nothing heavy: the command line shows it at once."""

import dataclasses
from pathlib import Path

from aios.brains.settings import Given
from aios.goal_text import goal_text
from chronomoe.errors import require


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertTraining(Given):
    """How one expert is trained."""

    dataset_file: Path | None = None
    """Text of the domain: a file, a folder, or prepared data."""
    brain: str | None = None
    """The brain it is trained in: its name, family/name or path."""
    anchor_file: Path | None = None
    """General text on which the expert shall change nothing. [the brain's own training data, if it is there]"""
    steps: int = 400
    """Optimizer steps."""
    batch_size: int = 8
    """Sequences per step."""
    max_seq_len: int = 128
    """Tokens per sequence."""
    lr: float = 2e-3
    """Learning rate."""
    redraw: float = 0.5
    """Share of the hidden units drawn anew; the rest is a copy of the base's most used expert."""
    anchor_weight: float = 1.0
    """Weight of the anchor: KL between the base and the base with the expert, on general text."""
    false_alarm: float = 0.02
    """Share of general tokens at which the domain gate may open, at most, in each domain of the base."""
    harm_kl: float = 0.003
    """What those may do to the base's output, nats per token of KL, at most."""
    eval_tokens: int = 32768
    """Held-out tokens per domain used to evaluate before and after."""
    calibration_windows: int = 400
    """Sequences of each domain the gate is fitted to; as many more of general text to calibrate it on."""
    gate_memory: float = 0.99
    """How much of the evidence before a token is left at the next one; 0 judges each token alone."""
    default_goal: str | None = None
    """Goal the expert is for."""
    log_file: Path | None = None
    """Metrics, one JSON object a line, appended. [metrics.jsonl beside the expert]"""
    seed: int = 0
    """Seed of initialisation and data order."""

    def __post_init__(self) -> None:
        require(self, "steps", "batch_size", "max_seq_len", "calibration_windows", least=1, integer=True)
        require(self, "eval_tokens", least=0, integer=True)
        require(self, "lr", above=0)
        require(self, "redraw", "gate_memory", "false_alarm", least=0, most=1)
        require(self, "harm_kl", "anchor_weight", least=0)
        if self.default_goal is not None:
            goal_text(self.default_goal)
