"""One step: the forwards and backwards of its micro-batches, and the optimizer's update.

A step's micro-batches share one count of predicted tokens and one of routed tokens, so splitting a batch changes
neither its loss nor its gradient.
"""

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from chronomoe.data.windows import IGNORED
from chronomoe.errors import ConfigError, DataError
from chronomoe.routing.statistics import RoutingWindow
from chronomoe.routing.steering import Steering
from chronomoe.training.config import TrainingConfig
from chronomoe.training.micro_batches import Batch, calls, labels_of, routed_tokens
from chronomoe.training.optimizer import set_learning_rate

_TERM_NAMES = {
    "lm": "lm_loss", "balance": "lb_loss", "coherence": "coherence_loss", "valley": "valley_loss", "z": "z_loss",
}  # fmt: skip


@dataclass(kw_only=True)
class StepResult:
    """What one step was."""

    number: int
    """Counted from 1 over the whole run."""
    batches: Sequence[Batch]
    """Its micro-batches, of this process."""
    losses: dict[str, float]
    """Its loss terms, summed over micro-batches and processes; ``loss`` is what was minimised."""
    grad_norm: float = 0.0
    """Norm of the gradient before it was clipped."""
    tokens: int = 0
    """Tokens routed, padding left out, over all processes."""
    skip_reason: str = ""
    """Why the optimizer does not move; empty when it does."""
    window: RoutingWindow | None = None
    """What the routers observed; none where the step is skipped or nothing was routed."""


class TrainingStep:
    """Takes the steps of one run, with everything they need at hand."""

    def __init__(
        self,
        config: TrainingConfig,
        total_steps: int,
        accelerator: Accelerator,
        model: Any,
        wrapped: Any,
        optimizer: Any,
        steering: Steering | None,
    ) -> None:
        self.config, self.total_steps, self.accelerator = config, total_steps, accelerator
        self.model, self.wrapped, self.optimizer, self.steering = model, wrapped, optimizer, steering

    def backward(self, batches: Sequence[Batch], number: int) -> StepResult:
        """Run the forwards and backwards of step ``number`` and clip the gradient.

        Raises :class:`ConfigError` for batches of another form and :class:`DataError` for tokens the model lacks.
        """
        if not all(isinstance(batch, Mapping) and "input_ids" in batch for batch in batches):
            raise ConfigError(
                "the training loader must give dicts with input_ids (batch, sequence), and labels if any."
            )
        labels = [labels_of(batch) for batch in batches]
        counts = torch.stack([
            torch.stack([(label[:, 1:] != IGNORED).sum() for label in labels]).sum(),
            torch.stack([routed_tokens(batch) for batch in batches]).sum(),
        ]).to(self.accelerator.device)  # fmt: skip
        predicted, routed = self.accelerator.reduce(counts, "sum")
        logged = number % self.config.log_every_n_steps == 0 or number == self.total_steps
        if self.steering is not None:
            self.steering.tokens_in_step = routed
        terms: list[dict[str, Tensor]] = []
        for call, last in calls(batches, labels, self.config.chunk_size):
            if self.steering is not None:
                # Recomputed layers cannot be measured.
                self.steering.measuring = logged and last and not self.config.gradient_checkpointing
            with nullcontext() if last else self.accelerator.no_sync(self.wrapped):
                terms.append(self._forward_backward(call, predicted))
        tokens = int(routed)
        norm = float(self.accelerator.clip_grad_norm_(self.wrapped.parameters(), self.config.max_grad_norm))
        losses = self._sum_of(terms)
        skip_reason = ""
        if not all(map(math.isfinite, [norm, *losses.values()])):
            skip_reason = "its loss or gradient is not finite"
        if not int(predicted):
            skip_reason = "its batches have no token to predict"
        return StepResult(
            number=number, batches=batches, losses=losses, grad_norm=norm, tokens=tokens, skip_reason=skip_reason
        )

    def _forward_backward(self, call: dict[str, Any], predicted: Tensor) -> dict[str, Tensor]:
        """One forward and its backward; returns its loss terms."""
        try:
            output = self.wrapped(**call, num_items_in_batch=predicted.clamp(min=1))
        except IndexError as error:
            if int(call["input_ids"].max()) < self.model.config.vocab_size:
                raise
            raise DataError(f"a token of the batch is not in the model's vocabulary ({error}).") from error
        # Data parallelism averages gradients over processes; the counts are sums over them.
        self.accelerator.backward(output.loss * self.accelerator.num_processes)
        routers = {} if self.steering is None else self.steering.last_losses
        # A recurrent model adds terms: its cross-entropy, its halting loss, the segments it used.
        own: dict[str, Tensor] = getattr(self.model, "loss_terms", {})
        return {"loss": output.loss.detach()} | {_TERM_NAMES[name]: value for name, value in routers.items()} | own

    def _sum_of(self, micro_batches: list[dict[str, Tensor]]) -> dict[str, float]:
        """The step's loss terms, summed over micro-batches and processes."""
        names = list(micro_batches[0])
        terms = torch.stack([torch.stack([terms[name] for name in names]) for terms in micro_batches]).sum(dim=0)
        return dict(zip(names, self.accelerator.reduce(terms, "sum").tolist(), strict=True))

    def update(self, step: StepResult) -> None:
        """Move the weights by the step's gradient, unless it is skipped, and forget the gradient."""
        if not step.skip_reason:
            set_learning_rate(self.optimizer, step.number - 1, self.config, self.total_steps)
            self.optimizer.step()
        self.optimizer.zero_grad()
