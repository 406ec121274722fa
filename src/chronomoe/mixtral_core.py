"""MixtralConfig: transformers' configuration of a Mixtral, under the names ChronoMoE uses.

Both spellings work everywhere (``hidden_dim`` and ``hidden_size``, ...); what is saved are transformers' names, so a
saved model opens in plain transformers too.
"""

from typing import TYPE_CHECKING, Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import MixtralConfig as HFMixtralConfig

from chronomoe.errors import ConfigError, require


@strict
class MixtralConfig(HFMixtralConfig):
    """Shape of a Mixtral-style decoder.

    ``vocab_size``, ``hidden_dim``, ``intermediate_dim`` (3.5 hidden_dim), ``num_layers``, ``num_experts``,
    ``num_experts_per_token``, ``num_attention_heads`` (hidden_dim / 32 or the next divisor below, at most 32),
    ``num_key_value_heads`` (a quarter of the heads or the next divisor below), ``head_dim`` (hidden_dim / heads),
    ``max_seq_length``, ``rms_norm_eps``, ``rope_theta``,
    ``tie_word_embeddings``; in brackets what is derived when not given. ``enable_chronovisor=False`` makes the fields
    inert. ``steering`` and ``control`` hold fields of :class:`chronomoe.SteeringConfig` and :class:`ControlConfig`.

    Raises :class:`ConfigError` for combinations that cannot work.
    """

    attribute_map: ClassVar[dict[str, str]] = {
        "num_experts": "num_local_experts",
        "hidden_dim": "hidden_size",
        "intermediate_dim": "intermediate_size",
        "num_layers": "num_hidden_layers",
        "num_experts_per_token": "num_experts_per_tok",
        "max_seq_length": "max_position_embeddings",
    }

    intermediate_size: int | None = None  # type: ignore[assignment]
    num_attention_heads: int | None = None  # type: ignore[assignment]
    num_key_value_heads: int | None = None  # type: ignore[assignment]
    max_position_embeddings: int = 32768
    enable_chronovisor: bool = True
    steering: dict[str, Any] | None = None
    control: dict[str, Any] | None = None

    if TYPE_CHECKING:  # the real one is made by transformers from the fields and takes the aliases too

        def __init__(self, **kwargs: Any) -> None: ...

    def __post_init__(self, **kwargs: Any) -> None:
        for alias in set(kwargs) & set(self.attribute_map):
            setattr(self, alias, kwargs.pop(alias))
        if self.intermediate_size is None:
            self.intermediate_size = int(3.5 * self.hidden_size)
        if self.num_attention_heads is None:
            self.num_attention_heads = _heads(self.hidden_size)
        if self.num_key_value_heads is None:
            self.num_key_value_heads = _largest_divisor(self.num_attention_heads, self.num_attention_heads // 4)
        self._refuse_bad_shapes()
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        super().__post_init__(**kwargs)  # type: ignore[no-untyped-call]

    def _refuse_bad_shapes(self) -> None:
        sizes = "vocab_size", "hidden_dim", "intermediate_dim", "num_layers", "max_seq_length"
        numbers = "num_experts", "num_experts_per_token", "num_attention_heads", "num_key_value_heads"
        require(self, *sizes, *numbers, least=1, integer=True)
        require(self, "head_dim", least=2, integer=True, optional=True)
        heads, kv_heads = int(self.num_attention_heads or 0), int(self.num_key_value_heads or 0)
        if self.num_experts_per_token > self.num_experts:
            raise ConfigError(
                f"num_experts_per_token ({self.num_experts_per_token}) exceeds num_experts ({self.num_experts}); "
                "a token cannot use more experts than there are."
            )
        if self.head_dim is None and self.hidden_dim % heads:
            raise ConfigError(
                f"hidden_dim ({self.hidden_dim}) is not divisible by num_attention_heads ({heads}); "
                "change one of them or give head_dim."
            )
        head_dim = self.head_dim or self.hidden_dim // heads
        if head_dim % 2:
            raise ConfigError(f"head_dim is {head_dim}; rotary position embedding needs an even one.")
        if heads % kv_heads:
            raise ConfigError(
                f"num_attention_heads ({heads}) is not divisible by num_key_value_heads ({kv_heads}); change one."
            )


def _heads(width: int) -> int:
    """The most heads, at most ``width / 32`` and 32, that divide ``width`` into an even size each."""
    if not isinstance(width, int) or width < 2:
        return 1
    return next(heads for heads in range(max(1, min(32, width // 32)), 0, -1) if width % (2 * heads) == 0 or heads == 1)


def _largest_divisor(number: int, limit: int) -> int:
    return next((found for found in range(limit, 1, -1) if number % found == 0), 1)
