"""Experts that share a model: their gates are fitted to one another, from the records in their files, without text.

A gate that was fitted against the base's text alone opens on anything else that is unlike the base, other experts'
domains first. With the samples of all domains at hand, each gate's v and c are fitted again:

    min  mean over own samples of softplus(tau - s) + mean over other texts of mean softplus(s - tau) + pull |w - w0|^2

s = <v, f> + c g the log-odds of a sample, tau the gate's threshold, w0 what training found, in units of the columns'
root mean square. The last term keeps what was learned from far more text than the samples. Samples come in the order of
their experts' uids, and each fit starts from w0: neither order of attachment nor earlier fits have any effect.
"""

from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor
from torch.nn import functional as F

from chronomoe.errors import CheckpointError
from chronomoe.experts.expert import DomainExpert
from chronomoe.storage import whole_file

_PULL = 3e-4
_MAX_ITERATIONS = 100


def fit_together(experts: Sequence[DomainExpert]) -> None:
    """Fit the gates of the experts of one model to one another; an expert that is alone has its own gate.

    An expert without a record keeps its own gate, and no other gate knows its domain. A gate that never opens stays so.
    """
    ordered = sorted(experts, key=lambda one: one.uid)
    for one in ordered:
        one.set_gate()
    fitted = [(one, _fitted(one, [other for other in ordered if other is not one])) for one in ordered]
    for one, w_C in fitted:
        if w_C is not None:
            one.set_gate(w_C[:-1], w_C[-1])


def _fitted(expert: DomainExpert, others: Sequence[DomainExpert]) -> Tensor | None:
    """v and c of one gate, fp32 (C,); None where there is nothing to fit."""
    gate, record, threshold = expert.gate, expert.record, float(expert.gate.threshold)
    known = [other.record.domain for other in others if other.record is not None and other.gate.layers == gate.layers]
    if record is None or not known or not torch.isfinite(gate.threshold):
        return None
    general = [samples for _, samples in sorted(record.general.items())]
    own_MC, *shut = [samples.double() for samples in (record.domain, *general, *known)]
    start_C = torch.cat([gate.direction.flatten(), gate.offset.view(1)]).double().cpu()
    scale_C = torch.cat([own_MC, *shut]).square().mean(dim=0).sqrt() + 1e-6
    step_C = torch.zeros_like(start_C, requires_grad=True)
    optimizer = torch.optim.LBFGS([step_C], max_iter=_MAX_ITERATIONS, line_search_fn="strong_wolfe")

    @torch.enable_grad()
    def loss() -> Tensor:
        optimizer.zero_grad()
        w_C = start_C + step_C / scale_C
        missed = F.softplus(threshold - own_MC @ w_C).mean()
        wrong = torch.stack([F.softplus(samples @ w_C - threshold).mean() for samples in shut]).mean()
        total: Tensor = missed + wrong + _PULL * step_C.square().sum()
        total.backward()
        return total

    optimizer.step(loss)
    return (start_C + step_C.detach() / scale_C).float()


def save_gates(experts: Sequence[DomainExpert], folder: Path) -> str | None:
    """Write the gates as :func:`fit_together` left them into ``folder``; the file's name, None where all are their own.

    The name follows from the content: the list of experts that names the file is what makes it count.
    """
    tensors = {
        f"{one.uid}.{name}": tensor.detach().cpu()
        for one in sorted(experts, key=lambda one: one.uid)
        if one.own_gate
        for name, tensor in (("direction", one.gate.direction), ("offset", one.gate.offset))
    }
    if not tensors:
        return None
    content = save(tensors)
    name = f"gates-{sha256(content).hexdigest()[:16]}.safetensors"
    with whole_file(folder / name) as file:
        file.write(content)
    return name


def load_gates(experts: Sequence[DomainExpert], file: Path) -> None:
    """Let the gates decide as :func:`save_gates` wrote; :class:`CheckpointError` for a file that is damaged."""
    remedy = "detach one of the experts and attach it again"
    try:
        tensors = load_file(file)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file} is missing or damaged ({error}); {remedy}.") from error
    for one in experts:
        direction, offset = (tensors.pop(f"{one.uid}.{name}", None) for name in ("direction", "offset"))
        if direction is None or offset is None:
            continue
        if direction.shape != one.gate.direction.shape or offset.dim():
            raise CheckpointError(f"{file} does not fit the gate of expert {one.expert_id}; {remedy}.")
        one.set_gate(direction, offset)
    if tensors:
        raise CheckpointError(f"{file} has gates of experts that are not attached; {remedy}.")


def opened_on(experts: Sequence[DomainExpert]) -> list[dict[str, Any]]:
    """Where which gate opens, by the samples in the experts' records.

    A row for each expert and text (``domain``: its own, another expert's, or one of the base's): the share of the
    samples at which its gate is ``open``, and at which it has the largest margin, so that the expert is ``used``.
    """
    ordered = sorted(experts, key=lambda one: (one.expert_id, one.uid))
    rows: list[dict[str, Any]] = []
    for expert in ordered:
        texts = {one.expert_id: one.record.domain for one in ordered if one.record is not None}
        if expert.record is not None:
            texts |= dict(sorted(expert.record.general.items()))
        for name, samples in texts.items():
            margins = {one.uid: _margin(one, samples) for one in ordered if _readable(one, samples)}
            if (mine := margins.get(expert.uid)) is None:
                continue
            best = torch.stack(list(margins.values())).amax(dim=0)
            is_open = mine > 0
            rows.append(
                {
                    "expert_id": expert.expert_id,
                    "domain": name,
                    "open": float(is_open.float().mean()),
                    "used": float((is_open & (mine == best)).float().mean()),
                }
            )
    return rows


def _margin(expert: DomainExpert, samples: Tensor) -> Tensor:
    return expert.gate.odds_of(samples) + expert.gate.prior - expert.gate.threshold


def _readable(expert: DomainExpert, samples: Tensor) -> bool:
    return expert.active and samples.shape[1] == expert.gate.direction.numel() + 1
