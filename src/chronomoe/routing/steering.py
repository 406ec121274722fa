"""Steering: the fields on all routers of a model, what the routers observe, and the router losses.

Shape suffixes: L MoE layers, N experts.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Literal, Self

import torch
from torch import Tensor, nn

from chronomoe.errors import ConfigError
from chronomoe.routing.calls import RoutedCall, loss_sums, which_count
from chronomoe.routing.fields import RHO, selection_scores, temperature
from chronomoe.routing.losses import ChronoMoELoss, balance_loss, coherence_loss, valley_loss, z_loss
from chronomoe.routing.router import RoutingContext, without_autocast
from chronomoe.routing.statistics import RoutingStatistics, RoutingWindow
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
    """Whose load the balance loss uses: this forward's, or (where a step is split and its size told) that of the last
    complete optimizer step."""


class Fp32Module(nn.Module):
    """Moves with the model, but keeps the dtype of its buffers: counts and small biases do not survive bf16."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = {(module, name): buffer for module in self.modules() for name, buffer in module._buffers.items()}
        super()._apply(fn, recurse)
        for (module, name), buffer in before.items():
            now = module._buffers[name]
            if buffer is not None and now is not None and now.dtype != buffer.dtype:
                module._buffers[name] = buffer.to(now.device)
        return self

    def keep_dtypes(self) -> None:
        """From now on :meth:`restore_dtypes` knows what the buffers are."""
        self._dtypes = {name: buffer.dtype for name, buffer in self._buffers.items() if buffer is not None}

    def restore_dtypes(self) -> None:
        """Undo what from_pretrained does to bools and integers: they follow the dtype of the model."""
        for name, dtype in self._dtypes.items():
            setattr(self, name, self.get_buffer(name).to(dtype))


