"""Train one expert alone: the base is frozen and only read, the expert learns on its hidden states under the LM loss.

domain text    expert open everywhere: cross-entropy
anchor text    expert open everywhere: KL(base || base with expert), so that a false alarm of the gate costs little
then           the gate is fitted to hidden states of both, and calibrated on general text
"""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from chronomoe.errors import ConfigError, DataError
from chronomoe.experts.attachment import attach_expert, detach_expert
from chronomoe.experts.expert import DomainExpert
from chronomoe.experts.gate import false_alarm_threshold
from chronomoe.experts.record import DomainRecord
from chronomoe.hosts.attach import moe_layers
from chronomoe.hosts.capture import gate_inputs, kl, measure_routing
from chronomoe.hosts.protocol import SteeredModel

MIN_WINDOWS = 40
"""Of fewer windows no small quantile is taken."""
ANCHOR_EVERY = 4
"""One sequence in so many of a batch has an anchor sequence beside it."""


class WithAnchor(Dataset[dict[str, Tensor]]):
    """Domain sequences, each with a sequence of general text beside it."""

    def __init__(self, domain: Dataset[dict[str, Tensor]], anchor: Dataset[dict[str, Tensor]]) -> None:
        self.domain, self.anchor = domain, anchor

    def __len__(self) -> int:
        return len(self.domain)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {**self.domain[index], "anchor_ids": self.anchor[index]["input_ids"]}


