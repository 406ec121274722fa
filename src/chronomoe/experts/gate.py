"""The domain gate: is an attached expert open at this token? Evidence is gathered along the sequence.

    x_t = c + sum over layers of <v_l, h_(l,t)>    evidence of one token
    s_t = leak s_(t-1) + x_t,  n_t = leak n_(t-1) + 1
    open where  s_t / sqrt(n_t + 4) + prior > threshold

h_l is the input of the experts in layer l of the frozen trunk. Tokens of one text are anything but independent, so a
sum of their evidence is compared with its own growth: the square root makes the threshold right at every position. v
and c are those for which that running value is best as log-odds, in nats, of the text being the domain's: logistic
regression on the sums themselves, which recalls far more than summing the best evidence of single tokens. A goal is
the prior of those odds: text of the domain is to be expected, and evidence to the contrary still shuts the gate. Only
the past counts, so causality holds; padding counts for nothing.

Shape suffixes: B batch, S sequence, D hidden size, K layers it reads, N texts.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from chronomoe.routing.state import Fp32Module

_PRIOR_TOKENS = 4.0
"""Added to the count of tokens, so that the first few do not open a gate by chance."""
_WEIGHT_DECAY = 1e-4
_STRIDE = 8
"""One position in so many is fitted: neighbours say nearly the same."""
_MAX_ITERATIONS = 100


class DomainGate(Fp32Module):
    """Evidence on the inputs of the experts in the MoE ``layers``; buffers are fp32 and never trained.

    It decides at the last of them, so networks in earlier layers add nothing.
    """

    direction: Tensor
    offset: Tensor
    leak: Tensor
    threshold: Tensor
    prior: Tensor

    def __init__(self, hidden_size: int, layers: Sequence[int] = (0,)) -> None:
        super().__init__()
        self.layers = tuple(layers)
        self.register_buffer("direction", torch.zeros(len(self.layers), hidden_size, dtype=torch.float32))
        for name, value in (("offset", 0.0), ("leak", 0.99), ("threshold", torch.inf)):
            self.register_buffer(name, torch.tensor(value, dtype=torch.float32))
        # Which goals are on is run-time state: no file of an expert says it.
        self.register_buffer("prior", torch.zeros((), dtype=torch.float32), persistent=False)

    def layer_evidence(self, layer: int, h_BSD: Tensor) -> Tensor:
        """What one layer adds to the evidence, (B, S)."""
        return h_BSD.float() @ self.direction[self.layers.index(layer)]

    def evidence(self, h: dict[int, Tensor]) -> Tensor:
        """x_t in nats, (B, S), from the inputs (B, S, D) of each layer it reads."""
        return self.combine({layer: self.layer_evidence(layer, h[layer]) for layer in self.layers})

    def combine(self, by_layer: dict[int, Tensor]) -> Tensor:
        """x_t in nats, (B, S), from the :meth:`layer_evidence` of all layers, in any order."""
        return self.offset + torch.stack([by_layer[layer] for layer in self.layers]).sum(dim=0)

    def log_odds(
        self, x_BS: Tensor, counted_BS: Tensor | None = None, state_B2: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Normalised running log-odds (B, S), prior included, and the state (B, 2) after the last token.

        ``state_B2`` is what an earlier call left: s and n, without the prior.
        """
        counted_BS = torch.ones_like(x_BS) if counted_BS is None else counted_BS.to(x_BS.dtype)
        weight_BSS, age_BS = self._memory(counted_BS)
        s_BS = (weight_BSS @ x_BS.unsqueeze(2)).squeeze(2)
        n_BS = weight_BSS.sum(dim=2)
        if state_B2 is not None:
            kept_BS = self.leak**age_BS
            s_BS, n_BS = s_BS + kept_BS * state_B2[:, :1], n_BS + kept_BS * state_B2[:, 1:]
        return s_BS / (n_BS + _PRIOR_TOKENS).sqrt() + self.prior, torch.stack([s_BS[:, -1], n_BS[:, -1]], dim=1)

    def _memory(self, counted_BS: Tensor) -> tuple[Tensor, Tensor]:
        """How much of each token i is left at t, leak^(t - i) for i <= t, and how many were counted until t."""
        steps = torch.arange(counted_BS.shape[1], device=counted_BS.device)
        age_BS = counted_BS.cumsum(dim=1)  # a padded token neither adds nor ages
        gap_BSS = (age_BS.unsqueeze(2) - age_BS.unsqueeze(1)).clamp(min=0)
        return self.leak**gap_BSS * (steps.unsqueeze(1) >= steps) * counted_BS.unsqueeze(1), age_BS

    @torch.no_grad()
    def samples(self, h: dict[int, Tensor], count: int, generator: torch.Generator) -> Tensor:
        """What is added up at ``count`` tokens of the windows ``h``, (n, S, D) for each layer: fp32 (count, K D + 1).

        Their product with ``direction`` and ``offset`` are the log-odds there; see chronomoe.experts.record.
        """
        h_NSC = torch.cat([h[layer].float() for layer in self.layers], dim=-1)
        windows = torch.arange(count) * len(h_NSC) // count
        positions = torch.randint(h_NSC.shape[1], (count,), generator=generator)
        memory_SS = self._memory(torch.ones_like(h_NSC[:1, :, 0]))[0][0]
        chosen = memory_SS[positions.to(memory_SS.device)]
        growth_M1 = (chosen.sum(dim=1, keepdim=True) + _PRIOR_TOKENS).sqrt()
        sums_MC = torch.stack([weights @ h_NSC[window] for weights, window in zip(chosen, windows, strict=True)])
        return torch.cat([sums_MC, chosen.sum(dim=1, keepdim=True)], dim=1) / growth_M1

    @torch.no_grad()
    def odds_of(self, samples_MC: Tensor) -> Tensor:
        """Log-odds (M,) at :meth:`samples`, without the prior."""
        return samples_MC.to(self.direction) @ torch.cat([self.direction.flatten(), self.offset.view(1)])

    @torch.no_grad()
    def fit(self, domain: dict[int, Tensor], others: Sequence[dict[int, Tensor]]) -> None:
        """Find v and c by windows of the domain and of each other domain, (n, S, D) for each layer.

        The domain weighs as much as all others together, which weigh alike. Every eighth position counts.
        """
        texts = [torch.cat([text[layer].float() for layer in self.layers], dim=-1) for text in (domain, *others)]
        mean_C = torch.stack([text.mean(dim=(0, 1)) for text in texts]).mean(dim=0)
        memory_SS = self._memory(torch.ones_like(texts[0][:1, :, 0]))[0][0, _STRIDE // 2 :: _STRIDE]
        growth_S1 = (memory_SS.sum(dim=1, keepdim=True) + _PRIOR_TOKENS).sqrt()
        sums = [
            ((memory_SS @ F.pad(text - mean_C, (0, 1), value=1.0)) / growth_S1).flatten(0, 1) for text in texts
        ]  # the last column is that of c
        x_NC = torch.cat(sums)
        scale_C = x_NC.square().mean(dim=0).sqrt() + 1e-6  # around 0, not the mean: one column may be constant
        x_NC /= scale_C
        label_N, weight_N = (
            torch.cat([torch.full_like(rows[:, 0], value) for rows, value in zip(sums, values, strict=True)])
            for values in (
                [1.0] + [0.0] * len(others),
                [1 / len(sums[0])] + [1 / len(rows) / len(others) for rows in sums[1:]],
            )
        )
        w_C = torch.zeros_like(scale_C, requires_grad=True)
        optimizer = torch.optim.LBFGS([w_C], max_iter=_MAX_ITERATIONS, line_search_fn="strong_wolfe")

        @torch.enable_grad()
        def loss() -> Tensor:
            optimizer.zero_grad()
            missed = F.binary_cross_entropy_with_logits(x_NC @ w_C, label_N, weight_N, reduction="sum")
            total = missed + _WEIGHT_DECAY * w_C.square().sum()
            total.backward()
            return total

        optimizer.step(loss)
        v_C, c = (w_C / scale_C).split([len(w_C) - 1, 1])
        self.direction.copy_(v_C.view_as(self.direction))
        self.offset.copy_(c.squeeze() - v_C @ mean_C)


def false_alarm_threshold(log_odds: list[Tensor], false_alarm: float) -> float:
    """The threshold that at most a share ``false_alarm`` of the tokens of each domain exceeds."""
    return max(_upper_quantile(values.flatten(), false_alarm) for values in log_odds)


def _upper_quantile(values: Tensor, share: float) -> float:
    # Exact, and of any number of tokens; torch's quantile stops at 16 million.
    ordered = values.sort(descending=True).values
    return float(ordered[min(len(ordered) - 1, int(share * len(ordered)))])
