"""The judge: probes put everything back, masking takes proof and can be undone, the back-off grows and resets."""

import dataclasses
import math
import multiprocessing

import pytest
import torch
from torch import distributed

from chronomoe import ControlConfig
from chronomoe.control import judge
from chronomoe.control.judge import mean_and_error, probe, set_masked, sums_of
from chronomoe.training.control import language_model_loss
from tests.chronomoe.control.building import batches, build, language_loss, text, train


def test_a_probe_puts_everything_back():
    model = build()
    available = model.steering.available
    found = list(probe(language_loss(model), available, [(0, 1), (1, 2)]))
    assert [(layer, expert) for layer, expert, _ in found] == [(0, 1), (1, 2)]
    assert available.all()
    assert model.training


def test_a_harmful_expert_is_masked_and_comes_back_when_mended(model):
    experts, controller = model.model.layers[0].mlp.experts, model.controller
    saved = experts.down_proj[3].detach().clone()
    with torch.no_grad():
        experts.down_proj[3] *= -8
    controller.health[0, 3] = -0.9
    verdicts = controller.judge(language_loss(model))
    assert "expert 3 of layer 0 is masked" in verdicts[0]
    assert not model.steering.available[0, 3]
    assert controller.judge(language_loss(model)) == [], "not again so soon"
    x = text(1)[0]
    model(input_ids=x, labels=x).loss.backward()
    window = controller.tick()
    assert window.assignments[0, 3] == 0
    with torch.no_grad():
        experts.down_proj[3] = saved
    controller.ticks += 1000
    verdicts = controller.judge(language_loss(model))
    assert "is back" in verdicts[0]
    assert model.steering.available.all()
    assert controller.recovering[0, 3] == 1


def test_a_harmless_suspect_is_left_alone(model):
    model.controller.health[:] = -0.9
    assert model.controller.judge(language_loss(model)) == []
    assert model.steering.available.all()


def test_the_last_experts_are_never_masked():
    model = build()
    train(model, 30)
    model.steering.available[:, 2:] = False
    model.controller.health[:] = -0.9
    assert model.controller.suspects() == []


def test_an_expert_whose_output_overflows_is_named_though_its_weights_are_finite():
    model = build()
    train(model, 5)
    with torch.no_grad():
        model.model.layers[0].mlp.experts.gate_up_proj[2] *= 1e12
        model.model.layers[0].mlp.experts.down_proj[2] *= 1e20
    x = batches(1)[0]
    assert not model(input_ids=x, labels=x).loss.isfinite()
    assert model.controller.mask_broken() == ["expert 2 of layer 0 is masked: what it computes is not finite."]
    assert model(input_ids=x, labels=x).loss.isfinite()


def test_a_broken_expert_that_cannot_be_spared_is_still_named():
    model = build(num_experts=2, num_experts_per_token=2)
    with torch.no_grad():
        model.model.layers[0].mlp.experts.down_proj[1] = math.inf
    (sentence,) = model.controller.mask_broken()
    assert "expert 1 of layer 0" in sentence
    assert "cannot be spared" in sentence


def test_an_expert_closed_by_hand_is_not_opened_by_health():
    model = build()
    train(model, 30)
    model.steering.available[0, 2] = False
    model.controller.health[0, 2] = -0.9
    assert (0, 2) not in model.controller.suspects()


def test_an_expert_let_in_again_cools_down_and_can_be_judged_anew():
    model = build(ControlConfig(probe_every=1, suspect_below=1.0))
    controller = model.controller
    controller.recovering[0, 1] = 1.0
    controller.ticks.fill_(10)
    controller.health.fill_(-1)
    assert (0, 1) not in controller.suspects()
    assert (0, 2) in controller.suspects()
    train(model, steps=1)
    assert controller.recovering[0, 1] == pytest.approx(0.98)
    train(model, steps=40)
    assert controller.recovering[0, 1] < 0.5
    controller.health[0, 1] = -1.0
    assert (0, 1) in controller.suspects()


