"""Families of brains: everything that depends on the kind of model a brain is, a class each.

A brain's folder names its family (artifacts/brains/<family>/<name>), the ``config.json`` of a saved model its
``model_type``: both lead to the row in :data:`FAMILIES`. Nothing outside this file asks which family a brain is of.
Importing it loads no torch.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from aios.settings.train import HRMShape, ModelShape
from aios.workspace import Workspace
from chronomoe.errors import CheckpointError, ChronoMoEError, ConfigError

ShapeT = TypeVar("ShapeT", ModelShape, HRMShape)
Config = Any
"""A configuration of transformers, of the family at hand."""


class Family(ABC, Generic[ShapeT]):
    """What the application must know of one kind of model; ``config`` is a configuration of that kind."""

    name: ClassVar[str]
    """The folder below artifacts/brains."""
    model_type: ClassVar[str]
    """As ``config.json`` spells it."""
    title: ClassVar[str]
    description: ClassVar[str]
    """A noun phrase for the model card."""
    shape: type[ShapeT]
    """Settings of the shape of a new model."""
    model_path: ClassVar[str]
    """module:class of the model."""
    halts: ClassVar[bool] = False
    """Do its models decide per token how many segments to run?"""
    can_be_dense: ClassVar[bool] = False

    @property
    def model_class(self) -> Any:
        """The class of its models; imports torch."""
        module, _, name = self.model_path.partition(":")
        return getattr(import_module(module), name)

    @abstractmethod
    def build(
        self, base: Path, shape: ShapeT, *, vocab_size: int, separator_id: int, seq_len: int, capacity: float | None
    ) -> Any:
        """A new model of ``shape`` for sequences of ``seq_len`` tokens.

        ``base``: folder of the base model. ``capacity``: tokens an expert may take, as a multiple of its fair share.
        Raises :class:`ConfigError` for a shape that cannot be, :class:`CheckpointError` for a damaged base model.
        """

    @abstractmethod
    def same_model(self, base: Path, one: ShapeT, other: ShapeT) -> bool:
        """Do the two shapes make the same model?"""

    @abstractmethod
    def layers_and_experts(self, config: Mapping[str, Any]) -> tuple[int, int]:
        """Layers with a router, and experts in each (0: dense), from a ``config.json``.

        Raises :class:`KeyError`, :class:`TypeError` or :class:`ValueError` where it does not say.
        """

    @abstractmethod
    def describe_blocks(self, config: Config) -> str:
        """The blocks of a model in a few words."""

    @abstractmethod
    def check_export(self, config: Config) -> None:
        """Raise :class:`ConfigError` when transformers has no model like this one."""

    @abstractmethod
    def default_data(self, root: Path, bundle: Path) -> Path:
        """Prepared data of a brain that names none."""

    def call_counts(self, config: Config) -> dict[str, int]:
        """How often a token passes the blocks whose parameter names begin so, at most; once where not listed."""
        return {}

    def kept_activations(self, config: Config) -> tuple[int, int]:
        """Blocks, and outputs of the vocabulary's size, whose activations the backward pass needs."""
        return config.num_hidden_layers, 1

    def segments(self, config: Config) -> int:
        """Segments a token may run."""
        return 1

    def layer_names(self, config: Config, layers: int) -> list[str]:
        """What to call its MoE layers."""
        return [str(layer) for layer in range(layers)]


