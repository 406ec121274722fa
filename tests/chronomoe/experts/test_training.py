"""One expert learns, and only it; the base is what it was."""

import pytest
import torch

from chronomoe.errors import ConfigError
from chronomoe.experts.attachment import attach_expert
from chronomoe.experts.expert import DomainExpert
from chronomoe.experts.file import base_fingerprint
from chronomoe.experts.training import begin, calibrate, divergence, fit_gate, trainee
from chronomoe.hosts.attach import moe_layers
from chronomoe.hosts.capture import gate_inputs, kl, measure_routing
from chronomoe.training import ChronoMoETrainer, TrainingConfig
from tests.chronomoe.everything import differing, everything
from tests.chronomoe.experts.conftest import BASES, VOCAB, build_base, build_expert


def windows(n, low, high, seed):
    return torch.randint(low, high, (n, 24), generator=torch.Generator().manual_seed(seed))


def fresh(model):
    blocks = moe_layers(model)
    return DomainExpert("new", hidden_size=32, width=blocks[0].experts.intermediate_dim, layers=range(len(blocks)))


def train(model, expert, folder, steps=30, anchor=None):
    rows = [{"input_ids": row, "labels": row.clone()} for row in windows(64, 0, 12, 1)]
    if anchor is not None:
        rows = [{**row, "anchor_ids": other} for row, other in zip(rows, anchor, strict=True)]
    config = TrainingConfig(checkpoint_dir=str(folder), max_steps=steps, batch_size=8, learning_rate=1e-2)
    with trainee(model, expert, 1.0) as one:
        before = one(**_batch(rows[:8])).loss.item()
        loader = torch.utils.data.DataLoader(rows, batch_size=8, shuffle=True)
        result = ChronoMoETrainer(one, config, loader, show=lambda line: None).train()
        after = one(**_batch(rows[:8])).loss.item()
    assert result["finished"]
    return before, after


def _batch(rows):
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


@pytest.mark.parametrize("family", BASES)
def test_the_expert_learns_and_the_base_is_untouched(family, tmp_path):
    model, rows = build_base(family), windows(8, 0, 12, 2)
    fingerprint = base_fingerprint(model)
    fields = everything(model)
    expert = fresh(model)
    begin(expert, model, rows, 0.5, 0)
    start = {name: value.clone() for name, value in expert.state_dict().items()}
    before, after = train(model, expert, tmp_path)
    assert after < before - 0.3
    assert base_fingerprint(model) == fingerprint
    assert not differing(fields, everything(model))
    assert all(parameter.requires_grad for name, parameter in model.named_parameters() if "z_L_init" not in name)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not hasattr(model, "subbrains")
    changed = {name for name, value in expert.state_dict().items() if not torch.equal(value, start[name])}
    assert changed == {name for name, _ in expert.named_parameters()}
    assert all(len(layer.mixing.shape) == 0 for layer in expert.layers.values())


def test_the_anchor_keeps_general_text_as_it_was(tmp_path):
    drift = []
    for number, weight in enumerate((None, 1.0)):
        model = build_base("mixtral")
        expert = fresh(model)
        begin(expert, model, windows(8, 0, 12, 2), 0.5, 0)
        train(model, expert, tmp_path / str(number), anchor=None if weight is None else windows(64, 20, VOCAB, 3))
        attach_expert(model, expert)
        expert.forced = True
        drift.append(divergence(model, expert, windows(16, 20, VOCAB, 4)))
    assert drift[1] < drift[0] / 2


def test_it_begins_as_a_copy_of_the_most_used_expert_with_a_share_redrawn():
    model, rows = build_base("mixtral"), windows(8, 0, 12, 2)
    uses = measure_routing(model, rows).share
    torch.testing.assert_close(uses.sum(dim=1), torch.ones(3))
    for redraw, same in ((0.0, 48), (0.25, 36), (1.0, 0)):
        expert = fresh(model)
        begin(expert, model, rows, redraw, 0)
        for layer, block in enumerate(moe_layers(model)):
            gate_up = block.experts.gate_up_proj[uses[layer].argmax()]
            down = block.experts.down_proj[uses[layer].argmax()]
            network = expert.layers[str(layer)]
            kept = (network.w1.weight == gate_up[:48]).all(dim=1)
            assert kept.sum() == same
            assert torch.equal((network.w3.weight == gate_up[48:]).all(dim=1), kept)
            assert torch.equal((network.w2.weight == down).all(dim=0), kept)
    with pytest.raises(ConfigError, match="width 40 cannot begin"):
        begin(DomainExpert("x", hidden_size=32, width=40, layers=[0]), model, rows, 0.0, 0)


@pytest.mark.parametrize("family", BASES)
def test_the_gate_opens_on_its_domain_and_keeps_its_budgets_elsewhere(family):
    model = build_base(family)
    expert = fresh(model)
    begin(expert, model, windows(8, 0, 12, 2), 0.5, 0)
    general = {"a": windows(60, 12, 40, 3), "b": windows(60, 40, VOCAB, 4)}
    fit_gate(expert, model, windows(60, 0, 12, 5), general)
    attach_expert(model, expert)
    found = calibrate(model, expert, general, 0.02, 1.0)
    assert max(found["measured_false_alarm"].values()) <= 0.02
    odds, _ = expert.gate.log_odds(expert.gate.evidence(gate_inputs(model, expert.gate.layers, windows(40, 0, 12, 6))))
    assert (odds[:, 10:] > expert.gate.threshold).float().mean() > 0.8
    closed = calibrate(model, expert, general, 0.5, 0.0, tried=1)  # no share is small enough: it never opens
    assert closed["measured_false_alarm"] == {"a": 0.0, "b": 0.0}
    assert closed["measured_kl"] == {"a": 0.0, "b": 0.0}
    strict = calibrate(model, expert, general, 0.5, 1e-4)
    assert max(strict["measured_kl"].values()) <= 1e-4
    assert max(strict["measured_false_alarm"].values()) < 0.5


def test_divergence_is_that_of_distributions():
    a, b = torch.randn(5, 7), torch.randn(5, 7)
    wanted = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=a), torch.distributions.Categorical(logits=b)
    )
    torch.testing.assert_close(kl(a, b), wanted)


def test_the_budget_counts_from_the_base_to_the_base_with_the_expert():
    model = build_base("mixtral")
    expert = build_expert(threshold=-1e9)
    attach_expert(model, expert)
    rows = windows(4, 0, VOCAB, 1)
    with torch.no_grad():
        theirs = model(rows).logits
        expert.active = False
        own = model(rows).logits
        expert.active = True
    assert divergence(model, expert, rows) == pytest.approx(float(kl(own, theirs).mean()), rel=1e-4)
    assert divergence(model, expert, rows) != pytest.approx(float(kl(theirs, own).mean()), rel=1e-2)