def test_a_verdict_needs_the_margin_and_twice_its_standard_error(model):
    controller = model.controller
    controller.health[0, 3] = -0.9
    noise = torch.tensor([1.0, -1.0] * 8)

    def loss(gain):
        return lambda: torch.zeros(16) if model.steering.available[0, 3] else noise * 0.1 - gain

    assert controller.judge(loss(0.04)) == [], "the mean gain is below two standard errors, 0.05"
    controller.ticks += 100
    controller.evidence.zero_()
    noise.zero_()
    assert controller.judge(loss(0.0019)) == [], "below the margin"
    controller.ticks += 100
    controller.evidence.zero_()
    assert "is masked" in controller.judge(loss(0.0021))[0]


def test_evidence_adds_up_over_probes(model):
    """A loss that one probe cannot tell from noise is told by several, on other sequences each."""
    controller, generator = model.controller, torch.Generator().manual_seed(0)
    controller.health[0, 3] = -0.9

    def loss():
        noise = torch.randn(8, generator=generator) * 0.1
        return torch.zeros(8) if model.steering.available[0, 3] else noise - 0.05

    verdicts = []
    while not verdicts and controller.ticks < 3000:
        controller.ticks += 25
        verdicts = controller.judge(loss)
    assert "is masked" in verdicts[0]
    assert controller.evidence[:, 0, 3].tolist() == [0, 0, 0], "a verdict begins a new account"
    mean, error = mean_and_error(sums_of(torch.tensor([1.0, 2.0, 3.0])))
    assert (mean, error) == (pytest.approx(2.0), pytest.approx(1 / 3**0.5))


def probes_of(controller, ticks, loss):
    """At which of the ticks to come someone was probed."""
    seen = []
    for _ in range(ticks):
        controller.ticks += 1
        asked = []
        controller.judge(lambda asked=asked: asked.append(1) or loss())
        seen += [int(controller.ticks)] if asked else []
    return seen


def test_an_expert_that_stays_bad_is_probed_ever_less_often():
    controller = build().controller
    set_masked(controller, controller.steering, 1, 2, masked=True)
    harm = torch.full((4,), 0.05)
    seen = probes_of(controller, 2000, lambda: harm * bool(controller.steering.available[1, 2]))
    assert seen == [100, 300, 700, 1100, 1500, 1900], "after 100, 200, and then every 400 ticks"
    assert probes_of(controller, 2500, lambda: harm * 0) == [2300, 2700, 3100], "harmless now"
    assert controller.steering.available.all(), "what is long past weighs little"
    controller.ticks.fill_(5000)
    controller.last_probe.fill_(5000)
    set_masked(controller, controller.steering, 1, 2, masked=True)
    assert probes_of(controller, 310, lambda: harm * bool(controller.steering.available[1, 2])) == [5100, 5300]


def test_a_suspect_that_harms_nobody_is_probed_ever_less_often():
    controller = build().controller
    controller.health[0, 3] = -0.9
    assert probes_of(controller, 1200, lambda: torch.zeros(4)) == [25, 75, 175, 375, 775, 1175]
    controller.health[1, 1] = -0.9
    assert probes_of(controller, 30, lambda: torch.zeros(4)) == [1201], "another one, long unprobed, does not wait"


def test_who_was_well_again_is_probed_at_once_when_next_it_falls_ill(model):
    controller = model.controller
    controller.fruitless[0, 3] = controller.fruitless[0, 2] = 4
    controller.contrast[0, 3] = -4 * controller.gradient_size[0]
    controller.contrast[0, 2] = 0.1 * controller.gradient_size[0]
    controller.fruitless[0, 4], controller.contrast[0, 4] = 4, -0.05 * controller.gradient_size[0]
    x = text(1)[0]
    model(input_ids=x, labels=x).loss.backward()
    controller.tick()
    assert -0.27 < controller.health[0, 4] < -0.16, "below 0, and far from well"
    assert controller.fruitless[0].tolist()[2:5] == [0, 4, 4]


def test_a_masked_expert_that_still_computes_nan_spoils_no_evidence():
    model = build()
    train(model, 30)
    with torch.no_grad():
        model.model.layers[0].mlp.experts.down_proj[2] = math.nan
    (sentence,) = model.controller.mask_broken()
    assert "expert 2 of layer 0" in sentence
    model.controller.ticks += 100
    assert model.controller.judge(language_loss(model)) == []
    assert model.controller.last_probe[0, 2] == model.controller.ticks
    assert model.controller.evidence.isfinite().all(), "a checkpoint of it could not be read again"


