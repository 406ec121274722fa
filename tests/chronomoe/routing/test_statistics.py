"""What routers observe equals what can be recomputed by hand from the same forward."""

import copy

import pytest
import torch

import chronomoe
from chronomoe.routing.losses import direction_similarity
from chronomoe.training import ChronoMoELoss
from tests.chronomoe.conftest import FAMILIES
from tests.chronomoe.draws import one_call


@pytest.fixture
def observed(host, tokens):
    """A steered model after one training step on a padded batch, with its router outputs and inputs."""

    def run(family="mixtral", **changes):
        model = host(family, **changes).train()
        steering = chronomoe.attach(model).steering
        seen = []
        model.model.layers[1].mlp.gate.register_forward_hook(lambda m, i, o: seen.append((i[0].detach(), *o)))
        mask = torch.ones_like(tokens)
        mask[1, 9:] = 0
        model(tokens, attention_mask=mask, labels=tokens.masked_fill(mask == 0, -100))
        return steering, seen[0], mask.reshape(-1).bool()

    return run


@pytest.mark.parametrize("family", FAMILIES)
def test_every_sum(observed, family):
    steering, (h, z, w, chosen), keep = observed(family)
    window = steering.end_step()
    h, z, w, chosen = h.reshape(-1, 32)[keep], z[keep], w[keep], chosen[keep]
    one_hot = torch.nn.functional.one_hot(chosen, 4).sum(1).float()
    p = z.softmax(-1)
    layer = 1
    torch.testing.assert_close(window.assignments[layer], one_hot.sum(0))
    torch.testing.assert_close(window.probability[layer], p.sum(0))
    torch.testing.assert_close(window.weight[layer], torch.zeros_like(p).scatter(1, chosen, w.float()).sum(0))
    torch.testing.assert_close(window.coactivation[layer], one_hot.T @ one_hot)
    torch.testing.assert_close(window.inputs[layer], one_hot.T @ h)
    torch.testing.assert_close(window.input_sum[layer], h.sum(0))
    assert window.tokens[layer] == keep.sum()
    torch.testing.assert_close(window.entropy[layer], torch.distributions.Categorical(p).entropy().sum())
    torch.testing.assert_close(window.logit_std[layer], z.std(-1, correction=0).sum())
    share = one_hot.sum(0) / one_hot.sum()
    torch.testing.assert_close(window.load[layer], share)
    torch.testing.assert_close(window.max_violation[layer], share.max() * 4 - 1)
    torch.testing.assert_close(window.balance[layer], 4 * (share * p.mean(0)).sum())
    direction = torch.stack([h[one_hot[:, k] > 0].mean(0) for k in range(4)]) - h.mean(0)
    torch.testing.assert_close(window.centred_direction[layer], direction)


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_gradient_signal_is_the_gradient_of_the_language_model_loss(host, tokens, family, top_k):
    model = host(family, num_experts_per_tok=top_k).train()
    steering = chronomoe.attach(model, chronomoe.SteeringConfig(loss=ChronoMoELoss(lambda_balance=5.0))).steering
    logits = []

    def keep(module, args, output):
        output[0].retain_grad()
        logits.append((output[0], output[2]))

    model.model.layers[1].mlp.gate.register_forward_hook(keep)
    model(tokens, labels=tokens).loss.backward()
    with_balance = logits[0][0].grad
    silent = copy.deepcopy(model)
    silent.zero_grad()
    silent.steering.config = chronomoe.SteeringConfig(loss=ChronoMoELoss(lambda_balance=0.0, lambda_z=0.0))
    logits.clear()
    silent(tokens, labels=tokens).loss.backward()
    z, chosen = logits[0]
    expected = torch.zeros(4).index_add_(0, chosen.reshape(-1), z.grad.gather(1, chosen).reshape(-1))
    window = steering.end_step()
    torch.testing.assert_close(window.gradient[1], expected)
    assert not torch.allclose(with_balance, z.grad)
    assert torch.all(window.absolute_gradient[1] >= window.gradient[1].abs() - 1e-9)


def test_no_router_loss_depends_on_padding(host, tokens):
    model = host("mixtral").train()
    controller = chronomoe.attach(model, chronomoe.SteeringConfig(loss=ChronoMoELoss(lambda_coherence=0.1)))
    model(tokens, labels=tokens).loss.backward()
    controller.tick()
    model.steering.valley_weight[:, 1] = 1.0
    mask, found = torch.ones_like(tokens), []
    mask[0, -6:] = 0
    for filler in (1, 7):
        x = torch.where(mask.bool(), tokens, filler)
        model(x, attention_mask=mask, labels=x.masked_fill(mask == 0, -100))
        found.append(model.steering.last_losses)
    assert set(found[0]) == {"lm", "balance", "coherence", "valley", "z"}
    for name, term in found[0].items():
        torch.testing.assert_close(term, found[1][name], msg=name)


def test_flips_are_choices_that_the_fields_changed(host, tokens):
    model, logits = host("mixtral").train(), []
    steering = chronomoe.attach(model).steering
    model.model.layers[0].mlp.gate.register_forward_hook(lambda module, args, output: logits.append(output[0]))
    model(tokens)
    assert steering.end_step().flips.tolist() == [0] * len(steering.pressure)
    steering.pressure[0, 0] = 100.0
    model(tokens)
    part = logits[1][::8]
    changed = (part.topk(steering.top_k).indices != 0).all(dim=-1).sum().item()
    assert 0 < changed < len(part)
    flips = steering.end_step().flips
    assert flips[0].item() == pytest.approx(changed * len(logits[1]) / len(part))


