"""A steered model with neutral fields is the plain model, bit for bit; each field does what it says."""

import copy

import pytest
import torch
from torch import nn

import chronomoe
from chronomoe.errors import ConfigError, UnsupportedModelError
from chronomoe.hosts.attach import moe_layers, register, unregister
from chronomoe.hosts.protocol import Stage
from chronomoe.routing.router import SteeredRouter
from chronomoe.training import ChronoMoELoss
from tests.chronomoe.conftest import FAMILIES

SILENT = chronomoe.SteeringConfig(loss=ChronoMoELoss(lambda_balance=0.0, lambda_z=0.0))


def loss_and_gradients(model, tokens, mask=None):
    model.train()
    output = model(input_ids=tokens, attention_mask=mask, labels=tokens)
    output.loss.backward()
    return output, [p.grad for p in model.parameters()]


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "sorted"])
@pytest.mark.parametrize("top_k", [2, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_neutral_steering_changes_no_bit_of_logits_or_gradients(host, tokens, family, top_k, implementation):
    plain = host(family, num_experts_per_tok=top_k)
    plain.set_experts_implementation(implementation)
    steered = copy.deepcopy(plain)
    chronomoe.attach(steered, SILENT, dispatch="keep")
    mask = torch.ones_like(tokens)
    mask[0, 10:] = 0
    expected, expected_gradients = loss_and_gradients(plain, tokens, mask)
    output, gradients = loss_and_gradients(steered, tokens, mask)
    assert torch.equal(output.logits, expected.logits)
    assert torch.equal(output.loss, expected.loss)
    for mine, theirs in zip(gradients, expected_gradients, strict=True):
        assert torch.equal(mine, theirs)
    plain.eval(), steered.eval()
    assert torch.equal(plain(tokens).logits, steered(tokens).logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_hosts_own_balance_loss_is_off_and_its_configuration_as_it_was(host, tokens, family, tmp_path):
    model = host(family, router_aux_loss_coef=0.5)
    chronomoe.attach(model, SILENT, dispatch="keep")
    plain = model(tokens, labels=tokens).loss
    assert torch.equal(model(tokens, labels=tokens, output_router_logits=True).loss, plain)
    assert model.config.router_aux_loss_coef == 0.5
    model.save_pretrained(tmp_path)
    assert type(model.config).from_pretrained(tmp_path).router_aux_loss_coef == 0.5


def test_router_logits_are_still_recorded_by_transformers(host, tokens):
    model = host("mixtral")
    expected = model(tokens, output_router_logits=True).router_logits
    chronomoe.attach(model, dispatch="keep")
    got = model(tokens, output_router_logits=True).router_logits
    assert len(got) == 2
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_pressure_chooses_and_stays_out_of_the_weights(host, tokens, family):
    model = host(family)
    steering = chronomoe.attach(model).steering
    router: SteeredRouter = model.model.layers[0].mlp.gate
    h = torch.randn(50, 32)
    z, _, chosen = router(h)
    steering.pressure[0, 3] = 100.0
    z2, w2, chosen2 = router(h)
    assert torch.equal(z, z2)
    assert torch.all((chosen2 == 3).any(-1))
    p = z.softmax(-1).gather(-1, chosen2)
    expected = p if not router.normalise else p / p.sum(-1, keepdim=True)
    torch.testing.assert_close(w2, expected)
    assert not torch.equal(chosen, chosen2)


def test_goal_bias_and_temperature_move_choices_too(host):
    model = host("mixtral")
    steering = chronomoe.attach(model).steering
    router = model.model.layers[1].mlp.gate
    h = torch.randn(400, 32) * 0.3
    before = torch.bincount(router(h)[2].reshape(-1), minlength=4)
    steering.goal_bias[1, 2] = 0.5
    goal = torch.bincount(router(h)[2].reshape(-1), minlength=4)
    assert goal[2] > before[2]
    steering.reset()
    steering.log_temperature[1, 2] = 0.3
    hot = torch.bincount(router(h)[2].reshape(-1), minlength=4)
    assert hot[2] > before[2]
    best = router(h)[0].argmax(-1, keepdim=True)
    assert (router(h)[2] == best).any(-1).all(), "the best expert stays chosen at every temperature"


def test_disabled_fields_are_inert(host, tokens):
    model = host("mixtral").eval()
    expected = model(tokens).logits
    steering = chronomoe.attach(model, chronomoe.SteeringConfig(enabled=False), dispatch="keep").steering
    steering.pressure.normal_()
    assert torch.equal(model(tokens).logits, expected)


def test_a_layer_whose_experts_are_all_open_computes_the_same_bits_as_before_one_closed_elsewhere(host):
    model = host("mixtral", num_experts_per_tok=2)
    steering = chronomoe.attach(model).steering
    steering.pressure[:, 1] = 0.3
    first, second = (layer.mlp.gate for layer in model.model.layers)
    h = torch.randn(50, 32)
    before = second(h)
    steering.available[0, 1] = False
    assert all(torch.equal(was, now) for was, now in zip(before, second(h), strict=True))
    assert steering.all_available == [False, True]
    assert not (first(h)[2] == 1).any()


def test_what_waits_for_the_end_of_a_forward_keeps_no_inputs(host):
    model = host("mixtral").train()
    steering = chronomoe.attach(model).steering
    steering.direction.normal_()  # so that coherence counts and takes its sample
    kept = []
    router = model.model.layers[0].mlp.gate
    router.register_forward_hook(lambda *_: kept.extend(steering.context.calls))
    model(torch.randint(10, (2, 16)))
    (call,) = kept
    assert call.inputs is None
    assert call.sampled_inputs.untyped_storage().nbytes() == 4 * 32 * 4, "two of each sequence, 32 wide, 4 bytes"


def test_a_router_that_may_choose_closed_experts_gives_them_neither_weight_nor_load(host):
    """The seam for routers that choose within groups of experts: openness is checked after the choice."""
    model = host("mixtral")
    chronomoe.attach(model)
    router = model.model.layers[0].mlp.gate
    h = torch.randn(50, 32)
    _, before, chosen = router(h)
    vars(router)["_chosen_open"] = lambda chosen: chosen != 2
    _, after, same = router(h)
    assert torch.equal(same, chosen)
    open_weight = before.masked_fill(chosen == 2, 0.0)
    assert (after == 0).any()
    torch.testing.assert_close(after, open_weight / open_weight.sum(dim=-1, keepdim=True))
    model.train()
    calls = []
    router.register_forward_hook(lambda *_: calls.extend(model.steering.context.calls))
    model(torch.randint(10, (2, 16)))
    assert calls[0].used[:, 2].sum() == 0, "a closed expert has no load"


def test_an_unavailable_expert_is_never_chosen_and_too_few_is_an_error(host):
    model = host("mixtral")
    steering = chronomoe.attach(model).steering
    steering.pressure[0, 1] = 50.0
    steering.available[0, 1] = False
    _, w, chosen = model.model.layers[0].mlp.gate(torch.randn(100, 32))
    assert not (chosen == 1).any()
    torch.testing.assert_close(w.sum(-1), torch.ones(100))
    steering.available[0, 2:] = False
    with pytest.raises(ConfigError, match="1 available experts but each token needs 2"):
        model.model.layers[0].mlp.gate(torch.randn(3, 32))


@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("noise", [0.0, 0.7])
def test_steered_choices_are_the_highest_scores(host, tokens, top_k, noise):
    model = host("mixtral", num_experts_per_tok=top_k).train()
    steering = chronomoe.attach(model).steering
    steering.pressure.copy_(torch.linspace(-0.3, 0.3, 8).view(2, 4))
    steering.log_temperature[:, 1] = 0.2
    steering.exploration.fill_(noise)
    router, seen = model.model.layers[0].mlp.gate, []
    highest = router._highest

    def watched(scores):
        seen.append((scores, highest(scores)))
        return seen[-1][1]

    vars(router)["_highest"] = watched
    model(tokens)
    ((scores, chosen),) = seen
    assert torch.equal(chosen, scores.topk(top_k, dim=-1).indices)


def test_exploration_only_in_training(host):
    model = host("mixtral")
    steering = chronomoe.attach(model).steering
    steering.exploration.fill_(2.0)
    router = model.model.layers[0].mlp.gate
    h = torch.randn(200, 32)
    model.eval()
    assert torch.equal(router(h)[2], router(h)[2])
    model.train()
    assert not torch.equal(router(h)[2], router(h)[2])


@pytest.mark.parametrize("family", FAMILIES)
def test_top_1_gives_the_router_a_gradient_and_keeps_the_hosts_weight(host, tokens, family):
    plain = host(family, num_experts_per_tok=1)
    model = copy.deepcopy(plain)
    chronomoe.attach(model, SILENT, dispatch="keep")
    output, _ = loss_and_gradients(model, tokens)
    assert torch.equal(output.logits, plain.train()(tokens).logits)
    for layer in model.model.layers:
        assert layer.mlp.gate.weight.grad.abs().max() > 0


def test_capacity_drops_in_training_only_and_is_reported(host, tokens):
    model = host("mixtral")
    steering = chronomoe.attach(model, chronomoe.SteeringConfig(capacity_factor=0.5)).steering
    model.eval()
    dropless = model(tokens).logits
    model.train()(tokens)
    window = steering.end_step()
    assert torch.all(window.dropped_fraction > 0.2)
    assert window.assignments.max() <= -(-0.5 * 2 * tokens.numel() // 4)
    assert torch.equal(model.eval()(tokens).logits, dropless)


def test_capacity_renormalises_what_remains(host):
    model = host("mixtral")
    chronomoe.attach(model, chronomoe.SteeringConfig(capacity_factor=0.6))
    _, w, _ = model.train().model.layers[0].mlp.gate(torch.randn(64, 32))
    total = w.sum(-1)
    assert torch.all((total - 1).abs().minimum(total.abs()) < 1e-5)
    assert (w == 0).any()
    assert (total > 0.5).any()


def test_a_deep_copy_is_steered_by_its_own_fields(host, tokens):
    model = host("mixtral")
    chronomoe.attach(model)
    twin = copy.deepcopy(model)
    twin.steering.pressure[:, 0] = 100.0
    twin.train()(tokens)
    assert twin.steering.end_step().load[:, 0].min() == 0.5
    assert model.steering.end_step() is None
    model.train()(tokens)
    assert model.steering.end_step().load[:, 0].max() < 0.5


def test_models_it_cannot_steer_are_named():
    with pytest.raises(UnsupportedModelError, match=r"cannot steer a Linear.*Mixtral"):
        chronomoe.attach(nn.Linear(2, 2))
    import transformers

    config = transformers.DeepseekV3Config(
        vocab_size=11, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, n_routed_experts=4,
        intermediate_size=16, moe_intermediate_size=8, first_k_dense_replace=0, n_group=1, topk_group=1,
        num_experts_per_tok=2, q_lora_rank=4, kv_lora_rank=4, qk_rope_head_dim=4, v_head_dim=4, qk_nope_head_dim=4,
    )  # fmt: skip
    with pytest.raises(UnsupportedModelError, match="DeepseekV3TopkRouter"):
        chronomoe.attach(transformers.DeepseekV3ForCausalLM(config))


def test_attaching_twice_is_refused(host):
    model = host("olmoe")
    chronomoe.attach(model)
    with pytest.raises(ConfigError, match="already"):
        chronomoe.attach(model)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rho": 0.5}, "rho"),
        ({"capacity_factor": 0.0}, "capacity_factor"),
        ({"balance_scope": "batch"}, "balance_scope"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ConfigError, match=message):
        chronomoe.SteeringConfig(**settings)


def test_fields_and_sums_stay_fp32_when_the_model_is_cast(host, tokens):
    model = host("mixtral")
    steering = chronomoe.attach(model).steering
    steering.pressure[0, 1] = 0.3
    model.to(torch.bfloat16)
    assert steering.pressure.dtype == steering.statistics.sums.dtype == torch.float32
    assert steering.available.dtype == torch.bool
    assert steering.pressure[0, 1] == torch.tensor(0.3)
    model.train()(tokens, labels=tokens).loss.backward()
    assert steering.end_step().assignments.sum() == 2 * 2 * tokens.numel()


def test_fields_that_are_not_finite_are_refused(host, tokens):
    model = host("mixtral")
    steering = chronomoe.attach(model).steering
    steering.pressure[0, 1] = float("nan")
    with pytest.raises(ConfigError, match="not finite"):
        model(tokens)
    steering.reset()
    steering.base_temperature.fill_(0.0)
    with pytest.raises(ConfigError, match="base_temperature"):
        model(tokens)


def test_an_unknown_dispatch_is_refused_before_anything_changes(host):
    model = host("mixtral")
    with pytest.raises(ConfigError, match="no dispatch 'foo'"):
        chronomoe.attach(model, dispatch="foo")
    chronomoe.attach(model)


def test_a_field_that_beats_any_logit_gap_gives_weights_not_nan(host, tokens):
    model = host("mixtral")
    steering = chronomoe.attach(model).steering
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate.weight[0] *= 1e4
    steering.pressure[:, 1:3] = 1e6
    model.train()
    output = model(input_ids=tokens, labels=tokens)
    output.loss.backward()
    assert output.loss.isfinite()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_only_models_can_be_steered():
    with pytest.raises(UnsupportedModelError, match="NoneType"):
        chronomoe.attach(None)


@pytest.mark.parametrize("top_k", [1, 2])
def test_a_closed_expert_has_no_say_among_the_others_at_any_temperature(host, top_k):
    model = host("mixtral", num_experts=6, num_experts_per_tok=top_k).eval()
    steering = chronomoe.attach(model).steering
    generator = torch.Generator().manual_seed(2)
    steering.log_temperature.copy_(torch.rand(2, 6, generator=generator) * 0.6 - 0.3)
    steering.pressure.copy_(torch.rand(2, 6, generator=generator) * 0.2)
    x = torch.randint(0, 61, (2, 40), generator=generator)
    steering.available[:, 3] = False
    before = model(x).logits
    for layer in model.model.layers:
        layer.mlp.gate.weight.data[3] *= 50
    assert torch.equal(model(x).logits, before)


def test_a_new_configuration_is_seen_at_once(host, tokens):
    import dataclasses

    model = host("mixtral").eval()
    plain = model(tokens).logits
    steering = chronomoe.attach(model, dispatch="keep").steering
    steering.pressure[:, 0] = 30
    assert not torch.equal(model(tokens).logits, plain)
    steering.config = dataclasses.replace(steering.config, enabled=False)
    steering.config = dataclasses.replace(steering.config, rho=3.0)
    assert torch.equal(model(tokens).logits, plain)


class Recorded(Stage):
    """Notes when it is called, and adds 1 to the output of blocks."""

    name = "experts"
    mixes = True

    def __init__(self, steering):
        self.steering, self.calls = steering, []

    def open(self, context, cache):
        self.calls.append("open")

    def close(self, context, cache):
        self.calls.append(("close", len(context.calls), context.sums is not None))

    def mix(self, layer, context, h, y):
        self.calls.append((layer, context.calls[-1].layer, h.shape == y.shape))
        return y + 1


def test_a_stage_takes_part_in_the_written_order_and_leaves_no_trace(host, tokens):
    model = host("mixtral").train()
    steering = chronomoe.attach(model, dispatch="keep").steering
    before = model(tokens).logits
    register(model, stage := Recorded(steering))
    assert not torch.equal(model(tokens).logits, before)
    # In a block the router has decided before anything is mixed; what it left is observed before other stages close.
    assert stage.calls == ["open", (0, 0, True), (1, 1, True), ("close", 0, True)]
    steering.context = None  # it holds a graph, which cannot be copied
    twin = copy.deepcopy(model)
    unregister(model, "experts")
    assert torch.equal(model(tokens).logits, before)
    assert not any(layer.block._forward_hooks or layer.block._forward_pre_hooks for layer in moe_layers(model))
    assert len(stage.calls) == 4
    assert not torch.equal(twin(tokens).logits, before)
    assert len(stage.calls) == 4