class Trainee(nn.Module):
    """What the trainer trains: the parameters of ``module`` alone; its forward runs the frozen ``base`` around it.

    The base stays in evaluation mode: its routing, capacity and fields are those it will have afterwards. ``on``
    and ``off`` are contexts that switch the module; a batch may have a number, ``goal``, which ``on`` receives.
    ``loss_terms`` holds ``ce`` and ``anchor_kl`` of the latest forward.
    """

    def __init__(
        self,
        base: SteeredModel,
        module: nn.Module,
        file: str,
        on: Callable[[int], AbstractContextManager[None]],
        off: Callable[[], AbstractContextManager[None]],
        anchor_weight: float,
    ) -> None:
        super().__init__()
        self.module = module
        self.config = base.config
        self.file, self.anchor_weight = file, anchor_weight
        self.dtype = base.dtype
        vars(self)["base"] = base  # not a submodule: nothing of it is trained, moved or saved
        self.on, self.off = on, off
        self.loss_terms: dict[str, Tensor] = {}

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor,
        anchor_ids: Tensor | None = None,
        goal: Tensor | None = None,
        num_items_in_batch: Any = None,
        **_: Any,
    ) -> Any:
        """Output with a training loss: mean over predicted tokens, plus the anchor's KL."""
        base: Any = vars(self)["base"]
        with self.on(0 if goal is None else int(goal[0])):
            output = base(input_ids=input_ids, labels=labels, num_items_in_batch=num_items_in_batch, use_cache=False)
            self.loss_terms = {"ce": output.loss.detach()}
            if anchor_ids is not None and self.anchor_weight > 0:
                rows = anchor_ids[: max(1, len(anchor_ids) // ANCHOR_EVERY)]
                theirs = base(input_ids=rows, use_cache=False).logits
                with self.off(), torch.no_grad():
                    own = base(input_ids=rows, use_cache=False).logits
                divergence = kl(own, theirs).mean()
                share = 1.0 if num_items_in_batch is None else (labels[:, 1:] >= 0).sum() / num_items_in_batch
                output.loss = output.loss + self.anchor_weight * share * divergence
                self.loss_terms["anchor_kl"] = divergence.detach() * share
        return output

    def save_pretrained(self, path: str | os.PathLike[str], **_: Any) -> None:
        """The module's tensors, as a checkpoint of its training holds them."""
        from safetensors.torch import save_file

        save_file({name: t.contiguous() for name, t in self.module.state_dict().items()}, Path(path) / self.file)


@contextmanager
def _inactive(expert: DomainExpert) -> Iterator[None]:
    was, expert.active = expert.active, False
    try:
        yield
    finally:
        expert.active = was


@contextmanager
def _forced_open(expert: DomainExpert) -> Iterator[None]:
    was, expert.forced = expert.forced, True
    try:
        yield
    finally:
        expert.forced = was


@contextmanager
def only_read(base: SteeredModel) -> Iterator[None]:
    """Within the block ``base`` is in evaluation mode and has no gradients; afterwards it is as it was."""
    was_training = base.training
    trained = [parameter for parameter in base.parameters() if parameter.requires_grad]
    base.eval()
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
        base.train(was_training)


@contextmanager
def trainee(base: SteeredModel, expert: DomainExpert, anchor_weight: float) -> Iterator[Trainee]:
    """Within the block ``expert`` is attached to the frozen ``base``; afterwards the base is as it was."""
    with only_read(base):
        attach_expert(base, expert)
        try:
            yield Trainee(
                base,
                expert,
                "expert.safetensors",
                lambda _: _forced_open(expert),
                lambda: _inactive(expert),
                anchor_weight,
            )
        finally:
            detach_expert(base, expert.uid)


def begin(expert: DomainExpert, base: SteeredModel, windows: Tensor, redraw: float, seed: int) -> None:
    """Start an expert from the base's own experts: in each layer the one that ``windows`` (n, S) use most."""
    shares_LN = measure_routing(base, windows).share
    experts = [layer.experts for layer in moe_layers(base)]
    sources = {}
    for layer in expert.layer_numbers:
        best = int(shares_LN[layer].argmax())
        sources[layer] = experts[layer].gate_up_proj[best].detach(), experts[layer].down_proj[best].detach()
    if next(iter(sources.values()))[1].shape[1] != expert.width:
        raise ConfigError(f"an expert of width {expert.width} cannot begin from the base's; give it theirs.")
    expert.begin_from(sources, redraw, torch.Generator().manual_seed(seed))


def fit_gate(
    expert: DomainExpert, base: SteeredModel, domain: Tensor, general: Mapping[str, Tensor], *, seed: int | None = None
) -> None:
    """Fit the gate to windows of the domain (n, S) and of each general domain.

    With a ``seed`` the expert keeps a record of these texts, so that other gates learn to stay shut on its domain.
    """
    if not general:
        raise DataError("a gate needs general text beside that of its domain; give an anchor.")
    own = gate_inputs(base, expert.gate.layers, domain)
    others = {name: gate_inputs(base, expert.gate.layers, windows) for name, windows in general.items()}
    expert.gate.fit(own, list(others.values()))
    expert.record = None if seed is None else DomainRecord.of(expert.gate, own, others, seed)


@torch.no_grad()
def calibrate(
    base: SteeredModel,
    expert: DomainExpert,
    general: dict[str, Tensor],
    false_alarm: float,
    harm_kl: float,
    tried: int = 6,
) -> dict[str, Any]:
    """Set the gate's threshold by general text (n, S) of each base domain; returns what was found.

    The share of tokens at which the gate opens is at most ``false_alarm`` in each domain of at least
    :data:`MIN_WINDOWS` windows, and what that does to the output at most ``harm_kl`` nats per token in every domain:
    while it is more, the share is halved. ``expert`` must be attached.
    """
    gate = expert.gate
    odds = {
        name: gate.log_odds(gate.evidence(gate_inputs(base, gate.layers, windows)))[0]
        for name, windows in general.items()
    }
    # A handful of windows says nothing of a share of 1 %; what the gate does to them still counts.
    telling = [odds[name] for name, windows in general.items() if len(windows) >= MIN_WINDOWS] or list(odds.values())
    share, harm = false_alarm, dict.fromkeys(general, 0.0)
    for _ in range(tried):
        threshold = false_alarm_threshold(telling, share)
        expert.gate.threshold.fill_(threshold)
        harm = {name: divergence(base, expert, windows) for name, windows in general.items()}
        if max(harm.values()) <= harm_kl:
            break
        share /= 2
    else:
        expert.gate.threshold.fill_(max(float(values.max()) for values in odds.values()))  # never open on that text
        harm = dict.fromkeys(general, 0.0)
    threshold = float(expert.gate.threshold)
    alarms = {name: float((values > threshold).float().mean()) for name, values in odds.items()}
    at_open = {name: harm[name] / share for name, share in alarms.items() if share}
    return {
        "false_alarm": false_alarm,
        "harm_kl": harm_kl,
        "threshold": threshold,
        "measured_false_alarm": alarms,
        "measured_kl": harm,
        "measured_kl_where_open": at_open,
        "windows": {name: len(windows) for name, windows in general.items()},
    }


@torch.no_grad()
def divergence(base: SteeredModel, expert: DomainExpert, windows: Tensor) -> float:
    """Mean KL(base || base with the attached expert) over the tokens of ``windows`` (n, S), nats."""
    total = 0.0
    for rows in windows.split(8):
        theirs = base(input_ids=rows, use_cache=False).logits
        with _inactive(expert):
            own = base(input_ids=rows, use_cache=False).logits
        total += float(kl(own, theirs).sum())
    return total / windows.numel()
