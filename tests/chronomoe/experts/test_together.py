"""Experts that share a model: one is used at a token, gates are fitted to one another, and order does not matter."""

import copy
import itertools

import pytest
import torch
from safetensors.torch import load_file

from chronomoe.errors import CheckpointError
from chronomoe.experts import together
from chronomoe.experts.attachment import attach_expert, detach_expert
from chronomoe.experts.file import read_expert, save_expert
from chronomoe.experts.record import SAMPLES, DomainRecord
from chronomoe.experts.together import fit_together, load_gates, opened_on, save_gates
from chronomoe.experts.training import calibrate, fit_gate
from chronomoe.hosts.capture import capture_routing, gate_inputs
from tests.chronomoe.experts.conftest import BASES, VOCAB, build_base, build_expert


def logits(model, tokens, **inputs):
    with torch.no_grad():
        return model(tokens, use_cache=False, **inputs).logits


def text(first, last, seed, count=64, length=32):
    """Windows whose tokens are in [first, last): a domain that hidden states tell from others."""
    return torch.randint(first, last, (count, length), generator=torch.Generator().manual_seed(seed))


def opened(model, tokens):
    """uid -> bool (B, S): where each expert is used."""
    found = {}

    def note(gate):
        place = torch.zeros(tokens.numel(), dtype=torch.bool)
        if gate.open is not None:
            place[gate.open] = True
        found[gate.expert_id] = place.view(tokens.shape)

    with capture_routing(model, gate_callback=note):
        logits(model, tokens)
    return found


@pytest.fixture(scope="module")
def trained():
    """A base, and three experts whose gates were fitted to three domains, each against general text alone."""
    model = build_base("mixtral")
    general = {"general": text(0, 15, 0)}
    experts = []
    for number, name in enumerate(("laws", "maps", "tunes")):
        expert = build_expert(name, seed=number + 1)
        expert.gate.leak.fill_(0.9)
        first = 15 + 15 * number
        fit_gate(expert, model, text(first, first + 15, number + 1), general, seed=0)
        attach_expert(model, expert)
        calibrate(model, expert, {"general": text(0, 15, 9)}, 0.02, 1e9)
        detach_expert(model, name)
        experts.append(expert)
    return model, experts


def fresh(trained):
    return copy.deepcopy(trained[0]), [copy.deepcopy(one) for one in trained[1]]


@pytest.mark.parametrize("family", BASES)
def test_at_each_token_the_expert_with_the_largest_margin_is_used_alone(family, tokens):
    model = build_base(family)
    experts = [build_expert(f"expert-{seed}", seed=seed, threshold=0.2 * seed) for seed in (1, 2, 3)]
    margins = []
    for one in experts:
        odds, _ = one.gate.log_odds(one.gate.evidence(gate_inputs(model, one.gate.layers, tokens)))
        margins.append(odds - one.gate.threshold)
    for one in experts:
        attach_expert(model, one)
    found, best = opened(model, tokens), torch.stack(margins).amax(dim=0)
    assert sum(place.sum() for place in found.values()) == (best > 0).sum()
    for one, margin in zip(experts, margins, strict=True):
        assert torch.equal(found[one.expert_id], (margin == best) & (margin > 0))
        assert found[one.expert_id].any()


@pytest.mark.parametrize("family", BASES)
def test_logits_do_not_depend_on_the_order_of_attaching(family, tokens):
    found = []
    for order in itertools.permutations((1, 2, 3)):
        model = build_base(family)
        for seed in order:
            attach_expert(model, build_expert(f"expert-{seed}", seed=seed))
        found.append(logits(model, tokens))
    assert all(torch.equal(one, found[0]) for one in found)


def test_equal_margins_go_to_the_smaller_id(tokens):
    for order in (("b", "a"), ("a", "b")):
        model = build_base("mixtral")
        for name in order:
            expert = build_expert(name, seed=1, threshold=-1e9)
            expert.uid = name * 32
            attach_expert(model, expert)
        found = opened(model, tokens)
        assert found["a"].all()
        assert not found["b"].any()


