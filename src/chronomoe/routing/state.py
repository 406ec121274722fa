"""FieldState: the fields that routers read, and what is worked out from them once per change.

Shape suffixes: L MoE layers, T tokens, N experts, D hidden size.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Literal, Self

import torch
from torch import Tensor, nn

from chronomoe.errors import ConfigError
from chronomoe.routing.context import without_autocast
from chronomoe.routing.fields import RHO, selection_scores, temperature
from chronomoe.routing.losses import ChronoMoELoss
from chronomoe.settings import Bounds, Positive, Settings

_FIELDS = "pressure", "goal_bias", "log_temperature", "direction", "input_mean"
_SCALARS = "base_temperature", "exploration"


@dataclass(frozen=True, kw_only=True)
class SteeringConfig(Settings):
    """How routers are steered. The defaults change nothing but the training loss."""

    enabled: bool = True
    """False makes every field inert; statistics and router losses stay."""
    rho: Annotated[float, Bounds(ge=1)] = RHO
    """Largest ratio of two expert temperatures in a layer."""
    capacity_factor: Positive | None = None
    """Tokens an expert may take, as a multiple of its fair share, in training; None drops nothing."""
    loss: ChronoMoELoss = field(default_factory=ChronoMoELoss)
    """Weights of the router losses."""
    balance_scope: Literal["forward", "step"] = "forward"
    """Whose load the balance loss uses: this forward's, or (where a step is split and its size given) that of the
    last complete optimizer step."""


class Fp32Module(nn.Module):
    """Moves with the model, but keeps the dtype of its buffers: counts and small biases do not survive bf16."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = {(module, name): buffer for module in self.modules() for name, buffer in module._buffers.items()}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for (module, name), buffer in before.items():
            now = module._buffers[name]
            if buffer is not None and now is not None and now.dtype != buffer.dtype:
                module._buffers[name] = buffer.to(now.device)
        return self


