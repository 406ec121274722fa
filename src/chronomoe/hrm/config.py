"""HRMACTv1Config: transformers' configuration of hrm_text, with stacks of their own depth, experts and halting."""

from typing import TYPE_CHECKING, Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import HrmTextConfig

from chronomoe.errors import ConfigError, require
from chronomoe.hrm_shape import HRMShape

CHOICES = {
    "pos_encodings": ("rope", "learned"),
    "grad_mode": ("one_step", "last_cycle", "all"),
    "halting": ("exact", "max"),
}


def ffn_width(hidden_size: int, expansion: float) -> int:
    """Width of a SwiGLU of ``expansion``: two thirds of it, since it has three matrices; a multiple of 256 (HRM)."""
    return -(-round(expansion * hidden_size * 2 / 3) // 256) * 256


@strict
class HRMACTv1Config(HrmTextConfig):
    """Shape of an HRM ACTv1.

    A segment runs ``H_cycles`` times: ``L_cycles`` calls of the low stack (``l_layers`` blocks), one of the high stack
    (``h_layers``). A token gets up to ``halt_max_steps`` segments. ``use_moe`` puts ``num_experts`` experts of
    ``intermediate_size`` (from ``expansion`` when not given) into every block, ``num_experts_per_tok`` for each token;
    else each has one dense SwiGLU.

    ``pos_encodings``: rope or learned. ``window_size``: tokens each token sees, itself included; None for all before
    it. ``grad_mode``: which calls of a segment carry gradient: one_step (the last of each stack), last_cycle (those of
    the last high cycle), all. ``halting``: exact (each token stops where its head says) or max (never before the cap).
    ``halt_cap`` lowers the number of segments at inference. ``halt_bias`` is the head's first bias: deep, or a model
    learns to stop before further segments help it. ``halt_exploration`` is the share of tokens that must, in training,
    run a random number of segments. ``halt_gain``, nats: a further segment that is expected to gain less is not worth
    it. ``steering`` and ``control`` as in :class:`chronomoe.MixtralConfig`.

    Raises :class:`ConfigError` for combinations that cannot work.
    """

    model_type = "hrm_actv1"
    attribute_map: ClassVar[dict[str, str]] = {
        "num_experts": "num_local_experts",
        "h_cycles": "H_cycles",
        "l_cycles": "L_cycles",
    }

    hidden_size: int = HRMShape.hidden_size
    intermediate_size: int | None = None  # type: ignore[assignment]
    expansion: float = HRMShape.expansion
    num_attention_heads: int = HRMShape.num_heads
    head_dim: int | None = None  # type: ignore[assignment]
    h_layers: int = HRMShape.h_layers
    l_layers: int = HRMShape.l_layers
    H_cycles: int = HRMShape.h_cycles
    L_cycles: int = HRMShape.l_cycles
    use_moe: bool = HRMShape.use_moe
    num_local_experts: int = HRMShape.num_experts
    num_experts_per_tok: int = HRMShape.num_experts_per_tok
    router_jitter_noise: float = 0.0
    pos_encodings: str = HRMShape.pos_encodings
    window_size: int | None = None
    grad_mode: str = HRMShape.grad_mode
    halt_max_steps: int = HRMShape.halt_max_steps
    halt_cap: int | None = None
    halting: str = "exact"
    halt_bias: float = -5.0
    halt_exploration: float = 0.5
    halt_gain: float = 0.02
    prefix_lm: bool = False
    steering: dict[str, Any] | None = None
    control: dict[str, Any] | None = None

    if TYPE_CHECKING:  # the real one is made by transformers from the fields and takes the aliases too

        def __init__(self, **kwargs: Any) -> None: ...

    def __post_init__(self, **kwargs: Any) -> None:
        for alias in set(kwargs) & set(self.attribute_map):
            setattr(self, alias, kwargs.pop(alias))
        self._check()
        if self.intermediate_size is None:
            self.intermediate_size = ffn_width(self.hidden_size, self.expansion)
        self.head_dim = self.hidden_size // self.num_attention_heads
        self.num_layers_per_stack = self.l_layers
        # One cache slot for each time a block attends.
        self.num_hidden_layers = self.slots_per_segment * self.halt_max_steps
        super().__post_init__(**kwargs)  # type: ignore[no-untyped-call]

    @property
    def slots_per_segment(self) -> int:
        """Blocks evaluated in one segment."""
        return self.H_cycles * (self.L_cycles * self.l_layers + self.h_layers)

    def _check(self) -> None:
        counts = ["hidden_size", "num_attention_heads", "h_layers", "l_layers", "H_cycles", "L_cycles"]
        counts += ["vocab_size", "halt_max_steps", "num_local_experts", "num_experts_per_tok"]
        require(self, *counts, least=1, integer=True)
        require(self, "window_size", "halt_cap", least=1, integer=True, optional=True)
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ConfigError(f"{name} is {getattr(self, name)!r}; use one of {', '.join(allowed)}.")
        if self.hidden_size % self.num_attention_heads:
            raise ConfigError(
                f"hidden_size is {self.hidden_size}, not a multiple of {self.num_attention_heads} attention heads; "
                "change one of them."
            )
        if self.pos_encodings == "rope" and self.hidden_size // self.num_attention_heads % 2:
            raise ConfigError(
                f"{self.num_attention_heads} heads of a hidden_size of {self.hidden_size} have an odd width, which "
                "rope cannot turn; change one of them or use learned positions."
            )
        if self.use_moe and self.num_experts_per_tok > self.num_local_experts:
            raise ConfigError(
                f"num_experts_per_tok ({self.num_experts_per_tok}) exceeds the {self.num_local_experts} experts; "
                "lower it."
            )
        require(self, "halt_exploration", least=0, most=1)
        require(self, "halt_gain", "halt_bias")
        require(self, "expansion", above=0)
