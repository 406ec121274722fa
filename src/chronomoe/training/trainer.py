"""ChronoMoETrainer: one training loop for every steered model, on accelerate.

A step, in order; :meth:`ChronoMoETrainer._take_steps` is this list as code:

    draw the batches of the step                     _draw; the random state of a resumed run returns after the first
    forwards, backwards, clip, finite?               step.py
    Control: knob, tick, gate, judge                 control.py, after_backward
    optimizer or skip, count                         step.py, _update
    Metrics: average, log line, record               metrics.py, after_step
    Usage: record                                    usage.py
    callbacks given to the trainer
    Evaluation: goals on, evaluate, sample, best     evaluation.py
    Checkpoint: save                                 checkpoint.py

Everything that moves is in the checkpoint: training resumed is the training that never stopped, bit for bit.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, skip_first_batches
from accelerate.state import AcceleratorState
from accelerate.utils import DataLoaderConfiguration, DistributedDataParallelKwargs, set_seed
from torch import Tensor
from torch.utils.data import DataLoader

from chronomoe.allocator import keep_freed_memory
from chronomoe.errors import ConfigError, DataError, TrainingError
from chronomoe.knob import Agent
from chronomoe.routing.loss_weights import LossWeights
from chronomoe.routing.losses import ChronoMoELoss
from chronomoe.settings import annotations_of
from chronomoe.training.callback import Callback, Run
from chronomoe.training.checkpoint import Checkpoint
from chronomoe.training.config import TrainingConfig
from chronomoe.training.control import Control, controller_for
from chronomoe.training.evaluation import Evaluation, GoalSteering
from chronomoe.training.gating import CoherenceGatedOptimizer
from chronomoe.training.interrupt import SafeStop
from chronomoe.training.metrics import Metrics
from chronomoe.training.micro_batches import Batch
from chronomoe.training.optimizer import build_optimizer
from chronomoe.training.report import Reporter
from chronomoe.training.rng import unpack_rng
from chronomoe.training.step import StepResult, TrainingStep
from chronomoe.training.usage import Usage

_NO_BATCH = "the training loader has no batch; give more text, shorter sequences or smaller batches."


class ChronoMoETrainer:
    """Trains ``model`` on ``train_dataloader``.

    Batches are dicts with ``input_ids`` (batch, sequence) and optionally ``attention_mask`` and ``labels`` (not
    shifted; -100 is ignored). ``eval_dataloader`` is such a loader, or held-out windows by domain, evaluated in bits
    per byte. ``sample`` turns the model into a text that is logged at each evaluation; ``save_extra`` adds files (a
    tokenizer) to each checkpoint; ``show`` prints a line; ``stop_after`` saves and stops at that step;
    ``knob_agent`` turns kappa in place of the rules when ``kappa_schedule`` is adaptive; ``goals`` turns goals on, as
    :class:`Evaluation` says, and returns what the log is to say of it; ``callbacks`` take part in the run, see
    :class:`Callback`; ``use_cpu`` leaves accelerators alone.

    Raises :class:`ConfigError` for settings that cannot work and :class:`DataError` for an empty loader.
    """

    def __init__(
        self,
        model: Any,
        config: TrainingConfig,
        train_dataloader: Any,
        eval_dataloader: Any = None,
        *,
        sample: Callable[[Any], str] | None = None,
        save_extra: Callable[[Path], Any] | None = None,
        show: Callable[[str], None] | None = None,
        stop_after: int | None = None,
        knob_agent: Agent | None = None,
        goals: GoalSteering | None = None,
        goals_key: str = "goals",
        callbacks: Sequence[Callback] = (),
        use_cpu: bool = False,
    ) -> None:
        keep_freed_memory()
        self.model, self.stop_after = model, stop_after
        self.config = config = config.ablated()
        self.accelerator = accelerator = _make_accelerator(config, use_cpu)
        set_seed(config.seed)
        loss = ChronoMoELoss(**{name: getattr(config, name) for name in annotations_of(LossWeights)})
        self.controller = controller = controller_for(model, loss, config.control)
        self.steering = None if controller is None else controller.steering
        if config.gradient_checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        _refuse_loader(train_dataloader, config)
        optimizer: Any = build_optimizer(model, config)
        gated = None
        if controller is not None and config.use_coherence_gating and controller.steering.config.enabled:
            gated = optimizer = CoherenceGatedOptimizer(optimizer, config.min_coherence, config.gating_strength)
        wrapped, self.optimizer, self.train_loader = accelerator.prepare(model, optimizer, train_dataloader)
        per_epoch = -(-(_length(self.train_loader) or 0) // config.gradient_accumulation_steps)
        self.total_steps = total_steps = config.max_steps or per_epoch * config.max_epochs
        log_file = Path(config.log_file or Path(config.checkpoint_dir) / "metrics.jsonl")
        self.report = Reporter(
            log_file, total_steps, show, active=accelerator.is_main_process, tensorboard=config.tensorboard
        )
        self.run = run = Run(config=config, total_steps=total_steps, report=self.report)
        self.state = run.state
        self.training_step = TrainingStep(
            config, total_steps, accelerator, model, wrapped, self.optimizer, self.steering
        )
        self.control = Control(
            model, controller, config, total_steps, show=self.report.line, agent=knob_agent, gated=gated
        )
        self.metrics = Metrics(run, self.control)
        self.checkpoint = Checkpoint(run, model, self.optimizer, accelerator, save_extra=save_extra)
        self.evaluation = Evaluation(
            run, model, eval_dataloader, accelerator, controller, self.checkpoint.save_step,
            sample=sample, goals=goals, goals_key=goals_key,
        )  # fmt: skip
        self.callbacks = run.callbacks
        self.callbacks += [self.control, self.metrics, Usage(run), *callbacks, self.evaluation, self.checkpoint]
        self._generators: dict[str, Tensor] | None = None
        """The random state of the checkpoint that was loaded, until the first step."""

    # -- training ------------------------------------------------------------------------------------------------

    def train(self) -> dict[str, Any]:
        """Train to the last step, from wherever the run is; Ctrl-C and SIGTERM save and stop after the current step.

        Returns ``global_step``, ``epoch``, ``best_loss``, ``best_step``, ``skipped_steps``, ``finished``,
        ``interrupted`` (by a signal) and the last ``evaluation``. Raises :class:`TrainingError` after too many
        non-finite steps in a row.
        """
        self.checkpoint.refuse_foreign()
        stop_file = None if self.config.stop_file is None else Path(self.config.stop_file)
        self.config.refuse_stop_file()
        self.model.train()
        try:
            with SafeStop() as stop, self.report.live():
                stopped = self._take_steps(lambda: stop.requested or (stop_file is not None and stop_file.exists()))
                return self._finish(stopped) | {"interrupted": stop.requested}
        finally:
            if self.steering is not None:
                # The next trainer of this model may not split its steps.
                self.steering.tokens_in_step = None

    def _take_steps(self, stop_requested: Callable[[], bool]) -> bool:
        """Take steps up to the last, or to the first after which a stop is requested: was one?"""
        last = self.total_steps if self.stop_after is None else min(self.total_steps, self.stop_after)
        for callback in self.callbacks:
            callback.before_training()
        for batches in self._draw(last):
            step = self.training_step.backward(batches, self.state.step + 1)
            for callback in self.callbacks:
                callback.after_backward(step)
            self._update(step)
            with self._saved_on_error():
                for callback in self.callbacks:
                    callback.after_step(step)
            if stop_requested():
                return True
        return False

    def _draw(self, last: int) -> Iterator[list[Batch]]:
        """The micro-batches of each step up to ``last``; the last group of an epoch may be smaller."""
        state = self.state
        while state.step < last:
            self.train_loader.set_epoch(state.epoch)
            loader = skip_first_batches(self.train_loader, state.batch) if state.batch else self.train_loader
            stream = iter(loader)
            while state.step < last:
                group = list(itertools.islice(stream, self.config.gradient_accumulation_steps))
                if self._generators is not None:
                    # Only now: making the iterator has drawn from the generator, as it had in the first run.
                    unpack_rng(self._generators)
                    self._generators = None
                if not group and state.batch == 0:
                    raise DataError(_NO_BATCH)
                if not group:
                    break
                state.batch += len(group)
                yield group
            else:
                return
            state.epoch, state.batch = state.epoch + 1, 0

    def _update(self, step: StepResult) -> None:
        """Let the optimizer move, or skip the step; count it."""
        state = self.state
        self.training_step.update(step)
        state.step, state.tokens = step.number, state.tokens + step.tokens
        if not step.skip_reason:
            state.skipped_in_a_row = 0
            return
        state.skipped, state.skipped_in_a_row = state.skipped + 1, state.skipped_in_a_row + 1
        self.report.line(f"Step {step.number} | skipped: {step.skip_reason}")
        if state.skipped_in_a_row >= self.config.max_nonfinite_steps:
            latest = self.checkpoint.latest()
            raise TrainingError(
                f"{state.skipped_in_a_row} steps in a row were skipped (last: step {state.step}, {step.skip_reason}). "
                "Usual suspects: learning rate too high, bf16 where fp32 is needed, z-loss off, too small a batch; "
                "for a MoE keep --auto-adjust-lr on or use fewer experts per token. "
                + (f"The last good checkpoint is {latest}." if latest else "Nothing was saved.")
            )

    @contextmanager
    def _saved_on_error(self) -> Iterator[None]:
        """Save before an error of the block is raised: what failed is an evaluation or a log, not the training."""
        try:
            yield
        except Exception:
            self.save_checkpoint()
            raise

    def _finish(self, stopped: bool) -> dict[str, Any]:
        """End the run here: the callbacks' last words, the final record, the results."""
        with self._saved_on_error():
            for callback in self.callbacks:
                callback.after_training()
        state, finished = self.state, self.state.step >= self.total_steps
        final = {"event": "final", "step": state.step, "steps": state.step, "trained": finished, "stopped": stopped}
        self.report.record({**final, "skipped_steps": state.skipped})
        if state.skipped:
            self.report.line(f"{state.skipped} of {state.step} steps were skipped.")
        return {
            "global_step": state.step,
            "epoch": state.epoch,
            "best_loss": self.evaluation.best_loss,
            "best_step": self.run.best_step,
            "skipped_steps": state.skipped,
            "finished": finished,
            "evaluation": self.evaluation.latest,
        }

    # -- evaluation and checkpoints ------------------------------------------------------------------------------

    def evaluate(self) -> dict[str, float]:
        """Bits per byte by domain and their ``mean`` (held-out windows), or ``loss`` (a loader). Moves nothing."""
        return self.evaluation.evaluate()

    def save_checkpoint(self) -> Path:
        """Write ``<checkpoint_dir>/step_<N>``, unless this step is saved already; returns its path."""
        return self.checkpoint.save_step()

    def load_checkpoint(self, name: str) -> None:
        """Continue from a checkpoint: ``"step_500"`` in the checkpoint folder, ``"latest"``, or a path.

        Raises :class:`CheckpointError` when it is missing, damaged, foreign, or of another model.
        """
        self._generators = self.checkpoint.load_step(self.checkpoint.find(name))


