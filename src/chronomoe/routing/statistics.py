"""What the routers observe in one window (one optimizer step), accumulated on the device.

Everything lives in one (layers, width) tensor of sums, so that making it global is one all-reduce. Padding never
enters; evaluation never writes; a recomputed forward (activation checkpointing) is not counted again.

Shape suffixes: L MoE layers, T tokens, N experts, K chosen experts, D hidden size.
"""

import math
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class RoutingWindow:
    """Sums over one window, per MoE layer (fp32). Shares, means and entropies are properties."""

    assignments: Tensor
    """(L, N) how often each expert was used."""
    depth_assignments: Tensor
    """(L, depths, N) the same by which of the layer's calls in a forward it was; recurrent models have several."""
    probability: Tensor
    """(L, N) sum of softmax(z)."""
    weight: Tensor
    """(L, N) sum of combine weights received."""
    gradient: Tensor
    """(L, N) sum over the tokens sent to an expert of dL/dz: negative where more routing to it would lower the loss."""
    absolute_gradient: Tensor
    """(L, N) sum of |dL/dz| over the same tokens, the scale of ``gradient``."""
    goal_shift: Tensor
    """(L, N) assignments that goals brought to an expert, less those they took from it."""
    coactivation: Tensor
    """(L, N, N) how often two experts served the same token; the diagonal is ``assignments``."""
    inputs: Tensor
    """(L, N, D) sum of the inputs each expert received."""
    input_sum: Tensor
    """(L, D) sum of all inputs."""
    tokens: Tensor
    """(L,) tokens routed."""
    dropped: Tensor
    """(L,) assignments dropped for want of capacity."""
    flips: Tensor
    """(L,) assignments that fields or noise changed, estimated from a part of the tokens."""
    entropy: Tensor
    """(L,) sum over tokens of the entropy of softmax(z), nats."""
    logit_std: Tensor
    """(L,) sum over tokens of the standard deviation of z over experts."""

    @property
    def load(self) -> Tensor:
        """(L, N) share of the assignments; rows sum to 1 (0 for an empty window)."""
        return self.assignments / self.assignments.sum(dim=-1, keepdim=True).clamp(min=1)

    @property
    def load_without_goals(self) -> Tensor:
        """(L, N) the share there would be if no goal biased the choice: what balancing is to act on."""
        unasked = self.assignments - self.goal_shift
        return unasked / unasked.sum(dim=-1, keepdim=True).clamp(min=1)

    @property
    def depth_load(self) -> Tensor:
        """(L, depths, N) share of the assignments at each depth; 0 where nothing was routed."""
        return self.depth_assignments / self.depth_assignments.sum(dim=-1, keepdim=True).clamp(min=1)

    @property
    def max_violation(self) -> Tensor:
        """(L,) MaxVio = max_k N f_k - 1 (Wang et al. 2024): 0 when balanced."""
        return (self.load.amax(dim=-1) * self.load.shape[-1] - 1).clamp(min=0)

    @property
    def max_violation_floor(self) -> Tensor:
        """(L,) MaxVio of perfect balance over that many independent tokens; text is correlated, its floor is higher.

        E_N sqrt((N - K) / (T K)) with the expected largest of N standard normals in Blom's approximation.
        """
        n, total = self.load.shape[-1], (self.assignments.sum(dim=-1) + self.dropped).clamp(min=1)
        top_k = total / self.tokens.clamp(min=1)
        largest = NormalDist().inv_cdf((n - 0.375) / (n + 0.25))
        return largest * ((n - top_k).clamp(min=0) / total).sqrt()

    @property
    def flipped_fraction(self) -> Tensor:
        """(L,) share of assignments that fields or noise changed."""
        return self.flips / (self.assignments.sum(dim=-1) + self.dropped).clamp(min=1)

    @property
    def load_entropy(self) -> Tensor:
        """(L,) entropy of the load over log N: 1 when balanced."""
        share = self.load
        return _of_largest(-(share * share.clamp(min=1e-12).log()).sum(dim=-1), share.shape[-1])

    @property
    def router_entropy(self) -> Tensor:
        """(L,) mean entropy of softmax(z) over log N: 1 for a router that knows nothing."""
        return _of_largest(self.entropy / self.tokens.clamp(min=1), self.load.shape[-1])

    @property
    def dead_experts(self) -> Tensor:
        """(L,) experts with less than a hundredth of the mean load."""
        return (self.load * self.load.shape[-1] < 0.01).sum(dim=-1)

    @property
    def dropped_fraction(self) -> Tensor:
        """(L,) share of assignments dropped by the capacity limit."""
        asked = self.assignments.sum(dim=-1) + self.dropped
        return self.dropped / asked.clamp(min=1)

    @property
    def balance(self) -> Tensor:
        """(L,) N sum_k f_k P_k of this window: 1.0 when balanced."""
        mean_probability = self.probability / self.tokens.clamp(min=1).unsqueeze(-1)
        return self.load.shape[-1] * (self.load * mean_probability).sum(dim=-1)

    @property
    def centred_direction(self) -> Tensor:
        """(L, N, D) mean input of each expert less the mean of all inputs; 0 for an unused expert."""
        count = self.assignments.unsqueeze(-1)
        mean_all = (self.input_sum / self.tokens.clamp(min=1).unsqueeze(-1)).unsqueeze(1)
        return torch.where(count > 0, self.inputs / count.clamp(min=1) - mean_all, 0.0)

    def summary(self) -> dict[str, float]:
        """Scalars over all layers for a log: the worst ``max_violation``, the sum of ``dead_experts``, means else."""
        return {
            "max_violation": self.max_violation.max().item(),
            "max_violation_floor": self.max_violation_floor.max().item(),
            "load_entropy": self.load_entropy.mean().item(),
            "router_entropy": self.router_entropy.mean().item(),
            "dead_experts": int(self.dead_experts.sum()),
            "dropped_fraction": self.dropped_fraction.mean().item(),
            "flips": self.flipped_fraction.mean().item(),
        }


