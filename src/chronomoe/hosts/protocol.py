"""What chronomoe expects of a host: models, blocks, routers and experts as transformers builds them."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from chronomoe.control.controller import ChronovisorMixtralController
from chronomoe.routing.context import RoutingContext
from chronomoe.routing.steering import Steering


class SteeredModel(Protocol):
    """A causal language model after ``attach``."""

    config: Any
    training: bool
    dtype: torch.dtype
    steering: Steering
    controller: ChronovisorMixtralController

    @property
    def model(self) -> Any:
        """The decoder."""

    def __call__(self, **inputs: Any) -> Any:
        """A model output with ``logits`` (batch, sequence, vocabulary)."""

    def eval(self) -> Any:
        """Switch to evaluation mode."""

    def train(self, mode: bool = True) -> Any:
        """Switch to training mode."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """All weights."""

    def state_dict(self) -> dict[str, Tensor]:
        """All weights by name; fields and controller are not among them."""

    def get_input_embeddings(self) -> Any:
        """The table of token embeddings."""


class Hooked(Protocol):
    """A module that calls hooks."""

    def register_forward_pre_hook(self, hook: Any) -> Any:
        """As torch's."""

    def register_forward_hook(self, hook: Any) -> Any:
        """As torch's."""


class Router(Hooked, Protocol):
    """A router of transformers, steered: (T, D) to logits (T, N), combine weights (T, K) and chosen experts (T, K)."""

    weight: nn.Parameter
    top_k: int
    num_experts: int
    hidden_dim: int
    layer: int
    context: RoutingContext | None
    slot: int


class Experts(Protocol):
    """The experts of one layer: ``gate_up_proj`` (N, 2 F, D) and ``down_proj`` (N, D, F)."""

    gate_up_proj: nn.Parameter
    down_proj: nn.Parameter
    intermediate_dim: int

    def __call__(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """The mixture (T, D)."""


class MoEBlock(Hooked, Protocol):
    """Router and experts of one layer: (batch, sequence, D) to the same."""


@dataclass(eq=False)
class MoELayer:
    """One MoE layer of a steered model."""

    number: int
    """Counted from 0, MoE layers only."""
    block: MoEBlock
    router: Router
    experts: Experts
    context: RoutingContext | None = None
    """Of the call that the block is in, while something is mixed into its output."""


class Stage:
    """What takes part in each forward of an instrumented model; each method does nothing unless overridden."""

    name: str
    """One of chronomoe.hosts.attach.ORDER."""
    mixes = False
    """Does :meth:`mix` change the output of blocks?"""

    def open(self, context: RoutingContext, cache: Any) -> None:
        """A forward begins; ``cache`` is the key-value cache it was given, if any."""

    def close(self, context: RoutingContext, cache: Any) -> None:
        """A forward is over; ``cache`` is the key-value cache it returns, if any."""

    def mix(self, layer: int, context: RoutingContext, h_BSD: Tensor, y_BSD: Tensor) -> Tensor:
        """A block's output, from its input and its own output."""
        return y_BSD