def test_a_prior_counts_in_the_margin_and_padding_uses_none(tokens):
    model = build_base("mixtral")
    for seed in (1, 2):
        attach_expert(model, build_expert(f"expert-{seed}", seed=seed))
    before = opened(model, tokens)["expert-2"].sum()
    model.subbrains.by_id("expert-2").gate.prior.fill_(5.0)
    assert opened(model, tokens)["expert-2"].sum() > before
    mask = torch.ones_like(tokens)
    mask[0, :4] = 0
    found = {}
    with capture_routing(model, gate_callback=lambda gate: found.update({gate.expert_id: gate.open})):
        logits(model, tokens, attention_mask=mask)
    assert not any(open_at is not None and (open_at < 4).any() for open_at in found.values())


def test_a_gate_that_reads_a_later_layer_takes_over_from_there(tokens):
    model = build_base("mixtral")
    early = build_expert("early", seed=1, gate_layers=[0], layers=[0, 1, 2], threshold=-1e6)
    late = build_expert("late", seed=2, gate_layers=[1], layers=[1, 2], threshold=-1e7)
    found = []
    for order in ((early, late), (late, early)):
        for one in order:
            attach_expert(model, one)
        found.append(logits(model, tokens))
        assert opened(model, tokens)["late"].all()
        for one in order:
            detach_expert(model, one.uid)
    assert torch.equal(*found)
    attach_expert(model, late)
    assert not torch.equal(logits(model, tokens), found[0]), "in the first layer the early one was used"


@pytest.mark.parametrize("steps", [1, 5])
def test_cached_generation_with_several_equals_uncached(steps, tokens):
    model = build_base("mixtral")
    for seed in (1, 2):
        attach_expert(model, build_expert(f"expert-{seed}", seed=seed))
    whole = logits(model, tokens)
    cache, parts = None, []
    for piece in tokens.split(steps, dim=1):
        with torch.no_grad():
            output = model(piece, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        parts.append(output.logits)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=1e-4, rtol=1e-4)


# -- fitted to one another ---------------------------------------------------------------------------------------------


def shares(model, experts, windows):
    return {one.expert_id: float(opened(model, windows)[one.expert_id].float().mean()) for one in experts}


def test_fitted_together_gates_stay_shut_on_one_anothers_domain_and_open_on_their_own(trained):
    model, experts = fresh(trained)
    own = {one.expert_id: text(15 + 15 * n, 30 + 15 * n, 100 + n) for n, one in enumerate(experts)}

    def gates_open(expert, windows):
        odds, _ = expert.gate.log_odds(expert.gate.evidence(gate_inputs(model, expert.gate.layers, windows)))
        return float((odds > expert.gate.threshold).float().mean())

    alone = {(a.expert_id, b): gates_open(a, windows) for a in experts for b, windows in own.items()}
    assert max(share for (a, b), share in alone.items() if a != b) > 0.3, "else there is nothing to mend"
    fit_together(experts)
    for (a, b), before in alone.items():
        share = gates_open(next(one for one in experts if one.expert_id == a), own[b])
        assert share > 0.9 * before if a == b else share < 0.1, (a, b, share)
    for one in experts:
        assert gates_open(one, text(0, 15, 200)) < 0.05


def test_what_is_fitted_depends_on_who_is_attached_and_on_nothing_else(trained):
    _, experts = fresh(trained)
    fit_together(experts)
    wanted = [one.gate.direction.clone() for one in experts]
    for order in itertools.permutations(range(3)):
        fit_together([experts[number] for number in order])
        assert all(torch.equal(one.gate.direction, w) for one, w in zip(experts, wanted, strict=True))
    fit_together(experts[:1])
    own = trained[1][0]
    assert torch.equal(experts[0].gate.direction, own.gate.direction)
    assert torch.equal(experts[0].gate.offset, own.gate.offset)
    assert experts[0].own_gate == {}


def test_samples_come_in_the_order_of_uids(trained, monkeypatch):
    """The sum of losses is not the same bits in another order, once there are enough of them."""
    _, experts = fresh(trained)
    seen = []
    monkeypatch.setattr(
        together, "_fitted", lambda one, others: seen.append((one.uid, [other.uid for other in others])) or None
    )
    for order in itertools.permutations(experts):
        seen.clear()
        fit_together(order)
        uids = sorted(one.uid for one in experts)
        assert seen == [(uid, [other for other in uids if other != uid]) for uid in uids]


