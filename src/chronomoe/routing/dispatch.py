"""`sorted` dispatch: every token to its experts, none dropped, as a few large grouped matrix products.

Assignments are sorted by expert, gathered, and run through two grouped products with the gated activation between them;
one embedding bag weighs and sums the outputs. One autograd function saves the least: the gathered inputs and the first
product; the gradient of the combine weights comes from the hidden layer, so outputs are not kept. Registered in
transformers' experts registry as ``sorted``, so every transformers MoE model can use it:
``model.set_experts_implementation("sorted")``.

Shape suffixes: T tokens, K choices per token, S = T K assignments, N experts, D hidden size, F expert width.
"""

import os
import shutil
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from transformers.activations import ACT2FN
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from chronomoe.errors import UnsupportedModelError
from chronomoe.routing.context import without_autocast

COMPILE_FROM = 1 << 20
"""Elements of the activation from which a fused backward pays for its seconds of compilation."""


SILU = (nn.SiLU, type(ACT2FN["silu"]))


@torch.compiler.disable  # type: ignore[untyped-decorator]  # it sorts on the host: torch.compile goes around it
def sorted_experts_forward(experts: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The experts' mixture, shape (T, D), for tokens (T, D), expert indices (T, K) and combine weights (T, K).

    ``experts`` is a transformers experts module: ``gate_up_proj`` (N, 2 F, D), ``down_proj`` (N, D, F), ``act_fn``.
    Raises :class:`UnsupportedModelError` for experts of another layout.
    """
    if experts.has_bias or experts.is_transposed or not (experts.has_gate and experts.is_concatenated):
        raise UnsupportedModelError(
            f"`sorted` dispatch runs gated experts without bias, not {type(experts).__name__}; use grouped_mm for it."
        )
    gate_up_NID, down_NDF = experts.gate_up_proj, experts.down_proj
    device = hidden_states.device.type
    if torch.is_autocast_enabled(device):
        lower = torch.get_autocast_dtype(device)
        gate_up_NID, down_NDF = gate_up_NID.to(lower), down_NDF.to(lower)
    x_TD = hidden_states.to(gate_up_NID.dtype)
    one_token = x_TD.shape[0] == 1 and device == "cpu" and not torch.is_grad_enabled()
    with without_autocast(x_TD):
        if one_token:
            out_TD = _one_token(x_TD, top_k_index, top_k_weights, gate_up_NID, down_NDF, experts.act_fn)
        else:
            activation = None if isinstance(experts.act_fn, SILU) else experts.act_fn
            apply: Any = _SortedExperts.apply
            out_TD = apply(x_TD, top_k_index, top_k_weights, gate_up_NID, down_NDF, activation)
    return out_TD.to(hidden_states.dtype)


def use_sorted_dispatch(model: Any, name: str = "sorted") -> None:
    """Make ``model`` run its experts with the implementation ``name``."""
    model.set_experts_implementation(name)


def _one_token(
    x_1D: Tensor, index_1K: Tensor, w_1K: Tensor, gate_up_NID: Tensor, down_NDF: Tensor, act: Callable[[Tensor], Tensor]
) -> Tensor:
    # Decoding is bound by call overhead, not arithmetic: a plain loop over K experts beats sorting.
    out_1D = torch.zeros_like(x_1D)
    for slot, expert in enumerate(index_1K[0].tolist()):
        gate_1F, up_1F = F.linear(x_1D, gate_up_NID[expert]).chunk(2, dim=-1)
        hidden_1F = (act(gate_1F) * up_1F).mul_(w_1K[:, slot : slot + 1])
        out_1D.addmm_(hidden_1F, down_NDF[expert].T)
    return out_1D


class _SortedExperts(torch.autograd.Function):
    """y_t = sum_k w_tk down_k(act(gate_k x_t) * up_k x_t)."""

    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        index_TK: Tensor,
        w_TK: Tensor,
        gate_up_NID: Tensor,
        down_NDF: Tensor,
        activation: Callable[[Tensor], Tensor] | None,
    ) -> Tensor:
        num_experts, top_k = gate_up_NID.shape[0], index_TK.shape[1]
        order_S, ends_N = _sort_by_expert(index_TK.reshape(-1), num_experts)
        place_S = torch.empty_like(order_S).scatter_(0, order_S, torch.arange(len(order_S), device=order_S.device))
        token_S = order_S // top_k
        w_S1 = w_TK.reshape(-1).index_select(0, order_S).unsqueeze(-1).to(x_TD.dtype)
        x_SD = x_TD.index_select(0, token_S)
        gate_up_SI = grouped_mm(x_SD, gate_up_NID.transpose(1, 2), ends_N)
        gate_SF, up_SF = gate_up_SI.chunk(2, dim=-1)
        hidden_SF = F.silu(gate_SF).mul_(up_SF) if activation is None else activation(gate_SF) * up_SF
        y_SD = grouped_mm(hidden_SF, down_NDF.transpose(1, 2), ends_N)
        ctx.save_for_backward(x_SD, w_S1, gate_up_NID, down_NDF, gate_up_SI, token_S, place_S, ends_N)
        ctx.top_k, ctx.activation, ctx.w_dtype = top_k, activation, w_TK.dtype
        return _sum_choices(y_SD, place_S, top_k, w_TK.to(y_SD.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        x_SD, w_S1, gate_up_NID, down_NDF, gate_up_SI, token_S, place_S, ends_N = ctx.saved_tensors
        grad_y_SD = grad_TD.to(x_SD.dtype).index_select(0, token_S)
        grad_SF = grouped_mm(grad_y_SD, down_NDF, ends_N)
        grad_gate_up_SI, grad_w_S = _backward_kernel(ctx.activation, grad_SF)(gate_up_SI, w_S1, grad_SF, ctx.activation)
        grad_down = grouped_mm(grad_y_SD.T, grad_SF, ends_N) if ctx.needs_input_grad[4] else None
        grad_gate_up = None
        if ctx.needs_input_grad[3]:
            grad_gate_up = grouped_mm(grad_gate_up_SI.T, x_SD, ends_N)
        grad_x_SD = grouped_mm(grad_gate_up_SI, gate_up_NID, ends_N)
        grad_w_TK = grad_w_S.to(ctx.w_dtype).index_select(0, place_S).view(-1, ctx.top_k)
        return _sum_choices(grad_x_SD, place_S, ctx.top_k), None, grad_w_TK, grad_gate_up, grad_down, None


def _sort_by_expert(index_S: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """The stable order of assignments by expert (S,), and where each expert's run ends (N,), int32."""
    if index_S.device.type == "cpu" and num_experts <= 65536:
        # numpy sorts small integers by radix, ten times as fast as torch.
        keys = index_S.numpy().astype(np.uint8 if num_experts <= 256 else np.uint16)
        order_S = torch.from_numpy(np.argsort(keys, kind="stable"))
        return order_S, torch.from_numpy(np.bincount(keys, minlength=num_experts).cumsum().astype(np.int32))
    keys_S, order_S = torch.sort(index_S, stable=True)
    experts_N = torch.arange(num_experts, device=index_S.device)
    return order_S, torch.searchsorted(keys_S, experts_N, right=True).to(torch.int32)


def _sum_choices(rows_SD: Tensor, place_S: Tensor, top_k: int, w_TK: Tensor | None = None) -> Tensor:
    """Sum the K rows of each token, weighted if ``w_TK`` is given: (S, D) sorted by expert to (T, D)."""
    return F.embedding_bag(place_S.view(-1, top_k), rows_SD, mode="sum", per_sample_weights=w_TK)


def grouped_mm(a: Tensor, b: Tensor, ends_N: Tensor) -> Tensor:
    """Per-expert product, S grouped by ``ends_N``: (S, I) x (N, I, O) to (S, O), or (I, S) x (S, O) to (N, I, O)."""
    if _aligned(a) and _aligned(b):
        return F.grouped_mm(a, b, offs=ends_N)
    spans = list(pairwise([0, *ends_N.tolist()]))
    if b.dim() == 3:
        return torch.cat([a[lo:hi] @ b[expert] for expert, (lo, hi) in enumerate(spans)])
    return torch.stack([a[:, lo:hi] @ b[lo:hi] for lo, hi in spans])


def _aligned(tensor: Tensor) -> bool:
    # torch's grouped_mm wants its strides in multiples of 16 bytes and no empty operand.
    strides = [stride for stride in tensor.stride() if stride != 1]
    return tensor.numel() > 0 and all(stride * tensor.element_size() % 16 == 0 for stride in strides)


def _gated_backward(
    gate_up_SI: Tensor, w_S1: Tensor, grad_SF: Tensor, activation: Callable[[Tensor], Tensor] | None
) -> tuple[Tensor, Tensor]:
    """Gradients of w * act(gate) * up: for [gate, up] (S, 2F) and w (S,); ``grad_SF`` becomes the product itself."""
    gate_SF, up_SF = gate_up_SI.chunk(2, dim=-1)
    if activation is None:
        sigmoid_SF = gate_SF.sigmoid()
        act_SF = gate_SF * sigmoid_SF
        slope_SF = sigmoid_SF * (1 + gate_SF * (1 - sigmoid_SF))
    else:
        with torch.enable_grad():
            leaf = gate_SF.detach().requires_grad_()
            value = activation(leaf)
            (slope_SF,) = torch.autograd.grad(value.sum(), leaf)
        act_SF = value.detach()
    product_SF = act_SF * up_SF
    grad_w_S = (grad_SF.float() * product_SF.float()).sum(dim=-1)
    weighted_grad_SF = grad_SF * w_S1
    grad_gate_up_SI = torch.cat([weighted_grad_SF * up_SF * slope_SF, weighted_grad_SF * act_SF], dim=-1)
    grad_SF.copy_(product_SF * w_S1)  # in place: fresh memory costs as much as the arithmetic
    return grad_gate_up_SI, grad_w_S


@cache
def _compiled_backward() -> Callable[..., tuple[Tensor, Tensor]]:
    return torch.compile(_gated_backward, dynamic=True)


@cache
def can_compile() -> bool:
    """Is there a C++ compiler for torch.compile, and is it not refused by ``CHRONOMOE_COMPILE=0``?"""
    compiler = os.environ.get("CXX", "g++")
    return os.environ.get("CHRONOMOE_COMPILE", "1") != "0" and shutil.which(compiler) is not None


def _backward_kernel(activation: object, grad_SF: Tensor) -> Callable[..., tuple[Tensor, Tensor]]:
    # One pass over memory instead of eight, worth it on large activations; SiLU only, others go through autograd.
    if activation is None and grad_SF.numel() >= COMPILE_FROM and can_compile():
        return _compiled_backward()
    return _gated_backward


ALL_EXPERTS_FUNCTIONS.register("sorted", sorted_experts_forward)
