"""When a token may stop: the halting head's target, and the loss over all segments.

After segment m the next-token loss of a token is CE_m. The head's logit q_m, read from the state after segment m, is
trained on whether the next segment is worth its cost,

    target_m = sigmoid(halt_gain - (CE_m - CE_{m+1})),   halt where q_m > 0,

so a token halts where the squashed gain of one more segment is expected below that of ``halt_gain`` nats. It is soft
because a single token's gain is mostly noise: for gains below a nat or so it is the mean gain that decides, while rare
large ones count for less than their size. It exists where the token ran segment m+1, hence the exploration: a share of
tokens must run on. The gradient stays in the head: it watches the model and does not bend it.

Shape suffixes: B batch, S sequence, M segments.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


def forced_segments(like_BS: Tensor, max_steps: int, exploration: float) -> Tensor:
    """Segments each token must run at least: for a share of ``exploration`` uniform in 2..max_steps, else 1."""
    forced_BS = torch.rand(like_BS.shape, device=like_BS.device) < exploration
    return torch.where(forced_BS, torch.randint(2, max_steps + 1, like_BS.shape, device=like_BS.device), 1)


@dataclass(frozen=True)
class SegmentLoss:
    """The loss of one forward, per predicted token."""

    ce: Tensor
    """Next-token cross-entropy, mean over each token's segments, then over tokens."""
    bce_halt: Tensor
    """Binary cross-entropy of the halting head."""
    used_segments: Tensor
    """Segments per token."""


def segment_loss(
    ce_MBS: Tensor,
    halt_MBS: Tensor,
    active_MBS: Tensor,
    predicted_BS: Tensor,
    halt_gain: float,
    num_items: Tensor | float | None = None,
) -> SegmentLoss:
    """``ce_MBS`` is 0 where nothing is predicted; ``active_MBS``: the token ran the segment; ``halt_MBS``: logits.

    ``num_items`` is the number of predicted tokens to divide by, when the step is split into several forwards.
    """
    items = predicted_BS.sum().clamp(min=1) if num_items is None else num_items
    ran_MBS = active_MBS & predicted_BS
    used_BS = active_MBS.sum(dim=0)
    ce = ((ce_MBS * ran_MBS).sum(dim=0) / used_BS).sum() / items
    segments = len(ce_MBS)
    bce = ce.new_zeros(())
    if segments > 1:
        with torch.no_grad():
            target_MBS = (halt_gain - (ce_MBS[:-1] - ce_MBS[1:])).sigmoid()
        known_MBS = ran_MBS[1:]
        losses_MBS = F.binary_cross_entropy_with_logits(halt_MBS[:-1], target_MBS, reduction="none")
        bce = (losses_MBS * known_MBS).sum() / (items * (segments - 1))
    return SegmentLoss(ce, bce, (used_BS * predicted_BS).sum() / items)
