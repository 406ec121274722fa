"""attach(model): put steering and its controller on a transformers MoE model, as transformers builds it.

The only file that swaps a class, registers a hook or adds an attribute to a host:

- Routers get a class of their own (:func:`_steer_router`): a subclass of the host's, so that transformers still records
  its outputs and initialises its weights, and checkpoints keep the parameter's name.
- Key-value caches get one (:func:`keep_with_cache`) while experts are attached: generation reorders, repeats and
  selects rows of its cache by methods of the cache alone, and what gates remember of a sequence must follow.
- :func:`instrument` hangs hooks on the decoder, which open the context of each forward, hand it down to the routers as
  a keyword argument, and call the registered stages.
- A hook on the whole model adds the router losses to the training loss.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from chronomoe.control.config import ControlConfig
from chronomoe.control.controller import ChronovisorMixtralController
from chronomoe.errors import ConfigError, UnsupportedModelError
from chronomoe.hosts.protocol import MoELayer, Stage, SteeredModel
from chronomoe.hosts.table import SUPPORTED, Host, at_path, host_of
from chronomoe.routing.context import RoutingContext
from chronomoe.routing.dispatch import use_sorted_dispatch
from chronomoe.routing.gradients import compare_gradients
from chronomoe.routing.router import SteeredRouter
from chronomoe.routing.state import SteeringConfig
from chronomoe.routing.steering import Steering

ORDER = "experts", "steering"
"""Stages in the order in which a forward opens them; it closes them in reverse. In a block the router decides first,
and then stages mix into its output."""


def attach(
    model: nn.Module,
    config: SteeringConfig | None = None,
    control: ControlConfig | None = None,
    *,
    dispatch: str = "sorted",
) -> ChronovisorMixtralController:
    """Steer every router of ``model``; returns the controller, found as ``model.controller`` from now on.

    ``model.steering`` holds the fields. They stay neutral until something moves them: ``controller.tick()`` after each
    step's backward, as our trainer and callback do, or your own hand.
    ``dispatch`` names the experts implementation to use from now on (``sorted`` is ours; ``keep`` leaves the model's).
    With every field neutral the model's logits and gradients stay the same bits (with ``dispatch="keep"``; another
    dispatch sums in another order). In training its loss gains the router
    losses of ``config``, in place of transformers' own auxiliary loss.

    Raises :class:`UnsupportedModelError` for a model without routers of a known kind, :class:`ConfigError` when the
    model is steered already or its experts cannot be steered together.
    """
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError(f"cannot steer a {type(model).__name__}; give a model: {SUPPORTED}.")
    for given, kind in ((config, SteeringConfig), (control, ControlConfig)):
        if given is not None and not isinstance(given, kind):
            raise ConfigError(f"attach() was given a {type(given).__name__} where a {kind.__name__} belongs.")
    if isinstance(getattr(model, "steering", None), Steering):
        raise ConfigError("this model is steered already; use model.steering.")
    if dispatch not in ("keep", "eager") and dispatch not in ALL_EXPERTS_FUNCTIONS:
        raise ConfigError(f"there is no dispatch {dispatch!r}; use sorted, grouped_mm, eager or keep.")
    hosts = [(layer, host) for layer in _decoder_layers(model) if (host := host_of(layer)) is not None]
    first = _refuse_unequal(model, [at_path(layer, host.router) for layer, host in hosts])
    steering = Steering(
        len(hosts),
        first.num_experts,
        first.top_k,
        first.hidden_dim,
        config or SteeringConfig(),
        getattr(_decoder(model), "routing_depths", 1),
    )
    steering.to(first.weight.device)
    for number, (layer, host) in enumerate(hosts):
        _steer_router(at_path(layer, host.router), steering, number, host)
    layers = instrument(model, hosts)
    register(model, _Observe(steering))
    model.add_module("steering", steering)
    experts: Any = [layer.experts for layer in layers]
    controller = ChronovisorMixtralController(steering, control, experts).to(first.weight.device)
    model.add_module("controller", controller)
    model.register_forward_hook(_add_router_losses, with_kwargs=True)
    if hasattr(model, "router_aux_loss_coef"):
        # transformers adds its balance loss (layers pooled, not divided by K) when router logits are asked for. The
        # configuration keeps its coefficient: it is saved with the model.
        vars(model)["router_aux_loss_coef"] = 0.0
    if dispatch != "keep":
        use_sorted_dispatch(model, dispatch)
    # Each rank observes its own tokens; DDP must not overwrite them with rank 0's.
    local = [name for name, _ in model.named_buffers() if name.startswith(("steering.", "controller."))]
    vars(model)["_ddp_params_and_buffers_to_ignore"] = local
    return controller


def _refuse_unequal(model: nn.Module, routers: list[Any]) -> Any:
    """The first of a model's routers; an error when there are none, or when they cannot be steered together."""
    if not routers:
        found = sorted({type(m).__name__ for m in model.modules() if "Router" in type(m).__name__})
        seen = f"its routers are {', '.join(found)}" if found else "it has no MoE router"
        raise UnsupportedModelError(f"cannot steer a {type(model).__name__}: {seen}; supported are {SUPPORTED}.")
    first = routers[0]
    if any(router.num_experts != first.num_experts or router.top_k != first.top_k for router in routers):
        raise ConfigError(
            "the MoE layers differ in their number of experts or of experts per token; steer equal layers."
        )
    if first.top_k > first.num_experts:
        raise ConfigError(f"{first.top_k} experts per token of only {first.num_experts} experts; lower the former.")
    return first


