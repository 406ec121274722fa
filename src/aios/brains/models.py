"""The model of a run: which class, which configuration, which weights to begin with."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from aios.brains.bundle import check_config, load_weights, model_folder, refuse_small_vocabulary
from aios.brains.settings import HRMShape, ModelShape, Run
from chronomoe.data.token_store import TokenStore
from chronomoe.errors import CheckpointError, ConfigError


def build_model(base: Path, run: Run, store: TokenStore) -> Any:
    """The model a run begins with, freshly initialised or from the weights it names."""
    from transformers import set_seed

    set_seed(run.training.seed)
    model = _hrm(run, store) if isinstance(run.shape, HRMShape) else _mixtral(base, run, run.shape, store)
    if run.settings.student_init is not None and not run.settings.resume:
        load_student(model, run.settings.student_init)
    return model


def changed_shape(base: Path, before: ModelShape | HRMShape, now: ModelShape | HRMShape) -> bool:
    """Would the two make different models?"""
    if isinstance(before, ModelShape) and isinstance(now, ModelShape):
        return _configured(base, before).to_dict() != _configured(base, now).to_dict()
    return before != now


def hrm_config(shape: HRMShape, vocab_size: int, seq_len: int, **others: Any) -> Any:
    """The configuration of an HRM ACTv1 of that shape, to be trained on sequences of that length."""
    from chronomoe.hrm import HRMACTv1Config

    positions = seq_len if shape.pos_encodings == "learned" else max(2048, seq_len)
    fields = asdict(shape)
    fields["num_attention_heads"] = fields.pop("num_heads")
    return HRMACTv1Config(**fields, vocab_size=vocab_size, max_position_embeddings=positions, **others)


def load_student(model: Any, source: Path) -> None:
    """Put weights into a model: those of a bundle, a checkpoint or a .safetensors file; the fields start neutral.

    Raises :class:`CheckpointError` when they are missing, damaged or of another shape.
    """
    from safetensors.torch import load_file

    from chronomoe.experts.attachment import base_state
    from chronomoe.sidecars import refuse_old

    if source.is_dir():
        state = base_state(load_weights(model_folder(source)))
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


def _hrm(run: Run, store: TokenStore) -> Any:
    from chronomoe.hrm import HRMACTv1ForCausalLM

    shape, settings, separator = run.shape, run.settings, store.info.separator_id
    assert isinstance(shape, HRMShape)
    others: dict[str, Any] = {"eos_token_id": separator, "bos_token_id": separator}
    if shape.use_moe:
        others["steering"] = {"capacity_factor": settings.moe_capacity_factor}
    return HRMACTv1ForCausalLM(hrm_config(shape, store.info.vocab_size, settings.seq_len, **others))


def _mixtral(base: Path, run: Run, shape: ModelShape, store: TokenStore) -> Any:
    """The base model's weights if it has any, else freshly initialised from its configuration."""
    import torch

    from chronomoe import ChronovisorMixtralForCausalLM, MixtralConfig

    config = _configured(base, shape)
    steering = {**(config.steering or {}), "capacity_factor": run.settings.moe_capacity_factor}
    if any(base.glob("model*.safetensors")):
        if given := shape.given():
            raise ConfigError(f"{base} has weights, so its shape is fixed; leave out {', '.join(given)}.")
        if run.settings.seq_len > config.max_position_embeddings:
            raise ConfigError(f"{base} reads {config.max_position_embeddings} tokens; lower --seq-len to that.")
        config.steering = steering
        # Trained in fp32 whatever it was saved in: small updates vanish in bf16.
        model = load_weights(base, config=config, dtype=torch.float32)
        refuse_small_vocabulary(model, store.info.vocab_size, base)
        return model
    values = config.to_dict()
    values |= {"vocab_size": store.info.vocab_size, "eos_token_id": store.info.separator_id, "steering": steering}
    values["max_position_embeddings"] = max(config.max_position_embeddings, run.settings.seq_len)
    values |= {"bos_token_id": store.info.separator_id, "pad_token_id": None}
    return ChronovisorMixtralForCausalLM(MixtralConfig(**values))


def _configured(base: Path, shape: ModelShape) -> Any:
    """The base model's configuration, changed as asked."""
    from chronomoe import MixtralConfig

    check_config(base)
    config = MixtralConfig.from_pretrained(base)
    return MixtralConfig(**{**config.to_dict(), **_without_derived(config, shape.given())})


def _without_derived(config: Any, shape: dict[str, int]) -> dict[str, Any]:
    # A changed width drags along what was derived from the old one.
    names = {config.attribute_map.get(name, name): value for name, value in shape.items()}
    derived: dict[str, Any] = {}
    if "hidden_size" in names:
        derived = {"intermediate_size": None, "num_attention_heads": None, "num_key_value_heads": None}
    if names.keys() & {"hidden_size", "num_attention_heads"}:
        derived["head_dim"] = None
    return derived | names
