"""The model a training run begins with."""

from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from transformers import set_seed

from aios.brains.brain import Brain
from aios.brains.families import FAMILIES, load_weights
from aios.data.tokenizers import find_tokenizer, tokenizer_fingerprint
from aios.settings.train import Shape
from chronomoe.data.store_info import StoreInfo
from chronomoe.errors import CheckpointError, ConfigError
from chronomoe.experts.attachment import base_state
from chronomoe.sidecars import refuse_old


def build_model(
    family: str,
    base: Path,
    shape: Shape,
    data: StoreInfo,
    *,
    seed: int,
    seq_len: int,
    capacity: float | None,
    weights: Path | None = None,
) -> Any:
    """A model of ``family`` for ``data``, freshly initialised or from ``weights``; see :meth:`Family.build`."""
    set_seed(seed)
    model = FAMILIES[family].build(
        base, shape, vocab_size=data.vocab_size, separator_id=data.separator_id, seq_len=seq_len, capacity=capacity
    )
    if weights is not None:
        load_student(model, weights)
    return model


def tokenizer_of(tokenizer: Path | None, base: Path, family: str) -> Path:
    """The folder of the tokenizer of a new brain: ``tokenizer`` if one is named, else the base model's.

    :class:`ConfigError` for one that weights to start from were not trained with; :class:`DataError` for none.
    """
    if tokenizer is None:
        return base
    folder = find_tokenizer(tokenizer)
    has_weights = family == "mixtral" and any(base.glob("model*.safetensors"))
    if has_weights and tokenizer_fingerprint(folder) != tokenizer_fingerprint(base):
        raise ConfigError(f"{base} has weights, which were trained with its own tokenizer; leave out --tokenizer.")
    return folder


def load_student(model: Any, source: Path) -> None:
    """Put weights into a model: those of a brain, a checkpoint or a .safetensors file; the fields start neutral.

    Raises :class:`CheckpointError` when they are missing, damaged or of another shape.
    """
    if source.is_dir():
        state = base_state(load_weights(Brain(Path(), source).weights))
    else:
        try:
            state = load_file(source)
        except Exception as error:
            raise CheckpointError(f"{source} holds no weights that can be read ({error}).") from error
        refuse_old(state, source)
    mine = base_state(model)
    tied = set(mine) - set(state) if model.config.tie_word_embeddings else set()
    wrong = [name for name in mine if name not in tied and (name not in state or state[name].shape != mine[name].shape)]
    wrong += [name for name in state if name not in mine]
    if wrong:
        raise CheckpointError(f"the weights in {source} do not fit this model: {wrong[0]} is missing or differs.")
    model.load_state_dict(state, strict=False)
