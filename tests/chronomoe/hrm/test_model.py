"""The model is hrm_text where it has nothing more; losses, gradients, checkpointing, saving, steering by depth."""

import dataclasses

import pytest
import torch
from torch.nn import functional as F
from transformers import HrmTextConfig, HrmTextForCausalLM

from chronomoe.errors import ConfigError
from chronomoe.hosts.capture import capture_routing
from chronomoe.hrm import HRMACTv1Config, HRMACTv1ForCausalLM
from chronomoe.hrm.config import ffn_width
from chronomoe.routing import router
from tests.chronomoe.hrm.building import VOCAB, build, tokens


@pytest.mark.parametrize("cycles", [(1, 1), (2, 2), (2, 3), (3, 1)])
def test_one_dense_segment_is_hrm_text(cycles):
    high, low = cycles
    ours = build(use_moe=False, halt_max_steps=1, h_layers=2, l_layers=2, H_cycles=high, L_cycles=low)
    theirs = HrmTextForCausalLM(
        HrmTextConfig(
            vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_attention_heads=4, head_dim=8,
            num_hidden_layers=2, H_cycles=high, L_cycles=low, prefix_lm=False, max_position_embeddings=64,
        )
    ).eval()  # fmt: skip
    theirs.load_state_dict(ours.state_dict(), strict=True)
    torch.testing.assert_close(ours(tokens()).logits, theirs(tokens()).logits, rtol=0, atol=1e-5)