class Steering(Fp32Module):
    """Fields and observations of all L routers with N experts each; buffers of the model they steer.

    ``pressure`` b, ``goal_bias`` g and ``log_temperature`` tau are (L, N), ``available`` is a bool (L, N),
    ``base_temperature`` T0 and ``exploration`` (the scale of the Gumbel noise) are scalars. Write them in place.
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

    def __init__(
        self, num_layers: int, num_experts: int, top_k: int, hidden_size: int, config: SteeringConfig, depths: int = 1
    ) -> None:
        super().__init__()
        self.config = config
        self.num_experts = num_experts
        self.top_k = top_k
        self.statistics = RoutingStatistics(num_layers, num_experts, hidden_size, top_k, depths)
        shape = (num_layers, num_experts)
        for name in ("pressure", "goal_bias", "log_temperature"):
            self.register_buffer(name, torch.zeros(shape, dtype=torch.float32))  # whatever the default dtype is
        self.register_buffer("available", torch.ones(shape, dtype=torch.bool))
        self.register_buffer("base_temperature", torch.ones((), dtype=torch.float32))
        self.register_buffer("exploration", torch.zeros((), dtype=torch.float32))
        self.register_buffer("load", torch.full(shape, 1 / num_experts, dtype=torch.float32))
        self.register_buffer("direction", torch.zeros((*shape, hidden_size), dtype=torch.float32))
        self.register_buffer("input_mean", torch.zeros((num_layers, hidden_size), dtype=torch.float32))
        self.register_buffer("valley_weight", torch.zeros(shape, dtype=torch.float32))
        self.keep_dtypes()
        self.tokens_in_step: Tensor | float | None = None
        """Tokens of the whole optimizer step, set by a trainer that splits it; None: each forward is a step."""
        self.conditioning: Callable[[int], Tensor | None] | None = None
        """What learned goals add to the logits of a layer; see chronomoe.goals.conditioning."""
        self._looked_at: list[tuple[int, int]] | None = None
        self._looked_with: SteeringConfig | None = None
        self._bias, self._temperature, self._temperate = self.pressure, self.log_temperature, [True] * num_layers
        self._usual: tuple[Tensor, Tensor] | None = None
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
        self.measuring = False
        """Compare the gradients of the loss terms in the next forward."""
        self.gradient_norms: dict[str, Tensor] = {}
        """Norm of each term's gradient at the routers, weighted, as last measured."""
        self.context: RoutingContext | None = None
        """Context of the latest forward, until the model's loss has been added to."""
        self.last_losses: dict[str, Tensor] = {}
        """Terms of the latest training loss: ``lm``, ``balance``, ``coherence``, ``valley``, ``z``."""

    @torch.no_grad()
    def reset(self) -> None:
        """Every field neutral, nothing observed."""
        self.statistics.start_over()
        for buffer in self.buffers():
            buffer.zero_()
        self.available.fill_(True)
        self.base_temperature.fill_(1)
        self.load.fill_(1 / self.num_experts)

    @torch.no_grad()
    def after_loading(self) -> None:
        """Mend what from_pretrained leaves: unsaved buffers hold whatever was in memory."""
        self.statistics.start_over()
        self.restore_dtypes()

    # -- what the routers ask ------------------------------------------------------------------------------------

    def look(self) -> None:
        """Bring ``neutral``, ``all_available`` and ``exploring`` up to date, asking the device only after a write.

        Each forward of the model looks once. Raises :class:`ConfigError` when a layer has too few available experts.
        """
        fields = [self.get_buffer(name) for name in (*_FIELDS, *_SCALARS, "available")]
        if any(field.is_inference() for field in fields):
            versions = None  # made in inference mode: they count no writes
        else:
            versions = [(field.data_ptr(), field._version) for field in fields]
            if versions == self._looked_at and self.config is self._looked_with:
                return
        # One question to the device for all: largest magnitudes (not finite if anything is not), available experts.
        asked = [torch.linalg.vector_norm(field, math.inf) for field in fields[: len(_FIELDS)]]
        asked += [self.base_temperature, self.exploration, *self.available.sum(dim=-1)]
        found = torch.stack(asked).tolist()
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
        self._usual = None
        if self.coherent:
            usual_LMD = torch.cat([self.direction, self.input_mean.unsqueeze(1)], dim=1)
            with without_autocast(self.direction):
                self._usual = usual_LMD, (usual_LMD @ self.input_mean.unsqueeze(-1)).squeeze(-1)
        self._bias = self.pressure + self.goal_bias
        self._temperate = [True] * len(self.pressure)
        if tempered:
            self._temperature = temperature(self.log_temperature, self.base_temperature, self.config.rho)
            self._temperate = (self._temperature == 1).all(dim=-1).tolist()
        self._looked_at, self._looked_with = versions, self.config

    def scores(self, layer: int, z_TN: Tensor, *, goals: bool = True) -> Tensor:
        """Selection scores (T, N) of one layer from its logits, with or without what goals ask for."""
        t_N = self.temperature_of(layer)
        bias_LN = self._bias if goals else self.pressure
        return selection_scores(z_TN, bias_LN[layer], t_N)

    def temperature_of(self, layer: int) -> Tensor | None:
        """T (N,) of one layer as last looked at; None where it is 1 everywhere."""
        return None if self._temperate[layer] else self._temperature[layer]

    # -- what a forward pass asks --------------------------------------------------------------------------------

    def new_context(self, attention_mask: Tensor | None, batch: int, length: int) -> RoutingContext:
        """The context of one forward over (batch, length) tokens; a mask (batch, past + length) has 0 for padding."""
        self.look()
        context = RoutingContext(num_tokens=batch * length, row_length=length, num_positions=batch * length)
        if attention_mask is not None and attention_mask.dim() == 2:
            context.counted_T = attention_mask[:, -length:].reshape(-1).bool()
            context.num_tokens = context.counted_T.sum()
        return context

    def observe(self, context: RoutingContext) -> None:
        """Add to the open window what the routers left in ``context``, and sum up what its losses need."""
        left, context.calls[:] = list(context.calls), []
        if idle := [call for call in left if not call.carries_gradient]:
            self.record(context, idle)
        if calls := [call for call in left if call.carries_gradient]:
            z_CTN, p_CTN, counted_CT = self.record(context, calls)
            with without_autocast(self.load):
                context.sums = loss_sums(
                    calls, z_CTN, p_CTN, counted_CT, context.assigned, self._usual, context.row_length
                )

    def record(self, context: RoutingContext, calls: list[RoutedCall]) -> tuple[Tensor, Tensor, Tensor | None]:
        """Add calls of a forward to the open window; returns their logits, probabilities, and (C, T) what counts."""
        with without_autocast(self.load):
            z_CTN = torch.stack([call.logits for call in calls])
            p_CTN = torch.stack([call.probabilities for call in calls])
            counted_CT, flipping = which_count(calls), self.exploring or not self.neutral
            assigned_CN = self.statistics.record(calls, z_CTN.detach(), p_CTN.detach(), counted_CT, flipping=flipping)
        for call, assigned_N in zip(calls, assigned_CN, strict=True):
            context.assigned[call.layer] = context.assigned.get(call.layer, 0) + assigned_N
        return z_CTN, p_CTN, counted_CT

    def losses(self, context: RoutingContext, share: Tensor | float | None = None) -> dict[str, Tensor]:
        """The terms of one training forward, unweighted, means over layers, each a share of the whole step's."""
        return {name: values.mean() for name, values in self.layer_losses(context, share).items()}

    def layer_losses(self, context: RoutingContext, share: Tensor | float | None = None) -> dict[str, Tensor]:
        """``balance``, ``z``, ``valley`` and, if it counts, ``coherence`` of each layer of one training forward.

        ``share`` is the part of the step's tokens that this forward holds; by default counted from ``tokens_in_step``,
        or 1 when each forward is a step.
        """
        sums = context.sums
        if sums is None:
            return {}
        tokens: Tensor | float = context.num_tokens
        if self.tokens_in_step is not None:
            tokens = self.tokens_in_step
        elif share is not None:
            tokens = tokens / share
        tokens_L = (torch.tensor(sums.calls, device=self.load.device) * tokens).clamp(min=1)
        if self.config.balance_scope == "step" and not (self.tokens_in_step is None and share is None):
            load = self.load[sums.layers]
        else:
            load = sums.assigned / sums.assigned.sum(dim=-1, keepdim=True).clamp(min=1)
        terms = {
            "balance": balance_loss(load, sums.probability, tokens_L),
            "z": z_loss(sums.squared_logsumexp, tokens_L),
            "valley": valley_loss(self.valley_weight[sums.layers], sums.probability, tokens_L),
        }
        if sums.agreement is not None and sums.agreed is not None:
            terms["coherence"] = coherence_loss(sums.agreement, sums.agreed, tokens_L)
        return terms

    # -- what a trainer asks -------------------------------------------------------------------------------------

    @torch.no_grad()
    def end_step(self) -> RoutingWindow | None:
        """Close the window of one optimizer step: sum it over ranks, note the load, start anew.

        None, and nothing noted, when a layer saw no token or something that is not finite.
        """
        self.statistics.gather()
        window = self.statistics.window(self.available)
        largest, fewest = torch.stack(
            [torch.linalg.vector_norm(self.statistics.sums, math.inf), window.tokens.min()]
        ).tolist()
        self.discard_step()
        if not math.isfinite(largest) or fewest <= 0:
            return None
        self.load.copy_(window.load_without_goals)
        return window

    @torch.no_grad()
    def discard_step(self) -> None:
        """Forget the open window, as after a step whose loss was not finite."""
        self.statistics.start_over()