def test_a_router_called_outside_its_model_is_observed_too(host):
    model = host("mixtral").train()
    steering = chronomoe.attach(model).steering
    router = model.model.layers[1].mlp.gate
    router(torch.randn(5, router.hidden_dim))
    assert steering.statistics.window().tokens.tolist() == [0, 5]


def test_autocast_does_not_coarsen_what_inputs_are_compared_with(host, tokens):
    model = host("mixtral").train()
    controller = chronomoe.attach(model)
    model(tokens, labels=tokens).loss.backward()
    controller.tick()
    steering = model.steering
    steering.refresh()
    _, exact = steering._prototypes
    steering.direction.mul_(1.0)  # written to: looked at anew
    with torch.autocast("cpu", dtype=torch.bfloat16):
        steering.refresh()
    assert steering.coherent
    assert torch.equal(steering._prototypes[1], exact)


def test_autocast_does_not_coarsen_the_agreement(host, tokens):
    model = host("mixtral").train()
    controller = chronomoe.attach(model, chronomoe.SteeringConfig(loss=ChronoMoELoss(lambda_coherence=0.1)))
    model(tokens, labels=tokens).loss.backward()
    controller.tick()
    steering, seen = model.steering, []
    model.model.layers[0].mlp.gate.register_forward_hook(lambda module, args, output: seen.append((args[0], output[0])))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(tokens)
    ((h, logits),) = seen
    part = torch.arange(tokens.shape[1]) % 8 == 0
    h = h.view(*tokens.shape, -1)[:, part].flatten(0, 1).float()
    p = logits.softmax(dim=-1).view(*tokens.shape, -1)[:, part].flatten(0, 1)
    usual, along_mean = (of_layer[0] for of_layer in steering._prototypes)
    scale = tokens.shape[1] / part.sum()
    expected = scale * (p * direction_similarity(h, usual, along_mean)).sum()
    torch.testing.assert_close(steering.context.sums.similarity[0], expected, rtol=1e-4, atol=1e-5)


def test_a_reset_forgets_what_the_backward_pass_told(host, tokens):
    model = host("mixtral").train()
    steering = chronomoe.attach(model).steering
    model(tokens, labels=tokens).loss.backward()
    steering.reset()
    window = steering.statistics.window()
    assert not window.tokens.any()
    assert not window.absolute_gradient.any()


def test_evaluation_and_generation_write_nothing(host, tokens):
    model = host("mixtral").eval()
    steering = chronomoe.attach(model).steering
    model(tokens, labels=tokens)
    model.generate(tokens[:, :4], max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert steering.statistics.sums.abs().sum() == 0
    load = steering.load.clone()
    steering.end_step()
    assert torch.equal(steering.load, load)


@pytest.mark.parametrize("family", FAMILIES)
def test_activation_checkpointing_counts_once_and_changes_no_gradient(host, tokens, family):
    plain = host(family).train()
    chronomoe.attach(plain)
    recomputing = copy.deepcopy(plain)
    recomputing.activation_checkpointing_enable({"use_reentrant": False})
    for model in (plain, recomputing):
        model(tokens, labels=tokens).loss.backward()
    windows = [model.steering.statistics.window() for model in (plain, recomputing)]
    assert windows[0].absolute_gradient.min() > 0
    assert torch.equal(plain.steering.statistics.sums, recomputing.steering.statistics.sums)
    for a, b in zip(plain.parameters(), recomputing.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


def test_windows_add_up_and_close(host, tokens):
    model = host("mixtral").train()
    steering = chronomoe.attach(model).steering
    model(tokens)
    once = steering.statistics.window()
    model(tokens)
    twice = steering.end_step()
    torch.testing.assert_close(twice.inputs, 2 * once.inputs)
    assert torch.equal(twice.assignments, 2 * once.assignments)
    assert torch.equal(steering.load, twice.load)
    assert steering.statistics.sums.abs().sum() == 0
    model(tokens)
    load = steering.load.clone()
    steering.discard_step()
    assert torch.equal(steering.load, load)


def test_derived_figures():
    from tests.chronomoe.conftest import build_host

    steering = chronomoe.attach(build_host("mixtral", num_experts_per_tok=1)).steering
    chosen = torch.tensor([0] * 60 + [1] * 20 + [2] * 20).unsqueeze(-1)
    p = torch.full((100, 4), 0.25)
    for layer in (0, 1):
        steering.statistics.record(*one_call(layer, torch.randn(100, 32), p, p, chosen, torch.ones(100, 1)))
    window = steering.statistics.window()
    assert window.dead_experts.tolist() == [1, 1]
    assert window.max_violation.tolist() == pytest.approx([1.4, 1.4])
    expected = torch.distributions.Categorical(torch.tensor([0.6, 0.2, 0.2, 0.0])).entropy() / torch.tensor(4.0).log()
    torch.testing.assert_close(window.load_entropy[0], expected)
    # Of those that may be chosen: a masked expert is neither dead nor a want of balance.
    steering.available[0, 3] = False
    steering.available[1, 1:] = False
    window = steering.end_step()
    assert window.dead_experts.tolist() == [0, 0]
    assert window.max_violation.tolist() == pytest.approx([0.8, 0.0])
    three = torch.distributions.Categorical(torch.tensor([0.6, 0.2, 0.2])).entropy() / torch.tensor(3.0).log()
    torch.testing.assert_close(window.load_entropy, torch.stack([three, torch.tensor(1.0)]))


def test_one_expert_and_an_empty_window_have_figures():
    from tests.chronomoe.conftest import build_host

    steering = chronomoe.attach(build_host("mixtral", num_experts=1, num_experts_per_tok=1)).steering
    window = steering.statistics.window()
    assert window.load_entropy.tolist() == window.router_entropy.tolist() == [1, 1]
    assert window.max_violation.tolist() == [0, 0]
    assert all(value == value for value in window.summary().values())
