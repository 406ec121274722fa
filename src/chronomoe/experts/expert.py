"""DomainExpert ("subbrain"): a feed-forward network per chosen MoE layer, how loudly it speaks, its domain gate."""

from collections.abc import Sequence
from typing import Any
from uuid import uuid4

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from chronomoe.errors import ConfigError
from chronomoe.experts.gate import DomainGate


class LayerExpert(nn.Module):
    """A gated feed-forward network of one layer, y = w2(act(w1 x) * w3 x), and its mixing weight."""

    def __init__(self, hidden_size: int, width: int, act: str) -> None:
        super().__init__()
        self.w1 = nn.Linear(hidden_size, width, bias=False)
        self.w3 = nn.Linear(hidden_size, width, bias=False)
        self.w2 = nn.Linear(width, hidden_size, bias=False)
        self.act_fn = ACT2FN[act]
        self.mixing = nn.Parameter(torch.zeros(()))
        """Logit of the share of the layer's output that is this expert's, apart from anything that opens the gate."""

    def forward(self, h_TD: Tensor) -> Tensor:
        """(T, D) to (T, D)."""
        out: Tensor = self.w2(self.act_fn(self.w1(h_TD)) * self.w3(h_TD))
        return out


class DomainExpert(nn.Module):
    """One expert, to be attached to a model of ``hidden_size`` in its MoE ``layers`` (numbers, ascending).

    Where the gate is open a layer's output y becomes (1 - m) y + m E(h), with m = sigmoid(mixing). ``active`` off, or
    the gate closed, leaves every bit of y as it was.
    """

    def __init__(
        self,
        expert_id: str,
        *,
        hidden_size: int,
        width: int,
        layers: Sequence[int],
        act: str = "silu",
        gate_layers: Sequence[int] | None = None,
        uid: str | None = None,
    ) -> None:
        super().__init__()
        gate_layers = layers[:1] if gate_layers is None else gate_layers
        for name, some in (("layers", layers), ("gate_layers", gate_layers)):
            if not some or sorted(set(some)) != list(some) or some[0] < 0:
                raise ConfigError(f"{name} are {list(some)}; name at least one, ascending and each once.")
        self.expert_id, self.uid = expert_id, uid or uuid4().hex
        self.hidden_size, self.width, self.act = hidden_size, width, act
        self.layers = nn.ModuleDict({str(layer): LayerExpert(hidden_size, width, act) for layer in layers})
        self.gate = DomainGate(hidden_size, gate_layers)
        self.header: dict[str, Any] = {}
        """What its file says of it besides; see chronomoe.experts.file."""
        self.attachment: dict[str, Any] = {}
        """What is to be kept about its being attached to this model: forced, frozen, when."""
        self.active = True
        self.forced: Tensor | bool | None = None
        """Where it is open whatever the gate says, (batch, sequence) or everywhere; None lets the gate decide."""

    @property
    def layer_numbers(self) -> list[int]:
        """The MoE layers it has a network for."""
        return [int(name) for name in self.layers]

    @property
    def mean_mixing(self) -> float:
        """Mean mixing weight over its layers."""
        networks: list[Any] = list(self.layers.values())
        return torch.stack([network.mixing.detach().sigmoid() for network in networks]).mean().item()

    def freeze(self, frozen: bool = True) -> None:
        """Frozen weights get no gradient and no update."""
        for parameter in self.parameters():
            parameter.requires_grad_(not frozen)

    @torch.no_grad()
    def begin_from(self, sources: dict[int, tuple[Tensor, Tensor]], redraw: float, generator: torch.Generator) -> None:
        """Copy an expert of the base into each layer, and draw a share ``redraw`` of its hidden units anew.

        ``sources``: layer -> (gate_up (2 F, D), down (D, F)) as transformers keeps them; see :func:`redraw_units`
        (drop-upcycling, Nakamura et al. 2025).
        """
        for number, (gate_up, down) in sources.items():
            network: Any = self.layers[str(number)]
            linears = (network.w1, network.w3, network.w2)
            for linear, matrix in zip(linears, (*gate_up.chunk(2), down), strict=True):
                linear.weight.copy_(matrix)
            units = (network.w1.weight, network.w3.weight, network.w2.weight.T)
            redraw_units(units, round(redraw * self.width), generator)


@torch.no_grad()
def redraw_units(matrices: Sequence[Tensor], count: int, generator: torch.Generator) -> None:
    """Draw ``count`` hidden units of a feed-forward network anew, in place, the same rows in all of ``matrices``.

    Each has a row a unit; new values come from a normal distribution with the mean and deviation of its old ones.
    """
    chosen = torch.randperm(len(matrices[0]), generator=generator)[:count]
    for matrix in matrices if count else ():
        mean, deviation = float(matrix.float().mean()), float(matrix.float().std(correction=0))
        fresh = torch.normal(mean, deviation, (count, matrix.shape[1]), generator=generator)
        matrix[chosen] = fresh.to(matrix)
