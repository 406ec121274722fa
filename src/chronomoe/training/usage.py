"""Records of how much each expert was used."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from chronomoe.errors import ConfigError
from chronomoe.routing.statistics import RoutingWindow
from chronomoe.settings import Settings
from chronomoe.training.callback import Callback, Run
from chronomoe.training.step import StepResult

Rows = tuple[tuple[float, ...], ...]


@dataclass(frozen=True, kw_only=True)
class UsageSums(Settings):
    """Sums since the last record, of each MoE layer; all empty when nothing was routed since."""

    title = "usage."
    assignments: Rows = ()
    """(layers, experts) assignments."""
    probability: Rows = ()
    """(layers, experts) probability mass."""
    tokens: tuple[float, ...] = ()
    """(layers,) tokens."""

    def __post_init__(self) -> None:
        super().__post_init__()
        sizes = {len(row) for row in (*self.assignments, *self.probability)}
        if len(sizes) > 1 or len({len(self.assignments), len(self.probability), len(self.tokens)}) > 1:
            raise ConfigError("usage has sums of different shapes.")


class Usage(Callback):
    """Records what each expert was given since the last record: all its assignments, padding left out."""

    name = "usage"

    def __init__(self, run: Run) -> None:
        self.run = run
        self._sums: dict[str, Tensor] = {}

    def after_step(self, step: StepResult) -> None:
        """Add the step; a record when one is due."""
        if step.window is not None:
            self.add(step.window)
        if self.run.is_due(step.number, self.run.config.usage_every_n_steps):
            self._record()

    def after_training(self) -> None:
        """A record of what is left."""
        self._record()

    def add(self, window: RoutingWindow) -> None:
        """Add one step."""
        for name in ("assignments", "probability", "tokens"):
            value = getattr(window, name).double()
            self._sums[name] = self._sums[name] + value if name in self._sums else value.clone()

    def _record(self) -> None:
        if usage := self.report():
            self.run.report.record({"event": "expert_usage", "step": self.run.state.step, **usage})

    def report(self) -> dict[str, Any]:
        """Means over the MoE layers, and each layer's own, since the last report; empty when nothing was routed."""
        if not self._sums:
            return {}
        counts_LN, tokens_L = self._sums["assignments"], self._sums["tokens"]
        share_LN = self._sums["probability"] / tokens_L.unsqueeze(-1)
        self._sums = {}
        return {
            "avg_routing_prob": [round(p, 4) for p in share_LN.mean(dim=0).tolist()],
            "token_counts": [round(n) for n in counts_LN.mean(dim=0).tolist()],
            "total_tokens": round(tokens_L.mean().item()),
            "layers": {
                "avg_routing_prob": [[round(p, 4) for p in row] for row in share_LN.tolist()],
                "token_counts": [[round(n) for n in row] for row in counts_LN.tolist()],
                "total_tokens": [round(n) for n in tokens_L.tolist()],
            },
        }

    def state_dict(self) -> dict[str, Any]:
        """The sums since the last record."""
        return {name: value.tolist() for name, value in self._sums.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from these sums."""
        sums = UsageSums.from_json(state, "usage", exact=bool(state))
        self._sums = {name: torch.tensor(getattr(sums, name), dtype=torch.float64) for name in state}
