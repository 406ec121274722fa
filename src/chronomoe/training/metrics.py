"""The numbers of a run: loss terms averaged between log lines, one metrics record and log line each time."""

from dataclasses import dataclass
from typing import Annotated, Any

from chronomoe.routing.statistics import RoutingWindow
from chronomoe.settings import Bounds, Settings
from chronomoe.training.callback import Callback, Run
from chronomoe.training.control import Control
from chronomoe.training.optimizer import learning_rate
from chronomoe.training.step import StepResult


@dataclass(frozen=True, kw_only=True)
class MetricsState(Settings):
    """What a resumed run must know to go on averaging."""

    title = "metrics."
    sums: dict[str, float]
    """Loss terms summed since the last log line."""
    summed: Annotated[int, Bounds(ge=0)]
    """Over how many steps."""


class Metrics(Callback):
    """Averages the loss terms and writes a log line and a metrics record when one is due."""

    name = "metrics"

    def __init__(self, run: Run, control: Control) -> None:
        self.run, self.control = run, control
        self.sums: dict[str, float] = {}
        self.summed = 0
        self.window: RoutingWindow | None = None
        """What the routers observed in the latest step that was not skipped."""

    def before_training(self) -> None:
        """Start the clock."""
        self.run.report.start(self.run.state.step)

    def after_step(self, step: StepResult) -> None:
        """Add the step; log when it is time."""
        self.window = step.window or self.window
        if not step.skip_reason:
            self._add(step)
        if self.run.is_due(step.number, self.run.config.log_every_n_steps):
            self.run.report.step(step.number, self._fields(step))
            self.sums, self.summed = {}, 0
        else:
            self.run.report.tick(step.number)

    def _add(self, step: StepResult) -> None:
        losses = dict(step.losses)
        if self.window is not None:
            # What the step was, not what its gradient assumed (the load of the step before).
            losses["lb_loss"] = self.window.balance.mean().item()
        for name, value in losses.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        self.summed += 1

    def _fields(self, step: StepResult) -> dict[str, Any]:
        config, state = self.run.config, self.run.state
        fields: dict[str, Any] = {name: total / max(1, self.summed) for name, total in self.sums.items()}
        fields |= {
            "lr": learning_rate(step.number, config, self.run.total_steps),
            "grad_norm": step.grad_norm,
            "tokens": state.tokens,
            "skipped_steps": state.skipped,
        }
        if self.window is not None:
            fields |= {"moe_layers": len(self.window.tokens), "load": self.window.load.tolist()}
            fields["lb_coef"] = config.lambda_balance
            if self.window.depth_assignments.shape[1] > 1:
                fields["load_by_depth"] = self.window.depth_load.tolist()
            fields |= self.window.summary()
        return fields | self.control.metrics()

    def state_dict(self) -> dict[str, Any]:
        """The sums since the last log line."""
        return MetricsState(sums=self.sums, summed=self.summed).to_json()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from these sums."""
        saved = MetricsState.from_json(state, "metrics", exact=True)
        self.sums, self.summed = dict(saved.sums), saved.summed
