"""The judge of health: probes suspects, weighs the evidence, masks harmful experts and lets recovered ones back.

Health is only the trigger. The verdict comes from a probe: the loss with the expert masked, on a few sequences. Masking
takes proof, coming back does not. A merely noisy expert fails no probe and is left alone.

Shape suffixes: L MoE layers, N experts, D hidden size, T tokens.
"""

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, distributed, nn

from chronomoe.control.config import ControlConfig
from chronomoe.control.state import ControlState
from chronomoe.routing.steering import Steering

PROBE_MARGIN = 0.002
"""Loss in nats per token that masking must win at least, and that coming back may cost."""
EVIDENCE_DECAY = 0.92
"""Weight of a probe after one probe interval: half after eight."""
RECOVERY_MARGIN = 0.15
"""Hysteresis above the trigger before the back-off of an expert resets."""
MIN_SEQUENCES, MAX_SEQUENCES = 4, 64
"""Sequences below which there is no verdict, and above which a close call is not pursued."""
MAX_BACKOFF = 4
"""The wait for the next probe grows to 2^this probe intervals, so that an expert that stays bad costs little."""
MASKED_BACKOFF = 2
"""Back-off that a masked expert starts with: without tokens it does not learn, only the others change."""

Expert = tuple[int, int]
"""Layer and number of an expert."""


def suspects(state: ControlState, steering: Steering, config: ControlConfig) -> list[Expert]:
    """Experts to probe now: unhealthy ones, and masked ones that may come back. Empty between two probes."""
    if not (config.health and steering.config.enabled):
        return []
    now = int(state.ticks)
    since = now - int(state.last_probe.max())
    if since != 1 and since < config.probe_every:
        return []
    candidates = torch.zeros_like(state.masked)
    if since == 1:  # a close call goes on with the sequences of the next step, and the next
        count, total, _ = state.evidence
        close = (total < -PROBE_MARGIN * count) & (count < MAX_SEQUENCES)
        candidates = (state.last_probe == now - 1) & close & steering.available
    if since >= config.probe_every:  # together: they share one loss to compare with
        unhealthy = (state.health < config.suspect_below) & (state.recovering < 0.5) & steering.available
        waited = now - state.last_probe >= config.probe_every << state.fruitless.clamp(0, MAX_BACKOFF)
        candidates |= (unhealthy | state.masked) & waited  # an expert closed by hand is opened by hand
    return [
        (layer, expert) for layer, expert in candidates.nonzero().tolist() if can_spare(state, steering, layer, expert)
    ]


def can_spare(state: ControlState, steering: Steering, layer: int, expert: int) -> bool:
    """True if the layer has enough experts without this one."""
    return bool(state.masked[layer, expert]) or int(steering.available[layer].sum()) > steering.top_k


def judge(
    state: ControlState,
    steering: Steering,
    config: ControlConfig,
    suspected: Sequence[Expert],
    loss: Callable[[], Tensor],
) -> list[str]:
    """Probe ``suspected`` with ``loss`` (one value a sequence) and act on the verdicts; returns sentences.

    Every rank of ``steering.group`` must call this with its own sequences.
    """
    # Each is compared with the model as it is; only then does anything change.
    gains = {}
    for layer, expert, change in probe(loss, steering.available, suspected):
        if (gain := weigh(state, config, layer, expert, sums_of(change, steering.group))) is not None:
            gains[layer, expert] = gain
    verdicts = []
    for layer, expert in sorted(gains, key=gains.__getitem__):
        if can_spare(state, steering, layer, expert):  # another verdict may have taken the last that can be
            masked = bool(state.masked[layer, expert])
            set_masked(state, steering, layer, expert, masked=not masked)
            what = "back" if masked else "masked"
            verdicts.append(f"expert {expert} of layer {layer} is {what}: {gains[layer, expert]:+.4f} nats per token.")
    return verdicts


@torch.no_grad()
def probe(
    loss: Callable[[], Tensor], available_LN: Tensor, suspected: Sequence[Expert]
) -> Iterator[tuple[int, int, Tensor]]:
    """For each suspect (layer, expert) what changing its availability does to ``loss``, (sequences,); below 0: better.

    ``available_LN`` is put back as it was.
    """
    before = loss()
    for layer, expert in suspected:
        was = available_LN[layer, expert].clone()
        available_LN[layer, expert] = ~was
        try:
            after = loss()
        finally:
            available_LN[layer, expert] = was
        yield layer, expert, after - before


def sums_of(change: Tensor, group: distributed.ProcessGroup | None = None) -> Tensor:
    """Count, sum and sum of squares over the sequences of the ranks of ``group`` (all by default), (3,)."""
    sums = torch.stack([torch.ones_like(change).sum(), change.sum(), change.square().sum()])
    if distributed.is_available() and distributed.is_initialized():
        distributed.all_reduce(sums, group=group)
    return sums


