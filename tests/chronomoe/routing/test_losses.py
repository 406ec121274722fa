"""Router losses: their values, their true gradients, and that they do not see how a batch was split."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import chronomoe
from chronomoe.errors import ConfigError
from chronomoe.routing.losses import balance_loss, z_loss
from chronomoe.training import ChronoMoELoss


@given(st.integers(2, 64), st.integers(1, 5))
def test_balanced_is_one_for_every_size(n, layers):
    uniform = torch.full((layers, n), 1 / n)
    assert balance_loss(uniform, uniform * 100, 100.0).tolist() == pytest.approx([1.0] * layers)


def test_collapse_costs_n():
    load = torch.tensor([[1.0, 0, 0, 0]])
    assert balance_loss(load, load * 10, 10.0).item() == pytest.approx(4.0)


def test_imbalances_of_different_layers_do_not_cancel():
    load = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    assert balance_loss(load, load * 10, 10.0).tolist() == pytest.approx([2.0, 2.0])


def test_the_gradient_pushes_probability_off_the_loaded_expert():
    z = torch.zeros(10, 4, requires_grad=True)
    load = torch.tensor([[0.7, 0.1, 0.1, 0.1]], requires_grad=True)
    balance_loss(load, z.softmax(-1).sum(0, keepdim=True), 10.0).backward()
    assert torch.all(z.grad[:, 0] > 0)
    assert torch.all(z.grad[:, 1:] < 0)
    assert load.grad is None, "the load is a constant"
    # dL/dz_j = N/T p_j (f_j - sum_k p_k f_k)
    expected = 4 / 10 * 0.25 * (load.detach() - load.detach().mean())
    torch.testing.assert_close(z.grad, expected.expand(10, 4))


def test_z_loss_is_the_mean_squared_logsumexp():
    z = torch.randn(10, 4)
    assert z_loss(z.logsumexp(-1).square().sum().view(1), 10.0).item() == pytest.approx(
        z.logsumexp(-1).square().mean().item(), rel=1e-5
    )


def gradients(model, batches, masks, scope):
    """One optimizer step's gradients from the given micro-batches, as a trainer computes them."""
    model = copy.deepcopy(model).train()
    config = chronomoe.SteeringConfig(loss=ChronoMoELoss(lambda_balance=1.0, lambda_z=0.1), balance_scope=scope)
    steering = chronomoe.attach(model, config).steering
    steering.load.copy_(torch.tensor([[0.4, 0.3, 0.2, 0.1], [0.1, 0.1, 0.1, 0.7]]))
    steering.tokens_in_step = sum(mask.sum() for mask in masks)
    labels = [batch.masked_fill(mask == 0, -100) for batch, mask in zip(batches, masks, strict=True)]
    predicted = sum((label[:, 1:] != -100).sum() for label in labels)
    total = {"balance": 0.0, "z": 0.0}
    for batch, mask, label in zip(batches, masks, labels, strict=True):
        model(batch, attention_mask=mask, labels=label, num_items_in_batch=predicted).loss.backward()
        for name in total:
            total[name] += steering.last_losses[name].item()
    return [p.grad for p in model.parameters()], total, steering.end_step()


def test_splitting_a_padded_batch_changes_nothing(host):
    model = host("mixtral")
    x = torch.randint(0, 61, (6, 12))
    mask = torch.ones_like(x)
    mask[1, 7:] = 0
    mask[4, 3:] = 0
    whole, whole_loss, whole_window = gradients(model, [x], [mask], "step")
    parts, parts_loss, parts_window = gradients(model, list(x.split([1, 2, 3])), list(mask.split([1, 2, 3])), "step")
    for a, b in zip(whole, parts, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert whole_loss == pytest.approx(parts_loss, rel=1e-5)
    assert torch.equal(whole_window.assignments, parts_window.assignments)
    assert torch.equal(whole_window.load, parts_window.load)
    torch.testing.assert_close(whole_window.balance, parts_window.balance)


def test_the_load_of_each_forward_alone_would_depend_on_the_split(host):
    model = host("mixtral")
    x = torch.randint(0, 61, (6, 12))
    mask = torch.ones_like(x)
    whole, *_ = gradients(model, [x], [mask], "forward")
    parts, *_ = gradients(model, list(x.split(1)), list(mask.split(1)), "forward")
    worst = max((a - b).abs().max() / a.abs().max() for a, b in zip(whole, parts, strict=True))
    assert worst > 1e-3, "why the step's load is the default of the trainer"


def test_on_by_default_and_in_the_loss(host, tokens):
    model = host("mixtral").train()
    steering = chronomoe.attach(model).steering
    output = model(tokens, labels=tokens)
    terms = steering.last_losses
    expected = terms["lm"] + 0.01 * terms["balance"] + 0.001 * terms["z"]
    torch.testing.assert_close(output.loss.detach(), expected)
    assert output.aux_loss.requires_grad
    grads = torch.autograd.grad(output.aux_loss, [layer.mlp.gate.weight for layer in model.model.layers])
    assert all(grad.abs().max() > 0 for grad in grads)
    assert torch.isclose(model.eval()(tokens, labels=tokens).loss, terms["lm"])


def test_the_balance_loss_balances(host):
    torch.manual_seed(0)
    model = host("mixtral", num_experts=8).train()
    steering = chronomoe.attach(
        model, chronomoe.SteeringConfig(loss=ChronoMoELoss(lambda_balance=1.0, lambda_z=0))
    ).steering
    x = torch.randint(0, 61, (8, 16))
    routers = [layer.mlp.gate.weight for layer in model.model.layers]
    optimizer = torch.optim.Adam(routers, lr=0.02)
    worst = []
    for _ in range(40):
        model(x, labels=x).aux_loss.backward()
        optimizer.step()
        model.zero_grad()
        worst.append(steering.end_step().max_violation.max().item())
    assert worst[-1] < 0.5 * worst[0]


def test_reentrant_checkpointing_that_loses_the_gradient_is_refused(host, tokens):
    model = host("mixtral").train()
    chronomoe.attach(model)
    model.activation_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    with pytest.raises(ConfigError, match="use_reentrant"):
        model(tokens, labels=tokens)
