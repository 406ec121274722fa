"""`sorted` dispatch against transformers' eager loop, forward and backward, in every awkward case."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from chronomoe.errors import UnsupportedModelError
from chronomoe.routing import dispatch


def build(n=4, d=16, f=24, dtype=torch.float32, act="silu"):
    config = MixtralConfig(hidden_size=d, intermediate_size=f, num_local_experts=n, hidden_act=act)
    config._experts_implementation = "eager"
    experts = MixtralExperts(config).to(dtype)
    generator = torch.Generator().manual_seed(0)
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.2, generator=generator)
    return experts


def run(experts, implementation, x, index, w, grad):
    experts.config._experts_implementation = implementation
    x, w = x.clone().requires_grad_(), w.clone().requires_grad_()
    experts.zero_grad()
    out = experts(x, index, w)
    out.backward(grad)
    return [out, x.grad, w.grad, experts.gate_up_proj.grad.clone(), experts.down_proj.grad.clone()]


def case(t=13, k=2, n=4, d=16, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(t, d, generator=generator).to(dtype)
    scores = torch.randn(t, n, generator=generator)
    w, index = scores.softmax(-1).topk(k)
    return x, index, w, torch.randn(t, d, generator=generator).to(dtype)


def compare(experts, x, index, w, grad, **tolerance):
    expected = run(experts, "eager", x, index, w, grad)
    for got, want in zip(run(experts, "sorted", x, index, w, grad), expected, strict=True):
        torch.testing.assert_close(got, want, **tolerance)


@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("t", [1, 2, 13, 200])
def test_equals_eager(t, k):
    compare(build(), *case(t=t, k=k))


def test_equals_eager_in_bf16():
    x, index, w, grad = case(dtype=torch.bfloat16)
    compare(build(dtype=torch.bfloat16), x, index, w, grad, rtol=5e-2, atol=5e-2)


def test_empty_experts_get_zero_gradient():
    experts = build(n=8)
    x, _, w, grad = case()
    index = torch.tensor([[2, 5]]).expand(13, 2)
    compare(experts, x, index, w, grad)
    run(experts, "sorted", x, index, w, grad)
    unused = [0, 1, 3, 4, 6, 7]
    assert experts.gate_up_proj.grad[unused].abs().max() == 0
    assert experts.down_proj.grad[unused].abs().max() == 0


def test_all_tokens_on_one_expert():
    x, _, w, grad = case(k=1)
    compare(build(), x, torch.full((13, 1), 3), w, grad)


def test_no_tokens_at_all():
    experts = build()
    experts.config._experts_implementation = "sorted"
    out = experts(torch.empty(0, 16), torch.empty(0, 2, dtype=torch.long), torch.empty(0, 2))
    assert out.shape == (0, 16)


def test_expanded_and_strided_gradients():
    x, index, w, _ = case()
    compare(build(), x, index, w, torch.ones(1, 1).expand(13, 16))
    compare(build(), x, index, w, torch.randn(16, 13).T)


@pytest.mark.parametrize(("d", "f"), [(15, 24), (16, 23), (7, 5)])
def test_widths_that_grouped_mm_refuses(d, f):
    compare(build(d=d, f=f), *case(d=d))


@pytest.mark.parametrize("act", ["gelu", "relu"])
def test_other_activations(act):
    compare(build(act=act), *case())


def test_more_than_256_experts():
    compare(build(n=300), *case(n=300))


def test_frozen_experts_still_pass_the_gradient_on():
    experts = build().requires_grad_(False)
    x, index, w, grad = case()
    for implementation in ("eager", "sorted"):
        experts.config._experts_implementation = implementation
        leaf = x.clone().requires_grad_()
        experts(leaf, index, w).backward(grad)
        if implementation == "eager":
            expected = leaf.grad
    torch.testing.assert_close(leaf.grad, expected)
    assert experts.gate_up_proj.grad is None


def test_decoding_one_token_equals_the_sorted_path():
    experts = build()
    x, index, w, _ = case(t=1)
    experts.config._experts_implementation = "sorted"
    with torch.no_grad():
        fast = experts(x, index, w)
    torch.testing.assert_close(fast, experts(x, index, w).detach())


def test_inside_autocast_the_experts_run_in_its_precision():
    experts = build()
    x, index, w, _ = case()
    experts.config._experts_implementation = "sorted"
    experts(x, index, w).sum().backward()
    exact = experts.gate_up_proj.grad.clone()
    experts.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = experts(x, index, w)
    assert got.dtype == torch.float32
    lower = build().to(torch.bfloat16)
    lower.config._experts_implementation = "sorted"
    assert torch.equal(got, lower(x.bfloat16(), index, w).float())
    got.sum().backward()
    torch.testing.assert_close(experts.gate_up_proj.grad, exact, rtol=0.1, atol=0.02 * exact.abs().max().item())


@pytest.mark.skipif(not dispatch.can_compile(), reason="no C++ compiler")
def test_the_compiled_backward_equals_the_plain_one(monkeypatch):
    experts, arguments = build(), case(t=40)
    plain = run(experts, "sorted", *arguments)
    monkeypatch.setattr(dispatch, "COMPILE_FROM", 0)
    for got, want in zip(run(experts, "sorted", *arguments), plain, strict=True):
        torch.testing.assert_close(got, want)


def test_compilation_can_be_refused(monkeypatch):
    monkeypatch.setenv("CHRONOMOE_COMPILE", "0")
    dispatch.can_compile.cache_clear()
    assert not dispatch.can_compile()
    dispatch.can_compile.cache_clear()


def test_experts_of_another_layout_are_refused():
    other = SimpleNamespace(has_bias=True, is_transposed=False, has_gate=True, is_concatenated=True)
    with pytest.raises(UnsupportedModelError, match="without bias"):
        dispatch.sorted_experts_forward(other, *case()[:3])


def test_the_fast_path_is_taken_for_silu_as_transformers_builds_it():
    assert isinstance(build().act_fn, dispatch.SILU)
    assert not isinstance(torch.nn.GELU(), dispatch.SILU)
