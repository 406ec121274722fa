"""Upcycling: equal to the dense parent at first, able to learn, different where that was asked for."""

import copy

import pytest
import torch
from torch.nn import functional as F

from chronomoe.errors import ConfigError
from chronomoe.hrm import HRMACTv1ForCausalLM
from chronomoe.hrm.upcycle import upcycle
from tests.chronomoe.hrm.building import build, tokens

SHAPES = {
    "halting": {},
    "full-depth": {"halting": "max"},
    "capped": {"halt_cap": 2},
    "one-segment": {"halt_max_steps": 1},
    "tied": {"tie_word_embeddings": True},
    "learned": {"pos_encodings": "learned"},
    "unequal": {"h_layers": 2, "l_layers": 1, "window_size": 5, "H_cycles": 1, "L_cycles": 3},
}
MOE = {"use_moe", "num_local_experts", "num_experts_per_tok"}


def dense(**changes):
    return build(use_moe=False, **changes)


def blocks(model):
    return [*model.model.L_module.layers, *model.model.H_module.layers]


@pytest.mark.parametrize("numbers", [(4, 1), (4, 2), (4, 4), (2, 1), (8, 2)])
@pytest.mark.parametrize("shape", SHAPES)
def test_outputs_equal_the_parents(shape, numbers):
    parent, x = dense(**SHAPES[shape]), tokens()
    child = upcycle(parent, *numbers)
    expected, found = parent(x, labels=x), child(x, labels=x)
    torch.testing.assert_close(found.logits, expected.logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(found.loss, expected.loss, rtol=0, atol=1e-5)
    assert torch.equal(found.segments, expected.segments)
    for model in (parent, child):
        torch.manual_seed(3)  # of the tokens that must go on
        model.train()(x, labels=x)
    for name in ("ce", "bce_halt", "used_segments"):
        torch.testing.assert_close(child.loss_terms[name], parent.loss_terms[name], rtol=0, atol=1e-5)


def test_generation_equals_the_parents():
    parent = dense()
    options = {"max_new_tokens": 12, "do_sample": False}
    expected = parent.generate(tokens(2, 5), **options)
    assert torch.equal(upcycle(parent, 4, 2).generate(tokens(2, 5), **options), expected)


def test_everything_else_is_copied():
    parent = dense(tie_word_embeddings=True, halt_gain=0.05, grad_mode="all", rms_norm_eps=1e-5)
    parent.generation_config.temperature = 0.7
    before = copy.deepcopy(parent.state_dict())
    child = upcycle(parent, 6, 3)
    old, new = parent.config.to_dict(), child.config.to_dict()
    assert {name for name in new if new[name] != old.get(name)} == MOE
    assert child.lm_head.weight is child.model.embed_tokens.weight
    assert child.generation_config.to_dict() == parent.generation_config.to_dict()
    state = child.state_dict()
    kept = {name for name in before if ".mlp." not in name}
    assert {name for name in state if ".mlp." not in name} == kept
    assert all(torch.equal(state[name], before[name]) for name in kept)
    with torch.no_grad():
        for parameter in child.parameters():
            parameter.add_(1)
    assert all(torch.equal(tensor, before[name]) for name, tensor in parent.state_dict().items()), "no memory is shared"


def test_the_seed_decides_and_the_callers_draws_are_left_alone():
    parent = dense()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    models = [upcycle(parent, 4, 2, redraw=0.5, seed=seed) for seed in (1, 1, 2)]
    assert torch.equal(torch.rand(3), expected)
    first, again, other = ([block.mlp.gate.weight for block in blocks(model)] for model in models)
    assert all(map(torch.equal, first, again))
    assert not any(map(torch.equal, first, other))
    assert all(weight.std() < 2 * parent.config.initializer_range for weight in first)
    first, again, other = ([block.mlp.experts.down_proj for block in blocks(model)] for model in models)
    assert all(map(torch.equal, first, again))
    assert not any(map(torch.equal, first, other))


def test_dtype_and_mode_are_the_parents():
    child = upcycle(dense().to(torch.bfloat16).train(), 4, 2)
    assert child.training
    assert {parameter.dtype for parameter in child.parameters()} == {torch.bfloat16}
    assert child.steering.pressure.dtype == torch.float32


def test_it_saves_and_loads(tmp_path):
    child = upcycle(dense(), 4, 2, redraw=0.25)
    child.save_pretrained(tmp_path)
    loaded = HRMACTv1ForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(tokens()).logits, child(tokens()).logits)


