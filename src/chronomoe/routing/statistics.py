"""What the routers observe in one window (one optimizer step), accumulated on the device.

Everything lives in one (layers, width) tensor of sums, so that making it global is one all-reduce. Padding never
enters; evaluation never writes; a recomputed forward (activation checkpointing) is not counted again.

Shape suffixes: L MoE layers, C calls of routers in one forward, T tokens, N experts, K chosen experts, D hidden size.
"""

import math
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor, distributed, nn

from chronomoe.routing.context import SAMPLED, RoutedCall, stacked, used_experts


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
    """(L,) assignments that fields or noise changed, estimated from a sample of the tokens."""
    entropy: Tensor
    """(L,) sum over tokens of the entropy of softmax(z), nats."""
    logit_std: Tensor
    """(L,) sum over tokens of the standard deviation of z over experts."""
    available: Tensor
    """(L, N) bool: experts that could be chosen. Balance is over these: one that is masked lacks no load."""

    @property
    def _open(self) -> Tensor:
        """(L,) how many experts could be chosen."""
        return self.available.sum(dim=-1)

    @property
    def load(self) -> Tensor:
        """(L, N) share of the assignments; rows sum to 1 (0 for an empty window)."""
        return self.assignments / self.assignments.sum(dim=-1, keepdim=True).clamp(min=1)

    @property
    def load_without_goals(self) -> Tensor:
        """(L, N) the share there would be if no goal biased the choice: what balancing is to act on."""
        without_goals = self.assignments - self.goal_shift
        return without_goals / without_goals.sum(dim=-1, keepdim=True).clamp(min=1)

    @property
    def depth_load(self) -> Tensor:
        """(L, depths, N) share of the assignments at each depth; 0 where nothing was routed."""
        return self.depth_assignments / self.depth_assignments.sum(dim=-1, keepdim=True).clamp(min=1)

    @property
    def max_violation(self) -> Tensor:
        """(L,) MaxVio = max_k N f_k - 1 (Wang et al. 2024) of the N available experts: 0 when balanced."""
        return (self.load.amax(dim=-1) * self._open - 1).clamp(min=0)

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
        """(L,) entropy of the load over the log of the available experts: 1 when balanced."""
        entropy = -(self.load * self.load.clamp(min=1e-12).log()).sum(dim=-1)
        return torch.where(self._open > 1, entropy / self._open.clamp(min=2).log(), 1.0)

    @property
    def router_entropy(self) -> Tensor:
        """(L,) mean entropy of softmax(z) over log N: 1 for a router that knows nothing."""
        return _of_largest(self.entropy / self.tokens.clamp(min=1), self.load.shape[-1])

    @property
    def dead_experts(self) -> Tensor:
        """(L,) available experts with less than a hundredth of the mean load."""
        return ((self.load * self._open.unsqueeze(-1) < 0.01) & self.available).sum(dim=-1)

    @property
    def dropped_fraction(self) -> Tensor:
        """(L,) share of assignments dropped by the capacity limit."""
        wanted = self.assignments.sum(dim=-1) + self.dropped
        return self.dropped / wanted.clamp(min=1)

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
        self.inputs_start = self.sizes[0]
        self.gradient_start = sum(self.sizes[:-3])
        self.num_experts, self.top_k = n, top_k
        self.pulls: list[tuple[int, Tensor, Tensor, Tensor, Tensor]] = []
        """Of each router whose backward has run: layer, dL/dw, w, scale of the gradient, chosen experts, (T, K)."""
        self.num_layers = num_layers
        self.make_empty()

    def make_empty(self, device: torch.device | str | None = None) -> None:
        """Give it new sums on ``device``, all zero."""
        self.pulls.clear()
        sums = torch.zeros(self.num_layers, sum(self.sizes), dtype=torch.float32, device=device)
        self.register_buffer("sums", sums, persistent=False)

    @torch.no_grad()
    def record(
        self,
        calls: list[RoutedCall],
        z_CTN: Tensor,
        p_CTN: Tensor,
        counted_CT: Tensor | None = None,
        *,
        flipping: bool = False,
    ) -> Tensor:
        """Add the calls of one forward; returns their assignments (C, N), less what goals moved.

        ``z_CTN`` and ``p_CTN`` are their logits and probabilities, ``counted_CT`` says which tokens are not padding.
        ``flipping``: fields or noise may have changed choices.
        """
        self._record_gradients()  # of the forward before: no more than one waits
        n = self.num_experts
        w_CTK = torch.stack([call.weights for call in calls]).float()
        chosen_CTK = torch.stack([call.chosen for call in calls])
        used_CTM = torch.stack([call.used for call in calls])
        flips_C = _flips(p_CTN, chosen_CTK, counted_CT) if flipping else p_CTN.new_zeros(len(calls))
        # torch's reductions over short rows are slow; a product with ones is the same sum in a fraction of the time.
        ones_N1 = z_CTN.new_ones(n, 1)
        spread_CT = ((z_CTN - z_CTN.mean(dim=-1, keepdim=True)).square() @ ones_N1).squeeze(-1).sqrt()
        if counted_CT is not None:
            p_CTN, w_CTK = (x * counted_CT.unsqueeze(-1) for x in (p_CTN, w_CTK))
            spread_CT = spread_CT * counted_CT
        pairs_CMM = used_CTM.mT @ used_CTM
        assigned_CN = pairs_CMM[:, n, :n]
        without_goals_CN, without_goals_CTK = assigned_CN, stacked([call.chosen_without_goals for call in calls])
        if without_goals_CTK is not None:
            kept_CTK = stacked([call.kept_without_goals for call in calls])
            without_goals_CN = used_experts(without_goals_CTK, n, kept_CTK, counted_CT).sum(dim=1)[:, :n]
        sums_CW = torch.cat(
            [
                torch.stack([call.input_sums for call in calls]).flatten(1),
                pairs_CMM.flatten(1),
                p_CTN.sum(dim=1),
                torch.zeros_like(p_CTN).scatter_(-1, chosen_CTK, w_CTK).sum(dim=1),
                torch.stack(
                    [
                        flips_C,
                        -(p_CTN * p_CTN.clamp(min=1e-30).log()).sum(dim=(1, 2)),
                        spread_CT.sum(dim=-1) / math.sqrt(n),
                    ],
                    dim=-1,
                ),
                torch.zeros(len(calls), 2 * n, device=p_CTN.device),  # gradients come later
                assigned_CN - without_goals_CN,
            ],
            dim=-1,
        )
        layers_C = torch.tensor([call.layer for call in calls], device=p_CTN.device)
        depths_C = torch.tensor([call.depth for call in calls], device=p_CTN.device)
        self.sums[:, self.inputs_start :].index_add_(0, layers_C, sums_CW)
        by_depth_LRN = self.sums[:, : self.inputs_start].unflatten(-1, (-1, n))
        by_depth_LRN.index_put_((layers_C, depths_C), assigned_CN, accumulate=True)
        return without_goals_CN

    @torch.no_grad()
    def _record_gradients(self) -> None:
        """Add dL/dz of the chosen experts: dL/dz_k = w_k (dL/dw_k - sum_j w_j dL/dw_j)."""
        if not self.pulls:
            return
        pulls, self.pulls = self.pulls, []
        n, slots = self.num_experts, [layer * self.num_experts + chosen_TK for layer, *_, chosen_TK in pulls]
        grad_PK, weight_PK, scale_PK = (torch.cat(parts).float() for parts in list(zip(*pulls, strict=True))[1:4])
        grad_z_PK = scale_PK * (grad_PK - (grad_PK * weight_PK).sum(dim=-1, keepdim=True))
        slot_S = torch.cat(slots).flatten()
        for start, value_PK in (
            (self.gradient_start, grad_z_PK),
            (self.gradient_start + n, grad_z_PK.abs()),
        ):
            sums = value_PK.new_zeros(len(self.sums) * n).index_add_(0, slot_S, value_PK.flatten())
            self.sums[:, start : start + n] += sums.view(-1, n)

    def gather(self, group: distributed.ProcessGroup | None = None) -> None:
        """Sum over the ranks of ``group`` (all by default), which must be those that hold different tokens."""
        self._record_gradients()
        if distributed.is_available() and distributed.is_initialized():
            distributed.all_reduce(self.sums, group=group)

    def start_over(self) -> None:
        """Forget everything."""
        self.pulls.clear()
        self.sums.zero_()

    def window(self, available: Tensor | None = None) -> RoutingWindow:
        """The sums so far, copied, split by name; of ``available`` experts (L, N), all if none are given."""
        self._record_gradients()
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
            available=torch.ones_like(assignments, dtype=torch.bool) if available is None else available.clone(),
            **named,
        )


def _flips(p_CTN: Tensor, chosen_CTK: Tensor, counted_CT: Tensor | None) -> Tensor:
    """About how many choices the fields changed, (C,), estimated from a sample of the tokens.

    A choice is changed if its own probability is not among the K largest.
    """
    tokens, top_k = p_CTN.shape[1], chosen_CTK.shape[-1]
    p_CSN, chosen_CSK = p_CTN[:, ::SAMPLED], chosen_CTK[:, ::SAMPLED]
    changed_CSK = p_CSN.gather(-1, chosen_CSK) < p_CSN.topk(top_k, dim=-1).values[..., -1:]
    if counted_CT is not None:
        changed_CSK &= counted_CT[:, ::SAMPLED].unsqueeze(-1)
    return changed_CSK.sum(dim=(1, 2)) * (tokens / p_CSN.shape[1])


def _of_largest(entropy: Tensor, num_experts: int) -> Tensor:
    """Entropy as a share of log N, its largest value; one expert is always balanced."""
    return entropy / math.log(num_experts) if num_experts > 1 else torch.ones_like(entropy)
