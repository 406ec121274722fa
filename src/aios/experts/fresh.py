"""Train an expert as `train-actv1 --expert-id` says: in a brain, or in a model that is not a brain."""

from collections.abc import Callable
from typing import Any

import torch

from aios.brains.actv1 import wants_cpu
from aios.brains.brain import Brain
from aios.brains.build import tokenizer_of
from aios.brains.families import ACTV1, load_weights
from aios.brains.loaded import load_brain, load_tokenizer
from aios.experts.train import Base, train_expert
from aios.settings.actv1 import ACTv1Run
from aios.workspace import Workspace
from chronomoe.errors import ConfigError

Show = Callable[[str], None]


def train_expert_of(run: ACTv1Run, show: Show = print) -> dict[str, Any]:
    """Train the expert ``run.expert_id`` alone; results as of :func:`aios.experts.train.train_expert`.

    It learns in the brain named or in --student-init's, or else in the weights of --model or a fresh model, from which
    it does not transfer.
    """
    settings = run.as_expert()
    use_cpu = wants_cpu(run, show)
    assert run.expert_id is not None
    base = None if settings.brain is not None else _base(run, show)
    return train_expert(run.root, run.expert_id, settings, base, show, use_cpu=use_cpu)


def _base(run: ACTv1Run, show: Show) -> Base:
    folder = run.model or Workspace(run.root).base_model
    if run.student_init is not None:
        student = Brain(run.root, run.student_init)
        return Base(load_brain(student).model, student.weights)
    Workspace(run.root).refuse_missing_base(folder, "config.json" if run.tokenizer else "tokenizer.json")
    if any(folder.glob("model*.safetensors")):
        if run.tokenizer is not None:
            raise ConfigError(f"{folder} has weights, trained with its own tokenizer; leave out --tokenizer.")
        return Base(load_weights(folder).eval(), folder)
    torch.manual_seed(run.seed)
    folder = tokenizer_of(run.tokenizer, folder, run.family)
    tokenizer = load_tokenizer(folder)
    show(
        "The base is a fresh, untrained model: the expert learns, but will not transfer to a trained brain. "
        "Name one with --brain-name."
    )
    ids = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.eos_token_id}
    config = ACTV1.configure(run.shape, len(tokenizer), run.seq_len, **ids)
    return Base(ACTV1.model_class(config).eval(), folder)
