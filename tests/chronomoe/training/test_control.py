"""The control layer in a run: the seed's log lines, metrics, gates, probes, and resume with and without it."""

import dataclasses
import json
import re

import pytest
import torch

from chronomoe.control.judge import set_masked
from chronomoe.errors import ConfigError, DataError
from chronomoe.knob import parse_decision
from chronomoe.training import ChronoMoETrainer
from chronomoe.training.control import language_model_loss
from chronomoe.training.trainer_file import list_checkpoints
from tests.chronomoe.training.building import (
    AfterStep,
    build_data,
    build_model,
    build_trainer,
    equal_weights,
    records,
)

LINE = re.compile(r"Step \d+ \| Loss: \d+\.\d{4} \| κ: -?\d\.\d{2} \([a-z_]+\) \| R: \d\.\d{2} \| Gate: \d\.\d{2}")
LANDSCAPE = re.compile(r"  Landscape: var=\d+\.\d{4}, valleys=\[(\d+(, \d+)*)?\], ridges=\[(\d+(, \d+)*)?\]")


def spoken(trainer: ChronoMoETrainer) -> list[str]:
    lines: list[str] = []
    trainer.report.show = lines.append
    return lines


def test_the_two_log_lines_of_the_seed(tmp_path):
    trainer = build_trainer(tmp_path, max_steps=30, kappa_warmup_steps=5)
    lines = spoken(trainer)
    trainer.train()
    steps = [line for line in lines if line.startswith("Step ")]
    assert len(steps) == 30
    assert all(LINE.fullmatch(line) for line in steps), steps[0]
    assert "κ: 0.50 (warmup_explore)" in steps[4]
    assert "κ: -0.30 (cosine_anneal)" in steps[-1]
    landscapes = [line for line in lines if "Landscape" in line]
    assert len(landscapes) == 3
    assert all(LANDSCAPE.fullmatch(line) for line in landscapes)


def test_metrics_say_what_the_controller_did(tmp_path):
    trainer = build_trainer(tmp_path, max_steps=12, kappa_warmup_steps=4)
    trainer.train()
    found = records(tmp_path)
    last = found[-1]
    wanted = (
        "kappa intent R gate T_bar_variance valleys ridges max_violation max_violation_floor max_violation_global "
        "load_entropy router_entropy dead_experts flips T_bar pressure health landscape_formed "
        "coherence_loss valley_loss"
    )
    assert set(wanted.split()) <= set(last)
    assert [record["kappa"] for record in found[:4]] == [0.5] * 4
    assert last["kappa"] == pytest.approx(-0.3)
    assert last["R"] == pytest.approx(trainer.controller.coherence_history[-1])
    assert last["gate"] == pytest.approx(1 - 0.5 * (1 - max(0, last["R"] - 0.2) / 0.8))
    assert 0 < last["flips"] < 0.6
    assert last["pressure"] == trainer.controller.live_pressure.tolist()


def test_router_gradient_ratios_are_those_of_the_losses(tmp_path):
    """Against gradients taken one term at a time, in a model of one MoE layer (no path from layer to layer)."""
    model = build_model(num_layers=1)
    trainer = build_trainer(tmp_path, model, max_steps=6, lambda_balance=0.5, lambda_coherence=0.5, lambda_z=0.1)
    trainer.train()
    steering, router = model.steering, model.model.layers[0].mlp.gate.weight
    steering.tokens_in_step = None
    x = torch.randint(0, 53, (4, 16), generator=torch.Generator().manual_seed(0))
    steering.exploration.zero_()
    steering.measuring = True
    model.train()
    model.zero_grad()
    model(input_ids=x, labels=x).loss.backward()
    found = steering.gradient_norms
    steering.measuring = False
    total = router.grad.clone()
    weights = steering.config.loss.weights
    separate = {}
    for name in ("balance", "coherence", "z"):
        model.zero_grad()
        steering.context = None
        model(input_ids=x)
        term = steering.losses(steering.context)[name] * weights[name]
        (separate[name],) = torch.autograd.grad(term, router)
        assert found[name].item() == pytest.approx(separate[name].norm().item(), rel=1e-4), name
        assert found[name] > 0
    assert found["lm"].item() == pytest.approx((total - sum(separate.values())).norm().item(), rel=1e-3)
    assert {"balance", "coherence", "z"} <= set(records(tmp_path)[-1]["router_gradient_ratios"])


