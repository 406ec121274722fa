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

    def __init__(self, num_layers: int, num_experts: int, hidden_size: int, depths: int = 1) -> None:
        super().__init__()
        n, d = num_experts, hidden_size
        self.shapes = {
            "depth_assignments": (depths, n),
            "coactivation_and_inputs": (n, n + d),
            "probability": (n,),
            "weight": (n,),
            "input_sum": (d,),
            "scalars": (5,),
            "gradient": (n,),
            "absolute_gradient": (n,),
        }
        self.sizes = [torch.Size(shape).numel() for shape in self.shapes.values()]
        self.gradient_start = sum(self.sizes[:-2])
        self.depth_start = depths * n
        self.num_experts, self.hidden_size = num_experts, hidden_size
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
        # Short rows make some of torch's reductions slow: the forms below are several times faster than std and xlogy.
        used_TN = torch.zeros_like(p_TN).scatter_(1, chosen_TK, _ones(w_TK) if kept_TK is None else kept_TK.float())
        weight_TN = torch.zeros_like(p_TN).scatter_(1, chosen_TK, w_TK.float())
        entropy_T = -(p_TN * p_TN.clamp(min=1e-30).log()).sum(dim=-1)
        std_T = (z_TN - z_TN.mean(dim=-1, keepdim=True)).square().mean(dim=-1).sqrt()
        h_TD = h_TD.float()
        if counted_T is not None:
            mask_T1 = counted_T.float().unsqueeze(-1)
            used_TN, weight_TN, p_TN, h_TD = (x * mask_T1 for x in (used_TN, weight_TN, p_TN, h_TD))
            entropy_T, std_T = entropy_T * counted_T, std_T * counted_T
        tokens = h_TD.new_tensor(len(h_TD)) if counted_T is None else counted_T.sum().float()
        coactivation = used_TN.T @ used_TN
        assignments = coactivation.diagonal()
        parts = [
            torch.cat([coactivation, used_TN.T @ h_TD], dim=-1).reshape(-1),
            p_TN.sum(dim=0),
            weight_TN.sum(dim=0),
            h_TD.sum(dim=0),
            torch.stack(
                [
                    tokens,
                    chosen_TK.shape[1] * tokens - assignments.sum(),
                    torch.zeros_like(tokens) if flips is None else flips.float(),
                    entropy_T.sum(),
                    std_T.sum(),
                ]
            ),
        ]
        self.sums[layer, self.depth_start : self.gradient_start] += torch.cat(parts)
        self.sums[layer, depth * self.num_experts : (depth + 1) * self.num_experts] += assignments
        return assignments

    @torch.no_grad()
    def record_gradient(self, layer: int, grad_z_TK: Tensor, chosen_TK: Tensor, counted_T: Tensor | None) -> None:
        """Add dL/dz of the chosen experts, shape (T, K)."""
        grad_z_TK = grad_z_TK.float() if counted_T is None else grad_z_TK.float() * counted_T.unsqueeze(-1)
        index = chosen_TK.reshape(-1)
        start, n = self.gradient_start, self.num_experts
        self.sums[layer, start : start + n].index_add_(0, index, grad_z_TK.reshape(-1))
        self.sums[layer, start + n :].index_add_(0, index, grad_z_TK.abs().reshape(-1))

    def window(self) -> RoutingWindow:
        """The sums so far, copied, split by name."""
        parts = self.sums.clone().split(self.sizes, dim=-1)
        named = {
            name: part.unflatten(-1, shape) for (name, shape), part in zip(self.shapes.items(), parts, strict=True)
        }
        n = self.num_experts
        both = named.pop("coactivation_and_inputs")
        tokens, dropped, flips, entropy, logit_std = named.pop("scalars").unbind(dim=-1)
        coactivation, inputs = both[..., :n], both[..., n:]
        return RoutingWindow(
            assignments=coactivation.diagonal(dim1=-2, dim2=-1),
            coactivation=coactivation,
            inputs=inputs,
            tokens=tokens,
            dropped=dropped,
            flips=flips,
            entropy=entropy,
            logit_std=logit_std,
            **named,
        )


def _of_largest(entropy: Tensor, num_experts: int) -> Tensor:
    """Entropy as a share of log N, its largest value; one expert is always balanced."""
    return entropy / math.log(num_experts) if num_experts > 1 else torch.ones_like(entropy)


def _ones(like: Tensor) -> Tensor:
    return torch.ones_like(like, dtype=torch.float32)
