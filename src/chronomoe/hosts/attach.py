"""attach(model): put steering and its controller on a transformers MoE model, as transformers builds it.

Three seams, all public: the router modules (see router.py), forward hooks that hand each router the context of its
forward pass, and a forward hook on the whole model that adds the router losses to the training loss.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from chronomoe.control.config import ControlConfig
from chronomoe.control.controller import ChronovisorMixtralController
from chronomoe.errors import ConfigError, UnsupportedModelError
from chronomoe.routing.dispatch import use_sorted_dispatch
from chronomoe.routing.gradients import compare_gradients
from chronomoe.routing.router import SteeredRouter, steer_router
from chronomoe.routing.steering import Steering, SteeringConfig


@dataclass(frozen=True)
class _Host:
    """How a family of routers turns probabilities into combine weights."""

    keep_dtype: bool
    """Weights come back in the dtype of the hidden states (else fp32)."""
    always_normalised: bool = False
    """Weights of the chosen experts sum to 1 (else the router says, in ``norm_topk_prob``)."""


HOSTS = {
    "MixtralTopKRouter": _Host(keep_dtype=False, always_normalised=True),
    "OlmoeTopKRouter": _Host(keep_dtype=True),
    "Qwen2MoeTopKRouter": _Host(keep_dtype=True),
    "Qwen3MoeTopKRouter": _Host(keep_dtype=True),
}
"""Router classes of transformers that can be steered: softmax over a linear map, top-K."""

STATE_PREFIXES = ("steering.", "controller.")
"""Names of what steering adds to a model's state begin with one of these."""

SUPPORTED = "Mixtral, OLMoE, Qwen2-MoE and Qwen3-MoE"


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
    base = getattr(model, "model", model)
    routers = [(layer, router) for layer in _layers_of(base) if (router := _router_of(layer)) is not None]
    if not routers:
        found = sorted({type(m).__name__ for m in model.modules() if "Router" in type(m).__name__})
        seen = f"its routers are {', '.join(found)}" if found else "it has no MoE router"
        raise UnsupportedModelError(f"cannot steer a {type(model).__name__}: {seen}; supported are {SUPPORTED}.")
    first = routers[0][1]
    if any(router.num_experts != first.num_experts or router.top_k != first.top_k for _, router in routers):
        raise ConfigError(
            "the MoE layers differ in their number of experts or of experts per token; steer equal layers."
        )
    if first.top_k > first.num_experts:
        raise ConfigError(f"{first.top_k} experts per token asked of {first.num_experts} experts; lower the former.")
    steering = Steering(
        len(routers),
        first.num_experts,
        first.top_k,
        first.hidden_dim,
        config or SteeringConfig(),
        getattr(base, "routing_depths", 1),
    )
    steering.to(first.weight.device)
    for index, (layer, router) in enumerate(routers):
        host = HOSTS[type(router).__name__]
        normalise = host.always_normalised or bool(router.norm_topk_prob)
        steer_router(router, steering, index, normalise=normalise, keep_dtype=host.keep_dtype)
        # Attention gets the layer's extra arguments inside what checkpointing recomputes, just before the router.
        vars(layer.self_attn)["_router"] = router  # not a submodule
        layer.self_attn.register_forward_pre_hook(_hand_context_to_router, with_kwargs=True)
    vars(base)["_steering"] = steering  # not a second submodule
    base.register_forward_pre_hook(_open_context, with_kwargs=True)
    base.register_forward_hook(_observe_routers, with_kwargs=True)
    model.add_module("steering", steering)
    experts = [layer.mlp.experts for layer, _ in routers]
    controller = ChronovisorMixtralController(steering, control, experts).to(first.weight.device)
    model.add_module("controller", controller)
    model.register_forward_hook(_add_router_losses, with_kwargs=True)
    _turn_off_own_auxiliary_loss(model)
    if dispatch != "keep":
        use_sorted_dispatch(model, dispatch)
    # Each rank observes its own tokens; DDP must not overwrite them with rank 0's.
    local = [name for name, _ in model.named_buffers() if name.startswith(STATE_PREFIXES)]
    vars(model)["_ddp_params_and_buffers_to_ignore"] = local
    return controller


def moe_layers(model: Any) -> list[Any]:
    """The MoE blocks of a steered model in the order of their numbers, each with its router as ``gate``."""
    blocks = [layer.mlp for layer in _layers_of(getattr(model, "model", model))]
    return [block for block in blocks if isinstance(getattr(block, "gate", None), SteeredRouter)]


def _layers_of(base: Any) -> list[Any]:
    """The blocks of a plain decoder, or of the low and the high stack of a hierarchical one."""
    stacks = [base] if hasattr(base, "layers") else [getattr(base, name, None) for name in ("L_module", "H_module")]
    return [layer for stack in stacks if stack is not None for layer in stack.layers]


def _router_of(layer: nn.Module) -> Any:
    gate = getattr(getattr(layer, "mlp", None), "gate", None)
    return gate if type(gate).__name__ in HOSTS else None


def _turn_off_own_auxiliary_loss(model: nn.Module) -> None:
    # transformers adds its balance loss (layers pooled, not divided by K) when router logits are asked for.
    owner: Any
    for owner in (model, getattr(model, "config", None)):
        if hasattr(owner, "router_aux_loss_coef"):
            owner.router_aux_loss_coef = 0.0


# Hooks find their objects through the module they are called with, so that a deep copy of the model is whole.


def _open_context(base: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    inputs = kwargs.get("input_ids", args[0] if args else None)
    if inputs is None:
        inputs = kwargs["inputs_embeds"][..., 0]
    mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
    base._steering.context = kwargs["routing_context"] = base._steering.new_context(mask, *inputs.shape)
    return args, kwargs


def _observe_routers(base: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
    base._steering.observe(kwargs["routing_context"])


def _hand_context_to_router(attention: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    attention._router.context = kwargs.pop("routing_context", None)
    attention._router.slot = kwargs.get("cycle_offset", 0)
    return args, kwargs


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
