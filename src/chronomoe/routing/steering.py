"""Steering: the fields on all routers of a model, what the routers observe, and the router losses.

Shape suffixes: L MoE layers, C calls of routers in one forward, T tokens, N experts.
"""

import math

import torch
from torch import Tensor, distributed

from chronomoe.routing.context import RoutedCall, RoutingContext, which_count, without_autocast
from chronomoe.routing.losses import balance_loss, coherence_loss, loss_sums, valley_loss, z_loss
from chronomoe.routing.state import FieldState, SteeringConfig
from chronomoe.routing.statistics import RoutingStatistics, RoutingWindow


class Steering(FieldState):
    """Fields of all routers, what the routers observe in one step, and the losses; found as ``model.steering``."""

    def __init__(
        self, num_layers: int, num_experts: int, top_k: int, hidden_size: int, config: SteeringConfig, depths: int = 1
    ) -> None:
        super().__init__(num_layers, num_experts, top_k, hidden_size, config)
        self.statistics = RoutingStatistics(num_layers, num_experts, hidden_size, top_k, depths)
        self.group: distributed.ProcessGroup | None = None
        """Ranks whose tokens make one step: those of data parallelism; None for all."""
        self.tokens_in_step: Tensor | float | None = None
        """Tokens of the optimizer step, set by a trainer that splits it; None: each forward is a step."""
        self.measuring = False
        """Compare the gradients of the loss terms in the next forward."""
        self.gradient_norms: dict[str, Tensor] = {}
        """Norm of each term's gradient at the routers, weighted, as last measured."""
        self.context: RoutingContext | None = None
        """Context of the latest forward, until the model's loss has been added to."""
        self.controlled = False
        """Has it a controller?"""
        self.last_losses: dict[str, Tensor] = {}
        """Terms of the latest training loss: ``lm``, ``balance``, ``coherence``, ``valley``, ``z``."""

    def make_neutral(self, device: torch.device | str | None = None) -> None:
        super().make_neutral(device)
        self.statistics.make_empty(device)

    @torch.no_grad()
    def reset(self) -> None:
        """Make every field neutral and forget what was observed, in place."""
        self.statistics.start_over()
        super().reset()

    # -- one forward ---------------------------------------------------------------------------------------------

    def observe(self, context: RoutingContext) -> None:
        """Add the calls in ``context`` to the open window, and sum up what its losses need of them."""
        pending, context.calls[:] = list(context.calls), []
        if idle := [call for call in pending if not call.carries_gradient]:
            self.record(context, idle)
        if calls := [call for call in pending if call.carries_gradient]:
            z_CTN, p_CTN, counted_CT = self.record(context, calls)
            with without_autocast(self.load):
                context.sums = loss_sums(
                    calls, z_CTN, p_CTN, counted_CT, context.assigned, self._prototypes, context.row_length
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
        """The terms of one training forward, unweighted, means over layers, each a share of the optimizer step's."""
        return {name: values.mean() for name, values in self.layer_losses(context, share).items()}

    def layer_losses(self, context: RoutingContext, share: Tensor | float | None = None) -> dict[str, Tensor]:
        """``balance``, ``z``, ``valley`` and, if it counts, ``coherence`` of each layer of one training forward.

        ``share`` is the share of the step's tokens that this forward holds; by default counted from ``tokens_in_step``,
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
        if sums.similarity is not None and sums.compared is not None:
            terms["coherence"] = coherence_loss(sums.similarity, sums.compared, tokens_L)
        return terms

    # -- one step ----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def end_step(self) -> RoutingWindow | None:
        """Close the window of one optimizer step: sum it over the ranks of ``group``, set ``load``, open the next.

        None, and ``load`` unchanged, when a layer saw no token or something that is not finite.
        """
        self.statistics.gather(self.group)
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