def fake_loss(controller, *costs):
    """Sequences whose loss rises by so much for each (layer, expert, cost) that is available."""
    available = controller.steering.available
    return lambda: torch.full((8,), sum(cost * float(available[layer, expert]) for layer, expert, cost in costs))


def test_a_verdict_says_nothing_of_the_next_suspect(fresh):
    fresh.health[0, 0] = fresh.health[1, 1] = -0.9
    (sentence,) = fresh.judge(fake_loss(fresh, (0, 0, 0.05), (1, 1, -0.01)))
    assert sentence == "expert 0 of layer 0 is masked: -0.0500 nats per token."
    assert fresh.masked.nonzero().tolist() == [[0, 0]]
    set_masked(fresh, fresh.steering, 1, 1, masked=True)
    fresh.ticks += 1000
    (sentence,) = fresh.judge(fake_loss(fresh, (0, 0, -0.06), (1, 1, 0.05)))
    assert sentence == "expert 0 of layer 0 is back: -0.0600 nats per token."


def test_of_two_that_harm_the_worse_goes_when_only_one_can_be_spared():
    controller = build(num_experts=3, num_experts_per_token=2).controller
    controller.ticks.fill_(25)
    controller.health[0, 0] = controller.health[0, 1] = -0.9
    (sentence,) = controller.judge(fake_loss(controller, (0, 0, 0.05), (0, 1, 0.2)))
    assert "expert 1 of layer 0 is masked" in sentence
    assert controller.steering.available[0].tolist() == [True, False, True]


def test_suspects_are_probed_together_or_later(fresh):
    fresh.health[0, 3] = -0.9
    assert probes_of(fresh, 5, fake_loss(fresh)) == [26]
    fresh.health[1, 1] = -0.9
    assert probes_of(fresh, 60, fake_loss(fresh)) == [51, 76]


def times_masked(controller, trials, ticks, gain, sequences):
    """How often a suspect is, within so many ticks, whose absence lowers the loss by ``gain``, and noise."""
    generator, available = torch.Generator().manual_seed(0), controller.steering.available

    def loss():
        noise = 0.035 * torch.randn(sequences, generator=generator)
        return torch.zeros(sequences) if available[0, 3] else noise - gain

    masked = 0
    for _ in range(trials):
        controller.forget()
        controller.ticks.fill_(24)
        controller.health[0, 3] = -0.9
        probes_of(controller, ticks, loss)
        masked += int(controller.masked.sum())
    return masked


@pytest.mark.parametrize("sequences", [2, 4, 8, 16])
def test_chance_is_no_proof(fresh, sequences):
    """The absence of a suspect changes nothing but noise: of three hundred about four may be masked."""
    assert times_masked(fresh, 300, 25, 0.0, sequences) <= 10


@pytest.mark.parametrize(("sequences", "most"), [(4, 15), (8, 7), (16, 4)])
def test_harm_is_proven_within_few_steps(fresh, sequences, most):
    """What a zeroed expert did to a trained model: 0.027 nats, and 0.035 between sequences."""
    assert times_masked(fresh, 50, most, 0.027, sequences) >= 40


def test_a_close_call_asks_the_next_steps_up_to_a_number_and_no_others(fresh):
    """It gains by 0.01, with 0.032 between sequences: never proven."""
    fresh.health[0, 3] = -0.9
    noise = 0.03 * torch.tensor([1.0, -1.0] * 4)
    loss = lambda: torch.zeros(8) if fresh.steering.available[0, 3] else noise - 0.01  # noqa: E731
    assert probes_of(fresh, 59, loss) == [26, 27, 28, 29, 30, 31, 32, 33, 34, 84]
    assert fresh.fruitless[0, 3] == 2, "the steps in a row count as one"
    fresh.forget()
    fresh.ticks.fill_(25)
    fresh.health[0, 3] = -0.9
    noise = noise / 2
    assert probes_of(fresh, 20, loss) == [26, 27, 28, 29], "proven by thirty-two"
    assert fresh.masked[0, 3]
    fresh.ticks += 200
    assert len(probes_of(fresh, 20, lambda: -loss())) == 1, "whether it comes back can wait"


