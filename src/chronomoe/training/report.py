"""What a run shows and records: a live line or plain lines, metrics.jsonl for everything, TensorBoard if wanted."""

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from chronomoe.errors import ConfigError
from chronomoe.storage import disk_full_explained, finite

LANDSCAPE_EVERY = 10
"""Log lines per line about the landscape."""


class Reporter:
    """Prints and records for one run; does nothing when not ``active`` (other ranks)."""

    def __init__(
        self,
        log_file: Path,
        total_steps: int,
        show: Callable[[str], None] | None,
        *,
        active: bool = True,
        tensorboard: bool = False,
    ) -> None:
        self.log_file, self.total_steps, self.active = log_file, total_steps, active
        self._board_at = _tensorboard() if active and tensorboard else None
        self._board: Any = None
        self.console = Console(highlight=False, markup=False, soft_wrap=True)
        self.show = show or self.console.print
        if active:  # a place that cannot be written fails before the first step
            log_file.parent.mkdir(parents=True, exist_ok=True)
            log_file.open("ab").close()
        self._progress: Progress | None = None
        self._task: Any = None
        self._tokens_before = 0
        self._clock = time.perf_counter()
        self._latest = ""
        self._logged = 0

    @contextmanager
    def live(self) -> Iterator[None]:
        """A progress line at the bottom while the block runs, if someone is watching; then TensorBoard's file ends."""
        try:
            with self._progress_line():
                yield
        finally:
            if self._board is not None:
                self._board.close()
                self._board = None

    @contextmanager
    def _progress_line(self) -> Iterator[None]:
        if not (self.active and self.console.is_terminal):
            yield
            return
        columns = (
            BarColumn(bar_width=20), MofNCompleteColumn(), TextColumn("{task.fields[latest]}"), TimeRemainingColumn(),
        )  # fmt: skip
        with Progress(*columns, console=self.console, transient=True) as self._progress:
            self._task = self._progress.add_task("", total=self.total_steps, latest="")
            yield
        self._progress = None

    def start(self, step: int) -> None:
        """The clock of the throughput starts now."""
        self._clock, self._tokens_before = time.perf_counter(), -1
        if self._board_at is not None:  # later steps of a run that is resumed are hidden
            self._board = self._board_at(str(self.log_file.parent / "tensorboard"), purge_step=step + 1)
        if step:
            self.record({"event": "resumed", "step": step})
        self.tick(step)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Within the block (evaluating, saving) no training time passes."""
        clock, began = self._clock, time.perf_counter()
        yield
        self._clock = clock + time.perf_counter() - began

    def tick(self, step: int) -> None:
        """Move the live line."""
        if self._progress is not None:
            self._progress.update(self._task, completed=step, latest=self._latest)

    def line(self, text: str) -> None:
        """Print a line."""
        if self.active:
            self.show(text)

    def record(self, entry: dict[str, Any]) -> None:
        """Append one object to metrics.jsonl."""
        if self.active:
            self.log_file.parent.mkdir(parents=True, exist_ok=True)
            with disk_full_explained(self.log_file), self.log_file.open("a+b") as file:
                line = json.dumps(finite(entry), ensure_ascii=False, allow_nan=False) + "\n"
                file.write((line if _ends_with_newline(file) else "\n" + line).encode())
        if self._board is not None:
            for name, value in entry.items():
                if isinstance(value, (int, float)) and name != "step":
                    self._board.add_scalar(f"{entry['event']}/{name}", value, entry["step"])
            self._board.flush()

    def step(self, step: int, metrics: dict[str, Any]) -> None:
        """A log line and a metrics record; throughput is measured since the previous one."""
        now, tokens = time.perf_counter(), metrics["tokens"]
        if self._tokens_before >= 0:
            metrics["tokens_per_second"] = round((tokens - self._tokens_before) / (now - self._clock), 1)
        self._clock, self._tokens_before = now, tokens
        self.record({"event": "train", "step": step, **metrics})
        headline = [f"Step {step}", f"Loss: {metrics.get('loss', float('nan')):.4f}"]
        if "kappa" in metrics:
            headline.append(f"κ: {metrics['kappa']:.2f} ({metrics['intent']})")
            headline += [f"R: {metrics['R']:.2f}", f"Gate: {metrics['gate']:.2f}"]
        detail = [f"lr={metrics['lr']:.2e}"]
        if "max_violation" in metrics:
            detail += [f"balance={metrics.get('lb_loss', float('nan')):.3f}", f"MaxVio={metrics['max_violation']:.2f}"]
            detail.append(f"dead={metrics['dead_experts']}")
        if "tokens_per_second" in metrics:
            detail.append(f"{metrics['tokens_per_second']:,.0f} tok/s")
        self._latest = " ".join([*headline[1:], *detail[-1:]])
        self.line(" | ".join(headline))
        self.line("  " + ", ".join(detail))
        self._logged += 1
        if "T_bar_variance" in metrics and (self._logged % LANDSCAPE_EVERY == 0 or step == self.total_steps):
            self.line(
                f"  Landscape: var={metrics['T_bar_variance']:.4f}, valleys={metrics['valleys']}, "
                f"ridges={metrics['ridges']}"
            )
        self.tick(step)

    def evaluation(self, step: int, result: dict[str, float], segments: float | None = None) -> None:
        """The result of an evaluation, and the segments a token took in it, of a model that halts."""
        own = {} if segments is None else {"segments": round(segments, 4)}
        self.record({"event": "eval", "step": step, **result, **own})
        unit = "" if set(result) == {"loss"} else " (bits per byte)"
        result = result | own
        self.line(f"Step {step} | Eval{unit}: " + ", ".join(f"{name} {value:.4f}" for name, value in result.items()))

    def sample(self, step: int, text: str) -> None:
        """A text sampled from the model."""
        self.record({"event": "sample", "step": step, "text": text})
        self.line(f"Step {step} | Sample: {text!r}")


def _tensorboard() -> Callable[..., Any]:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ConfigError("TensorBoard is not installed: pip install 'chronomoe-aios[tensorboard]'.") from None
    return SummaryWriter


def _ends_with_newline(file: IO[bytes]) -> bool:
    """Is the last line complete? A full disk or a killed run may have cut it."""
    if file.seek(0, os.SEEK_END) == 0:
        return True
    file.seek(-1, os.SEEK_END)
    return file.read(1) == b"\n"