def test_a_closed_gate_stops_training_and_reopens_by_itself(tmp_path):
    model = build_model()
    before = [p.detach().clone() for p in model.parameters()]
    trainer = build_trainer(tmp_path, model, min_coherence=1.0, gating_strength=1.0, max_steps=5)
    trainer.train()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert {record["gate"] for record in records(tmp_path)} == {0.0}


def test_no_gate_when_told_so(tmp_path):
    trainer = build_trainer(tmp_path, use_coherence_gating=False, max_steps=3)
    trainer.train()
    assert {record["gate"] for record in records(tmp_path)} == {1.0}


def test_a_warm_up_longer_than_the_run_is_named(tmp_path):
    trainer = build_trainer(tmp_path, max_steps=2)
    lines = spoken(trainer)
    trainer.train()
    assert "warm-up of 1000 steps is not shorter than the run" in lines[0]


def test_a_model_without_a_choice_is_told_that_there_is_nothing_to_control(tmp_path):
    trainer = build_trainer(tmp_path, build_model(num_experts=2, num_experts_per_token=2), max_steps=2)
    lines = spoken(trainer)
    trainer.train()
    assert any("there is no routing to control" in line for line in lines)


def test_a_gradient_that_is_not_finite_moves_nothing_though_the_loss_is(tmp_path):
    model = build_model()
    trainer = build_trainer(tmp_path, model, max_steps=1)
    before = [p.clone() for p in model.parameters()]
    model.lm_head.weight.register_hook(lambda gradient: gradient * float("inf"))
    lines = spoken(trainer)
    assert trainer.train()["skipped_steps"] == 1
    assert any("its loss or gradient is not finite" in line for line in lines)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert int(model.controller.ticks) == 0


def test_resume_with_the_controllers_state_is_exact_and_without_it_is_not(tmp_path, record_property):
    def build_trainer_and_stop(folder, keep):
        trainer = build_trainer(folder, max_steps=12, save_chronovisor_state=keep)
        trainer.stop_after = 6
        trainer.train()

    straight = build_trainer(tmp_path / "straight", max_steps=12)
    straight.train()
    found = {}
    for keep in (True, False):
        build_trainer_and_stop(tmp_path / str(keep), keep)
        trainer = build_trainer(tmp_path / str(keep), build_model(seed=8), max_steps=12, save_chronovisor_state=keep)
        trainer.load_checkpoint("step_6")
        trainer.train()
        found[keep] = trainer
    assert equal_weights(found[True].model, straight.model)
    gap = max(
        (a - b).abs().max().item()
        for a, b in zip(found[False].model.parameters(), straight.model.parameters(), strict=True)
    )
    told = f"resumed without the controller's state, a weight differs by up to {gap:.2e} (with it: 0)"
    record_property("told", told)  # printed at the end of the tests, see conftest.py
    assert gap > 1e-4


def test_a_log_step_that_is_skipped_does_not_end_the_run(tmp_path):
    model = build_model()
    trainer = build_trainer(tmp_path, model, max_steps=8, log_every_n_steps=4)
    model.register_forward_hook(lambda m, a, out: spoil(out) if trainer.state.step in (0, 3) and m.training else None)
    assert trainer.train()["skipped_steps"] == 2
    found = records(tmp_path)
    assert [record["step"] for record in found] == [4, 8]
    assert found[0]["skipped_steps"] == 2
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()


def spoil(output):
    output.loss = output.loss * float("nan")
    return output


def test_batches_with_nothing_to_predict_are_named_and_move_nothing(tmp_path):
    rows = [{**row, "labels": torch.full_like(row["input_ids"], -100)} for row in build_data()]
    model = build_model()
    before = [p.clone() for p in model.parameters()]
    trainer = build_trainer(tmp_path, model, rows, max_steps=2)
    lines = spoken(trainer)
    trainer.train()
    assert "Step 1 | skipped: its batches have no token to predict" in lines
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_adaptive_kappa_resumes_bit_for_bit(tmp_path):
    settings = {"max_steps": 40, "kappa_schedule": "adaptive", "kappa_warmup_steps": 2, "save_every_n_steps": 40}
    whole = build_trainer(tmp_path / "whole", **settings)
    whole.train()
    first = build_trainer(tmp_path / "cut", **settings)
    first.stop_after = 25
    first.train()
    second = build_trainer(tmp_path / "cut", build_model(seed=5), **settings)
    second.load_checkpoint("latest")
    second.train()
    assert equal_weights(second.model, whole.model)
    assert second.control.knob.state_dict() == whole.control.knob.state_dict()