def test_an_experts_file_holds_its_own_gate_whatever_it_is_fitted_to(trained, tmp_path):
    _, experts = fresh(trained)
    header = {
        "created": "now", "base": {"hidden_size": 32, "act": "silu"}, "tokenizer_fingerprint": "", "training": {},
        "calibration": {}, "metrics": {}, "goals": [],
    }  # fmt: skip
    save_expert(experts[0], header, tmp_path / "alone.safetensors")
    fit_together(experts)
    assert not torch.equal(experts[0].gate.direction, trained[1][0].gate.direction)
    save_expert(experts[0], header, tmp_path / "together.safetensors")
    alone, together = (load_file(tmp_path / f"{name}.safetensors") for name in ("alone", "together"))
    assert alone.keys() == together.keys()
    assert all(torch.equal(alone[name], together[name]) for name in alone)
    again, _ = read_expert(tmp_path / "together.safetensors")
    assert torch.equal(again.record.domain, experts[0].record.domain)
    assert again.record.general.keys() == {"general"}


def test_gates_are_saved_and_loaded(trained, tmp_path):
    _, experts = fresh(trained)
    assert save_gates(experts, tmp_path) is None, "each has its own"
    fit_together(experts)
    name = save_gates(experts, tmp_path)
    assert save_gates(experts[::-1], tmp_path) == name
    others = [copy.deepcopy(one) for one in trained[1]]
    load_gates(others, tmp_path / name)
    assert all(torch.equal(a.gate.direction, b.gate.direction) for a, b in zip(experts, others, strict=True))
    with pytest.raises(CheckpointError, match="not attached"):
        load_gates(others[:2], tmp_path / name)
    (tmp_path / name).write_bytes(b"not one")
    with pytest.raises(CheckpointError, match="missing or damaged"):
        load_gates(others, tmp_path / name)


def test_without_a_record_a_gate_stays_and_nobody_knows_its_domain(trained):
    _, experts = fresh(trained)
    experts[1].record = None
    fit_together(experts)
    assert experts[1].own_gate == {}
    pair = [copy.deepcopy(one) for one in (trained[1][0], trained[1][2])]
    fit_together(pair)
    assert torch.equal(experts[0].gate.direction, pair[0].gate.direction)
    experts[0].gate.threshold.fill_(torch.inf)
    fit_together(experts)
    assert experts[0].own_gate == {}, "a gate that never opens stays so"


def test_samples_give_the_log_odds_of_any_gate(trained):
    model, experts = fresh(trained)
    gate, windows = experts[0].gate, text(0, VOCAB, 5, count=10)
    inputs = gate_inputs(model, gate.layers, windows)
    odds, _ = gate.log_odds(gate.evidence(inputs))
    samples = gate.samples(inputs, 40, torch.Generator().manual_seed(3))
    generator = torch.Generator().manual_seed(3)
    positions = torch.randint(32, (40,), generator=generator)
    wanted = torch.stack([odds[number * 10 // 40, place] for number, place in enumerate(positions.tolist())])
    torch.testing.assert_close(gate.odds_of(samples), wanted, atol=1e-4, rtol=1e-4)


def test_a_record_is_small_and_checked(trained):
    record = trained[1][0].record
    assert record.domain.dtype == torch.float16
    assert record.domain.shape == (SAMPLES, 2 * 32 + 1)
    with pytest.raises(CheckpointError, match="shape"):
        DomainRecord.taken_from(record.tensors(), 7)
    assert DomainRecord.taken_from({"gate.offset": torch.zeros(())}, 65) is None


def test_opened_on_tells_every_gate_on_every_domain(trained):
    _, experts = fresh(trained)
    before = {(row["expert_id"], row["domain"]): row for row in opened_on(experts)}
    fit_together(experts)
    after = {(row["expert_id"], row["domain"]): row for row in opened_on(experts[::-1])}
    assert before.keys() == after.keys()
    assert len(after) == 3 * 4
    for (gate, domain), row in after.items():
        assert 0 <= row["used"] <= row["open"] <= 1
        assert row["used"] > 0.85 if gate == domain else row["used"] < 0.05
    assert max(row["open"] for (gate, domain), row in before.items() if gate != domain) > 0.3