class MixtralFamily(Family[ModelShape]):
    """Mixtral-style decoders, whose shape is a change to the base model's configuration."""

    name = "mixtral"
    model_type = "mixtral"
    title = "Mixtral"
    description = "A Mixtral-style decoder"
    shape = ModelShape
    model_path = "chronomoe:ChronovisorMixtralForCausalLM"

    def build(
        self, base: Path, shape: ModelShape, *, vocab_size: int, separator_id: int, seq_len: int, capacity: float | None
    ) -> Any:
        """As of :meth:`Family.build`; the base model's weights if it has any, else freshly initialised."""
        config = self._configured(base, shape)
        steering = {**(config.steering or {}), "capacity_factor": capacity}
        if any(base.glob("model*.safetensors")):
            if given := shape.changes:
                raise ConfigError(f"{base} has weights, so its shape is fixed; leave out {', '.join(given)}.")
            if seq_len > config.max_position_embeddings:
                raise ConfigError(f"{base} reads {config.max_position_embeddings} tokens; lower --seq-len to that.")
            config.steering = steering
            # Trained in fp32 whatever it was saved in: small updates vanish in bf16.
            model = load_weights(base, config=config, dtype="float32")
            refuse_small_vocabulary(model, vocab_size, base)
            return model
        values = config.to_dict()
        values |= {"vocab_size": vocab_size, "eos_token_id": separator_id, "steering": steering}
        values["max_position_embeddings"] = max(config.max_position_embeddings, seq_len)
        values |= {"bos_token_id": separator_id, "pad_token_id": None}
        return self.model_class(self.model_class.config_class(**values))

    def same_model(self, base: Path, one: ModelShape, other: ModelShape) -> bool:
        """As of :meth:`Family.same_model`."""
        return bool(self._configured(base, one).to_dict() == self._configured(base, other).to_dict())

    def layers_and_experts(self, config: Mapping[str, Any]) -> tuple[int, int]:
        """As of :meth:`Family.layers_and_experts`."""
        return int(config["num_hidden_layers"]), int(config["num_local_experts"])

    def describe_blocks(self, config: Config) -> str:
        """As of :meth:`Family.describe_blocks`."""
        return f"{config.num_hidden_layers} layers"

    def check_export(self, config: Config) -> None:
        """Each is a Mixtral of transformers."""

    def default_data(self, root: Path, bundle: Path) -> Path:
        """What `aios data prepare` writes without --out."""
        return Workspace(root).prepared

    def _configured(self, base: Path, shape: ModelShape) -> Config:
        """The base model's configuration, changed as asked."""
        read_config(base)
        make = self.model_class.config_class
        config = make.from_pretrained(base)
        return make(**{**config.to_dict(), **_without_derived(config, shape.changes)})


class HRMFamily(Family[HRMShape]):
    """Hierarchical reasoning models with adaptive computation time; their shape is complete in itself."""

    name = "actv1"
    model_type = "hrm_actv1"
    title = "HRM ACTv1"
    description = "A hierarchical reasoning model (HRM ACTv1)"
    shape = HRMShape
    model_path = "chronomoe.hrm:HRMACTv1ForCausalLM"
    halts = True
    can_be_dense = True

    def configure(self, shape: HRMShape, vocab_size: int, seq_len: int, **others: Any) -> Config:
        """The configuration of a model of that shape, to be trained on sequences of that length.

        Raises :class:`ConfigError` for a shape that cannot be.
        """
        positions = seq_len if shape.pos_encodings == "learned" else max(2048, seq_len)
        fields = asdict(shape)
        fields["num_attention_heads"] = fields.pop("num_heads")
        make = self.model_class.config_class
        return make(**fields, vocab_size=vocab_size, max_position_embeddings=positions, **others)

    def build(
        self, base: Path, shape: HRMShape, *, vocab_size: int, separator_id: int, seq_len: int, capacity: float | None
    ) -> Any:
        """As of :meth:`Family.build`; ``base`` has no part in it."""
        others: dict[str, Any] = {"eos_token_id": separator_id, "bos_token_id": separator_id}
        if shape.use_moe:
            others["steering"] = {"capacity_factor": capacity}
        return self.model_class(self.configure(shape, vocab_size, seq_len, **others))

    def same_model(self, base: Path, one: HRMShape, other: HRMShape) -> bool:
        """As of :meth:`Family.same_model`."""
        return one == other

    def layers_and_experts(self, config: Mapping[str, Any]) -> tuple[int, int]:
        """As of :meth:`Family.layers_and_experts`."""
        layers, experts = int(config["l_layers"]) + int(config["h_layers"]), int(config["num_local_experts"])
        return layers, experts if config["use_moe"] else 0

    def describe_blocks(self, config: Config) -> str:
        """As of :meth:`Family.describe_blocks`."""
        return (
            f"{config.h_layers} high and {config.l_layers} low blocks, {config.H_cycles} x {config.L_cycles} cycles, "
            f"up to {config.halt_max_steps} segments"
        )

    def check_export(self, config: Config) -> None:
        """Transformers has hrm_text, the model without what this family adds to it."""
        plain = config.halt_max_steps == 1 and not config.use_moe
        equal = config.h_layers == config.l_layers and config.pos_encodings == "rope"
        if not (plain and equal and config.window_size is None):
            raise ConfigError(
                "transformers' hrm_text knows no experts, no halting, no window and no stacks of unequal depth: this "
                "brain cannot be written as one. It loads with chronomoe.hrm.HRMACTv1ForCausalLM as it is."
            )

    def default_data(self, root: Path, bundle: Path) -> Path:
        """What `train-actv1` prepares in the bundle itself."""
        return bundle / "data"

    def call_counts(self, config: Config) -> dict[str, int]:
        """As of :meth:`Family.call_counts`."""
        cycles = config.halt_max_steps * config.H_cycles
        return {"model.L_module.": cycles * config.L_cycles, "model.H_module.": cycles}

    def kept_activations(self, config: Config) -> tuple[int, int]:
        """One head a segment, and the blocks of the cycles that carry gradient."""
        blocks = config.num_hidden_layers if config.grad_mode == "all" else config.num_hidden_layers // config.H_cycles
        return blocks, config.halt_max_steps

    def segments(self, config: Config) -> int:
        """As of :meth:`Family.segments`."""
        return int(config.halt_max_steps)

    def layer_names(self, config: Config, layers: int) -> list[str]:
        """Each with its level."""
        return [f"{layer} ({'low' if layer < config.l_layers else 'high'})" for layer in range(layers)]


