"""DomainRecord: what an expert's file keeps of its domain, so that the gates of other experts stay shut there.

A sample is what a gate adds up at one token of a text, before its own direction comes in (see gate.py):

    f = sum over i <= t of leak^(t - i) h_i / sqrt(n_t + 4),  g = n_t / sqrt(n_t + 4)

so that the log-odds of any gate at that token are <v, f> + c g. Two hundred of them are 230 kB at a hidden size of 576.
They say something of the text they come from: means over some ten tokens of hidden states.

Shape suffixes: M samples, C hidden size times layers, plus one.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from chronomoe.errors import CheckpointError
from chronomoe.experts.gate import DomainGate

SAMPLES = 200
"""Of each text."""
_PREFIX = "record."
_OWN = "domain"


@dataclass(frozen=True, kw_only=True)
class DomainRecord:
    """Samples of an expert's own domain, and of the base's, at the layers that its gate reads."""

    domain: Tensor
    """fp16 (M, C): text that the expert is for."""
    general: dict[str, Tensor] = field(default_factory=dict)
    """fp16 (M, C) by domain of the base: text at which its gate is shut."""

    @classmethod
    def of(
        cls, gate: DomainGate, domain: dict[int, Tensor], general: Mapping[str, dict[int, Tensor]], seed: int
    ) -> "DomainRecord":
        """Samples of windows: inputs (n, S, D) for each layer the gate reads, of the domain and of each base domain."""
        generator = torch.Generator().manual_seed(seed)
        made = {name: gate.samples(h, SAMPLES, generator).half().cpu() for name, h in {_OWN: domain, **general}.items()}
        return cls(domain=made.pop(_OWN), general=made)

    def tensors(self) -> dict[str, Tensor]:
        """As an expert's file names them."""
        return {f"{_PREFIX}{_OWN}": self.domain} | {
            f"{_PREFIX}general.{name}": samples for name, samples in sorted(self.general.items())
        }

    @classmethod
    def taken_from(cls, tensors: dict[str, Tensor], columns: int) -> "DomainRecord | None":
        """Take the record out of the tensors of a file; None where it holds none.

        ``columns`` is C. :class:`CheckpointError` for samples of another shape.
        """
        found = {name.removeprefix(_PREFIX): tensors.pop(name) for name in sorted(tensors) if name.startswith(_PREFIX)}
        for name, samples in found.items():
            if samples.dim() != 2 or samples.shape[1] != columns or not len(samples):
                raise CheckpointError(
                    f"the record {name} has the shape {list(samples.shape)}, not (samples, {columns})."
                )
        if _OWN not in found:
            return None
        own = found.pop(_OWN)
        return cls(domain=own, general={name.removeprefix("general."): samples for name, samples in found.items()})