def _make_accelerator(config: TrainingConfig, use_cpu: bool) -> Accelerator:
    """Devices, precision and processes of a run; auto precision is bf16 on a GPU that has it."""
    bf16 = config.precision == "bf16"
    if config.precision == "auto":
        bf16 = not use_cpu and torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    precision = "bf16" if bf16 else "no"
    if AcceleratorState._shared_state:  # left by an earlier trainer of this process
        left = AcceleratorState()
        other_device = use_cpu != left._cpu and left.num_processes == 1
        if left.mixed_precision != precision or other_device:
            AcceleratorState._reset_state(reset_partial_state=other_device)
    return Accelerator(
        cpu=use_cpu,
        mixed_precision=precision,
        dataloader_config=DataLoaderConfiguration(
            use_seedable_sampler=True, data_seed=config.seed, dispatch_batches=False
        ),
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
    )


def _refuse_loader(loader: Any, config: TrainingConfig) -> None:
    """:class:`ConfigError` or :class:`DataError` for a training loader that cannot work."""
    if not isinstance(loader, DataLoader):
        raise ConfigError(f"train_dataloader is a {type(loader).__name__}; give a torch DataLoader.")
    batches = _length(loader)
    if batches == 0:
        raise DataError(_NO_BATCH)
    if batches is None and config.max_steps is None:
        raise ConfigError("the training loader does not tell its length; give max_steps.")


def _length(loader: Any) -> int | None:
    """Batches in a loader, None for a stream."""
    try:
        return len(loader)
    except TypeError:
        return None
