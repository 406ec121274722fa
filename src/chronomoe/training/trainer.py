"""ChronoMoETrainer: one training loop for every steered model, on accelerate.

    batches of one step -> forward, loss + router losses -> backward      (train)
    -> clip -> finite? -> optimizer, schedule, window of the routers       (_step)
    -> log, evaluate, save, when due                                       (_after_step)

A step's micro-batches share one count of predicted tokens and one of routed tokens, so splitting a batch changes
nothing. Everything that moves is in the checkpoint: training resumed is the training that never stopped, bit for bit.
"""

import itertools
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, skip_first_batches
from accelerate.state import AcceleratorState
from accelerate.utils import DataLoaderConfiguration, DistributedDataParallelKwargs, set_seed
from torch.utils.data import DataLoader

from chronomoe.allocator import keep_freed_memory
from chronomoe.data.windows import IGNORED, HeldoutWindows
from chronomoe.errors import ConfigError, DataError, TrainingError
from chronomoe.knob import Agent
from chronomoe.routing.statistics import RoutingWindow
from chronomoe.training import checkpoint
from chronomoe.training.config import TrainingConfig
from chronomoe.training.evaluation import bits_per_byte, labels_of, mean_loss, routed_tokens
from chronomoe.training.gating import CoherenceGatedOptimizer
from chronomoe.training.interrupt import SafeStop
from chronomoe.training.micro_batches import calls
from chronomoe.training.optimizer import build_optimizer, build_schedule
from chronomoe.training.reporting import Reporter
from chronomoe.training.run_control import RunControl, controller_for
from chronomoe.training.run_files import Rng, RunFiles, RunState

Batch = Mapping[str, Any]
_NO_BATCH = "the training loader has no batch; give more text, shorter sequences or smaller batches."
_TERM_NAMES = {
    "lm": "lm_loss", "balance": "lb_loss", "coherence": "coherence_loss", "valley": "valley_loss", "z": "z_loss",
}  # fmt: skip


