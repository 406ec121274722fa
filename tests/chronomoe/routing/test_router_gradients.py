"""Each router loss has the gradient its formula says, and does what it is for when it is descended alone."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

import chronomoe
from chronomoe import ControlConfig
from chronomoe.routing.losses import (
    ChronoMoELoss,
    balance_loss,
    coherence_loss,
    direction_similarity,
    valley_loss,
    z_loss,
)
from tests.chronomoe.conftest import build_host

T, N, D = 12, 5, 7


def agreements(h, mean, direction):
    usual = torch.cat([direction, mean.unsqueeze(0)])
    return direction_similarity(h, usual, usual @ mean)


def terms(z, h, load, weight, direction, mean):
    p = z.softmax(-1)
    agreement = (p * agreements(h, mean, direction).to(p.dtype)).sum()
    return {
        "balance": balance_loss(load, p.sum(0)[None], T),
        "z": z_loss(z.logsumexp(-1).square().sum()[None], T),
        "valley": valley_loss(weight, p.sum(0)[None], T),
        "coherence": coherence_loss(agreement[None], T, T),
    }


@pytest.mark.parametrize("name", ["balance", "z", "valley", "coherence"])
@given(seed=st.integers(0, 10_000))
def test_gradients_match_finite_differences(name, seed):
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    h, router = rand(T, D), rand(N, D).requires_grad_()
    constants = (rand(1, N).softmax(-1), rand(1, N).sigmoid(), F.normalize(rand(N, D).float(), dim=-1), rand(D).float())
    load, weight, direction, mean = constants

    def value(matrix):
        return terms(h @ matrix.T, h, load, weight, direction, mean)[name].sum()

    (gradient,) = torch.autograd.grad(value(router), router)
    assert gradient.norm() > 1e-6
    step = rand(N, D)
    step = step / step.norm() * 1e-5
    difference = (value(router.detach() + step) - value(router.detach() - step)) / 2
    torch.testing.assert_close((gradient * step).sum(), difference, rtol=1e-4, atol=1e-10)


@given(st.integers(0, 10_000))
def test_the_coherence_loss_lies_between_0_and_2(seed):
    generator = torch.Generator().manual_seed(seed)
    p = torch.randn(T, N, generator=generator).softmax(-1)
    h, mean = torch.randn(T, D, generator=generator), torch.randn(D, generator=generator)
    direction = F.normalize(torch.randn(N, D, generator=generator), dim=-1)
    loss = coherence_loss((p * agreements(h, mean, direction)).sum()[None], T, T).item()
    assert 0 <= loss <= 2


def steered(loss, **shape):
    torch.manual_seed(0)
    model = build_host("mixtral", num_experts=6, **shape).train()
    config = chronomoe.SteeringConfig(loss=loss)
    chronomoe.attach(model, config, ControlConfig().ablate("none"))
    return model


def tokens(n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    start = torch.randint(0, 61, (n, 4, 1), generator=generator)
    return (start + torch.arange(16)) % 61


def test_every_term_reaches_the_routers_in_a_real_step():
    model = steered(ChronoMoELoss(lambda_balance=1, lambda_coherence=1, lambda_valley=1, lambda_z=1))
    for x in tokens(3):
        model(input_ids=x, labels=x).loss.backward()
        model.zero_grad()
        model.controller.tick()
    steering = model.steering
    steering.valley_weight[:, 1] = 0.7
    routers = [layer.mlp.gate.weight for layer in model.model.layers]
    for name in ("balance", "coherence", "valley", "z"):
        x = tokens(1, seed=5)[0]
        model(input_ids=x)
        by_layer = steering.layer_losses(steering.context)[name]
        for layer, router in enumerate(routers):
            (gradient,) = torch.autograd.grad(by_layer[layer], router, retain_graph=True)
            assert gradient.norm() > 1e-5, (name, layer)


def test_the_losses_of_a_model_and_their_gradients_are_those_of_the_formulas():
    """Written here anew, in fp64, from what goes into the routers and comes out of them."""
    model = steered(ChronoMoELoss(lambda_coherence=1))
    for x in tokens(3):
        model(input_ids=x)
        model.controller.tick()
    steering, seen = model.steering, {}
    steering.valley_weight.copy_(torch.rand(2, 6, generator=torch.Generator().manual_seed(3)))
    for layer in model.model.layers:
        layer.mlp.gate.register_forward_hook(lambda router, args, out: seen.update({router.layer: (args[0], out[2])}))
    x = tokens(1, seed=5)[0]
    model(input_ids=x)
    found = steering.layer_losses(steering.context)
    assert found.keys() == {"balance", "z", "valley", "coherence"}
    for number, layer in enumerate(model.model.layers):
        h, chosen = seen[number]
        h = h.detach().double().flatten(0, -2)
        matrix = layer.mlp.gate.weight.detach().double().requires_grad_()
        z = h @ matrix.T
        p = z.softmax(-1)
        load = torch.bincount(chosen.flatten(), minlength=6) / chosen.numel()
        sampled = torch.arange(len(h)) % x.shape[1] % 8 == 0
        away = h[sampled] - steering.input_mean[number].double()
        cosine = F.cosine_similarity(away.unsqueeze(1), steering.direction[number].double().unsqueeze(0), dim=-1)
        expected = {
            "balance": 6 * (load * p.mean(0)).sum(),
            "z": z.logsumexp(-1).square().mean(),
            "valley": 6 * (steering.valley_weight[number].double() * p.mean(0)).sum(),
            "coherence": 1 - (p[sampled] * cosine).sum(-1).mean(),
        }
        for name, value in expected.items():
            torch.testing.assert_close(found[name][number].double(), value, rtol=1e-5, atol=1e-6)
            (mine,) = torch.autograd.grad(found[name][number], layer.mlp.gate.weight, retain_graph=True)
            (wanted,) = torch.autograd.grad(value, matrix, retain_graph=True)
            torch.testing.assert_close(mine.double(), wanted, rtol=1e-4, atol=1e-6)


def descend(model, name, steps, lr, sign=1):
    """Descend (or climb) one term alone, by the routers alone; the controller only observes."""
    routers = [layer.mlp.gate.weight for layer in model.model.layers]
    optimizer = torch.optim.Adam(routers, lr=lr)
    for x in tokens(steps, seed=7):
        model(input_ids=x)
        term = model.steering.losses(model.steering.context).get(name)
        if term is not None:
            optimizer.zero_grad()
            (sign * term).backward()
            optimizer.step()
        model.controller.tick()


def coherence_of(model, steps=120):
    """R over fresh text with routers at rest but noisy, so that it is not 1 to begin with."""
    model.controller.forget()
    with torch.no_grad():
        for x in tokens(steps, seed=11):
            model(input_ids=x)
            model.controller.tick()
    return model.controller.coherence_history[-1]


def test_agreement_is_the_cosine_of_the_centred_input():
    generator = torch.Generator().manual_seed(0)
    h, mean = torch.randn(20, 8, generator=generator), torch.randn(8, generator=generator)
    direction = torch.nn.functional.normalize(torch.randn(3, 8, generator=generator), dim=-1)
    wanted = torch.nn.functional.cosine_similarity((h - mean).unsqueeze(1), direction.unsqueeze(0), dim=-1)
    torch.testing.assert_close(agreements(h, mean, direction), wanted, atol=1e-5, rtol=1e-5)


def test_descending_the_coherence_loss_alone_raises_coherence_and_more_than_climbing_it():
    """With the routers' size put back: larger logits would resist the noise whatever they say.

    Climbing it raises R too, by two thirds as much: who is always sent what suits him least is steady as well.
    """
    found = {}
    for sign in (0, 1, -1):
        model = steered(ChronoMoELoss(lambda_coherence=1))
        # Noise makes routing unstable; a router that knows its directions resists it.
        model.steering.exploration.fill_(1.0)
        routers = [layer.mlp.gate.weight for layer in model.model.layers]
        with torch.no_grad():
            for router in routers:
                router.mul_(0.3)
        sizes = [router.norm().item() for router in routers]
        if sign:
            descend(model, "coherence", 150, 5e-3, sign)
        with torch.no_grad():
            for router, size in zip(routers, sizes, strict=True):
                router.mul_(size / router.norm())
        model.steering.direction.zero_()
        found[sign] = coherence_of(model)
    assert found[1] > found[0] + 0.15, found
    assert found[1] > found[-1] + 0.05, found


def test_the_valley_loss_empties_unhealthy_valleys(monkeypatch):
    model = steered(ChronoMoELoss(lambda_valley=1))
    model.steering.exploration.fill_(0.1)
    for x in tokens(5):
        model(input_ids=x)
        window = model.controller.tick()
    before = window.probability[:, 2] / window.tokens
    weight = torch.zeros(2, 6)
    weight[:, 2] = 0.9
    monkeypatch.setattr("chronomoe.control.tick.valley_weight", lambda state, config: weight)
    model.steering.valley_weight.copy_(weight)
    descend(model, "valley", 60, 1e-2)
    window = model.controller.window
    assert torch.all(window.probability[:, 2] / window.tokens < 0.3 * before)


def test_an_unhealthy_valley_found_by_the_controller_has_a_loss_with_a_gradient():
    model = steered(ChronoMoELoss(lambda_valley=1))
    controller, x = model.controller, tokens(1)[0]
    controller.structural_T_local[0, 4] = -0.3  # cold
    controller.contrast[0, 4], controller.gradient_size[0] = -1e3, 1.0  # and bad
    model(input_ids=x, labels=x).loss.backward()
    controller.tick()
    assert model.steering.valley_weight.nonzero().tolist() == [[0, 4]]
    assert controller.get_valley_health_diagnostics(0)["unhealthy_valleys"] == ["0.4"]
    model.zero_grad()
    model(input_ids=x)
    term = model.steering.layer_losses(model.steering.context)["valley"][0]
    (gradient,) = torch.autograd.grad(term, model.model.layers[0].mlp.gate.weight)
    assert gradient.norm() > 1e-6


def test_the_coherence_loss_does_not_depend_on_how_a_batch_is_split():
    """Of 17 tokens a sequence: which are sampled depends on their place in it."""
    model = steered(ChronoMoELoss(lambda_coherence=1))
    for x in tokens(3):
        model(input_ids=x)
        model.controller.tick()
    x = torch.randint(0, 61, (4, 17), generator=torch.Generator().manual_seed(2))
    model.steering.tokens_in_step = x.numel()
    found = []
    for rows in (4, 1):
        total = 0.0
        for part in x.split(rows):
            model(input_ids=part)
            total += model.steering.losses(model.steering.context)["coherence"].item()
        found.append(total)
    assert found[0] == pytest.approx(found[1], rel=1e-4)


def test_without_unhealthy_valleys_there_is_no_valley_loss():
    model = steered(ChronoMoELoss(lambda_valley=1))
    for x in tokens(5):
        model(input_ids=x, labels=x).loss.backward()
        model.controller.tick()
    assert model.steering.last_losses["valley"] == 0


def test_the_loss_can_be_made_outside_the_model():
    inside, outside = (steered(ChronoMoELoss(lambda_balance=0.5)) for _ in range(2))
    x = tokens(1)[0]
    expected = inside(input_ids=x, labels=x).loss
    loss = ChronoMoELoss(lambda_balance=0.5)
    total, parts = loss.compute(outside(input_ids=x).logits, x, outside.steering)
    torch.testing.assert_close(total, expected)
    assert set(parts) == {"lm_loss", "balance_loss", "valley_loss", "z_loss", "total_loss"}
    total.backward()
    expected.backward()
    for a, b in zip(inside.parameters(), outside.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)
