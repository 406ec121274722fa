"""What is measured: each arm is a function that does one forward+backward, one training step or one generation.

All arms of a comparison have the same weights (the dense one: as many as one token uses of the others) and see the same
inputs. ``ours`` includes what it does more than its peers: routing statistics in every layer and, in a step, the router
losses and the controller's tick, with every field live. Nobody clips gradients, nobody keeps a cache in training.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, MixtralForCausalLM
from transformers import MixtralConfig as HFMixtralConfig

from chronomoe import ChronovisorMixtralForCausalLM, MixtralConfig
from chronomoe.control.judge import set_masked
from chronomoe.training import CoherenceGatedOptimizer, TrainingConfig
from chronomoe.training.control import Control
from chronomoe.training.optimizer import build_optimizer
from chronomoe.training.step import StepResult

Arm = Callable[[], Tensor]
"""One unit of work. Its value (output, loss, tokens) is what the peers must agree on."""

OURS, GROUPED, EAGER, DENSE, UNSTEERED = "ours", "grouped_mm", "eager", "dense", "sorted"
"""Kinds of model: two are transformers' own experts implementations; ``sorted`` is our dispatch and nothing else."""

DEFAULT_ADAMW, FUSED_ADAMW, EAGER_ADAMW = "grouped_mm, default AdamW", "grouped_mm, fused AdamW", "eager, default AdamW"
STEP_ARMS = {
    OURS: (OURS, True),
    DEFAULT_ADAMW: (GROUPED, False),
    FUSED_ADAMW: (GROUPED, True),
    EAGER_ADAMW: (EAGER, False),
    "dense, fused AdamW": (DENSE, True),
}
"""Arm of a training step -> its kind of model, and whether its AdamW is the fused one."""
CONTROL_ARMS = {OURS: (OURS, True), "unsteered": (UNSTEERED, True)}
"""The same step with and without steering, statistics, router losses, controller, knob and gate."""


@dataclass(frozen=True)
class Shape:
    """A Mixtral-style decoder and the batch it is given."""

    num_experts: int = 8
    top_k: int = 2
    expert_width: int = 896
    vocab: int = 4096
    layers: int = 4
    hidden: int = 256
    heads: int = 8
    kv_heads: int = 4
    batch: int = 8
    length: int = 256

    def __str__(self) -> str:
        return f"N={self.num_experts} k={self.top_k} d={self.hidden} ff={self.expert_width}"


def build_model(shape: Shape, kind: str) -> Any:
    """A model in training mode: ours, dense, or transformers' Mixtral with that experts implementation."""
    fields: dict[str, Any] = {
        "vocab_size": shape.vocab,
        "hidden_size": shape.hidden,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
    }
    torch.manual_seed(0)
    if kind == DENSE:
        return LlamaForCausalLM(LlamaConfig(**fields, intermediate_size=shape.expert_width * shape.top_k)).train()
    fields |= {
        "intermediate_size": shape.expert_width,
        "num_local_experts": shape.num_experts,
        "num_experts_per_tok": shape.top_k,
    }
    plain = MixtralForCausalLM(HFMixtralConfig(**fields))
    if kind != OURS:
        plain.set_experts_implementation(kind)
        return plain.train()
    model = ChronovisorMixtralForCausalLM(MixtralConfig(**fields))
    model.load_state_dict(plain.state_dict(), strict=False)  # what it lacks are the steering's fields, neutral at first
    return model.train()


def layer_arms(shape: Shape) -> dict[str, Arm]:
    """Forward and backward of one MoE layer; ``dense`` is transformers' LlamaMLP, three bias-free linear maps."""
    small = replace(shape, layers=1, vocab=16)
    kinds = (OURS, GROUPED, EAGER, DENSE)
    return {kind: _layer_arm(build_model(small, kind).model.layers[0].mlp, shape) for kind in kinds}


def _layer_arm(layer: nn.Module, shape: Shape) -> Arm:
    generator = torch.Generator().manual_seed(1)
    x, grad = (torch.randn(shape.batch, shape.length, shape.hidden, generator=generator) for _ in range(2))
    x.requires_grad_()  # as the input of a layer inside a model

    def forward_backward() -> Tensor:
        layer.zero_grad(set_to_none=True)
        x.grad = None
        out: Tensor = layer(x)
        out.backward(grad)
        return out.detach()

    return forward_backward


def step_arms(shape: Shape, skip: str | None = None) -> dict[str, Arm]:
    """The training steps of :data:`STEP_ARMS`, but for ``skip``."""
    return {name: step_arm(shape, name) for name in STEP_ARMS if name != skip}


def control_arms(shape: Shape, kappa: float, bad_expert: bool = False) -> dict[str, Arm]:
    """The training steps of :data:`CONTROL_ARMS`; above kappa = 0 there is exploration noise."""
    return {name: step_arm(shape, name, kappa, bad_expert) for name in CONTROL_ARMS}


def step_arm(shape: Shape, name: str, kappa: float = -0.3, bad_expert: bool = False) -> Arm:
    """One training step on the next batch of a stream of random tokens; its value is the language model's loss.

    ``bad_expert``: ours keeps one expert masked that would do harm, so health probes it for ever.
    """
    kind, fused = {**STEP_ARMS, **CONTROL_ARMS}[name]
    model = build_model(shape, kind)
    if bad_expert and kind == OURS:
        model.model.layers[0].mlp.experts.down_proj.data[0] = torch.inf
        set_masked(model.controller, model.steering, 0, 0, masked=True)
    config = TrainingConfig(initial_kappa=kappa, final_kappa=kappa)
    optimizer: Any
    if kind in (OURS, UNSTEERED):
        optimizer = build_optimizer(model, config)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, fused=fused or None)
    gated = CoherenceGatedOptimizer(optimizer) if kind == OURS else None
    optimizer = gated or optimizer
    control = Control(model, getattr(model, "controller", None), config, 10**6, show=print, gated=gated)
    generator = torch.Generator().manual_seed(1)

    def step() -> Tensor:
        tokens = torch.randint(shape.vocab, (shape.batch, shape.length), generator=generator)
        optimizer.zero_grad(set_to_none=True)
        loss: Tensor = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        lm_loss = model.steering.last_losses["lm"] if kind == OURS else loss.detach()
        made = StepResult(number=1, batches=[{"input_ids": tokens}], losses={"loss": float(lm_loss)})
        control.after_backward(made)  # as the trainer does
        optimizer.step()
        return lm_loss

    return step


def decode_arms(shape: Shape, prompt: int, new: int) -> dict[str, Arm]:
    """Greedy generation by ``generate`` at batch 1: ``new`` tokens after ``prompt`` tokens, whichever they are."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(shape.vocab, (1, prompt), generator=generator)
    settings = {"attention_mask": torch.ones_like(tokens), "max_new_tokens": new, "do_sample": False}
    models = {kind: build_model(shape, kind).eval() for kind in (OURS, GROUPED, EAGER)}
    for model in models.values():
        model.generation_config.eos_token_id = None
    return {kind: partial(model.generate, tokens, **settings) for kind, model in models.items()}
