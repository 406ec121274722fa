"""Learned conditioning: what routers have learned to add for the text of a goal.

    z = W h + A e          e: the goal's text, mean of the model's own token embeddings, length 1; goals average

A (layers, experts, hidden size) starts at zero and is all that is trained; where no goal is on nothing is added, so a
model with and without it is the same to the bit. Unlike the goal field, this is meaning: it enters the weights too.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from chronomoe.errors import CheckpointError, ConfigError
from chronomoe.experts.file import base_fingerprint
from chronomoe.experts.training import Trainee, only_read
from chronomoe.goals.steer import Goal
from chronomoe.hosts.protocol import SteeredModel
from chronomoe.storage import whole_file

FILE = "goal_conditioning.safetensors"


class GoalConditioning(nn.Module):
    """A; ``embedding`` e (hidden size) is set while goals are on."""

    def __init__(self, layers: int, experts: int, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(layers, experts, hidden_size))
        self.embedding: Tensor | None = None

    def forward(self, layer: int) -> Tensor | None:
        """What goals add to the logits of one layer, (N,); None without any."""
        return None if self.embedding is None else self.weight[layer] @ self.embedding


def attach_conditioning(model: Any) -> GoalConditioning:
    """The conditioning of a steered model, all zero if it had none. Raises :class:`ConfigError` for other models."""
    steering = getattr(model, "steering", None)
    if steering is None:
        raise ConfigError("this model has no routers, which would learn a goal.")
    if steering.conditioning is None:
        layers, experts = steering.available.shape
        made = GoalConditioning(layers, experts, model.config.hidden_size)
        vars(steering)["conditioning"] = made.to(
            steering.pressure.device
        )  # not a submodule: no part of the model's file
    found: GoalConditioning = steering.conditioning
    return found


@torch.no_grad()
def embed(model: SteeredModel, goals: Sequence[Goal]) -> Tensor:
    """e of goals, weighted by their weights, (hidden size)."""
    table = model.get_input_embeddings().weight
    parts = [F.normalize(table[list(goal.tokens)].float().mean(dim=0), dim=0) * goal.weight for goal in goals]
    return torch.stack(parts).sum(dim=0) / sum(goal.weight for goal in goals)


def condition(model: Any, goals: Sequence[Goal]) -> None:
    """Give the routers these goals, and no others; without any they are as they were."""
    made = attach_conditioning(model) if goals else getattr(model.steering, "conditioning", None)
    if made is not None:
        made.embedding = embed(model, goals) if goals else None


@contextmanager
def conditioned(made: GoalConditioning, embedding: Tensor | None) -> Iterator[None]:
    """Within the block the goal of that embedding is on, or no goal."""
    before, made.embedding = made.embedding, embedding
    try:
        yield
    finally:
        made.embedding = before


@contextmanager
def conditioning_trainee(model: SteeredModel, goals: Sequence[Goal], anchor_weight: float) -> Iterator[Trainee]:
    """A trainee that learns A: a batch of ``goals[i]`` carries that number as ``goal``. The base is only read."""
    made = attach_conditioning(model)
    embeddings = [embed(model, [goal]) for goal in goals]
    with only_read(model):
        yield Trainee(
            model,
            made,
            FILE,
            lambda number: conditioned(made, embeddings[number]),
            lambda: conditioned(made, None),
            anchor_weight,
        )


def save_conditioning(model: Any, folder: Path) -> None:
    """Write A beside a saved model, in one step; it belongs to those weights."""
    from safetensors.torch import save

    tensors = {"weight": model.steering.conditioning.weight.detach().cpu().contiguous()}
    with whole_file(folder / FILE) as file:
        file.write(save(tensors, {"base_fingerprint": base_fingerprint(model)}))


def load_conditioning(model: Any, folder: Path) -> bool:
    """Read A from beside a saved model; False when there is none.

    Raises :class:`CheckpointError` when it is damaged or was learned with other weights.
    """
    from safetensors import safe_open

    file = folder / FILE
    if not file.exists():
        return False
    try:
        with safe_open(file, framework="pt") as content:
            known, weight = (content.metadata() or {}).get("base_fingerprint"), content.get_tensor("weight")
    except Exception as error:  # whatever the library raises for what it does not understand
        raise CheckpointError(f"{file} is damaged ({error}); teach the goals again.") from error
    if known != base_fingerprint(model):
        raise CheckpointError(f"{file} was learned with other weights than those beside it; teach the goals again.")
    made = attach_conditioning(model)
    if weight.shape != made.weight.shape or not bool(weight.isfinite().all()):
        raise CheckpointError(f"{file} does not fit the model, or holds values that are not finite; teach it again.")
    made.weight.data.copy_(weight)
    return True
