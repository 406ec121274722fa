"""SteeredRouter: the router of a softmax-top-k MoE layer, with fields from outside the gradient choosing the experts.

It keeps the host's parameter (``weight``) and its return value (logits, combine weights, chosen experts), so a plain
checkpoint loads unchanged and the experts never know. Fields decide *access*, meaning decides *weight*: pressure, goal
bias and temperature pick the experts and never enter the combine weights. With every field neutral the arithmetic is
the host's own, bit for bit.

Shape suffixes: T tokens, D hidden size, N experts, K chosen experts.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from chronomoe.routing.context import RoutedCall, RoutingContext, sampled, used_experts, without_autocast
from chronomoe.routing.fields import gumbel_like, open_probabilities, within_capacity
from chronomoe.routing.steering import Steering

MAX_PENDING_CALLS = 8
"""Calls without a gradient are observed once so many are pending, so that their tensors are freed."""


class SteeredRouter(nn.Module):
    """Mixed into a host's router class by chronomoe.hosts.attach; shapes as in the host: (..., D) in, (T, .) out."""

    weight: nn.Parameter
    top_k: int
    num_experts: int
    hidden_dim: int
    layer: int
    normalise: bool
    keep_dtype: bool
    steering: Steering
    context: RoutingContext | None
    slot: int
    """Which call of this forward comes next: a recurrent model hands its cache slot along."""

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return logits (T, N) in fp32, combine weights (T, K) and the chosen experts (T, K)."""
        # Taken, not kept: it holds the graph of its forward.
        context, self.context = self.context, None
        alone = context is None
        if context is None:  # called outside its model
            self.steering.refresh()
            context = RoutingContext.begin(1, hidden_states.numel() // self.hidden_dim)
        h_TD = hidden_states.reshape(-1, self.hidden_dim)
        with without_autocast(h_TD):
            z_TN = F.linear(h_TD.float(), self.weight.float())
            conditioning = self.steering.conditioning if self.steering.config.enabled else None
            if conditioning is not None and (learned_N := conditioning(self.layer)) is not None:
                z_TN = z_TN + learned_N
            p_TN = self._probabilities(z_TN)
            chosen_TK, without_goals_TK = self._choose(z_TN.detach(), p_TN.detach())
            w_TK, kept_TK = self._combine_weights(p_TN, chosen_TK, context)
            if self.training:
                self._record_call(context, h_TD.detach(), z_TN, p_TN, chosen_TK, without_goals_TK, w_TK, kept_TK)
                if alone:
                    self.steering.observe(context)
        return z_TN, w_TK.to(hidden_states.dtype) if self.keep_dtype else w_TK, chosen_TK

    def _probabilities(self, z_TN: Tensor) -> Tensor:
        if self.steering.all_available[self.layer]:
            return z_TN.softmax(dim=-1)
        return open_probabilities(z_TN, self.steering.available[self.layer])

    @torch.no_grad()
    def _choose(self, z_TN: Tensor, p_TN: Tensor) -> tuple[Tensor, Tensor | None]:
        """The experts of each token (T, K), and in training what they would be without goals, if there are any."""
        steering = self.steering
        without_TN: Tensor | None = None
        scores_TN = p_TN
        if not steering.neutral:
            # Closed experts leave before the deficit is taken: no distance is measured from them.
            if not steering.all_available[self.layer]:
                z_TN = z_TN.masked_fill(~steering.available[self.layer], -math.inf)
            scores_TN = steering.scores(self.layer, z_TN)
            if steering.has_goals and self.training:
                without_TN = steering.scores(self.layer, z_TN, goals=False)
        if steering.exploring and self.training:
            scores_TN = p_TN.log() if steering.neutral else scores_TN
            noise_TN = gumbel_like(scores_TN, steering.exploration)
            scores_TN = scores_TN + noise_TN
            without_TN = None if without_TN is None else without_TN + noise_TN
        chosen_TK = self._highest(scores_TN)
        return chosen_TK, None if without_TN is None else self._highest(without_TN)

    def _highest(self, scores_TN: Tensor) -> Tensor:
        steering = self.steering
        all_available = steering.all_available[self.layer]
        if not all_available:
            scores_TN = scores_TN.masked_fill(~steering.available[self.layer], -math.inf)
        if steering.neutral or self.top_k > 2 or not all_available:
            return scores_TN.topk(self.top_k, dim=-1).indices  # as the host, to the choice among equals
        # All scores are finite here. Over short rows two maxima take half the time of topk.
        first_T1 = scores_TN.max(dim=-1, keepdim=True).indices
        if self.top_k == 1:
            return first_T1
        others_TN = scores_TN.scatter(-1, first_T1, -math.inf)
        return torch.cat([first_T1, others_TN.max(dim=-1, keepdim=True).indices], dim=-1)

    def _combine_weights(
        self, p_TN: Tensor, chosen_TK: Tensor, context: RoutingContext
    ) -> tuple[Tensor, Tensor | None]:
        w_TK = p_TN.gather(-1, chosen_TK)
        if self.normalise:
            if not self.steering.neutral:
                # A field may choose experts of probability 0 (a logit gap above 100): still a mixture, not 0 / 0.
                w_TK = w_TK.clamp(min=torch.finfo(w_TK.dtype).tiny)
            # For one expert p / p is the host's weight 1 without its zero gradient: d log p, times what it adds.
            w_TK = w_TK / (w_TK.detach() if self.top_k == 1 else w_TK.sum(dim=-1, keepdim=True))
        kept_TK, open_TK = self._kept(chosen_TK, context), self._chosen_open(chosen_TK)
        if open_TK is not None:
            kept_TK = open_TK if kept_TK is None else kept_TK & open_TK
        if kept_TK is None:
            return w_TK, None
        kept_w_TK = w_TK * kept_TK
        rescale = w_TK.sum(dim=-1, keepdim=True) / kept_w_TK.sum(dim=-1, keepdim=True).clamp(min=1e-9)
        return kept_w_TK * rescale, kept_TK

    def _chosen_open(self, chosen_TK: Tensor) -> Tensor | None:
        """bool (T, K): choices that are open; None where no closed expert can be chosen.

        A closed one counts as one beyond capacity does: it has no weight, the rest of the token's choices share it, and
        it is no load. A softmax over available experts never chooses a closed one. A router that chooses within groups
        of experts may, and overrides this.
        """
        return None

    def _kept(self, chosen_TK: Tensor, context: RoutingContext) -> Tensor | None:
        """Which choices are within capacity; None where nothing limits them."""
        factor = self.steering.config.capacity_factor
        if factor is None or not self.training:
            return None
        # ceil(factor K T / N), T the tokens of the forward: how many halt is not known before they do.
        tokens = torch.as_tensor(context.num_tokens, dtype=torch.float64, device=chosen_TK.device)
        capacity = torch.ceil(factor * self.top_k * tokens / self.num_experts)
        counted_T = context.counted_T
        if counted_T is None:
            counted_T = torch.ones(len(chosen_TK), dtype=torch.bool, device=chosen_TK.device)
        return within_capacity(chosen_TK, self.num_experts, capacity, counted_T, context.row_length)

    def _record_call(
        self,
        context: RoutingContext,
        h_TD: Tensor,
        z_TN: Tensor,
        p_TN: Tensor,
        chosen_TK: Tensor,
        without_goals_TK: Tensor | None,
        w_TK: Tensor,
        kept_TK: Tensor | None,
    ) -> None:
        """Put into the context what is to be observed when the forward is over."""
        call = self.layer, self.slot
        if call in context.depths:
            return  # recomputed
        depth = context.depths[call] = sum(layer == self.layer for layer, _ in context.depths)
        steering, with_gradient = self.steering, torch.is_grad_enabled()
        used_TM = used_experts(chosen_TK, self.num_experts, kept_TK, context.counted_T)
        # A copy: where no row is cut short the sample is a view, which would keep all inputs.
        h_SD = sampled(h_TD, context.row_length).contiguous() if steering.coherent and with_gradient else None
        context.calls.append(
            RoutedCall(
                layer=self.layer,
                depth=depth,
                carries_gradient=with_gradient,
                logits=z_TN,
                probabilities=p_TN,
                chosen=chosen_TK,
                weights=w_TK.detach(),
                used=used_TM,
                input_sums=used_TM.T @ h_TD.float(),
                sampled_inputs=h_SD,
                inputs=h_TD if steering.measuring and with_gradient else None,
                counted=context.counted_T,
                chosen_without_goals=without_goals_TK,
                kept_without_goals=None if without_goals_TK is None else self._kept(without_goals_TK, context),
            )
        )
        if not with_gradient:
            idle = [one for one in context.calls if not one.carries_gradient]
            if len(idle) >= MAX_PENDING_CALLS:
                context.calls[:] = [one for one in context.calls if one.carries_gradient]
                steering.record(context, idle)
        if w_TK.requires_grad:
            self._watch_gradient(p_TN.detach(), chosen_TK, w_TK, context.counted_T)

    def _watch_gradient(self, p_TN: Tensor, chosen_TK: Tensor, w_TK: Tensor, counted_T: Tensor | None) -> None:
        statistics, layer = self.steering.statistics, self.layer
        single = self.normalise and self.top_k == 1
        weight_TK = p_TN.gather(-1, chosen_TK) if single else w_TK.detach()

        def record(grad_TK: Tensor) -> None:  # the gradient of the language model's loss alone
            counted_TK = grad_TK if counted_T is None else grad_TK * counted_T.unsqueeze(-1)
            scale_TK = torch.ones_like(weight_TK) if single else weight_TK
            statistics.pulls.append((layer, counted_TK, weight_TK, scale_TK, chosen_TK))

        w_TK.register_hook(record)
