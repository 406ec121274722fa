"""Attach experts to a steered model and take them off again; nothing of the model itself is changed.

The experts are a stage of the model's forward (chronomoe.hosts.attach.register). In each forward the last layer that
an expert's gate reads decides, for every token, whether that expert is open; that layer and all later ones then mix it
in. Where several gates are open, the expert with the largest margin over its threshold is used, alone.

The decision belongs to the forward (it travels in the RoutingContext, so recomputed layers see it too), the running
evidence to the sequence: it is kept with the key-value cache.

Shape suffixes: B batch, S sequence, D hidden size, T tokens.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from chronomoe.errors import ConfigError, UnsupportedModelError
from chronomoe.experts.expert import DomainExpert
from chronomoe.hosts.attach import keep_with_cache, kept_with_cache, moe_layers, register, unregister
from chronomoe.hosts.protocol import Stage
from chronomoe.routing.context import GateState, RoutingContext


class Subbrains(nn.ModuleDict):
    """The experts attached to a model, by uid in the order of attachment; found as ``model.subbrains``."""

    def by_id(self, expert_id: str) -> DomainExpert:
        """The attached expert of that id; :class:`ConfigError` when there is none."""
        for expert in self.attached:
            if expert_id in (expert.expert_id, expert.uid):
                return expert
        names = ", ".join(expert.expert_id for expert in self.attached) or "none"
        raise ConfigError(f"expert {expert_id} is not attached; attached are {names}.")

    @property
    def attached(self) -> list[DomainExpert]:
        """In order."""
        return list(self.values())  # type: ignore[arg-type]


def base_state(model: Any) -> dict[str, Tensor]:
    """The weights of the model itself, by name: without those of attached experts."""
    return {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("subbrains.")}


def attach_expert(model: Any, expert: DomainExpert) -> None:
    """Attach ``expert`` to a steered model, after those that are attached already.

    Raises :class:`ConfigError` when it does not fit or is attached already, :class:`UnsupportedModelError` for a model
    that is not steered.
    """
    if getattr(model, "steering", None) is None:
        raise UnsupportedModelError(f"cannot attach an expert to a {type(model).__name__}: attach() it first.")
    layers = moe_layers(model)
    attached: Any = getattr(model, "subbrains", None)
    if attached is not None and any(
        one.uid == expert.uid or one.expert_id == expert.expert_id for one in attached.attached
    ):
        raise ConfigError(f"expert {expert.expert_id} is attached already.")
    hidden = model.config.hidden_size
    if expert.hidden_size != hidden:
        raise ConfigError(f"expert {expert.expert_id} is {expert.hidden_size} wide, the model {hidden}.")
    highest = max([*expert.layer_numbers, *expert.gate.layers])
    if highest >= len(layers):
        raise ConfigError(f"expert {expert.expert_id} has a layer {highest}; the model has {len(layers)} MoE layers.")
    if attached is None:
        model.add_module("subbrains", Subbrains())
        register(model, _Gates(model.subbrains))
    expert.to(layers[0].router.weight.device)
    model.subbrains[expert.uid] = expert


def detach_expert(model: Any, expert_id: str) -> DomainExpert:
    """Take an expert off (by id or uid) and return it; with the last one the stage goes too."""
    if getattr(model, "subbrains", None) is None:
        raise ConfigError(f"expert {expert_id} is not attached; the model has none.")
    expert: DomainExpert = model.subbrains.by_id(expert_id)
    del model.subbrains[expert.uid]
    if not len(model.subbrains):
        unregister(model, _Gates.name)
        del model.subbrains
    return expert


class _Gates(Stage):
    """Decides in each forward where which expert is open, and mixes those in."""

    name = "experts"
    mixes = True

    def __init__(self, subbrains: Subbrains) -> None:
        self.subbrains = subbrains

    def open(self, context: RoutingContext, cache: Any) -> None:
        batch = context.num_positions // context.row_length
        context.gates = GateState((batch, context.row_length), earlier=kept_with_cache(cache))

    def close(self, context: RoutingContext, cache: Any) -> None:
        if cache is not None and context.gates is not None and context.gates.later:
            keep_with_cache(cache, context.gates.later)

    def mix(self, layer: int, context: RoutingContext, h_BSD: Tensor, y_BSD: Tensor) -> Tensor:
        gates = context.gates
        if gates is None:
            return y_BSD
        active = [expert for expert in self.subbrains.attached if expert.active]
        deciding = [one for one in active if one.uid not in gates.margins and layer in one.gate.layers]
        for expert in deciding:
            _gather(expert, layer, gates, h_BSD, context.counted_T)
        if any(expert.uid in gates.margins for expert in deciding):
            _choose(active, gates)
        for expert in active:
            index_T = gates.open.get(expert.uid)
            network = expert.network(layer)
            if index_T is None or network is None:
                continue
            h_TD, y_TD = (x.reshape(-1, x.shape[-1]).index_select(0, index_T) for x in (h_BSD, y_BSD))
            weight = network.mixing.sigmoid().to(y_TD.dtype)
            mixed_TD = y_TD + weight * (network(h_TD.to(network.dtype)).to(y_TD.dtype) - y_TD)
            y_BSD = y_BSD.reshape(-1, y_BSD.shape[-1]).index_copy(0, index_T, mixed_TD).view_as(y_BSD)
        return y_BSD


@torch.no_grad()
def _gather(expert: DomainExpert, layer: int, gates: GateState, h_BSD: Tensor, counted_T: Tensor | None) -> None:
    """Add a layer's evidence; after the last layer that the gate reads, note its margin."""
    gate, by_layer = expert.gate, gates.evidence.setdefault(expert.uid, {})
    if layer not in by_layer:  # of a recurrent model, the layer's first call counts
        by_layer[layer] = gate.layer_evidence(layer, h_BSD.view(*gates.batch, -1))
    if len(by_layer) < len(gate.layers):
        return
    counted_BS = None if counted_T is None else counted_T.view(gates.batch)
    odds_BS, gates.later[expert.uid] = gate.log_odds(gate.combine(by_layer), counted_BS, gates.earlier.get(expert.uid))
    margin_BS = odds_BS - gate.threshold
    if expert.forced is not None:
        forced_BS = torch.as_tensor(expert.forced, device=odds_BS.device).expand_as(odds_BS)
        margin_BS = torch.where(forced_BS, torch.inf, -torch.inf)
    gates.margins[expert.uid] = margin_BS if counted_BS is None else margin_BS.masked_fill(~counted_BS, -torch.inf)


@torch.no_grad()
def _choose(experts: Sequence[DomainExpert], gates: GateState) -> None:
    """At each token use the expert whose gate has decided and has the largest margin, if that is above 0.

    Equal margins go to the smaller id, so that the order of attachment is of no consequence.
    """
    decided = sorted((one for one in experts if one.uid in gates.margins), key=lambda one: (one.expert_id, one.uid))
    first_BS = gates.margins[decided[0].uid]
    best_BS, used_BS = torch.zeros_like(first_BS), torch.full_like(first_BS, -1, dtype=torch.int64)
    for number, expert in enumerate(decided):
        larger_BS = gates.margins[expert.uid] > best_BS
        best_BS = torch.where(larger_BS, gates.margins[expert.uid], best_BS)
        used_BS.masked_fill_(larger_BS, number)
    for number, expert in enumerate(decided):
        # One transfer from the device: a closed gate must cost nothing and touch nothing.
        index_T = (used_BS == number).flatten().nonzero().squeeze(-1)
        gates.open[expert.uid] = index_T if len(index_T) else None
