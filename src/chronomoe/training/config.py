"""TrainingConfig: the settings of a run. Imports nothing heavy, so that help appears at once."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from chronomoe.control.config import Ablation
from chronomoe.errors import ConfigError
from chronomoe.knob import FINAL_KAPPA, INITIAL_KAPPA
from chronomoe.routing.loss_weights import LossWeights
from chronomoe.settings import Bounds, Count, NonNegative, NonNegativeInt, Positive, Share

Kappa = Annotated[float, Bounds(ge=-1, le=1)]


@dataclass(frozen=True, kw_only=True)
class TrainingConfig(LossWeights):
    """Settings of one training run. Steps are optimizer steps throughout."""

    learning_rate: Positive = 1e-4
    """Peak learning rate."""
    weight_decay: NonNegative = 0.01
    """Decay of matrices; norms and other vectors are never decayed."""
    max_epochs: Count = 10
    """Passes over the training data, when max_steps is not given."""
    batch_size: Count = 8
    """Sequences per micro-batch and process."""
    gradient_accumulation_steps: Count = 1
    """Micro-batches per step; splitting a batch changes neither loss nor gradient."""
    max_grad_norm: Positive = 1.0
    """Gradients are clipped to this norm."""

    initial_kappa: Kappa = INITIAL_KAPPA
    """Meta-knob at the start: from exploration (+1) to exploitation (-1)."""
    final_kappa: Kappa = FINAL_KAPPA
    """Meta-knob at the end."""
    kappa_warmup_steps: NonNegativeInt | None = 1000
    """Steps during which kappa stays at its initial value; a tenth of the run when not given."""
    kappa_schedule: Literal["linear", "cosine", "step", "adaptive"] = "cosine"
    """How kappa moves after its warm-up; adaptive: rules that watch the run."""

    use_coherence_gating: bool = True
    """Take smaller steps while routing is incoherent."""
    min_coherence: Share = 0.2
    """Coherence below which the gate is closed."""
    gating_strength: Share = 0.5
    """How much a closed gate takes off the update; 1 stops it."""

    checkpoint_dir: str = "checkpoints"
    """Folder of the step_N checkpoints."""
    save_every_n_steps: Count = 1000
    """Steps between checkpoints."""
    save_chronovisor_state: bool = True
    """Keep the control layer's state in checkpoints; without it a resumed run begins with neutral fields."""
    control: Ablation | None = None
    """Run one experimental arm of the control layer; as the model and these settings say when not given."""

    max_steps: Count | None = None
    """Steps to train; overrides max_epochs."""
    seed: Annotated[int, Bounds(ge=0, lt=2**32)] = 0
    """Seed of initialisation, data order and exploration."""
    lr_schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Learning rate after its warm-up; cosine ends at a tenth of the peak, linear at 0."""
    lr_warmup_steps: NonNegativeInt | None = None
    """Steps of linear learning-rate warm-up; a twentieth of the run (at most 1000) when not given."""
    adam_beta2: Annotated[float, Bounds(ge=0, lt=1)] = 0.95
    """Second-moment decay of AdamW."""
    log_every_n_steps: Count = 100
    """Steps between log lines and metrics records."""
    eval_every_n_steps: Count = 500
    """Steps between evaluations."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: bf16 on a GPU that has it, fp32 elsewhere (on CPUs bf16 is several times slower)."""
    keep_last: NonNegativeInt = 0
    """Newest checkpoints kept, besides the best; 0 keeps all."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    max_nonfinite_steps: Count = 20
    """Consecutive steps with a non-finite loss or gradient that are skipped before the run gives up."""
    log_file: str | None = None
    """Metrics, one JSON object a line. [metrics.jsonl, beside a brain's model or in checkpoint_dir]"""
    tensorboard: bool = False
    """Write the numbers for TensorBoard too, into the folder tensorboard beside the metrics."""
    usage_every_n_steps: Count = 100
    """Steps between records of how each expert was used; there is one at the end too."""
    stop_file: str | None = None
    """Save and stop after the step during which this file appears."""
    chunk_size: Count | None = None
    """Read sequences in pieces of this many tokens: less memory, gradients cut between pieces."""
    router_lr_scale: NonNegative = 1.0
    """Learning rate of the routers, as a multiple of the others'."""
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    """adamw8bit keeps its moments in 8 bits; it needs bitsandbytes."""

    def refuse_stop_file(self) -> None:
        """:class:`ConfigError` while the stop file of an earlier run is there: this one would stop at once."""
        if self.stop_file is not None and Path(self.stop_file).exists():
            raise ConfigError(f"the stop file {self.stop_file} is there already; remove it to train.")

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
        return self.replace(**off if self.control == "aux" else {**off, "lambda_balance": 0.0})
