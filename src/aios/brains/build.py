"""The model a training run begins with."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from safetensors.torch import load_file
from torch import Tensor
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
    if bad := next((name for name, tensor in base_state(model).items() if not bool(tensor.isfinite().all())), None):
        raise CheckpointError(f"the weights in {weights or base} are not finite ({bad}); start from others.")
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
        state = _weights_in(source, model)
    mine = base_state(model)
    tied = set(mine) - set(state) if model.config.tie_word_embeddings else set()
    wrong = [name for name in mine if name not in tied and (name not in state or state[name].shape != mine[name].shape)]
    wrong += [name for name in state if name not in mine]
    if wrong:
        raise CheckpointError(f"the weights in {source} do not fit this model: {wrong[0]} is missing or differs.")
    model.load_state_dict(state, strict=False)


def _weights_in(file: Path, model: Any) -> dict[str, Tensor]:
    """The weights in a .safetensors file, under the names that ``model`` has for them."""
    try:
        names = load_file(file)
    except Exception as error:
        raise CheckpointError(f"{file} holds no weights that can be read ({error}).") from error
    refuse_old(names, file)
    # transformers saves some weights in another form than it computes with, and converts them when it loads a folder.
    with TemporaryDirectory() as place:
        model.config.save_pretrained(place)
        (Path(place) / "model.safetensors").symlink_to(file.resolve())
        try:
            return base_state(load_weights(Path(place)))
        except CheckpointError as error:
            reason = str(error).replace(place, str(file)).removesuffix(".")
            raise CheckpointError(f"the weights in {file} do not fit this model: {reason}.") from error