def test_an_agent_that_fails_is_named_once_and_the_run_goes_on(tmp_path):
    def agent(state):
        raise ZeroDivisionError("oh")

    trainer = build_trainer(tmp_path, max_steps=8, kappa_schedule="adaptive", kappa_warmup_steps=1, knob_agent=agent)
    lines = spoken(trainer)
    assert trainer.train()["finished"]
    assert sum("agent failed, kappa stays: ZeroDivisionError: oh" in line for line in lines) == 1
    assert trainer.controller.meta_knob.kappa == 0.5


def test_an_intent_that_is_no_text_is_a_failure_of_the_agent(tmp_path):
    class Odd:
        kappa, intent, reasoning = 0.1, object(), ""

    settings = {"max_steps": 4, "kappa_schedule": "adaptive", "kappa_warmup_steps": 1}
    trainer = build_trainer(tmp_path, knob_agent=lambda state: Odd(), **settings)
    lines = spoken(trainer)
    assert trainer.train()["finished"]
    assert any("it must be text" in line for line in lines)


def test_a_token_outside_the_vocabulary_is_named(tmp_path):
    rows = [{"input_ids": torch.full((16,), 99)} for _ in range(8)]
    with pytest.raises(DataError, match="not in the model's vocabulary"):
        build_trainer(tmp_path, data=rows).train()


def test_masked_experts_are_not_dead_to_an_agent(tmp_path):
    seen = []
    settings = {"max_steps": 6, "kappa_schedule": "adaptive", "kappa_warmup_steps": 1}
    trainer = build_trainer(tmp_path, knob_agent=seen.append, **settings)
    set_masked(trainer.controller, trainer.steering, 0, 1, masked=True)
    trainer.train()
    window = trainer.metrics.window
    assert window.load[0, 1] == 0
    assert seen[-1].dead_experts == int((window.load * window.load.shape[-1] < 0.01).sum()) - 1
    assert records(tmp_path)[-1]["max_violation_global"] == pytest.approx(
        max(float(load.max()) * n - 1 for load, n in zip(trainer.controller.mean_load, (3, 4), strict=True)), rel=1e-5
    )


@pytest.mark.parametrize("arm", ["none", "aux", "pi"])
def test_an_arm_is_whole_losses_gate_and_kappa_too(tmp_path, arm):
    trainer = build_trainer(tmp_path, max_steps=6, control=arm, lambda_balance=0.3)
    trainer.train()
    weights = trainer.steering.config.loss.weights
    assert weights["balance"] == (0.3 if arm == "aux" else 0)
    assert weights["coherence"] == weights["valley"] == 0
    last = records(tmp_path)[-1]
    assert (last["kappa"], last["gate"]) == (0, 1)
    assert trainer.steering.neutral is (arm != "pi")


def test_what_was_on_and_is_off_after_a_resume_is_gone(tmp_path):
    first = build_trainer(tmp_path, max_steps=8)
    first.stop_after = 6
    first.train()
    assert first.steering.pressure.any()
    second = build_trainer(tmp_path, build_model(seed=3), max_steps=8, control="none")
    lines = spoken(second)
    second.load_checkpoint("latest")
    assert any("settings differ" in line for line in lines)
    second.steering.refresh()
    assert second.steering.neutral
    second.train()
    assert records(tmp_path)[-1]["flips"] == 0
    assert records(tmp_path)[-1]["gate"] == 1


def test_a_broken_expert_is_named_and_the_run_goes_on(tmp_path):
    model = build_model()
    trainer = build_trainer(tmp_path, model, max_steps=8)
    lines = spoken(trainer)

    def damage(step):
        if step.number == 3:
            with torch.no_grad():
                model.model.layers[1].mlp.experts.down_proj[2] = float("nan")

    trainer.callbacks.append(AfterStep(damage))
    result = trainer.train()
    assert result["skipped_steps"] == 1
    assert any("expert 2 of layer 1 is masked" in line for line in lines)
    assert records(tmp_path)[-1]["masked_experts"] == [[1, 2]]
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_4", "step_8"]