def test_a_dense_model_of_one_segment_exports_to_hrm_text(tmp_path):
    model = build(use_moe=False, halt_max_steps=1, h_layers=2, l_layers=2)
    model.export_plain(tmp_path)
    plain = HrmTextForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(plain(tokens()).logits, model(tokens()).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("grad_mode", ["one_step", "last_cycle", "all"])
def test_every_parameter_learns_in_every_mode(grad_mode):
    model, x = build(grad_mode=grad_mode).train(), tokens()
    model(x, labels=x).loss.backward()
    idle = [n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert idle == []


def test_the_modes_keep_as_much_of_the_graph_as_they_say():
    found = {}
    for mode in ("one_step", "last_cycle", "all"):
        model, with_gradient = build(grad_mode=mode).train(), []
        for stack in (model.model.L_module, model.model.H_module):
            stack.register_forward_hook(lambda *_, seen=with_gradient: seen.append(torch.is_grad_enabled()))
        model(tokens(), labels=tokens())
        found[mode] = sum(with_gradient), len(with_gradient)
    assert found == {"one_step": (6, 18), "last_cycle": (9, 18), "all": (18, 18)}


def test_a_segment_begins_without_gradient_into_the_one_before():
    # With last_cycle the first cycle cuts the gradient anyway.
    model = build(use_moe=False, halting="max", grad_mode="all").train()
    states = model(tokens()).states
    (reached,) = torch.autograd.grad(states[1].sum(), states[0], allow_unused=True)
    assert reached is None


def test_pieces_have_the_loss_of_the_whole_the_last_token_of_each_included():
    from chronomoe.training.micro_batches import pieces

    x, model = tokens(2, 16), build(use_moe=False, halting="max").train()
    model(x, labels=x)
    whole, parts = model.loss_terms["ce"], 0.0
    for call in pieces({"input_ids": x}, x, 5):
        model(**call, num_items_in_batch=30)
        parts += model.loss_terms["ce"]
    torch.testing.assert_close(parts, whole)


def test_the_loss_is_a_mean_over_tokens_and_segments():
    x = tokens()
    model = build(halting="max", use_moe=False).train()
    output = model(x, labels=x)
    by_segment = [
        F.cross_entropy(model.lm_head(state)[:, :-1].flatten(0, 1), x[:, 1:].flatten()) for state in output.states
    ]
    torch.testing.assert_close(model.loss_terms["ce"], torch.stack(by_segment).mean())
    assert model.loss_terms["used_segments"] == 3
    torch.testing.assert_close(output.loss, model.loss_terms["ce"] + model.loss_terms["bce_halt"])


def test_its_size_does_not_jump_with_the_number_of_segments():
    x, losses, halting = tokens(), [], []
    for segments in (1, 2, 4):
        model = build(halt_max_steps=segments, halting="max", use_moe=False, thoughtful=False).train()
        model(x, labels=x)
        losses.append(model.loss_terms["ce"].item())
        halting.append(model.loss_terms["bce_halt"].item())
    assert max(losses) < 1.3 * min(losses)
    assert halting[0] == 0
    assert halting[2] < 1.3 * halting[1]


def test_micro_batches_of_any_split_have_one_gradient():
    x = tokens(4, 12)
    model = build(halt_exploration=0.0).train()
    model.steering.config = type(model.steering.config)(balance_scope="step")
    model.steering.tokens_in_step = x.numel()
    gradients = []
    for split in (4, 2, 1):
        model.zero_grad()
        for part in x.split(split):
            model(part, labels=part, num_items_in_batch=4 * 11).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        model.steering.discard_step()
    for other in gradients[1:]:
        for name, gradient in gradients[0].items():
            torch.testing.assert_close(other[name], gradient, rtol=1e-3, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_checkpointing_changes_no_gradient_and_counts_routing_once():
    x, found = tokens(), []
    for checkpointing in (False, True):
        model = build(halt_exploration=0.0).train()
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        model(x, labels=x).loss.backward()
        window = model.controller.tick()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        found.append((gradients, window.depth_assignments))
    for name, gradient in found[0][0].items():
        torch.testing.assert_close(found[1][0][name], gradient)
    assert torch.equal(found[0][1], found[1][1])


def test_checkpointing_works_in_pieces_too():
    from chronomoe.training.micro_batches import pieces

    x, found = tokens(2, 16), []
    for checkpointing in (False, True):
        model = build(halt_exploration=0.0).train()
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        for call in pieces({"input_ids": x}, x, 6):
            model(**call, num_items_in_batch=30).loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient)


def test_the_balance_loss_pulls_at_the_routers_under_checkpointing():
    x = tokens()
    model = build(halt_exploration=0.0).train()
    model.activation_checkpointing_enable({"use_reentrant": False})
    model(x)
    terms = model.steering.losses(model.steering.context)
    terms["balance"].backward()
    routers = [
        layer.mlp.gate.weight for stack in (model.model.L_module, model.model.H_module) for layer in stack.layers
    ]
    assert all(router.grad.norm() > 1e-6 for router in routers)


def test_calls_without_gradient_are_observed_before_a_long_forward_ends(monkeypatch):
    x, found = tokens(), []
    for waiting in (2, 10**9):
        monkeypatch.setattr(router, "MAX_PENDING_CALLS", waiting)
        model, most = build(halt_exploration=0.0, grad_mode="one_step").train(), []
        for layer in model.model.L_module.layers:
            layer.mlp.gate.register_forward_hook(
                lambda *_, model=model, most=most: most.append(
                    sum(not call.carries_gradient for call in model.steering.context.calls)
                )
            )
        model(x, labels=x).loss.backward()
        found.append((max(most), model.steering.last_losses, model.steering.statistics.window()))
    (few, losses, window), (many, same_losses, same) = found
    assert few < 2 < many
    for name, loss in losses.items():
        assert torch.equal(loss, same_losses[name])
    for one in dataclasses.fields(window):
        torch.testing.assert_close(getattr(window, one.name), getattr(same, one.name))


def test_the_losses_sum_over_the_calls_of_each_layer_that_carry_a_gradient():
    model = build(halt_exploration=0.0, grad_mode="last_cycle").train()
    mass, squares, times = ([0.0] * len(model.steering.available) for _ in range(3))

    def add(call):
        if torch.is_grad_enabled():
            z = call.logits if call.counted is None else call.logits[call.counted]
            mass[call.layer] += z.softmax(dim=-1).sum(dim=0)
            squares[call.layer] += z.logsumexp(dim=-1).square().sum()
            times[call.layer] += 1

    with capture_routing(model, add):
        model(tokens())
    sums = model.steering.context.sums
    assert max(times) > 1
    assert sums.calls == [times[layer] for layer in sums.layers]
    for row, layer in enumerate(sums.layers):
        torch.testing.assert_close(sums.probability[row], mass[layer])
        torch.testing.assert_close(sums.squared_logsumexp[row], squares[layer])


@pytest.mark.parametrize("waiting", [2, 10**9])
def test_the_balance_loss_acts_on_the_load_of_all_cycles(monkeypatch, waiting):
    monkeypatch.setattr(router, "MAX_PENDING_CALLS", waiting)
    model = build(halt_exploration=0.0, grad_mode="one_step").train()
    model(tokens())
    sums, window = model.steering.context.sums, model.steering.statistics.window()
    assert torch.equal(sums.assigned, window.assignments[sums.layers])
    assert sum(sums.calls) < (window.depth_assignments.sum(dim=-1) > 0).sum()  # few of them carry a gradient


def test_load_is_seen_by_depth_and_pooled_without_halted_tokens_or_padding():
    model, x = build(halt_exploration=0.0).train(), tokens()
    mask = torch.ones_like(x)
    mask[0, -4:] = 0
    output = model(x, attention_mask=mask, labels=x)
    output.loss.backward()
    window = model.controller.tick()
    by_depth = window.depth_assignments.sum(dim=-1)
    ran = [(output.segments[mask.bool()] > segment).sum().item() * 2 for segment in range(3)]
    assert by_depth[0].tolist() == [n for n in ran for _ in range(4)], "two low cycles in each of two high ones"
    assert by_depth[2].tolist() == [*(n for n in ran for _ in range(2)), *[0] * 6]
    torch.testing.assert_close(window.depth_assignments.sum(dim=1), window.assignments)
    assert ran[0] > ran[1] > ran[2] > 0


def test_pressure_steers_it():
    model, x = build(), tokens()
    before = model(x).logits
    model.steering.pressure[:, 0] = -100
    assert (model(x).logits - before).abs().max() > 1e-3
    model.steering.pressure.zero_()
    assert torch.equal(model(x).logits, before)


@pytest.mark.parametrize("variant", [{}, {"use_moe": False}, {"pos_encodings": "learned", "window_size": 5}], ids=str)
def test_it_saves_and_loads_whole(tmp_path, variant):
    model, x = build(**variant), tokens()
    if model.config.use_moe:
        model.steering.pressure[0, 1] = 0.3
    model.save_pretrained(tmp_path)
    again = HRMACTv1ForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(again(x).logits, model(x).logits)
    mine, theirs = model.config.to_dict(), again.config.to_dict()
    assert {**mine, "_name_or_path": ""} == {**theirs, "_name_or_path": ""}


def test_a_batch_of_nothing_but_ignored_labels_is_survived():
    model, x = build().train(), tokens()
    loss = model(x, labels=torch.full_like(x, -100)).loss
    assert loss.isfinite()


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"num_experts": 2, "num_experts_per_tok": 3}, r"num_experts_per_tok \(3\) exceeds the 2 experts"),
        ({"hidden_size": 30}, "30, not a multiple of 4 attention heads"),
        ({"hidden_size": 36}, "rope cannot turn"),
        ({"grad_mode": "some"}, "grad_mode"),
        ({"pos_encodings": "sine"}, "pos_encodings"),
        ({"halt_max_steps": 0}, "halt_max_steps"),
        ({"window_size": 0}, "window_size"),
        ({"h_layers": 0}, "h_layers"),
        ({"halt_exploration": 2.0}, "halt_exploration"),
    ],
)
def test_bad_shapes_are_named(changes, name):
    shape = {"hidden_size": 32, "num_attention_heads": 4} | changes
    with pytest.raises(ConfigError, match=name):
        HRMACTv1Config(**shape)


def test_widths_are_those_of_hrm():
    assert ffn_width(512, 2.0) == 768
    assert HRMACTv1Config(hidden_size=512, expansion=4.0).intermediate_size == 1536


def test_more_text_than_learned_positions_is_refused():
    model = build(pos_encodings="learned", max_position_embeddings=16)
    with pytest.raises(ConfigError, match="longer than the 16 positions"):
        model(tokens())
