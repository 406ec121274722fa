"""DomainExpert ("subbrain"): a network for each of its MoE layers, its share of their outputs, its domain gate."""

from collections.abc import Sequence
from typing import Any
from uuid import uuid4

import torch
from torch import Tensor, nn

from chronomoe.errors import ConfigError
from chronomoe.experts.gate import DomainGate
from chronomoe.experts.network import ExpertNetwork, LayerExpert, redraw_units
from chronomoe.experts.record import DomainRecord


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
        """The rest of its file's header; see chronomoe.experts.file."""
        self.attachment: dict[str, Any] = {}
        """What the model's list of experts keeps of it: frozen, when it was attached."""
        self.record: DomainRecord | None = None
        """Samples of its domain, by which the gates of other experts know it."""
        self.own_gate: dict[str, Tensor] = {}
        """The gate as in its file, by name of the tensor, while it is fitted to other experts; see :meth:`set_gate`."""
        self.active = True
        self.forced: Tensor | bool | None = None
        """Where it is open whatever the gate says, (batch, sequence) or everywhere; None lets the gate decide."""

    @property
    def layer_numbers(self) -> list[int]:
        """The MoE layers it has a network for."""
        return [int(name) for name in self.layers]

    def network(self, layer: int) -> ExpertNetwork | None:
        """Its network in one MoE layer; None where it has none."""
        if (name := str(layer)) not in self.layers:
            return None
        found: ExpertNetwork = self.layers[name]  # type: ignore[assignment]
        return found

    @torch.no_grad()
    def set_gate(self, direction: Tensor | None = None, offset: Tensor | None = None) -> None:
        """Let the gate decide by these, among other experts of the same model; by its own again where none are given.

        The expert's own gate stays what its file holds.
        """
        mine = {"gate.direction": self.gate.direction, "gate.offset": self.gate.offset}
        for name, tensor in self.own_gate.items():
            mine[name].copy_(tensor)
        self.own_gate = {}
        if direction is not None and offset is not None:
            self.own_gate = {name: tensor.clone() for name, tensor in mine.items()}
            self.gate.direction.copy_(direction.view_as(self.gate.direction))
            self.gate.offset.copy_(offset)

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
        """Copy an expert of the base into each layer, and redraw a share ``redraw`` of its hidden units.

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