def test_two_sequences_say_nothing_whatever_they_say(fresh):
    fresh.health[0, 3] = -0.9
    loss = lambda: torch.full((2,), float(fresh.steering.available[0, 3]))  # noqa: E731
    assert fresh.judge(loss) == []
    fresh.ticks += 50
    assert fresh.judge(loss) == []
    fresh.ticks += 100
    assert "is masked" in fresh.judge(loss)[0], "the third pair makes more than four, older ones at less weight"


def test_a_sequence_without_a_target_is_no_evidence(model):
    x = text(1, seed=9)[0]
    labels = x.clone()
    labels[:5] = -100
    loss = language_model_loss(model, {"input_ids": x, "labels": labels}, 16)
    assert loss().shape == (11,)
    torch.testing.assert_close(loss(), language_model_loss(model, {"input_ids": x}, 16)()[5:])


def test_an_expert_opened_by_hand_is_no_longer_masked(model):
    set_masked(model.controller, model.controller.steering, 0, 3, masked=True)
    set_masked(model.controller, model.controller.steering, 1, 2, masked=True)
    model.controller.evidence[:, 0, 3] = model.controller.evidence[:, 1, 2] = 5.0
    model.steering.available[0, 3] = True
    train(model, 1, data=text)
    assert model.controller.masked.nonzero().tolist() == [[1, 2]]
    assert not model.controller.evidence[:, 0, 3].any(), "its sign means the opposite now"
    assert model.controller.evidence[:, 1, 2].all()
    model.controller.ticks += 1000
    assert (0, 3) not in model.controller.suspects()


def test_evidence_against_a_masked_expert_goes_with_its_mask(fresh):
    for undo in (fresh.release, fresh.forget):
        set_masked(fresh, fresh.steering, 0, 3, masked=True)
        fresh.ticks += 1000
        fresh.judge(fake_loss(fresh, (0, 3, 0.05)))
        assert fresh.evidence.any()
        fresh.config = dataclasses.replace(fresh.config, health=False)
        undo()
        assert fresh.steering.available.all()
        assert not any(one.any() for one in (fresh.masked, fresh.evidence, fresh.fruitless))
        fresh.config = dataclasses.replace(fresh.config, health=True)


def test_one_let_back_may_be_a_suspect_as_any_other(fresh):
    set_masked(fresh, fresh.steering, 0, 3, masked=True)
    assert fresh.fruitless[0, 3] == 2
    fresh.ticks += 100
    assert "is back" in fresh.judge(fake_loss(fresh, (0, 3, -0.05)))[0]
    assert fresh.fruitless[0, 3] == 0


def test_an_expert_with_weights_that_are_not_finite_is_named_and_masked():
    model = build()
    train(model, 5)
    with torch.no_grad():
        model.model.layers[1].mlp.experts.gate_up_proj[4, 0, 0] = math.nan
    x = batches(1)[0]
    assert not model(input_ids=x, labels=x).loss.isfinite()
    with pytest.warns(UserWarning, match="expert 4 of layer 1 is masked: what it computes is not finite") as seen:
        model.controller.tick(finite=False)
    assert seen[0].filename == __file__
    assert model(input_ids=x, labels=x).loss.isfinite()
    assert model.controller.mask_broken() == []


def sums_on(rank, folder, results):
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    alone = [distributed.new_group([0]), distributed.new_group([1])][rank]
    change = torch.tensor([1.0, 3.0]) if rank == 0 else torch.tensor([-2.0])
    results.put((rank, sums_of(change).tolist(), sums_of(change, alone).tolist()))
    distributed.destroy_process_group()


def test_a_probe_is_summed_over_all_ranks_or_those_of_a_group(tmp_path):
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    ranks = [context.Process(target=sums_on, args=(rank, tmp_path, results)) for rank in range(2)]
    for process in ranks:
        process.start()
    found = sorted(results.get(timeout=120) for _ in ranks)
    for process in ranks:
        process.join()
    assert found == [(0, [3, 2, 14], [2, 4, 10]), (1, [3, 2, 14], [1, -2, 4])]


def test_a_judge_sums_over_the_group_of_its_routers(fresh, monkeypatch):
    groups = []
    monkeypatch.setattr(judge, "sums_of", lambda change, group=None: groups.append(group) or sums_of(change))
    fresh.steering.group = "the ranks with other tokens"
    fresh.health[0, 3] = -0.9
    fresh.judge(fake_loss(fresh))
    assert groups == ["the ranks with other tokens"]
