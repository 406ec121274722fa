"""Settings of `aios experts train`."""

from dataclasses import dataclass
from pathlib import Path

from aios.goal_text import goal_text
from chronomoe.settings import Count, NonNegative, NonNegativeInt, Positive, SequenceLength, Settings, Share
from chronomoe.training.config import TrainingConfig


@dataclass(frozen=True, kw_only=True)
class ExpertTraining(Settings):
    """How one expert is trained."""

    dataset_file: Path | None = None
    """Text of the domain: a file, a folder, or prepared data."""
    brain: str | None = None
    """The brain it is trained in: its name, family/name or path."""
    anchor_file: Path | None = None
    """General text on which the expert shall change nothing. [the brain's own training data, if it is there]"""
    steps: Count = 400
    """Optimizer steps."""
    batch_size: Count = TrainingConfig.batch_size
    """Sequences per step."""
    max_seq_len: SequenceLength = 128
    """Tokens per sequence."""
    lr: Positive = 2e-3
    """Learning rate."""
    redraw: Share = 0.5
    """Share of the hidden units that are redrawn; the rest is a copy of the base's most used expert."""
    anchor_weight: NonNegative = 1.0
    """Weight of the anchor: KL between the base and the base with the expert, on general text."""
    false_alarm: Share = 0.01
    """Share of general tokens at which the domain gate may open, at most, in each domain of the base."""
    harm_kl: NonNegative = 0.003
    """What those may do to the base's output, nats per token of KL, at most."""
    eval_tokens: NonNegativeInt = 32768
    """Held-out tokens per domain used to evaluate before and after."""
    calibration_windows: Count = 400
    """Sequences of each domain the gate is fitted to; as many more of general text to calibrate it on."""
    gate_memory: Share = 0.9
    """How much of the evidence before a token is left at the next one; 0 judges each token alone."""
    domain_record: bool = True
    """Keep samples of the domain's hidden states with the expert, by which gates of other experts stay shut there."""
    default_goal: str | None = None
    """Goal the expert is for."""
    log_file: Path | None = None
    """Metrics, one JSON object a line, appended. [metrics.jsonl beside the expert]"""
    seed: int = 0
    """Seed of initialisation and data order."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.default_goal is not None:
            goal_text(self.default_goal)