class ChronoMoETrainer:
    """Trains ``model`` on ``train_dataloader``.

    Batches are dicts with ``input_ids`` (batch, sequence) and optionally ``attention_mask`` and ``labels`` (not
    shifted; -100 is ignored). ``eval_dataloader`` is such a loader, or held-out windows by domain, evaluated in bits
    per byte. ``sample`` turns the model into a text that is logged at each evaluation; ``save_extra`` adds files (a
    tokenizer) to each checkpoint; ``show`` prints a line; ``stop_after`` saves and stops at that step;
    ``knob_agent`` turns kappa in place of the rules when ``kappa_schedule`` is adaptive; ``goals`` turns goals on,
    before the first step and anew before each evaluation (as routers learn a bias means less), and tells the log what.
    A run that is resumed with the ``goals_key`` of its checkpoint has them on already. ``use_cpu`` leaves accelerators
    alone.

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
        goals: Callable[[], dict[str, Any] | None] | None = None,
        goals_key: str = "goals",
        use_cpu: bool = False,
    ) -> None:
        keep_freed_memory()
        self.config = config = config.ablated()
        precision = "bf16" if self._precision(config, use_cpu) == "bf16" else "no"
        if AcceleratorState._shared_state:  # left by an earlier trainer of this process
            left = AcceleratorState()
            other_device = use_cpu != left._cpu and left.num_processes == 1
            if left.mixed_precision != precision or other_device:
                AcceleratorState._reset_state(reset_partial_state=other_device)
        self.accelerator = Accelerator(
            cpu=use_cpu,
            mixed_precision=precision,
            dataloader_config=DataLoaderConfiguration(
                use_seedable_sampler=True, data_seed=config.seed, dispatch_batches=False
            ),
            kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
        )
        set_seed(config.seed)
        self.model = model
        self.controller = controller_for(model, config)
        self.steering = None if self.controller is None else self.controller.steering
        if config.gradient_checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        if not isinstance(train_dataloader, DataLoader):
            raise ConfigError(f"train_dataloader is a {type(train_dataloader).__name__}; give a torch DataLoader.")
        if isinstance(eval_dataloader, Mapping) and not eval_dataloader:
            raise ConfigError("eval_dataloader is empty; give held-out windows by domain, a loader, or nothing.")
        batches = _length(train_dataloader)
        if batches == 0:
            raise DataError(_NO_BATCH)
        if batches is None and config.max_steps is None:
            raise ConfigError("the training loader does not tell its length; give max_steps.")
        optimizer: Any = build_optimizer(model, config)
        gated = None
        if self.controller is not None and config.use_coherence_gating and self.controller.steering.config.enabled:
            gated = optimizer = CoherenceGatedOptimizer(optimizer, config.min_coherence, config.gating_strength)
        self.wrapped, self.optimizer, self.train_loader = self.accelerator.prepare(model, optimizer, train_dataloader)
        self.eval_data = eval_dataloader
        per_epoch = -(-(_length(self.train_loader) or 0) // config.gradient_accumulation_steps)
        self.total_steps = config.max_steps or per_epoch * config.max_epochs
        self.schedule = build_schedule(self.optimizer, config, self.total_steps)
        self.state = RunState()
        self.control = RunControl(
            model, self.controller, config, self.total_steps, lambda line: self.report.line(line), knob_agent
        )
        self.control.optimizer = gated
        self.files = RunFiles(
            config=config,
            accelerator=self.accelerator,
            model=model,
            control=self.control,
            optimizer=self.optimizer,
            schedule=self.schedule,
            save_extra=save_extra,
        )
        log_file = Path(config.log_file) if config.log_file else self.files.folder / "metrics.jsonl"
        self.report = Reporter(
            log_file,
            self.total_steps,
            show,
            active=self.accelerator.is_main_process,
            tensorboard=config.tensorboard,
        )
        self.sample, self.stop_after, self.goals = sample, stop_after, goals
        self.goals_key = "" if goals is None else goals_key
        self._pending_rng: Rng | None = None
        self._saved_step = 0  # nothing worth keeping before the first step
        self.window: RoutingWindow | None = None
        """What the routers observed in the latest step that was not skipped."""

    @staticmethod
    def _precision(config: TrainingConfig, use_cpu: bool) -> str:
        if config.precision != "auto":
            return config.precision
        return "bf16" if not use_cpu and torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "fp32"

    # -- training ------------------------------------------------------------------------------------------------

    def train(self) -> dict[str, Any]:
        """Train to the last step, from wherever the run is; Ctrl-C and SIGTERM save and stop after the current step.

        Returns ``global_step``, ``epoch``, ``best_loss``, ``best_step``, ``skipped_steps``, ``finished``,
        ``interrupted`` (by a signal) and the last ``evaluation``. Raises :class:`TrainingError` after too many
        non-finite steps in a row.
        """
        self.files.refuse_foreign(self.state)
        self.model.train()
        try:
            return self._train()
        finally:
            if self.steering is not None:
                # Whoever trains the model next may not split its steps.
                self.steering.tokens_in_step = None

    def _train(self) -> dict[str, Any]:
        evaluation: dict[str, float] = {}
        stop_file = None if self.config.stop_file is None else Path(self.config.stop_file)
        if stop_file is not None and stop_file.exists():
            raise ConfigError(f"the stop file {stop_file} is there already; remove it to train.")
        with SafeStop() as stop, self.report.live():
            self.report.start(self.state.step)
            self.control.announce()
            if self.state.goals != self.goals_key:
                self._change_goals()
            stopped = False
            last = self.total_steps if self.stop_after is None else min(self.total_steps, self.stop_after)
            for batches in self._steps(last):
                self._step(batches)
                evaluation = self._or_save(self._after_step) or evaluation
                stopped = stop.requested or (stop_file is not None and stop_file.exists())
                if stopped:
                    break
            done = self.state.step >= self.total_steps
            if done and (not evaluation or self.state.step % self.config.eval_every_n_steps):
                evaluation = self._or_save(self._evaluate_and_log)
            if self._report_usage(at_end=True):
                self._saved_step = 0  # a checkpoint of this step would count again what has been reported
            self.save_checkpoint()
            final = {"event": "final", "step": self.state.step, "steps": self.state.step, "trained": done}
            self.report.record({**final, "stopped": stopped, "skipped_steps": self.state.skipped})
            if self.state.skipped:
                self.report.line(f"{self.state.skipped} of {self.state.step} steps were skipped.")
        return {
            "global_step": self.state.step,
            "epoch": self.state.epoch,
            "best_loss": self.state.best_loss,
            "best_step": self.state.best_step,
            "skipped_steps": self.state.skipped,
            "finished": done,
            "interrupted": stop.requested,
            "evaluation": evaluation,
        }

    def _or_save(self, act: Callable[[], dict[str, float]]) -> dict[str, float]:
        try:
            return act()
        except Exception:
            self.save_checkpoint()  # what failed is an evaluation or a sample, not the training
            raise

    def _steps(self, last: int) -> Iterator[list[Batch]]:
        """The micro-batches of each step up to ``last``; the last group of an epoch may be smaller."""
        state = self.state
        while state.step < last:
            self.train_loader.set_epoch(state.epoch)
            loader = skip_first_batches(self.train_loader, state.batch) if state.batch else self.train_loader
            stream = iter(loader)
            while state.step < last:
                group = list(itertools.islice(stream, self.config.gradient_accumulation_steps))
                if self._pending_rng is not None:
                    # Only now: making the iterator has drawn from the generator, as it had in the first run.
                    checkpoint.unpack_rng(*self._pending_rng)
                    self._pending_rng = None
                if not group and state.batch == 0:
                    raise DataError(_NO_BATCH)
                if not group:
                    break
                state.batch += len(group)
                yield group
            else:
                return
            state.epoch, state.batch = state.epoch + 1, 0

    def _step(self, batches: list[Batch]) -> None:
        state, accelerator = self.state, self.accelerator
        if not all(isinstance(batch, Mapping) and "input_ids" in batch for batch in batches):
            raise ConfigError(
                "the training loader must give dicts with input_ids (batch, sequence), and labels if any."
            )
        labels = [labels_of(batch) for batch in batches]
        counts = torch.stack([
            torch.stack([(label[:, 1:] != IGNORED).sum() for label in labels]).sum(),
            torch.stack([routed_tokens(batch) for batch in batches]).sum(),
        ]).to(accelerator.device)  # fmt: skip
        predicted, routed = accelerator.reduce(counts, "sum")
        due = (state.step + 1) % self.config.log_every_n_steps == 0 or state.step + 1 == self.total_steps
        if self.steering is not None:
            self.steering.tokens_in_step = routed
        terms: list[dict[str, torch.Tensor]] = []
        for call, last in calls(batches, labels, self.config.chunk_size):
            if self.steering is not None:
                # Recomputed layers cannot be looked into.
                self.steering.measuring = due and last and not self.config.gradient_checkpointing
            with nullcontext() if last else accelerator.no_sync(self.wrapped):
                try:
                    output = self.wrapped(**call, num_items_in_batch=predicted.clamp(min=1))
                except IndexError as error:
                    if int(call["input_ids"].max()) < self.model.config.vocab_size:
                        raise
                    raise DataError(f"a token of the batch is not in the model's vocabulary ({error}).") from error
                # Data parallelism averages gradients over processes; the counts above are sums over them.
                accelerator.backward(output.loss * accelerator.num_processes)
            terms.append({"loss": output.loss.detach(), **self._last_terms()})
        state.tokens += int(routed)
        norm = accelerator.clip_grad_norm_(self.wrapped.parameters(), self.config.max_grad_norm)
        self.report.grad_norm = float(norm)
        losses = self._sum_of(terms)
        why = "" if all(map(math.isfinite, [float(norm), *losses.values()])) else "its loss or gradient is not finite"
        if not int(predicted):
            why = "its batches have no token to predict"
        finite = not why
        window = self.control.after_backward(batches, losses.get("lm_loss", losses["loss"]), finite=finite)
        self.window = window or self.window
        self._update(why)
        if finite:
            self._note(losses)

    def _last_terms(self) -> dict[str, torch.Tensor]:
        seen = {} if self.steering is None else self.steering.last_losses
        # A recurrent model tells more: its cross-entropy, its halting loss, the segments it used.
        own: dict[str, torch.Tensor] = getattr(self.model, "loss_terms", {})
        return {_TERM_NAMES[name]: value for name, value in seen.items()} | own

    def _update(self, why_not: str) -> None:
        state = self.state
        if not why_not:
            self.optimizer.step()
            state.skipped_in_a_row = 0
        else:
            state.skipped += 1
            state.skipped_in_a_row += 1
            self.report.line(f"Step {state.step + 1} | skipped: {why_not}")
        with warnings.catch_warnings():
            # torch suspects a mistake when the very first optimizer step was skipped.
            warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step", category=UserWarning)
            self.schedule.step()
        self.optimizer.zero_grad()
        state.step += 1
        if state.skipped_in_a_row >= self.config.max_nonfinite_steps:
            raise TrainingError(
                f"{state.skipped_in_a_row} steps in a row were skipped (last: step {state.step}, {why_not}). "
                "Usual suspects: learning rate too high, bf16 where fp32 is needed, z-loss off, too small a batch; "
                "for a MoE keep --auto-adjust-lr on or use fewer experts per token. "
                + (
                    f"The last good checkpoint is {latest}."
                    if (latest := self.files.latest())
                    else "Nothing was saved."
                )
            )

    def _sum_of(self, micro_batches: list[dict[str, torch.Tensor]]) -> dict[str, float]:
        """The step's loss terms, summed over micro-batches and processes."""
        names = list(micro_batches[0])
        terms = torch.stack([torch.stack([terms[name] for name in names]) for terms in micro_batches]).sum(dim=0)
        return dict(zip(names, self.accelerator.reduce(terms, "sum").tolist(), strict=True))

    def _note(self, losses: dict[str, float]) -> None:
        """Add one step's loss terms to the sums since the last log line."""
        if self.window is not None:
            # What the step was, not what its gradient assumed (the load of the step before).
            losses["lb_loss"] = self.window.balance.mean().item()
        for name, value in losses.items():
            self.state.sums[name] = self.state.sums.get(name, 0.0) + value
        self.state.summed += 1

    def _after_step(self) -> dict[str, float]:
        state, config = self.state, self.config
        evaluation: dict[str, float] = {}
        if state.step % config.log_every_n_steps == 0 or state.step == self.total_steps:
            self.report.step(state.step, self._metrics())
            state.sums, state.summed = {}, 0
        else:
            self.report.tick(state.step)
        self._report_usage()
        with self.report.aside():
            if state.step % config.eval_every_n_steps == 0:
                evaluation = self._evaluate_and_log()
            if state.step % config.save_every_n_steps == 0:
                self.save_checkpoint()
        return evaluation

    def _report_usage(self, *, at_end: bool = False) -> bool:
        """Record how each expert was used since the last such record, if it is time; was there anything to tell?"""
        step = self.state.step
        due = at_end or step % self.config.usage_every_n_steps == 0 or step == self.total_steps
        usage = self.control.usage.report() if due else {}
        if usage:
            self.report.record({"event": "expert_usage", "step": step, **usage})
        return bool(usage)

    def _metrics(self) -> dict[str, Any]:
        state = self.state
        metrics: dict[str, Any] = {name: total / max(1, state.summed) for name, total in state.sums.items()}
        metrics |= {
            "lr": self.schedule.get_last_lr()[0],
            "grad_norm": self.report.grad_norm,
            "tokens": state.tokens,
            "skipped_steps": state.skipped,
        }
        if self.window is not None:
            metrics |= {"moe_layers": len(self.window.tokens), "load": self.window.load.tolist()}
            metrics["lb_coef"] = self.config.lambda_balance
            if self.window.depth_assignments.shape[1] > 1:
                metrics["load_by_depth"] = self.window.depth_load.tolist()
            metrics |= self.window.summary()
        return metrics | self.control.metrics()

    # -- evaluation ----------------------------------------------------------------------------------------------

    def evaluate(self) -> dict[str, float]:
        """Bits per byte by domain and their ``mean`` (held-out windows), or ``loss`` (a loader). Moves nothing."""
        if self.eval_data is None:
            return {}
        was_training = self.model.training
        self.model.eval()
        try:
            with self.accelerator.autocast(), self.control.deployed():
                if not isinstance(self.eval_data, Mapping):
                    return {"loss": mean_loss(self.model, self.eval_data)}
                result = {
                    name: bits_per_byte(self.model, windows, self.config.batch_size)
                    for name, windows in self.eval_data.items()
                    if isinstance(windows, HeldoutWindows)
                }
        finally:
            self.model.train(was_training)
        if not result:
            raise ConfigError("there is nothing to evaluate on: eval_dataloader has no held-out windows.")
        return {**result, "mean": sum(result.values()) / len(result)}

    def _change_goals(self) -> None:
        if self.steering is not None:
            self.steering.goal_bias.zero_()
        self.state.goals = self.goals_key
        self._turn_on_goals()

    def _turn_on_goals(self) -> None:
        event = None if self.goals is None else self.goals()
        if event is not None:
            self.report.record({**event, "step": self.state.step})

    def _evaluate_and_log(self) -> dict[str, float]:
        self._turn_on_goals()
        inner: Any = getattr(self.model, "model", None)
        recurrent = hasattr(inner, "reset_segments")
        if recurrent:
            inner.reset_segments()
        evaluation = self.evaluate()
        if evaluation:
            segments = inner.mean_segments if recurrent else None
            self.report.evaluation(self.state.step, evaluation, segments)
        if self.sample is not None:
            with torch.random.fork_rng():
                torch.manual_seed(self.config.seed)
                with self.control.deployed():
                    self.report.sample(self.state.step, self.sample(self.model))
            self.model.train()
        headline = evaluation.get("mean", evaluation.get("loss"))
        if headline is not None and (self.state.best_loss is None or headline < self.state.best_loss):
            self.state.best_loss, self.state.best_step = headline, self.state.step
            self.save_checkpoint()
        return evaluation

    # -- checkpoints ---------------------------------------------------------------------------------------------

    def save_checkpoint(self) -> Path:
        """Write ``<checkpoint_dir>/step_<N>`` whole, unless this step is saved already; see :meth:`RunFiles.save`."""
        if self._saved_step == self.state.step:
            return self.files.folder / f"step_{self.state.step}"
        path = self.files.save(self.state, self.total_steps)
        self.report.line(f"Saved checkpoint: {path.name}")
        self.report.record({"event": "checkpoint_save", "step": self.state.step, "path": path.name})
        self._saved_step = self.state.step
        return path

    def load_checkpoint(self, name: str) -> None:
        """Continue from a checkpoint: ``"step_500"`` in the checkpoint folder, ``"latest"``, or a path.

        Raises :class:`CheckpointError` when it is missing, damaged, foreign, or of another model.
        """
        path = self.files.find(name)
        self.state, self._pending_rng = self.files.load(path)
        self._saved_step = self.state.step
        self.report.line(f"Loaded checkpoint: {path.name}")


def _length(loader: Any) -> int | None:
    """Batches in a loader, None for a stream."""
    try:
        return len(loader)
    except TypeError:
        return None