def mean_and_error(sums: Tensor) -> tuple[float, float]:
    """Mean and its standard error (infinite for a single sequence) from count, sum and sum of squares."""
    count, total, squares = sums.double().tolist()
    mean = total / count
    variance = max(0.0, squares / count - mean**2) * count / max(count - 1, 1)
    return mean, math.sqrt(variance / count) if count > 1 else math.inf


def weigh(state: ControlState, config: ControlConfig, layer: int, expert: int, sums: Tensor) -> float | None:
    """Add a probe to the evidence on one expert; the change of the loss in nats per token if that is a verdict.

    An expert is masked when its absence lowers the loss by more than ``PROBE_MARGIN`` and 3 + 8 / n standard errors (n
    sequences; with few of them the error is little known), and let back in when its return raises the loss by no more
    than the margin.
    """
    ticks = int(state.ticks - state.last_probe[layer, expert])
    state.last_probe[layer, expert] = state.ticks
    if ticks >= config.probe_every:  # else a close call goes on
        state.fruitless[layer, expert] = (state.fruitless[layer, expert] + 1).clamp(max=MAX_BACKOFF)
    # Evidence of earlier probes counts too, the less the older: a batch has few sequences.
    evidence = EVIDENCE_DECAY ** (ticks / config.probe_every) * state.evidence[:, layer, expert]
    if sums.isfinite().all():  # one masked because its output is not finite spoils every loss
        evidence += sums
    state.evidence[:, layer, expert] = evidence
    if (count := evidence[0].item()) < MIN_SEQUENCES:
        return None
    mean, error = mean_and_error(evidence)
    masked = bool(state.masked[layer, expert])
    verdict = mean <= PROBE_MARGIN if masked else mean < -max(PROBE_MARGIN, (3 + 8 / count) * error)
    return mean if verdict else None


@torch.no_grad()
def set_masked(state: ControlState, steering: Steering, layer: int, expert: int, *, masked: bool) -> None:
    """Close an expert, or let it back in; what was known of it is forgotten."""
    state.masked[layer, expert] = masked
    steering.available[layer, expert] = not masked
    state.contrast[layer, expert] = 0
    state.health[layer, expert] = 0
    state.evidence[:, layer, expert] = 0
    state.fruitless[layer, expert] = MASKED_BACKOFF if masked else 0
    state.recovering[layer, expert] = 0.0 if masked else 1.0


def refresh(state: ControlState, available_LN: Tensor, config: ControlConfig) -> None:
    """After a tick: drop the masks of experts opened by hand, reset the back-off of recovered experts."""
    opened = state.masked & available_LN  # judged from now on as any other, from the beginning
    state.masked.logical_xor_(opened)
    state.evidence.mul_(~opened)
    state.fruitless.mul_((state.health < config.suspect_below + RECOVERY_MARGIN) | state.masked)


def mask_broken(state: ControlState, steering: Steering, experts: Sequence[nn.Module]) -> list[str]:
    """Mask experts whose weights or outputs are not finite; returns sentences. ``experts``: one module a layer."""
    verdicts = []
    for layer, module in enumerate(experts):
        for expert in broken_experts(module, steering.num_experts, steering.input_mean[layer]):
            name = f"expert {expert} of layer {layer}"
            if not steering.available[layer, expert]:
                continue
            if can_spare(state, steering, layer, expert):
                set_masked(state, steering, layer, expert, masked=True)
                verdicts.append(f"{name} is masked: what it computes is not finite.")
            else:
                verdicts.append(f"what {name} computes is not finite, and it cannot be spared.")
    return verdicts


@torch.no_grad()
def broken_experts(experts: nn.Module, num_experts: int, mean_D: Tensor) -> list[int]:
    """Experts of one layer whose output is not finite for inputs about ``mean_D``, of unit size beside it."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn((num_experts, 4, len(mean_D)), generator=generator).to(mean_D)
    h_TD = (mean_D + noise).flatten(0, 1).to(next(experts.parameters()).dtype)
    chosen_T1 = torch.arange(num_experts, device=mean_D.device).repeat_interleave(4).unsqueeze(-1)
    # The sum is the stricter judge: a value near the largest number breaks whatever adds to it.
    y_TD = experts(h_TD, chosen_T1, torch.ones_like(chosen_T1, dtype=torch.float32)).float()
    finite_N = y_TD.square().view(num_experts, -1).sum(dim=-1).isfinite()
    return [int(expert) for expert in (~finite_N).nonzero().flatten().tolist()]
