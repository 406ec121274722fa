"""Attach experts to a steered model and take them off again; nothing of the model itself is changed.

Each MoE layer of the base gets a hook beside it, once. In a forward the last layer an expert's gate reads
decides, for every token, whether that expert is open; that layer and all later ones then mix it in. The decision
belongs to the forward (it travels in the RoutingContext, so recomputed layers see it too), the running evidence to the
sequence: it is kept with the key-value cache.

Shape suffixes: B batch, S sequence, D hidden size, T tokens.
"""

from typing import Any

import torch
from torch import Tensor, nn

from chronomoe.errors import ConfigError, UnsupportedModelError
from chronomoe.experts.expert import DomainExpert
from chronomoe.hosts.attach import moe_layers
from chronomoe.routing.router import GateState


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


def attach_expert(model: Any, expert: DomainExpert) -> None:
    """Attach ``expert`` to a steered model, after those that are attached already.

    Raises :class:`ConfigError` when it does not fit or is attached already, :class:`UnsupportedModelError` for a model
    that is not steered.
    """
    if getattr(model, "steering", None) is None:
        raise UnsupportedModelError(f"cannot attach an expert to a {type(model).__name__}: attach() it first.")
    blocks = moe_layers(model)
    attached: Any = getattr(model, "subbrains", None)
    if attached is not None and any(
        one.uid == expert.uid or one.expert_id == expert.expert_id for one in attached.attached
    ):
        raise ConfigError(f"expert {expert.expert_id} is attached already.")
    hidden = model.config.hidden_size
    if expert.hidden_size != hidden:
        raise ConfigError(f"expert {expert.expert_id} is {expert.hidden_size} wide, the model {hidden}.")
    highest = max([*expert.layer_numbers, *expert.gate.layers])
    if highest >= len(blocks):
        raise ConfigError(f"expert {expert.expert_id} has a layer {highest}; the model has {len(blocks)} MoE layers.")
    if attached is None:
        model.add_module("subbrains", Subbrains())
        _hook(model, blocks)
    expert.to(blocks[0].gate.weight.device)
    model.subbrains[expert.uid] = expert


def detach_expert(model: Any, expert_id: str) -> DomainExpert:
    """Take an expert off (by id or uid) and return it; with the last one the hooks go too."""
    if getattr(model, "subbrains", None) is None:
        raise ConfigError(f"expert {expert_id} is not attached; the model has none.")
    expert: DomainExpert = model.subbrains.by_id(expert_id)
    del model.subbrains[expert.uid]
    if not len(model.subbrains):
        for handle in vars(model).pop("_subbrain_hooks"):
            handle.remove()
        for module in (getattr(model, "model", model), *moe_layers(model)):
            vars(module).pop("_subbrains")
        del model.subbrains
    return expert


def _hook(model: Any, blocks: list[Any]) -> None:
    base = getattr(model, "model", model)
    vars(base)["_subbrains"] = model.subbrains  # not a second submodule
    handles = [
        base.register_forward_pre_hook(_begin, with_kwargs=True),
        base.register_forward_hook(_end, with_kwargs=True),
    ]
    for number, block in enumerate(blocks):
        vars(block)["_subbrains"], vars(block)["_number"] = model.subbrains, number
        handles += [block.register_forward_pre_hook(_take_gates), block.register_forward_hook(_mix)]
    vars(model)["_subbrain_hooks"] = handles


# Hooks find their objects through the module they are called with, so that a deep copy of the model is whole.


def _begin(base: Any, args: Any, kwargs: dict[str, Any]) -> None:
    context = kwargs["routing_context"]  # the steering's hook, registered earlier, has put it there
    cache = kwargs.get("past_key_values")
    batch = context.num_positions // context.row_length
    context.gates = GateState((batch, context.row_length), earlier=dict(getattr(cache, "gate_states", {})))


def _end(base: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
    gates, cache = kwargs["routing_context"].gates, getattr(output, "past_key_values", None)
    if cache is not None and gates.later:
        _remember(cache, gates.later)


def _take_gates(block: Any, args: Any) -> None:
    context = block.gate.context  # the router is about to take it away
    vars(block)["_gates"] = None if context is None else (context.gates, context.counted_T)


def _mix(block: Any, args: Any, y_BSD: Tensor) -> Tensor:
    taken = vars(block).pop("_gates", None)
    if taken is None or taken[0] is None:
        return y_BSD
    gates, counted_T = taken
    number, h_BSD = block._number, args[0]
    for expert in block._subbrains.attached:
        if not expert.active:
            continue
        if expert.uid not in gates.open and number in expert.gate.layers:
            _decide(expert, number, gates, h_BSD, counted_T)
        index_T = gates.open.get(expert.uid)
        if index_T is None or str(number) not in expert.layers:
            continue
        network: Any = expert.layers[str(number)]
        h_TD, y_TD = (x.reshape(-1, x.shape[-1]).index_select(0, index_T) for x in (h_BSD, y_BSD))
        weight = network.mixing.sigmoid().to(y_TD.dtype)
        mixed_TD = y_TD + weight * (network(h_TD.to(network.w1.weight.dtype)).to(y_TD.dtype) - y_TD)
        y_BSD = y_BSD.reshape(-1, y_BSD.shape[-1]).index_copy(0, index_T, mixed_TD).view_as(y_BSD)
    return y_BSD


@torch.no_grad()
def _decide(expert: DomainExpert, number: int, gates: GateState, h_BSD: Tensor, counted_T: Tensor | None) -> None:
    gate, by_layer = expert.gate, gates.evidence.setdefault(expert.uid, {})
    if number not in by_layer:  # of a recurrent model, the layer's first call counts
        by_layer[number] = gate.layer_evidence(number, h_BSD.view(*gates.batch, -1))
    if len(by_layer) < len(gate.layers):
        return
    counted_BS = None if counted_T is None else counted_T.view(gates.batch)
    odds_BS, gates.later[expert.uid] = gate.log_odds(gate.combine(by_layer), counted_BS, gates.earlier.get(expert.uid))
    open_BS = odds_BS > gate.threshold
    if expert.forced is not None:
        open_BS = torch.as_tensor(expert.forced, device=open_BS.device).expand_as(open_BS)
    if counted_BS is not None:
        open_BS = open_BS & counted_BS
    # One question to the device: a closed gate must cost nothing and touch nothing.
    index_T = open_BS.flatten().nonzero().squeeze(-1)
    gates.open[expert.uid] = index_T if len(index_T) else None


class _WithGateStates:
    """Mixed into a cache's class: the gates' states follow its rows."""

    gate_states: dict[str, Tensor]

    def _rows(self, change: Any) -> None:
        self.gate_states = {uid: change(state) for uid, state in self.gate_states.items()}

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)  # type: ignore[misc]
        self._rows(lambda state: state.index_select(0, beam_idx.to(state.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]
        self._rows(lambda state: state.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)  # type: ignore[misc]
        self._rows(lambda state: state[indices])

    def reset(self) -> None:
        super().reset()  # type: ignore[misc]
        self.gate_states = {}

    def crop(self, tokens_to_remove: int) -> None:
        raise ConfigError("a cache cannot be cropped while experts are attached: their gates have read its tokens.")


_REMEMBERING: dict[type, type] = {}


def _remember(cache: Any, states: dict[str, Tensor]) -> None:
    kind = type(cache)
    if not isinstance(cache, _WithGateStates):
        if kind not in _REMEMBERING:
            _REMEMBERING[kind] = type(kind.__name__, (_WithGateStates, kind), {})
        cache.__class__ = _REMEMBERING[kind]
    cache.gate_states = states
