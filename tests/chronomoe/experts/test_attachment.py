"""An attached expert changes what its gate lets it change and nothing else."""

import copy

import pytest
import torch

import chronomoe
from chronomoe.errors import ConfigError, UnsupportedModelError
from chronomoe.experts.attachment import attach_expert, detach_expert
from chronomoe.hosts.attach import moe_layers
from chronomoe.hosts.capture import count_routing, gate_inputs
from tests.chronomoe.conftest import build_host
from tests.chronomoe.everything import differing, everything
from tests.chronomoe.experts.conftest import BASES, build_base, build_expert


def logits(model, tokens, **inputs):
    with torch.no_grad():
        return model(tokens, use_cache=False, **inputs).logits


@pytest.mark.parametrize("family", BASES)
def test_a_closed_gate_and_an_inactive_expert_change_no_bit_and_detaching_leaves_none(family, tokens):
    model = build_base(family)
    before, weights = logits(model, tokens), everything(model)
    names = dict(model.named_modules()).keys()
    attach_expert(model, build_expert(threshold=torch.inf))
    assert torch.equal(logits(model, tokens), before)
    attach_expert(model, loud := build_expert("loud", seed=2))
    assert not torch.equal(logits(model, tokens), before)
    loud.active = False
    assert torch.equal(logits(model, tokens), before)
    loud.active = True
    assert detach_expert(model, "loud") is loud
    detach_expert(model, "licences")
    assert torch.equal(logits(model, tokens), before)
    assert dict(model.named_modules()).keys() == names
    assert not differing(weights, everything(model))
    blocks = [layer.block for layer in moe_layers(model)]
    assert not any(block._forward_hooks or block._forward_pre_hooks for block in blocks)


@pytest.mark.parametrize("gate_layers", [[1], [0, 1]])
@pytest.mark.parametrize("family", BASES)
def test_the_output_is_the_mixture_that_the_gate_says(family, gate_layers, tokens):
    model = build_base(family)
    expert = build_expert(layers=[1], gate_layers=gate_layers)
    seen = []
    block = moe_layers(model)[1].block
    block.register_forward_hook(lambda module, args, output: seen.append((args[0], output)))
    inputs = gate_inputs(model, gate_layers, tokens)
    seen.clear()
    attach_expert(model, expert)
    logits(model, tokens)
    h, plain = seen[0]
    after = []
    block.register_forward_hook(lambda module, args, output: after.append(output))
    logits(model, tokens)
    h = h.view(*tokens.shape, -1)
    odds, _ = expert.gate.log_odds(expert.gate.evidence(inputs))
    is_open = odds > expert.gate.threshold
    assert 0 < is_open.sum() < is_open.numel()
    mixed = plain.view_as(h) + 0.5 * (expert.layers["1"](h) - plain.view_as(h))
    wanted = torch.where(is_open.unsqueeze(-1), mixed, plain.view_as(h))
    torch.testing.assert_close(after[0].view_as(h), wanted)
    assert torch.equal(after[0].view_as(h)[~is_open], plain.view_as(h)[~is_open])


@pytest.mark.parametrize("family", BASES)
def test_gate_and_expert_see_only_the_past(family, tokens):
    model = build_base(family)
    attach_expert(model, build_expert())
    before = logits(model, tokens)
    for place in (3, 9, 16):
        changed = tokens.clone()
        changed[:, place] = (changed[:, place] + 1) % 61
        after = logits(model, changed)
        assert torch.equal(after[:, :place], before[:, :place])
        assert not torch.equal(after[:, place:], before[:, place:])


@pytest.mark.parametrize("family", BASES)
@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}, {"num_return_sequences": 2, "num_beams": 2}], ids=str)
def test_cached_generation_equals_uncached(family, settings, tokens):
    model = build_base(family)
    attach_expert(model, expert := build_expert())
    mask = torch.ones_like(tokens)
    mask[0, :4] = 0
    arguments = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, **settings}
    with count_routing(model) as counts:
        cached = model.generate(tokens, **arguments)
    assert 0 < counts.tokens_open["licences"] < counts.tokens_seen["licences"]
    assert torch.equal(model.generate(tokens, use_cache=False, **arguments), cached)
    expert.active = False
    assert not torch.equal(model.generate(tokens, **arguments), cached)