MIXTRAL, ACTV1 = MixtralFamily(), HRMFamily()
FAMILIES: dict[str, Family[Any]] = {row.name: row for row in (MIXTRAL, ACTV1)}
"""By name, in the order in which they are listed."""


def family_of(model_type: str) -> Family[Any] | None:
    """The family of models of this ``model_type``."""
    return next((row for row in FAMILIES.values() if row.model_type == model_type), None)


def read_config(folder: Path) -> tuple[Family[Any], dict[str, Any]]:
    """The family of a saved model, and its ``config.json``.

    Raises :class:`CheckpointError` when the file is missing, damaged or of no known family: transformers would take it
    for a model of 47 billion parameters.
    """
    file = folder / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read ({error}).") from error
    family = family_of(str(config.get("model_type"))) if isinstance(config, dict) else None
    if family is None:
        titles = " or ".join(row.title for row in FAMILIES.values())
        raise CheckpointError(f"{file} does not describe a {titles} model; give the folder of one.")
    return family, config


def load_weights(folder: Path, **settings: Any) -> Any:
    """The model in a folder of weights; ``settings`` as of ``from_pretrained``.

    Raises :class:`CheckpointError` when they are damaged or not those of their config.json.
    """
    family, _ = read_config(folder)
    try:
        model, info = family.model_class.from_pretrained(folder, output_loading_info=True, **settings)
    except ChronoMoEError:
        raise
    except Exception as error:  # whatever the libraries raise for files they do not understand
        raise unreadable(folder, error) from error
    if missing := sorted(info["missing_keys"]):
        raise CheckpointError(f"the weights in {folder} are not those of its config.json: {missing[0]} is missing.")
    return model


def refuse_small_vocabulary(model: Any, tokens: int, folder: Path) -> None:
    """Raise :class:`CheckpointError` for a model with fewer tokens than its tokenizer; padding may give it more."""
    if model.config.vocab_size < tokens:
        raise CheckpointError(
            f"the tokenizer of {folder} has {tokens} tokens but its model {model.config.vocab_size}; "
            "they do not belong together."
        )


def unreadable(folder: Path, error: Exception) -> CheckpointError:
    """The error for a folder that a library failed to load."""
    reason = (str(error).strip().splitlines() or [""])[0]
    return CheckpointError(f"{folder} cannot be loaded: {type(error).__name__}, {reason}")


def _without_derived(config: Config, shape: dict[str, int]) -> dict[str, Any]:
    # A changed width drags along what was derived from the old one.
    names = {config.attribute_map.get(name, name): value for name, value in shape.items()}
    derived: dict[str, Any] = {}
    if "hidden_size" in names:
        derived = {"intermediate_size": None, "num_attention_heads": None, "num_key_value_heads": None}
    if names.keys() & {"hidden_size", "num_attention_heads"}:
        derived["head_dim"] = None
    return derived | names