def make_state_new(model: SteeredModel) -> None:
    """Give a steered model whose weights have just been loaded neutral fields and a controller that learned nothing."""
    layers = moe_layers(model)
    if layers:
        device = layers[0].router.weight.device
        model.steering.make_neutral(device)
        model.controller.make_new(device)


def moe_layers(model: Any) -> list[MoELayer]:
    """The MoE layers of a steered model in the order of their numbers; none of a model that is not steered."""
    instrument: _Instrument | None = getattr(_decoder(model), "_instrument", None)
    return [] if instrument is None else instrument.layers


def _decoder(model: Any) -> Any:
    return getattr(model, "model", model)


def _decoder_layers(model: Any) -> list[Any]:
    """The layers of a plain decoder, or of the low and the high stack of a hierarchical one."""
    base = _decoder(model)
    stacks = [base] if hasattr(base, "layers") else [getattr(base, name, None) for name in ("L_module", "H_module")]
    return [layer for stack in stacks if stack is not None for layer in stack.layers]


_STEERED_CLASSES: dict[type, Any] = {}


def _steer_router(router: Any, steering: Steering, layer: int, host: Host) -> None:
    """Turn a host's router into a :class:`SteeredRouter` in place; its parameters and hooks stay the same objects."""
    kind = type(router)
    if kind not in _STEERED_CLASSES:
        _STEERED_CLASSES[kind] = type(f"Steered{kind.__name__}", (SteeredRouter, kind), {})
    router.__class__ = _STEERED_CLASSES[kind]
    # Not a submodule: the model owns the one Steering, and every router only reads it.
    vars(router).update(
        steering=steering,
        layer=layer,
        normalise=host.always_normalised or bool(router.norm_topk_prob),
        keep_dtype=host.keep_dtype,
        context=None,
        slot=0,
    )


# -- one forward -------------------------------------------------------------------------------------------------------


class _Instrument:
    """What hangs on a decoder: its MoE layers, the stages of each forward, and the hooks on blocks, if anything mixes.

    Hooks find it through the module they are called with, so that a deep copy of the model works on its own.
    """

    def __init__(self, layers: list[MoELayer]) -> None:
        self.layers = layers
        self.stages: list[Stage] = []
        self.block_hooks: list[Any] = []


def instrument(model: Any, hosts: list[tuple[Any, Host]]) -> list[MoELayer]:
    """Open a context in each forward of ``model``, hand it to the routers, and call the registered stages.

    ``hosts`` are the layers of the decoder that have a router, and their rows in the table.
    """
    layers = [
        MoELayer(number, *(at_path(layer, path) for path in (host.block, host.router, host.experts)))
        for number, (layer, host) in enumerate(hosts)
    ]
    base = _decoder(model)
    vars(base)["_instrument"] = _Instrument(layers)
    base.register_forward_pre_hook(_open, with_kwargs=True)
    base.register_forward_hook(_close, with_kwargs=True)
    for moe_layer, (layer, host) in zip(layers, hosts, strict=True):
        # Attention gets the layer's extra arguments inside what checkpointing recomputes, just before the router.
        attention = at_path(layer, host.attention)
        vars(attention)["_moe_layer"] = vars(moe_layer.block)["_moe_layer"] = moe_layer
        attention.register_forward_pre_hook(_hand_down, with_kwargs=True)
    return layers


def register(model: Any, stage: Stage) -> None:
    """Let ``stage`` take part in each forward of a model that is instrumented."""
    instrument: _Instrument = _decoder(model)._instrument
    instrument.stages.append(stage)
    instrument.stages.sort(key=lambda one: ORDER.index(one.name))
    if stage.mixes and not instrument.block_hooks:
        for layer in instrument.layers:
            vars(layer.block)["_instrument"] = instrument
            instrument.block_hooks += [
                layer.block.register_forward_pre_hook(_take_context),
                layer.block.register_forward_hook(_mix),
            ]


def unregister(model: Any, name: str) -> None:
    """Undo :func:`register`; with the last stage that mixes the hooks on blocks go too."""
    instrument: _Instrument = _decoder(model)._instrument
    instrument.stages = [stage for stage in instrument.stages if stage.name != name]
    if not any(stage.mixes for stage in instrument.stages):
        for handle in instrument.block_hooks:
            handle.remove()
        instrument.block_hooks = []
        for layer in instrument.layers:
            vars(layer.block).pop("_instrument", None)


