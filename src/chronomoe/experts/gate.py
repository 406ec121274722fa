"""The domain gate: may an attached expert be heard at this token? Evidence is gathered along the sequence.

    x_t = <v, h_t> + c                     evidence of one token, nats: log p(h_t | domain) / p(h_t | the rest)
    s_t = leak s_(t-1) + x_t,  n_t = leak n_(t-1) + 1
    open where  (s_t + prior) / sqrt(n_t + 4) > threshold

h is the input of the experts in one layer of the frozen trunk, v and c are its shrunk linear discriminant. Tokens of
one text are anything but independent, so a sum of their evidence is compared with its own growth: the square root makes
the threshold right at every position. Only the past counts, so causality holds; padding counts for nothing.

Shape suffixes: B batch, S sequence, D hidden size, T tokens.
"""

import torch
from torch import Tensor, nn

_HEAD_START = 4.0
_SHRINKAGE = 0.1


class DomainGate(nn.Module):
    """Evidence on the inputs of the experts in MoE layer ``layer``; buffers are fp32 and never trained."""

    direction: Tensor
    offset: Tensor
    leak: Tensor
    threshold: Tensor
    prior: Tensor

    def __init__(self, hidden_size: int, layer: int = 0) -> None:
        super().__init__()
        self.layer = layer
        self.register_buffer("direction", torch.zeros(hidden_size, dtype=torch.float32))
        for name, value in (("offset", 0.0), ("leak", 0.98), ("threshold", torch.inf), ("prior", 0.0)):
            self.register_buffer(name, torch.tensor(value, dtype=torch.float32))

    def evidence(self, h_BSD: Tensor) -> Tensor:
        """x_t in nats, (B, S)."""
        return h_BSD.float() @ self.direction + self.offset

    def log_odds(
        self, x_BS: Tensor, counted_BS: Tensor | None = None, state_B2: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Normalised running log-odds (B, S), prior included, and the state (B, 2) after the last token.

        ``state_B2`` is what an earlier call left: s and n, which know nothing of the prior.
        """
        counted_BS = torch.ones_like(x_BS) if counted_BS is None else counted_BS.to(x_BS.dtype)
        length = x_BS.shape[1]
        steps = torch.arange(length, device=x_BS.device)
        # leak^(t - i) for i <= t; a padded token neither adds nor ages.
        age_BS = counted_BS.cumsum(dim=1)
        gap_BSS = (age_BS.unsqueeze(2) - age_BS.unsqueeze(1)).clamp(min=0)
        weight_BSS = self.leak**gap_BSS * (steps.unsqueeze(1) >= steps) * counted_BS.unsqueeze(1)
        s_BS = (weight_BSS @ x_BS.unsqueeze(2)).squeeze(2)
        n_BS = weight_BSS.sum(dim=2)
        if state_B2 is not None:
            kept_BS = self.leak**age_BS
            s_BS, n_BS = s_BS + kept_BS * state_B2[:, :1], n_BS + kept_BS * state_B2[:, 1:]
        return (s_BS + self.prior) / (n_BS + _HEAD_START).sqrt(), torch.stack([s_BS[:, -1], n_BS[:, -1]], dim=1)

    @torch.no_grad()
    def fit(self, domain_TD: Tensor, others: list[Tensor]) -> None:
        """Shrunk linear discriminant of hidden states: of the domain (T, D), and of each other domain (T, D), alike."""
        rest = [other.float() for other in others]
        means = [h.mean(dim=0) for h in (domain_TD.float(), *rest)]
        scatters = [torch.cov(h.T, correction=0) for h in (domain_TD.float(), *rest)]
        mean_rest = torch.stack(means[1:]).mean(dim=0)
        # The rest is a mixture: what its domains differ in is spread as well.
        between = torch.stack([torch.outer(m - mean_rest, m - mean_rest) for m in means[1:]]).mean(dim=0)
        scatter = (scatters[0] + torch.stack(scatters[1:]).mean(dim=0) + between) / 2
        size = scatter.diagonal().mean()
        shrunk = (1 - _SHRINKAGE) * scatter + _SHRINKAGE * size * torch.eye(len(scatter), device=scatter.device)
        direction = torch.linalg.solve(shrunk, means[0] - mean_rest)
        self.direction.copy_(direction)
        self.offset.copy_(-(means[0] + mean_rest) @ direction / 2)


def false_alarm_threshold(log_odds: list[Tensor], false_alarm: float) -> float:
    """The threshold that at most a share ``false_alarm`` of the tokens of each domain exceeds."""
    return max(_upper_quantile(values.flatten(), false_alarm) for values in log_odds)


def _upper_quantile(values: Tensor, share: float) -> float:
    # Exact, and of any number of tokens; torch's quantile stops at 16 million.
    ordered = values.sort(descending=True).values
    return float(ordered[min(len(ordered) - 1, int(share * len(ordered)))])