class RoutingStatistics(nn.Module):
    """The accumulator behind :class:`RoutingWindow`: one buffer ``sums`` of shape (L, width), fp32, not saved."""

    sums: Tensor

    def __init__(self, num_layers: int, num_experts: int, hidden_size: int, top_k: int, depths: int = 1) -> None:
        super().__init__()
        n, d = num_experts, hidden_size
        self.shapes = {
            "depth_assignments": (depths, n),
            "used_with_input": (n + 1, d),
            "used_with_used": (n + 1, n + 1),
            "probability": (n,),
            "weight": (n,),
            "scalars": (3,),
            "gradient": (n,),
            "absolute_gradient": (n,),
            "goal_shift": (n,),
        }
        self.sizes = [torch.Size(shape).numel() for shape in self.shapes.values()]
        self.inputs_start, self.pairs_start = self.sizes[0], sum(self.sizes[:2])
        self.gradient_start = sum(self.sizes[:-3])
        self.num_experts, self.top_k = n, top_k
        self.register_buffer("sums", torch.zeros(num_layers, sum(self.sizes), dtype=torch.float32), persistent=False)

    @torch.no_grad()
    def record(
        self,
        layer: int,
        h_TD: Tensor,
        z_TN: Tensor,
        p_TN: Tensor,
        chosen_TK: Tensor,
        w_TK: Tensor,
        kept_TK: Tensor | None,
        counted_T: Tensor | None,
        flips: Tensor | None = None,
        depth: int = 0,
    ) -> Tensor:
        """Add one call of a layer, its ``depth``-th in this forward; returns its assignments (N,).

        ``kept_TK`` marks assignments within capacity, ``counted_T`` tokens that are not padding, ``flips`` is a count.
        """
        n, row_W = self.num_experts, self.sums[layer]
        # A last column of ones beside the experts': one product then gives sums over tokens as well as over pairs.
        used_TM = torch.ones(len(p_TN), n + 1, device=p_TN.device)
        used_TM[:, :n] = 0
        used_TM.scatter_(
            1, chosen_TK, torch.ones_like(w_TK, dtype=torch.float32) if kept_TK is None else kept_TK.float()
        )
        # Short rows make torch's reductions over them slow (std, xlogy): these forms cost a fraction.
        spread_T = torch.linalg.vector_norm(z_TN - z_TN.mean(dim=-1, keepdim=True), dim=-1)
        w_TK = w_TK.float()
        if counted_T is not None:
            used_TM, p_TN, w_TK = (x * counted_T.unsqueeze(-1) for x in (used_TM, p_TN, w_TK))
            spread_T = spread_T * counted_T
        pairs_MM = used_TM.T @ used_TM
        assignments = pairs_MM[n, :n]
        row_W[self.inputs_start : self.pairs_start].view(n + 1, -1).addmm_(used_TM.T, h_TD.float())
        row_W[self.pairs_start : self.gradient_start] += torch.cat(
            [
                pairs_MM.flatten(),
                p_TN.sum(dim=0),
                p_TN.new_zeros(n).index_add_(0, chosen_TK.flatten(), w_TK.flatten()),
                torch.stack(
                    [
                        torch.zeros_like(spread_T[0]) if flips is None else flips,
                        -torch.dot(p_TN.flatten(), p_TN.clamp(min=1e-30).log().flatten()),
                        spread_T.sum() / math.sqrt(n),
                    ]
                ),
            ]
        )
        row_W[depth * n : (depth + 1) * n] += assignments
        return assignments

    @torch.no_grad()
    def record_gradient(self, layer: int, grad_z_TK: Tensor, chosen_TK: Tensor, counted_T: Tensor | None) -> None:
        """Add dL/dz of the chosen experts, shape (T, K)."""
        grad_z_TK = grad_z_TK.float() if counted_T is None else grad_z_TK.float() * counted_T.unsqueeze(-1)
        index = chosen_TK.reshape(-1)
        start, n = self.gradient_start, self.num_experts
        self.sums[layer, start : start + n].index_add_(0, index, grad_z_TK.reshape(-1))
        self.sums[layer, start + n : start + 2 * n].index_add_(0, index, grad_z_TK.abs().reshape(-1))

    @torch.no_grad()
    def record_goals(
        self, layer: int, assigned_N: Tensor, unasked_TK: Tensor, kept_TK: Tensor | None, counted_T: Tensor | None
    ) -> Tensor:
        """Add what goals moved: assignments less those there would be without goals, which are returned (N,)."""
        one_TK = torch.ones_like(unasked_TK, dtype=torch.float32) if kept_TK is None else kept_TK.float()
        one_TK = one_TK if counted_T is None else one_TK * counted_T.unsqueeze(-1)
        unasked_N = self.sums.new_zeros(self.num_experts).index_add_(0, unasked_TK.flatten(), one_TK.flatten())
        self.sums[layer, -self.num_experts :] += assigned_N - unasked_N
        return unasked_N

    def window(self) -> RoutingWindow:
        """The sums so far, copied, split by name."""
        parts = self.sums.clone().split(self.sizes, dim=-1)
        named = {
            name: part.unflatten(-1, shape) for (name, shape), part in zip(self.shapes.items(), parts, strict=True)
        }
        n = self.num_experts
        pairs, inputs = named.pop("used_with_used"), named.pop("used_with_input")
        flips, entropy, logit_std = named.pop("scalars").unbind(dim=-1)
        assignments, tokens = pairs[:, n, :n], pairs[:, n, n]
        return RoutingWindow(
            assignments=assignments,
            coactivation=pairs[:, :n, :n],
            inputs=inputs[:, :n],
            input_sum=inputs[:, n],
            tokens=tokens,
            dropped=self.top_k * tokens - assignments.sum(dim=-1),
            flips=flips,
            entropy=entropy,
            logit_std=logit_std,
            **named,
        )


def _of_largest(entropy: Tensor, num_experts: int) -> Tensor:
    """Entropy as a share of log N, its largest value; one expert is always balanced."""
    return entropy / math.log(num_experts) if num_experts > 1 else torch.ones_like(entropy)
