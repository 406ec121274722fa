"""HRMShape: the numbers of an HRM ACTv1 and their defaults. Imports nothing heavy, so that help appears at once."""

from dataclasses import dataclass
from typing import Literal

from chronomoe.settings import Settings


@dataclass(frozen=True, kw_only=True)
class HRMShape(Settings):
    """Shape of an HRM ACTv1; :class:`chronomoe.hrm.HRMACTv1Config` has the same defaults."""

    h_layers: int = 2
    """Blocks of the high level."""
    l_layers: int = 2
    """Blocks of the low level."""
    hidden_size: int = 512
    """Width of the residual stream."""
    expansion: float = 2.0
    """Feed-forward width in multiples of hidden_size, as of a layer with two matrices."""
    num_heads: int = 8
    """Attention heads."""
    h_cycles: int = 2
    """High cycles per segment."""
    l_cycles: int = 2
    """Low cycles per high cycle."""
    halt_max_steps: int = 2
    """Segments a token may use."""
    pos_encodings: Literal["rope", "learned"] = "rope"
    """Positions: rotary, or learned for max_seq_len tokens."""
    window_size: int | None = None
    """Tokens each token sees, itself included; all before it when not given."""
    grad_mode: Literal["one_step", "last_cycle", "all"] = "last_cycle"
    """Calls of a segment that carry gradient."""
    use_moe: bool = True
    """Experts in every block; else one dense layer."""
    num_experts: int = 8
    """Experts per layer."""
    num_experts_per_tok: int = 2
    """Experts each token uses (top-k)."""