def _open(base: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    inputs = kwargs.get("input_ids", args[0] if args else None)
    if inputs is None:
        inputs = kwargs["inputs_embeds"][..., 0]
    mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
    batch, length = inputs.shape
    context = kwargs["routing_context"] = RoutingContext.begin(batch, length, mask)
    for stage in base._instrument.stages:
        stage.open(context, kwargs.get("past_key_values"))
    return args, kwargs


def _close(base: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
    for stage in reversed(base._instrument.stages):
        stage.close(kwargs["routing_context"], getattr(output, "past_key_values", None))


def _hand_down(attention: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    router = attention._moe_layer.router
    router.context = kwargs.pop("routing_context", None)
    router.slot = kwargs.get("cycle_offset", 0)
    return args, kwargs


def _take_context(block: Any, args: Any) -> None:
    layer: MoELayer = block._moe_layer
    layer.context = layer.router.context  # the router is about to take it away


def _mix(block: Any, args: Any, y_BSD: Tensor) -> Tensor:
    layer: MoELayer = block._moe_layer
    context, layer.context = layer.context, None
    if context is not None:
        for stage in block._instrument.stages:
            y_BSD = stage.mix(layer.number, context, args[0], y_BSD)
    return y_BSD


class _Observe(Stage):
    """Brings the fields up to date before a forward and observes its routers after it."""

    name = "steering"

    def __init__(self, steering: Steering) -> None:
        self.steering = steering

    def open(self, context: RoutingContext, cache: Any) -> None:
        self.steering.refresh()
        self.steering.context = context

    def close(self, context: RoutingContext, cache: Any) -> None:
        self.steering.observe(context)


# -- the loss ----------------------------------------------------------------------------------------------------------


def _add_router_losses(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    steering: Steering = model.steering  # type: ignore[assignment]
    context, loss = steering.context, getattr(output, "loss", None)
    if not model.training or loss is not None:
        steering.context = None  # else ChronoMoELoss.compute takes it
    if isinstance(output, tuple) and model.training and kwargs.get("labels") is not None:
        raise ConfigError("a steered model trains with return_dict=True: a tuple cannot carry the router losses.")
    if not model.training or loss is None or context is None:
        return output
    labels, num_items = kwargs.get("labels"), kwargs.get("num_items_in_batch")
    share = (
        None if labels is None or labels.dim() < 2 or num_items is None else (labels[..., 1:] != -100).sum() / num_items
    )
    by_layer = steering.layer_losses(context, share)
    terms = {name: values.mean() for name, values in by_layer.items()}
    if loss.requires_grad and not terms and any(p.requires_grad for p in _router_weights(model)):
        raise ConfigError(
            "the router losses have no gradient: checkpoint activations with "
            'model.activation_checkpointing_enable({"use_reentrant": False}).'
        )
    steering.last_losses = {"lm": loss.detach(), **{name: term.detach() for name, term in terms.items()}}
    output.loss = steering.config.loss.total(loss, terms)
    if steering.measuring:
        compare_gradients(steering, context, by_layer)
    if hasattr(output, "aux_loss"):
        output.aux_loss = terms.get("balance")
    return output


def _router_weights(model: nn.Module) -> list[Tensor]:
    return [module.weight for module in model.modules() if isinstance(module, SteeredRouter)]


# -- what is kept beside a key-value cache -----------------------------------------------------------------------------


class _WithGateStates:
    """Mixed into a cache's class: the states of gates follow its rows."""

    gate_states: dict[str, Tensor]

    def _change_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        self.gate_states = {uid: change(state) for uid, state in self.gate_states.items()}

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)  # type: ignore[misc]
        self._change_rows(lambda state: state.index_select(0, beam_idx.to(state.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]
        self._change_rows(lambda state: state.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)  # type: ignore[misc]
        self._change_rows(lambda state: state[indices])

    def reset(self) -> None:
        super().reset()  # type: ignore[misc]
        self.gate_states = {}

    def crop(self, tokens_to_remove: int) -> None:
        raise ConfigError("a cache cannot be cropped while experts are attached: their gates have read its tokens.")


_CACHE_CLASSES: dict[type, type] = {}


def keep_with_cache(cache: Any, states: dict[str, Tensor]) -> None:
    """Keep the states of gates, uid -> (B, 2), with the rows of a key-value cache."""
    kind = type(cache)
    if not isinstance(cache, _WithGateStates):
        if kind not in _CACHE_CLASSES:
            _CACHE_CLASSES[kind] = type(kind.__name__, (_WithGateStates, kind), {})
        cache.__class__ = _CACHE_CLASSES[kind]
    cache.gate_states = states


def kept_with_cache(cache: Any) -> dict[str, Tensor]:
    """What :func:`keep_with_cache` kept; empty for a new cache or None."""
    return dict(getattr(cache, "gate_states", {}))
