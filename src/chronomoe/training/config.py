"""TrainingConfig: everything a run can be told. Imports nothing heavy, so the command line can show it at once."""

from dataclasses import dataclass, fields, replace
from typing import Any, Literal, Self

from chronomoe.control.config import ABLATIONS, Ablation
from chronomoe.errors import ConfigError, require


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Settings of one training run. Steps are optimizer steps throughout."""

    learning_rate: float = 1e-4
    """Peak learning rate."""
    weight_decay: float = 0.01
    """Decay of matrices; norms and other vectors are never decayed."""
    max_epochs: int = 10
    """Passes over the training data, when max_steps is not given."""
    batch_size: int = 8
    """Sequences per micro-batch and process."""
    gradient_accumulation_steps: int = 1
    """Micro-batches per step; splitting a batch changes neither loss nor gradient."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm."""

    lambda_balance: float = 0.01
    """Weight of the load-balancing loss (1.0 = balanced)."""
    lambda_coherence: float = 0.001
    """Weight of the coherence loss."""
    lambda_valley: float = 0.0001
    """Weight of the valley loss."""

    initial_kappa: float = 0.5
    """Meta-knob at the start: exploratory."""
    final_kappa: float = -0.3
    """Meta-knob at the end: exploitative."""
    kappa_warmup_steps: int | None = 1000
    """Steps during which kappa stays at its initial value; a tenth of the run when not given."""
    kappa_schedule: Literal["linear", "cosine", "step", "adaptive"] = "cosine"
    """How kappa moves after its warm-up; adaptive: rules that watch the run."""

    use_coherence_gating: bool = True
    """Take smaller steps while routing is incoherent."""
    min_coherence: float = 0.2
    """Coherence below which the gate is closed."""
    gating_strength: float = 0.5
    """How much a closed gate takes off the update; 1 stops it."""

    checkpoint_dir: str = "checkpoints"
    """Folder of the step_N checkpoints."""
    save_every_n_steps: int = 1000
    """Steps between checkpoints."""
    save_chronovisor_state: bool = True
    """Keep the control layer's state in checkpoints."""
    control: Ablation | None = None
    """Run one experimental arm of the control layer; as the model and these settings say when not given."""

    max_steps: int | None = None
    """Steps to train; overrides max_epochs."""
    seed: int = 0
    """Seed of initialisation, data order and exploration."""
    lr_schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Learning rate after its warm-up; cosine ends at a tenth of the peak, linear at 0."""
    lr_warmup_steps: int | None = None
    """Steps of linear learning-rate warm-up; a twentieth of the run (at most 1000) when not given."""
    adam_beta2: float = 0.95
    """Second-moment decay of AdamW."""
    lambda_z: float = 0.001
    """Weight of the router z-loss."""
    log_every_n_steps: int = 100
    """Steps between log lines and metrics records."""
    eval_every_n_steps: int = 500
    """Steps between evaluations."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: bf16 on a GPU that has it, fp32 elsewhere (on CPUs bf16 is several times slower)."""
    keep_last: int = 0
    """Newest checkpoints kept, besides the best; 0 keeps all."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    max_nonfinite_steps: int = 20
    """Consecutive steps with a non-finite loss or gradient that are skipped before the run gives up."""
    log_file: str | None = None
    """Metrics, one JSON object a line; <checkpoint_dir>/metrics.jsonl when not given."""
    tensorboard: bool = False
    """Write the numbers for TensorBoard too, into the folder tensorboard beside the metrics."""
    usage_every_n_steps: int = 100
    """Steps between records of how each expert was used; there is one at the end too."""
    stop_file: str | None = None
    """Save and stop after the step during which this file appears."""
    chunk_size: int | None = None
    """Read sequences in pieces of this many tokens: less memory, gradients cut between pieces."""
    router_lr_scale: float = 1.0
    """Learning rate of the routers, as a multiple of the others'."""
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    """adamw8bit keeps its moments in 8 bits; it needs bitsandbytes."""

    def __post_init__(self) -> None:
        every = "save_every_n_steps", "log_every_n_steps", "eval_every_n_steps", "usage_every_n_steps"
        counts = "max_epochs", "batch_size", "gradient_accumulation_steps", "max_nonfinite_steps"
        require(self, *every, *counts, least=1, whole=True)
        require(self, "max_steps", "chunk_size", least=1, whole=True, optional=True)
        require(self, "lr_warmup_steps", "kappa_warmup_steps", least=0, whole=True, optional=True)
        require(self, "keep_last", least=0, whole=True)
        require(self, "seed", least=0, below=2**32, whole=True)
        lambdas = "lambda_balance", "lambda_coherence", "lambda_valley", "lambda_z"
        require(self, "learning_rate", "weight_decay", "router_lr_scale", *lambdas, least=0)
        require(self, "max_grad_norm", above=0)  # a large one clips nothing
        require(self, "initial_kappa", "final_kappa", least=-1, most=1)
        require(self, "adam_beta2", least=0, below=1)
        require(self, "min_coherence", "gating_strength", least=0, most=1)
        if self.control is not None and self.control not in ABLATIONS:
            raise ConfigError(f"control is {self.control!r}; use one of {', '.join(ABLATIONS)}.")
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ConfigError(f"{name} is {getattr(self, name)!r}; use one of {', '.join(allowed)}.")

    def kappa_warmup(self, total_steps: int) -> int:
        """Steps of kappa's warm-up in a run of ``total_steps``."""
        return total_steps // 10 if self.kappa_warmup_steps is None else self.kappa_warmup_steps

    def warmup_steps(self, total_steps: int) -> int:
        """Steps of learning-rate warm-up in a run of ``total_steps``."""
        return min(1000, total_steps // 20) if self.lr_warmup_steps is None else self.lr_warmup_steps

    def ablated(self) -> Self:
        """These settings as the arm ``control`` wants them: only ``full`` has all losses, gate and kappa, only ``aux``
        and ``full`` the balance loss."""
        if self.control in (None, "full"):
            return self
        off: dict[str, Any] = {"lambda_coherence": 0.0, "lambda_valley": 0.0, "use_coherence_gating": False}
        off |= {"initial_kappa": 0.0, "final_kappa": 0.0, "kappa_schedule": "linear"}
        return replace(self, **off if self.control == "aux" else {**off, "lambda_balance": 0.0})

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "TrainingConfig":
        """The inverse of ``dataclasses.asdict``; an unknown name is a :class:`ConfigError`."""
        unknown = sorted(set(values) - {field.name for field in fields(cls)})
        if unknown:
            raise ConfigError(f"unknown training setting {', '.join(unknown)}.")
        return cls(**values)


_CHOICES = {
    "kappa_schedule": ("linear", "cosine", "step", "adaptive"),
    "lr_schedule": ("cosine", "linear", "constant"),
    "precision": ("auto", "fp32", "bf16"),
    "optimizer": ("adamw", "adamw8bit"),
}