class FieldState(Fp32Module):
    """Fields of all L routers with N experts each; write the buffers in place.

    ``pressure`` b, ``goal_bias`` g and ``log_temperature`` tau are (L, N), ``available`` is a bool (L, N),
    ``base_temperature`` T0 and ``exploration`` (the scale of the Gumbel noise) are scalars.
    ``load`` (L, N) is the share of assignments in the last complete step, over all ranks, less what goals moved.
    For the losses: ``direction`` (L, N, D), unit vectors or 0, ``input_mean`` (L, D) and ``valley_weight`` (L, N).
    """

    pressure: Tensor
    goal_bias: Tensor
    log_temperature: Tensor
    available: Tensor
    base_temperature: Tensor
    exploration: Tensor
    load: Tensor
    direction: Tensor
    input_mean: Tensor
    valley_weight: Tensor

    def __init__(self, num_layers: int, num_experts: int, top_k: int, hidden_size: int, config: SteeringConfig) -> None:
        super().__init__()
        self.config = config
        self.num_experts = num_experts
        self.top_k = top_k
        self._shape = num_layers, num_experts, hidden_size
        FieldState.make_neutral(self)
        self.conditioning: Callable[[int], Tensor | None] | None = None
        """What learned goals add to the logits of a layer; see chronomoe.goals.conditioning."""
        self._config_seen: SteeringConfig | None = None
        self._bias, self._temperature = self.pressure, self.log_temperature
        self._is_unit_temperature = [True] * num_layers
        self._prototypes: tuple[Tensor, Tensor] | None = None
        self.neutral = True
        """Pressure, goals and temperature leave every choice as it is."""
        self.has_goals = False
        """A goal biases the choice."""
        self.all_available = [True] * num_layers
        """Every expert of that layer may be used."""
        self.exploring = False
        """There is exploration noise, in training."""
        self.coherent = False
        """The coherence loss counts and has directions to compare with."""

    def make_neutral(self, device: torch.device | str | None = None) -> None:
        """Give the state new buffers on ``device``, every field neutral: routers choose as their host does.

        They are run-time state, in no state dict: whatever loads a model's weights calls this, then restores what was
        saved beside them.
        """
        layers, num_experts, hidden_size = self._shape
        # fp32 whatever the default dtype is
        made = {
            "pressure": torch.zeros(layers, num_experts, dtype=torch.float32, device=device),
            "goal_bias": torch.zeros(layers, num_experts, dtype=torch.float32, device=device),
            "log_temperature": torch.zeros(layers, num_experts, dtype=torch.float32, device=device),
            "available": torch.ones(layers, num_experts, dtype=torch.bool, device=device),
            "base_temperature": torch.ones((), dtype=torch.float32, device=device),
            "exploration": torch.zeros((), dtype=torch.float32, device=device),
            "load": torch.full((layers, num_experts), 1 / num_experts, dtype=torch.float32, device=device),
            "direction": torch.zeros(layers, num_experts, hidden_size, dtype=torch.float32, device=device),
            "input_mean": torch.zeros(layers, hidden_size, dtype=torch.float32, device=device),
            "valley_weight": torch.zeros(layers, num_experts, dtype=torch.float32, device=device),
        }
        for name, buffer in made.items():
            self.register_buffer(name, buffer, persistent=False)
        self._field_versions: list[tuple[int, int]] | None = None

    @torch.no_grad()
    def reset(self) -> None:
        """Make every field neutral, in place."""
        for name in (*_FIELDS, "exploration", "valley_weight"):
            self.get_buffer(name).zero_()
        self.available.fill_(True)
        self.base_temperature.fill_(1)
        self.load.fill_(1 / self.num_experts)

    def refresh(self) -> None:
        """Bring ``neutral``, ``all_available``, ... up to date; the device is asked only after a field was written.

        Each forward of the model calls it once. Raises :class:`ConfigError` when a layer has too few available experts.
        """
        fields = [self.get_buffer(name) for name in (*_FIELDS, *_SCALARS, "available")]
        if any(field.is_inference() for field in fields):
            versions = None  # made in inference mode: they count no writes
        else:
            versions = [(field.data_ptr(), field._version) for field in fields]
            if versions == self._field_versions and self.config is self._config_seen:
                return
        # One transfer for all: largest magnitudes (not finite if anything is not), available experts.
        sizes = [torch.linalg.vector_norm(field, math.inf) for field in fields[: len(_FIELDS)]]
        sizes += [self.base_temperature, self.exploration, *self.available.sum(dim=-1)]
        found = torch.stack(sizes).tolist()
        found, counts = found[: -len(self.available)], found[-len(self.available) :]
        size = dict(zip((*_FIELDS, *_SCALARS), found, strict=True))
        if not all(map(math.isfinite, found)) or size["base_temperature"] <= 0:
            raise ConfigError(
                "a steering field is not finite, or base_temperature is not above 0; controller.reset() helps."
            )
        if min(counts) < self.top_k:
            raise ConfigError(
                f"a layer has {int(min(counts))} available experts but each token needs {self.top_k}; enable more."
            )
        enabled = self.config.enabled
        self.all_available = [count == self.num_experts for count in counts]
        self.has_goals = enabled and size["goal_bias"] > 0
        self.exploring = enabled and size["exploration"] > 0
        tempered = enabled and (size["log_temperature"] > 0 or size["base_temperature"] != 1)
        self.neutral = not enabled or not (size["pressure"] or size["goal_bias"] or tempered)
        self.coherent = self.config.loss.lambda_coherence > 0 and size["direction"] > 0
        self._prototypes = None
        if self.coherent:
            prototypes_LMD = torch.cat([self.direction, self.input_mean.unsqueeze(1)], dim=1)
            with without_autocast(self.direction):
                self._prototypes = prototypes_LMD, (prototypes_LMD @ self.input_mean.unsqueeze(-1)).squeeze(-1)
        self._bias = self.pressure + self.goal_bias
        self._is_unit_temperature = [True] * len(self.pressure)
        if tempered:
            self._temperature = temperature(self.log_temperature, self.base_temperature, self.config.rho)
            self._is_unit_temperature = (self._temperature == 1).all(dim=-1).tolist()
        self._field_versions, self._config_seen = versions, self.config

    def scores(self, layer: int, z_TN: Tensor, *, goals: bool = True) -> Tensor:
        """Selection scores (T, N) of one layer from its logits, with or without the goal bias."""
        t_N = self.temperature_of(layer)
        bias_LN = self._bias if goals else self.pressure
        return selection_scores(z_TN, bias_LN[layer], t_N)

    def temperature_of(self, layer: int) -> Tensor | None:
        """T (N,) of one layer as of the last :meth:`refresh`; None where it is 1 everywhere."""
        return None if self._is_unit_temperature[layer] else self._temperature[layer]