def test_disabled_chronovisor_trains_a_plain_mixtral(tmp_path):
    model = build_model(enable_chronovisor=False)
    trainer = build_trainer(tmp_path, model, max_steps=6)
    trainer.train()
    assert not model.steering.pressure.any()
    assert not model.steering.log_temperature.any()
    assert {record["gate"] for record in records(tmp_path)} == {1.0}


@pytest.mark.parametrize("name", ["none", "pi", "full"])
def test_one_setting_chooses_the_mechanisms(tmp_path, name):
    trainer = build_trainer(tmp_path, max_steps=4, control=name)
    trainer.train()
    assert bool(trainer.steering.pressure.any()) is (name != "none")
    assert bool(trainer.steering.log_temperature.any()) is (name == "full")
    assert json.loads((tmp_path / "step_4/chronovisor.json").read_text())["control"]["temperature"] is (name == "full")


def test_an_agent_outside_turns_the_knob(tmp_path):
    seen = []

    def agent(state):
        seen.append(json.loads(state.to_json()))
        return parse_decision('{"kappa": -0.25, "intent": "asked"}')

    trainer = build_trainer(tmp_path, max_steps=6, kappa_schedule="adaptive", kappa_warmup_steps=2, knob_agent=agent)
    trainer.train()
    assert [record["kappa"] for record in records(tmp_path)] == [0.5, 0.5, -0.25, -0.25, -0.25, -0.25]
    assert records(tmp_path)[-1]["intent"] == "asked"
    assert seen[-1]["step"] == 5, "steps done when it was asked"
    assert {"loss", "loss_trend", "coherence_R", "load_entropy", "dead_experts"} <= set(seen[0])


def test_a_run_probes_its_suspects(tmp_path):
    model = build_model()
    trainer = build_trainer(tmp_path, model, max_steps=6)
    controller = model.controller
    controller.config = dataclasses.replace(controller.config, probe_every=4, suspect_below=1.0)
    trainer.train()
    assert int(controller.last_probe.max()) == 4
    assert controller.evidence.abs().sum() > 0


def test_a_probe_reads_all_batches_of_a_step_up_to_its_number(tmp_path):
    control = build_trainer(tmp_path, build_model()).control
    generator = torch.Generator().manual_seed(0)
    batches = [{"input_ids": torch.randint(0, 9, (n, 16), generator=generator)} for n in (6, 6, 6)]
    losses = control._probed_loss(batches)
    assert losses.shape == (16,)
    together = torch.cat([batch["input_ids"] for batch in batches])[:16]
    torch.testing.assert_close(losses, language_model_loss(control.model, {"input_ids": together}, 99)())


def test_the_trend_falls_while_the_loss_does(tmp_path):
    row = {"input_ids": torch.arange(16) % 5}
    trainer = build_trainer(tmp_path, data=[row] * 8, max_steps=30, kappa_schedule="adaptive", kappa_warmup_steps=1)
    trainer.train()
    state = trainer.control.knob_state
    assert state.loss_trend < -0.01
    assert state.loss == pytest.approx(trainer.control.loss_fast)


def test_control_state_is_taken_whole_or_not_at_all(tmp_path):
    control = build_trainer(tmp_path).control
    good = control.state_dict()
    for spoiled in (
        good | {"foo": 1},
        {name: value for name, value in good.items() if name != "knob"},
        good | {"loss_fast": float("nan")},
        good | {"loss_slow": "a"},
        good | {"knob": good["knob"] | {"foo": 1}},
        good | {"knob": good["knob"] | {"current": -5}},
        good | {"knob": good["knob"] | {"decision": {"kappa": 0.1}}},
        good | {"knob": good["knob"] | {"agent": {"intent": "sleep", "candidate": "neutral", "held": 0}}},
        good | {"knob_state": {"step": 1}},
    ):
        with pytest.raises(ConfigError):
            control.load_state_dict(spoiled)
        assert control.state_dict() == good
