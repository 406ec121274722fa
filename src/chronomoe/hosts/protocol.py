"""What chronomoe expects of a host: models, blocks, routers and experts as transformers builds them."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from chronomoe.control.controller import ChronovisorMixtralController
from chronomoe.routing.context import RoutingContext
from chronomoe.routing.steering import Steering


class SteeredModel(Protocol):
    """A causal language model after ``attach``."""

    config: Any
    training: bool
    steering: Steering
    controller: ChronovisorMixtralController

    def __call__(self, **inputs: Any) -> Any:
        """A model output with ``logits`` (batch, sequence, vocabulary)."""

    def eval(self) -> Any:
        """Switch to evaluation mode."""

    def train(self, mode: bool = True) -> Any:
        """Switch to training mode."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """All weights."""


class Router(Protocol):
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

    def __call__(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """The mixture (T, D)."""


class MoEBlock(Protocol):
    """Router and experts of one layer: (batch, sequence, D) to the same."""

    def register_forward_pre_hook(self, hook: Any) -> Any:
        """As torch's."""

    def register_forward_hook(self, hook: Any) -> Any:
        """As torch's."""


@dataclass(eq=False)
class MoELayer:
    """One MoE layer of a steered model."""

    number: int
    """Counted from 0, MoE layers only."""
    block: Any
    router: Any
    experts: Any
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
