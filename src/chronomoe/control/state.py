"""ControlState: everything the controller remembers between two ticks.

Buffers in fp32 of shape (layers, experts) unless said otherwise. They move with the model, are saved beside its weights
and are the same on every rank: all ranks see the same summed window and do the same arithmetic.

Shape suffixes: L MoE layers, N experts, D hidden size, B blocks of time.
"""

import torch
from torch import Tensor

from chronomoe.control.coherence import layer_coherence
from chronomoe.control.landscape import BLOCKS
from chronomoe.routing.state import Fp32Module


class ControlState(Fp32Module):
    """The memory of the control layer for L layers of N experts with inputs of size D; new, it has seen nothing."""

    integral: Tensor
    """Integral of the load error, in logits."""
    live_pressure: Tensor
    """Pressure after the latest tick."""
    mean_pressure: Tensor
    """Its running average: what a deployed model uses."""
    smooth_load: Tensor
    """Load, averaged over about 2 ticks."""
    slow_load: Tensor
    """Load, averaged over about 5 ticks."""
    mean_load: Tensor
    """Load with the share of goals, averaged over about 50 ticks: for reports."""
    spread: Tensor
    """(L,) standard deviation of the logits over experts, averaged: the unit of pressure."""
    direction: Tensor
    """(L, N, D) running mean of the unit direction of each expert's inputs."""
    forgotten: Tensor
    """Weight of the zero that ``direction`` began with, memory^(number of updates)."""
    coherence: Tensor
    """R_k of each expert, in [0, 1]."""
    contrast: Tensor
    """Running mean of -dL/dz per assignment."""
    gradient_size: Tensor
    """(L,) running mean of |dL/dz| per assignment."""
    health: Tensor
    """r_k in [-1, 1]; below 0 where less of the expert would lower the loss."""
    masked: Tensor
    """(bool) experts closed by a verdict or because their output is not finite."""
    recovering: Tensor
    """1 when an expert has just been let back in, decaying to 0."""
    temperature_fast: Tensor
    """log T of the latest tick."""
    structural_T_local: Tensor
    """log structural temperature of each expert: an average of the fast one."""
    structural_T_global: Tensor
    """(N,) log structural temperature of each expert slot over all layers: the slowest memory."""
    fast_blocks: Tensor
    """(B, L, N) means of the fast temperature over blocks of ticks, a ring."""
    block_rates: Tensor
    """(B,) mean factor of the structural rates in each block."""
    evidence: Tensor
    """(3, L, N) count of probed sequences, sum and sum of squares of their change in loss; older ones weigh less."""
    last_probe: Tensor
    """(int64) tick of the latest probe; 0: never."""
    fruitless: Tensor
    """(int64) probes in a row without a verdict: the exponent of the back-off."""
    ticks: Tensor
    """(int64 scalar) steps that moved this state."""

    def __init__(self, layers: int, num_experts: int, hidden_size: int) -> None:
        super().__init__()
        self._shape = layers, num_experts, hidden_size
        self.make_new()

    def make_new(self, device: torch.device | str | None = None) -> None:
        """Give the state new buffers on ``device``, nothing learned.

        They are run-time state, in no state dict: whatever loads a model's weights calls this, then restores what was
        saved beside them.
        """
        layers, num_experts, hidden_size = self._shape
        for name in (
            "integral", "live_pressure", "mean_pressure", "smooth_load", "slow_load", "mean_load", "forgotten",
            "coherence", "contrast", "health", "recovering", "temperature_fast", "structural_T_local",
        ):  # fmt: skip
            self._make(name, (layers, num_experts), torch.float32, device)
        for name, shape in {
            "spread": (layers,),
            "gradient_size": (layers,),
            "direction": (layers, num_experts, hidden_size),
            "structural_T_global": (num_experts,),
            "fast_blocks": (BLOCKS, layers, num_experts),
            "block_rates": (BLOCKS,),
            "evidence": (3, layers, num_experts),
        }.items():
            self._make(name, shape, torch.float32, device)
        self._make("masked", (layers, num_experts), torch.bool, device)
        for name in ("last_probe", "fruitless"):
            self._make(name, (layers, num_experts), torch.int64, device)
        self._make("ticks", (), torch.int64, device)
        self.clear()

    def _make(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str | None) -> None:
        self.register_buffer(name, torch.zeros(shape, dtype=dtype, device=device), persistent=False)

    @torch.no_grad()
    def clear(self) -> None:
        """Forget everything, in place."""
        for buffer in self.buffers():
            buffer.zero_()
        self.forgotten.fill_(1)
        for load in (self.smooth_load, self.slow_load, self.mean_load):
            load.fill_(1 / load.shape[-1])

    @property
    def R_per_layer(self) -> Tensor:  # noqa: N802 (the name of the order parameter)
        """(L,) coherence of each layer, its experts weighted by load, in [0, 1]."""
        return layer_coherence(self.coherence, self.smooth_load)

    @property
    def R(self) -> float:  # noqa: N802
        """Coherence: mean of the layers', in [0, 1]."""
        return self.R_per_layer.mean().item()