@pytest.mark.parametrize("family", BASES)
def test_padding_is_no_evidence(family, tokens):
    model = build_base(family)
    expert = build_expert()
    attach_expert(model, expert)
    found, _ = expert.gate.log_odds(expert.gate.evidence(gate_inputs(model, expert.gate.layers, tokens[:1])))
    # Between two values in the middle: what padding adds to the evidence would open or shut it somewhere.
    ordered = found.flatten().sort().values
    expert.gate.threshold.copy_((ordered[7] + ordered[8]) / 2)
    with count_routing(model) as counts:
        row = logits(model, tokens[:1])
    assert counts.tokens_open == {"licences": 9}
    for left in (True, False):
        pad = torch.full((1, 5), 7)
        padded = torch.cat([pad, tokens[:1]] if left else [tokens[:1], pad], dim=1)
        mask = torch.cat([0 * pad, 0 * tokens[:1] + 1] if left else [0 * tokens[:1] + 1, 0 * pad], dim=1)
        found = logits(model, padded, attention_mask=mask)
        part = found[:, 5:] if left else found[:, :-5]
        torch.testing.assert_close(part, row, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", BASES)
def test_gates_stay_in_fp32_when_the_model_is_cast(family, tokens):
    model = build_base(family)
    expert = build_expert()
    attach_expert(model, expert)
    model.to(torch.bfloat16)
    assert expert.gate.direction.dtype == torch.float32
    assert expert.layers["1"].w1.weight.dtype == torch.bfloat16
    with count_routing(model) as counts:
        assert logits(model, tokens).isfinite().all()
    assert counts.tokens_open["licences"]


def test_the_order_of_two_experts_does_not_matter_to_one_when_the_other_is_inactive(tokens):
    found = []
    for order in ((1, 2), (2, 1)):
        model = build_base("mixtral")
        for seed in order:
            attach_expert(model, build_expert(f"expert-{seed}", seed=seed))
        model.subbrains.by_id("expert-2").active = False
        found.append(logits(model, tokens))
    alone = build_base("mixtral")
    attach_expert(alone, build_expert("expert-1", seed=1))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], logits(alone, tokens))


@pytest.mark.parametrize("family", BASES)
def test_an_attached_model_trains_with_recomputation_as_without(family, tokens):
    gradients = []
    for recompute in (False, True):
        model = build_base(family).train()
        attach_expert(model, build_expert())
        if recompute:
            model.activation_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(0)
        model(tokens, labels=tokens, use_cache=False).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
        assert gradients[-1][next(name for name in gradients[-1] if name.endswith("w2.weight"))].abs().sum() > 0
    for name, gradient in gradients[0].items():
        assert gradient is None or torch.equal(gradient, gradients[1][name]), name


def test_a_frozen_expert_gets_no_gradient_and_no_decay(tokens):
    model = build_base("mixtral").train()
    attach_expert(model, expert := build_expert())
    expert.freeze()
    before = copy.deepcopy(expert.state_dict())
    from chronomoe.training import TrainingConfig
    from chronomoe.training.optimizer import build_optimizer

    optimizer = build_optimizer(model, TrainingConfig(weight_decay=0.5))
    model(tokens, labels=tokens).loss.backward()
    optimizer.step()
    assert all(p.grad is None for p in expert.parameters())
    assert all(torch.equal(value, before[name]) for name, value in expert.state_dict().items())


@pytest.mark.parametrize("family", ["mixtral", "olmoe", "qwen3_moe"])
def test_other_hosts_take_experts_too(family, tokens):
    model = build_host(family).eval()
    with pytest.raises(UnsupportedModelError, match=r"attach\(\) it first"):
        attach_expert(model, build_expert(layers=[0, 1], gate_layers=[0]))
    chronomoe.attach(model)
    before = logits(model, tokens)
    attach_expert(model, build_expert(layers=[0, 1], gate_layers=[0]))
    assert not torch.equal(logits(model, tokens), before)
    detach_expert(model, "licences")
    assert torch.equal(logits(model, tokens), before)


def test_a_copy_of_an_attached_model_is_whole(tokens):
    model = build_base("mixtral")
    attach_expert(model, build_expert())
    twin, found = copy.deepcopy(model), logits(model, tokens)
    model.subbrains.by_id("licences").active = False
    assert torch.equal(logits(twin, tokens), found)
    detach_expert(twin, "licences")
    assert torch.equal(logits(twin, tokens), logits(model, tokens))


def test_what_does_not_fit_is_refused(tokens):
    model = build_base("mixtral")
    with pytest.raises(ConfigError, match="the model has none"):
        detach_expert(model, "licences")
    with pytest.raises(ConfigError, match="16 wide, the model 32"):
        attach_expert(model, build_expert(hidden_size=16))
    with pytest.raises(ConfigError, match="has a layer 7; the model has 3"):
        attach_expert(model, build_expert(layers=[7]))
    attach_expert(model, build_expert())
    with pytest.raises(ConfigError, match="attached already"):
        attach_expert(model, build_expert())
    with pytest.raises(ConfigError, match="not attached; attached are licences"):
        detach_expert(model, "laws")
    with pytest.raises(ConfigError, match="layers"):
        build_expert(layers=[2, 1])
    output = model(tokens, use_cache=True)
    with pytest.raises(ConfigError, match="cropped"):
        output.past_key_values.crop(1)
