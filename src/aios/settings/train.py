"""Settings of a training run: what `aios train` takes, and what every family's run has."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar

from cyclopts import Parameter

from aios.settings.expert import ExpertTraining
from aios.settings.goals import TrainingGoals
from aios.workspace import Workspace
from chronomoe import hrm_shape
from chronomoe.settings import (
    TRANSIENT,
    Count,
    NonNegativeInt,
    Positive,
    SequenceLength,
    Settings,
    annotations_of,
)
from chronomoe.training.config import TrainingConfig

T = TypeVar("T")
OneCall = Annotated[T, TRANSIENT]
"""A field that concerns one call: never saved, and never taken from a brain that is resumed."""
Flat = Parameter(name="*")
"""The fields of a settings class as flags of their own."""


@dataclass(frozen=True, kw_only=True)
class Shape(Settings):
    """Shape of a model; the fields are the family's."""

    @property
    def changes(self) -> dict[str, Any]:
        """The fields that have a value."""
        return {name: value for name, value in self.to_json().items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class ModelShape(Shape):
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


@dataclass(frozen=True, kw_only=True)
class HRMShape(hrm_shape.HRMShape, Shape):
    """Shape of an HRM ACTv1, as options."""

    use_moe: Annotated[bool, Parameter(negative="--no-moe")] = hrm_shape.HRMShape.use_moe
    """Experts in every block; --no-moe: one dense layer."""


@dataclass(frozen=True, kw_only=True)
class RunOptions(Settings):
    """What to train on, from which weights, and where the brain goes."""

    root: Annotated[OneCall[Path], Parameter(parse=False)] = Path()
    """Workspace folder."""
    model: Path | None = None
    """Folder with config and tokenizer, and weights to start from if any. [artifacts/hf_implant/base_model]"""
    tokenizer: Path | None = None
    """Folder of the tokenizer of a new brain. [that of --model]"""
    data: Path | None = None
    """Prepared data. [training_data/prepared]"""
    name: OneCall[str | None] = "small"
    """Name of the brain: artifacts/brains/mixtral/NAME."""
    seq_len: SequenceLength = 256
    """Tokens per training sequence."""
    moe_capacity_factor: Positive | None = None
    """Tokens an expert may take, as a multiple of its fair share; nothing is dropped when not given."""
    eval_tokens: NonNegativeInt = ExpertTraining.eval_tokens
    """Held-out tokens per domain used for each evaluation; 0 evaluates nothing."""
    linear: bool = False
    """Read the text in order instead of shuffled."""
    start_offset: NonNegativeInt = 0
    """Sequences passed over at the beginning of each domain, read in order."""
    student_init: Path | None = None
    """Weights to start from: a bundle, a checkpoint or a .safetensors file of the same shape."""
    default_goal: Annotated[str | None, Parameter(show=False)] = None
    """Goal kept with the brain."""
    stop_after: OneCall[Count | None] = None
    """Save and stop at this step, to be resumed later."""
    resume: OneCall[bool] = False
    """Continue the brain of this name from its latest checkpoint, with its own settings."""
    dry_run: OneCall[bool] = False
    """Print the plan (parameters, memory, tokens, time) and do nothing."""


@dataclass(frozen=True, kw_only=True)
class TrainRun(TrainingConfig, RunOptions):
    """One training run of any family, as it was asked for; :meth:`resolved` is what the trainer takes.

    A brain keeps fewer checkpoints than the library, and kappa warms up for a tenth of its run.
    """

    family: ClassVar[Literal["mixtral", "actv1"]]

    kappa_warmup_steps: NonNegativeInt | None = None
    """Steps during which kappa stays at its initial value; a tenth of the run when not given."""
    keep_last: NonNegativeInt = 3
    """Newest checkpoints kept, besides the best; 0 keeps all."""
    shape: Annotated[Shape, Flat] = Shape()
    goals: Annotated[OneCall[TrainingGoals], Flat] = TrainingGoals()  # noqa: RUF009 (frozen)
    """Goals to train under; on --resume those of the brain, unless others are given."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stop_file is not None:  # a later call may stop or resume the run from another folder
            object.__setattr__(self, "stop_file", str(Path(self.stop_file).absolute()))

    @property
    def bundle(self) -> Path:
        """Where the brain goes; :class:`ConfigError` for a name that is not a plain word."""
        return Workspace(self.root).brain(self.name or "", self.family)

    def training(self, **changes: Any) -> TrainingConfig:
        """The library's settings alone, with ``changes``."""
        return TrainingConfig(**{name: getattr(self, name) for name in annotations_of(TrainingConfig)} | changes)

    def resolved(self) -> Self:
        """The run with all settings of the library in place: what depends on others is worked out."""
        return self


@dataclass(frozen=True, kw_only=True)
class MixtralRun(TrainRun):
    """A run of `aios train`."""

    family: ClassVar = "mixtral"

    shape: Annotated[ModelShape, Flat] = ModelShape()
