"""Settings of `aios hrm-hf train-actv1`: spellings and defaults of the first AI-OS, and what they mean for a run."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar

from cyclopts import Parameter

from aios.settings.expert import ExpertTraining
from aios.settings.train import Flat, HRMShape, OneCall, TrainRun
from aios.workspace import Workspace
from chronomoe.control.config import Ablation
from chronomoe.errors import ConfigError
from chronomoe.settings import TRANSIENT, Count, NonNegative, NonNegativeInt, Positive, SequenceLength, annotations_of
from chronomoe.training.config import TrainingConfig

T = TypeVar("T")
Derived = Annotated[T, TRANSIENT, Parameter(parse=False)]
"""A field of the library that has no flag here: :meth:`ACTv1Run.resolved` sets it."""

MOE_LR_CAP = 1e-3
"""Above this rate routers of small models were seen to run away."""
MOE_ROUTER_SCALE = 0.5
ENDLESS = 10**9
"""Steps of a run that is trained until it is stopped."""


def adjusted_rates(lr: float, use_moe: bool, adjust: bool) -> tuple[float, float]:
    """Learning rate, and the routers' as a multiple of it; never above ``lr``.

    A router decides which expert learns from a token, so its mistakes feed themselves: with experts the rate is at
    most 1e-3 and the routers take half of it. A dense model, or ``adjust`` off, keeps ``lr``.
    """
    if not (use_moe and adjust):
        return lr, 1.0
    return min(lr, MOE_LR_CAP), MOE_ROUTER_SCALE


def warmup_steps(steps: int) -> int:
    """Steps of linear learning-rate warm-up: a tenth of the run, 10 to 200, and never more than the run."""
    return min(steps, 200, max(10, steps // 10))


@dataclass(frozen=True, kw_only=True)
class ACTv1Run(TrainRun):
    """A run of `aios hrm-hf train-actv1`."""

    family: ClassVar = "actv1"

    # Settings of every run, with this command's spelling or default.
    model: Path | None = None
    """Folder of the base model, of which the tokenizer is used. [artifacts/hf_implant/base_model]"""
    name: Annotated[OneCall[str | None], Parameter(name="--brain-name")] = None
    """Name of the brain, a folder in --bundle-dir."""
    seq_len: Annotated[SequenceLength, Parameter(name="--max-seq-len")] = ExpertTraining.max_seq_len
    """Tokens per training sequence."""
    max_steps: Annotated[Count, Parameter(name="--steps")] = 200
    """Optimizer steps; with --iterate, of each cycle."""
    learning_rate: Annotated[Positive, Parameter(name="--lr")] = 2e-4
    """Learning rate."""
    lambda_balance: Annotated[NonNegative, Parameter(name="--lb-coef")] = 0.05
    """Weight of the load-balancing loss."""
    lambda_z: Annotated[NonNegative, Parameter(name="--z-loss-coef")] = TrainingConfig.lambda_z
    """Weight of the router z-loss."""
    linear: Annotated[bool, Parameter(name="--linear-dataset")] = True
    """Read the text in order; --no-linear-dataset shuffles it."""
    start_offset: Annotated[NonNegativeInt, Parameter(name="--dataset-start-offset")] = 0
    """Sequences to pass over at the beginning of the text."""
    moe_capacity_factor: NonNegative | None = 1.25
    """Tokens an expert may take in training, as a multiple of its fair share; 0 drops nothing."""
    chunk_size: Count | None = 2048
    """Tokens per piece."""
    gradient_checkpointing: bool = True
    """Recompute activations: less memory, about a third more time."""
    default_goal: Annotated[str | None, Parameter(show=True)] = None
    """Goal kept with the brain."""
    shape: Annotated[HRMShape, Flat] = HRMShape()  # noqa: RUF009 (frozen)

    # Options of this command alone.
    dataset_file: OneCall[Path | None] = None
    """Text to train on: a file (.txt, .md, .csv, .tsv, .jsonl, .gz, .zip, .parquet), a folder, or prepared data."""
    eval_file: OneCall[Path | None] = None
    """Text to evaluate on, besides what is held out of the dataset."""
    ascii_only: OneCall[bool] = False
    """Leave out lines with other than ASCII characters."""
    eval_batches: NonNegativeInt = 10
    """Batches of held-out text per domain in each evaluation; 0 evaluates nothing."""
    eval_every: Count | None = None
    """Steps between evaluations; at the end only when not given."""
    save_every: Count | None = None
    """Steps between checkpoints; at the end only when not given."""
    log_every: Count | None = None
    """Steps between log lines; a twentieth of the run when not given."""
    iterate: bool = False
    """Train in cycles of --steps until stopped."""
    auto_adjust_lr: bool = True
    """Lower the rate for a mixture of experts, the routers' most; never raises it."""
    amp: bool = True
    """bf16 where the device is fast at it; a CPU is not, and computes in fp32."""
    model_dtype: Literal["fp32", "fp16", "bf16"] = "fp32"
    """bf16 computes in bf16 whatever the device; weights are kept in fp32."""
    use_8bit_optimizer: bool = False
    """Keep the optimizer's moments in 8 bits (needs bitsandbytes)."""
    use_chunked_training: bool = False
    """Read each sequence in pieces of --chunk-size: long sequences in bounded memory."""
    balance: Ablation = "full"
    """How the load is balanced: none, aux (loss only), loss_free, pi, ..., full (the whole control layer)."""
    control_layer: OneCall[bool] = True
    """--no-control-layer is --balance aux."""
    save_dir: OneCall[Path | None] = None
    """Bundle of a brain without a name. [artifacts/training_datasets/actv1]"""
    bundle_dir: OneCall[Path | None] = None
    """Folder of brains. [artifacts/brains/actv1]"""
    expert_id: OneCall[str | None] = None
    """Train one expert alone, under this id, in the brain --brain-name (else in a fresh model)."""
    anchor_file: OneCall[Path | None] = None
    """With --expert-id: general text on which the expert shall change nothing."""
    device: OneCall[str] = "auto"
    """auto, cpu, cuda or mps."""
    ddp: OneCall[bool] = False
    """Train on several processes; start them with `accelerate launch`."""
    world_size: OneCall[int | None] = None
    """Processes there must be."""
    zero_stage: OneCall[Literal["none", "zero1", "zero2", "zero3"]] = "none"
    """Shard optimizer, gradients, weights: through `accelerate launch` with DeepSpeed."""

    data: Annotated[Path | None, Parameter(parse=False)] = None
    max_epochs: Derived[Count] = TrainingConfig.max_epochs
    router_lr_scale: Derived[NonNegative] = TrainingConfig.router_lr_scale
    lr_schedule: Derived[Literal["cosine", "linear", "constant"]] = TrainingConfig.lr_schedule
    lr_warmup_steps: Derived[NonNegativeInt | None] = None
    kappa_schedule: Derived[Literal["linear", "cosine", "step", "adaptive"]] = TrainingConfig.kappa_schedule
    kappa_warmup_steps: Derived[NonNegativeInt | None] = None
    control: Derived[Ablation | None] = None
    precision: Derived[Literal["auto", "fp32", "bf16"]] = TrainingConfig.precision
    optimizer: Derived[Literal["adamw", "adamw8bit"]] = TrainingConfig.optimizer
    eval_tokens: Derived[NonNegativeInt] = TrainRun.eval_tokens
    eval_every_n_steps: Derived[Count] = TrainingConfig.eval_every_n_steps
    save_every_n_steps: Derived[Count] = TrainingConfig.save_every_n_steps
    log_every_n_steps: Derived[Count] = TrainingConfig.log_every_n_steps

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.name is not None and self.save_dir is not None:
            raise ConfigError("--brain-name and --save-dir both say where the brain goes; give one of them.")

    @classmethod
    def spelled(cls, name: str) -> str:
        """A field as the command line spells it."""
        parameters = [
            one for one in getattr(annotations_of(cls)[name], "__metadata__", ()) if isinstance(one, Parameter)
        ]
        names = [flag for one in parameters for flag in one.name or ()]
        return names[0].removeprefix("--").replace("-", "_") if names else name

    @property
    def bundle(self) -> Path:
        """Where the brain goes; :class:`ConfigError` for a name that is not a plain word."""
        workspace = Workspace(self.root)
        if self.name is None:
            return self.save_dir or workspace.root / "artifacts/training_datasets/actv1"
        named = workspace.brain(self.name, self.family)
        return named if self.bundle_dir is None else self.bundle_dir / named.name

    @property
    def is_prepared(self) -> bool:
        """Is the dataset prepared data, not text?"""
        return self.dataset_file is not None and (self.dataset_file / "data.json").is_file()

    def check(self) -> None:
        """Raise :class:`ConfigError` for flags of one call that are missing or contradict each other."""
        if self.anchor_file is not None and self.expert_id is None:
            raise ConfigError("--anchor-file is for the training of one expert alone; give --expert-id too.")
        if self.dataset_file is None and not self.resume:
            raise ConfigError("name the text to train on with --dataset-file.")
        if self.resume and (fixed := sorted({"ascii_only", "eval_file", "student_init"} & self.given)):
            flag = fixed[0].replace("_", "-")
            raise ConfigError(f"--{flag} is settled when a brain is begun; leave it out on --resume.")
        if self.is_prepared and (unread := sorted({"ascii_only", "eval_file"} & self.given)):
            flag = unread[0].replace("_", "-")
            raise ConfigError(f"{self.dataset_file} is prepared already; --{flag} has no text to work on.")
        if self.model_dtype == "fp16":
            raise ConfigError("--model-dtype fp16 is not supported: weights stay in fp32; use --amp, or bf16.")
        if "chunk_size" in self.given and not self.use_chunked_training:
            raise ConfigError("--chunk-size needs --use-chunked-training.")
        if self.start_offset and not self.linear:
            raise ConfigError("--dataset-start-offset counts in the order of the text; leave out --no-linear-dataset.")
        if not self.control_layer and "balance" in self.given and self.balance == "full":
            raise ConfigError("--no-control-layer and --balance full contradict each other; give one of them.")
        self.refuse_stop_file()

    def canonical(self) -> Self:
        """The same run, with flags that are another spelling of a setting put into that setting."""
        changes: dict[str, Any] = {}
        if "control_layer" in self.given and "balance" not in self.given:
            changes["balance"] = "full" if self.control_layer else "aux"
        if self.is_prepared:
            changes["data"] = self.dataset_file
        return self.replace(**changes)

    def resolved(self) -> Self:
        """The run with all settings of the library in place: what depends on others is worked out."""
        rate, router_scale = adjusted_rates(self.learning_rate, self.shape.use_moe, self.auto_adjust_lr)
        steps = self.max_steps
        return self.replace(
            learning_rate=rate,
            router_lr_scale=router_scale,
            max_steps=ENDLESS if self.iterate and not self.dry_run else steps,
            lr_schedule="constant" if self.iterate else "cosine",
            lr_warmup_steps=warmup_steps(steps),
            kappa_schedule="adaptive" if self.iterate else "cosine",
            kappa_warmup_steps=steps // 10,
            control=self.balance,
            precision="bf16" if self.model_dtype == "bf16" else "auto" if self.amp else "fp32",
            optimizer="adamw8bit" if self.use_8bit_optimizer else "adamw",
            chunk_size=self.chunk_size if self.use_chunked_training else None,
            moe_capacity_factor=self.moe_capacity_factor or None,
            eval_tokens=self.eval_batches * self.batch_size * self.seq_len,
            eval_every_n_steps=self.eval_every or steps,
            save_every_n_steps=self.save_every or steps,
            log_every_n_steps=self.log_every or max(1, steps // 20),
        )

    def as_expert(self) -> ExpertTraining:
        """The training of one expert alone; :class:`ConfigError` for flags that mean nothing there."""
        if self.goals.any:
            raise ConfigError("an expert that is trained alone answers everywhere; --default-goal names its goal.")
        other = {"save_dir", "resume", "iterate", "dry_run", "eval_file", "use_chunked_training", "stop_file"}
        wrong = sorted(other & self.given) + ["no-moe"] * (not self.shape.use_moe)
        if wrong:
            flag = wrong[0].replace("_", "-")
            raise ConfigError(f"--{flag} has no meaning when one expert is trained alone (--expert-id); leave it out.")
        self.check()
        return ExpertTraining(
            dataset_file=self.dataset_file,
            brain=None if self.name is None else str(self.bundle),
            anchor_file=self.anchor_file,
            steps=self.max_steps,
            batch_size=self.batch_size,
            max_seq_len=self.seq_len,
            eval_tokens=self.eval_batches * self.batch_size * self.seq_len,
            default_goal=self.default_goal,
            log_file=None if self.log_file is None else Path(self.log_file),
            seed=self.seed,
            lr=self.learning_rate if "learning_rate" in self.given else ExpertTraining.lr,
        )
