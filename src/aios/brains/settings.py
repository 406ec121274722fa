"""Settings of a training run beyond the loop's own. Imports nothing heavy: the command line shows it at once."""

from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from cyclopts import Parameter

from aios.settings.goals import TrainingGoals
from chronomoe.errors import require
from chronomoe.training.config import TrainingConfig


class Given:
    """Remembers which fields its maker named: a flag given at its default value is still given."""

    given_names: frozenset[str]

    def __new__(cls, **given: Any) -> Self:
        made = super().__new__(cls)
        object.__setattr__(made, "given_names", frozenset(given))
        return made

    def naming(self, names: set[str]) -> Self:
        """The same, but only these fields count as given."""
        object.__setattr__(self, "given_names", frozenset(names))
        return self


@dataclass(frozen=True, kw_only=True)
class BrainTraining(Given, TrainingConfig):
    """The library's settings; a brain keeps fewer checkpoints, and kappa warms up for a tenth of its run."""

    kappa_warmup_steps: int | None = None
    """Steps during which kappa stays at its initial value; a tenth of the run when not given."""

    keep_last: int = 3
    """Newest checkpoints kept, besides the best; 0 keeps all."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stop_file is not None:  # whoever stops the run, or resumes it, may be in another folder
            object.__setattr__(self, "stop_file", str(Path(self.stop_file).absolute()))


@dataclass(frozen=True, kw_only=True)
class ModelShape(Given):
    """Changes to the base model's configuration; what is not given stays as the base model has it."""

    hidden_dim: int | None = None
    """Width of the residual stream."""
    intermediate_dim: int | None = None
    """Width of one expert."""
    num_layers: int | None = None
    """Decoder layers."""
    num_attention_heads: int | None = None
    """Attention heads."""
    num_key_value_heads: int | None = None
    """Key and value heads."""
    num_experts: int | None = None
    """Experts per layer."""
    num_experts_per_tok: int | None = None
    """Experts each token uses (top-k)."""

    def given(self) -> dict[str, int]:
        """The fields that were given."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class HRMShape(Given):
    """Shape of an HRM ACTv1."""

    h_layers: int = 2
    """Blocks of the high level."""
    l_layers: int = 2
    """Blocks of the low level."""
    hidden_size: int = 512
    """Width of the residual stream."""
    expansion: float = 2.0
    """Feed-forward width in multiples of hidden_size, as of a layer with two matrices."""
    num_heads: int = 8
    """Attention heads."""
    h_cycles: int = 2
    """High cycles per segment."""
    l_cycles: int = 2
    """Low cycles per high cycle."""
    halt_max_steps: int = 2
    """Segments a token may use."""
    pos_encodings: Literal["rope", "learned"] = "rope"
    """Positions: rotary, or learned for max_seq_len tokens."""
    window_size: int | None = None
    """Tokens each token sees, itself included; all before it when not given."""
    grad_mode: Literal["one_step", "last_cycle", "all"] = "last_cycle"
    """Calls of a segment that carry gradient."""
    use_moe: Annotated[bool, Parameter(negative="--no-moe")] = True
    """Experts in every block; --no-moe: one dense layer."""
    num_experts: int = 8
    """Experts per layer."""
    num_experts_per_tok: int = 2
    """Experts each token uses (top-k)."""

    def given(self) -> dict[str, Any]:
        """The fields that were named."""
        return {name: value for name, value in asdict(self).items() if name in self.given_names}


SHAPES: dict[str, type[ModelShape] | type[HRMShape]] = {"mixtral": ModelShape, "actv1": HRMShape}
"""Families of brains, and how their shape is told."""


@dataclass(frozen=True, kw_only=True)
class RunSettings(Given):
    """What to train, on what, and under which name."""

    root: Path = Path()
    """Workspace folder."""
    model: Path | None = None
    """Folder with config and tokenizer, and weights to start from if any. [artifacts/hf_implant/base_model]"""
    data: Path | None = None
    """Prepared data. [training_data/prepared]"""
    name: str = "small"
    """Name of the brain: artifacts/brains/mixtral/<name>."""
    seq_len: int = 256
    """Tokens per training sequence."""
    moe_capacity_factor: float | None = None
    """Tokens an expert may take, as a multiple of its fair share; nothing is dropped when not given."""
    eval_tokens: int = 32768
    """Held-out tokens per domain used for each evaluation; 0 evaluates nothing."""
    linear: bool = False
    """Read the text in order instead of shuffled."""
    start_offset: int = 0
    """Sequences passed over at the beginning of each domain, read in order."""
    student_init: Path | None = None
    """Weights to start from: a bundle, a checkpoint or a .safetensors file of the same shape."""
    default_goal: Annotated[str | None, Parameter(show=False)] = None
    """Goal kept with the brain."""
    stop_after: int | None = None
    """Save and stop at this step, to be resumed later."""
    resume: bool = False
    """Continue the brain of this name from its latest checkpoint, with its own settings."""
    dry_run: bool = False
    """Print the plan (parameters, memory, tokens, time) and do nothing."""

    def __post_init__(self) -> None:
        require(self, "seq_len", least=2, integer=True)
        require(self, "eval_tokens", "start_offset", least=0, integer=True)
        require(self, "stop_after", least=1, integer=True, optional=True)


_PATHS = ("model", "data", "student_init")
_MOMENTARY = ("root", "resume", "dry_run", "stop_after", "name")


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training run, complete: what ``run.json`` of a brain holds."""

    settings: RunSettings = field(default_factory=RunSettings)
    shape: ModelShape | HRMShape = field(default_factory=ModelShape)
    training: BrainTraining = field(default_factory=BrainTraining)
    family: str = "mixtral"
    goals: TrainingGoals = field(default_factory=TrainingGoals)
    """Goals to train under; on --resume those the brain remembers, unless others are given."""
    bundle: Path | None = None
    """Where the brain is, if not where its name says."""

    def to_json(self) -> dict[str, Any]:
        """JSON-ready; what concerns one invocation only is left out."""
        settings = {
            name: str(value) if isinstance(value, Path) else value
            for name, value in asdict(self.settings).items()
            if name not in _MOMENTARY
        }
        parts = {"settings": settings, "shape": asdict(self.shape), "training": asdict(self.training)}
        return {"family": self.family, **parts}

    def continuing(self, saved: dict[str, Any]) -> tuple["Run", dict[str, tuple[Any, Any]]]:
        """The run that ``saved`` describes, changed where this one was told otherwise; and those changes."""
        changes: dict[str, tuple[Any, Any]] = {}
        merged: dict[str, dict[str, Any]] = {}
        for part, default in (
            ("settings", RunSettings()),
            ("shape", SHAPES[self.family]()),
            ("training", BrainTraining()),
        ):
            now = getattr(self, part)
            merged[part] = {}
            for entry in fields(default):
                asked = getattr(now, entry.name)
                old = saved.get(part, {}).get(entry.name, getattr(default, entry.name))
                if part == "settings" and entry.name in _PATHS and old is not None:
                    old = Path(old)
                take = asked if entry.name in now.given_names or entry.name in _MOMENTARY else old
                if take != old and entry.name not in _MOMENTARY:
                    changes[entry.name] = (old, take)
                merged[part][entry.name] = take
        run = replace(
            self,
            settings=RunSettings(**merged["settings"]),
            shape=SHAPES[self.family](**merged["shape"]),
            training=BrainTraining(**merged["training"]),
        )
        return run, changes