def test_experts_learn_at_once_and_routers_when_experts_differ():
    model, x = upcycle(dense(), 4, 2).train(), tokens()

    def gradients():
        model.zero_grad()
        torch.manual_seed(3)
        # Of the language alone: the balancing losses would move routers in any case.
        logits = torch.stack([model.lm_head(state) for state in model.model(x).states])
        F.cross_entropy(logits[:, :, :-1].flatten(0, 2), x[:, 1:].repeat(len(logits), 1).flatten()).backward()
        routers = torch.stack([block.mlp.gate.weight.grad.norm() for block in blocks(model)])
        experts = torch.stack([block.mlp.experts.gate_up_proj.grad.flatten(1).norm(dim=1) for block in blocks(model)])
        return routers, experts

    routers, experts = gradients()
    assert (experts > 1e-3).all()
    assert (experts[:, 0] != experts[:, 1]).all(), "they read different tokens"
    assert (routers < 1e-4).all(), "equal experts leave a router nothing to prefer"
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    later, _ = gradients()
    assert (later > 100 * routers).all()
    model.zero_grad()
    model(x, labels=x).loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize(("redraw", "units"), [(0.25, 12), (0.5, 24), (0.999, 48), (0.001, 1)])
def test_redraw_changes_the_stated_share_of_all_experts_but_the_first(redraw, units):
    parent = dense()
    child = upcycle(parent, 4, 2, redraw=redraw)
    drawn = []
    for block, source in zip(blocks(child), blocks(parent), strict=True):
        gate, up = block.mlp.experts.gate_up_proj.chunk(2, dim=1)
        copies = {"gate": gate, "up": up, "down": block.mlp.experts.down_proj.transpose(1, 2)}
        old = {
            "gate": source.mlp.gate_proj.weight,
            "up": source.mlp.up_proj.weight,
            "down": source.mlp.down_proj.weight.T,
        }
        for expert in range(4):
            changed = {name: (copies[name][expert] != old[name]).all(dim=1) for name in copies}
            touched = {name: (copies[name][expert] != old[name]).any(dim=1) for name in copies}
            assert all(torch.equal(flags, changed["gate"]) for flags in (*changed.values(), *touched.values()))
            assert changed["gate"].sum() == (units if expert else 0)
            drawn.append(tuple(changed["gate"].tolist()))
    if units < 48:
        assert len(set(drawn)) == 1 + 3 * len(blocks(child)), "each expert has its own"
        assert (child(tokens()).logits - parent(tokens()).logits).abs().max() > 1e-3


def test_what_is_drawn_has_the_statistics_of_the_layer():
    parent = dense(hidden_size=64, intermediate_size=512)
    with torch.no_grad():
        for n, linear in enumerate((m for m in blocks(parent)[0].mlp.children() if hasattr(m, "weight")), 1):
            linear.weight.normal_(mean=0.1 * n, std=0.2 * n)
    experts = blocks(upcycle(parent, 2, 1, redraw=0.9))[0].mlp.experts
    gate, up = experts.gate_up_proj[1].chunk(2)
    for n, weight in enumerate((gate, up, experts.down_proj[1]), 1):
        assert weight.mean().item() == pytest.approx(0.1 * n, abs=0.02 * n)
        assert weight.std().item() == pytest.approx(0.2 * n, rel=0.05)


@pytest.mark.parametrize(
    ("model", "numbers", "redraw", "sentence"),
    [
        ({}, (2, 3), 0.0, r"num_experts_per_tok \(3\) exceeds the 2 experts"),
        ({}, (1, 1), 0.0, "num_experts is 1"),
        ({}, (4, 0), 0.0, "num_experts_per_tok is 0"),
        ({}, (4, 2), 1.0, "redraw is 1.0"),
        ({}, (4, 2), -0.1, "redraw is -0.1"),
        ({}, (4, 2), float("nan"), "redraw is nan"),
        ({"use_moe": True}, (4, 2), 0.0, "has experts already"),
        ({"mlp_bias": True}, (4, 2), 0.0, "biases"),
    ],
)
def test_what_cannot_be_is_refused(model, numbers, redraw, sentence):
    with pytest.raises(ConfigError, match=sentence):
        upcycle(build(**{"use_moe": False, **model}), *numbers, redraw=redraw)
