import json
import platform
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import run
from benchmarks.arms import (
    CONTROL_ARMS,
    DENSE,
    EAGER,
    FUSED_ADAMW,
    GROUPED,
    OURS,
    STEP_ARMS,
    Shape,
    build_model,
    control_arms,
    decode_arms,
    layer_arms,
    step_arms,
)
from benchmarks.measure import Comparison, measure
from benchmarks.worker import worker
from chronomoe.control.controller import ChronovisorMixtralController

SHAPES = [replace(shape, **run.TINY) for shape in run.SHAPES[:2]]
PEERS = {"layer": {GROUPED, EAGER, DENSE}, "step": set(STEP_ARMS) - {OURS}, "decode": {GROUPED, EAGER},
         "control": set(CONTROL_ARMS) - {OURS}, "probes": set(CONTROL_ARMS) - {OURS}}  # fmt: skip


@pytest.fixture(autouse=True)
def _one_thread():
    # Tiny tensors need no second thread, and two on a busy machine wait for each other.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("group", ["layer", "step", "decode"])
def test_every_peer_gets_a_row(group):
    rows = measure(run.suite(quick=True)[group][0], rounds=2, repeats=1)
    assert {row.figure.replace("ours", "").strip(" /") for row in rows} == PEERS[group]
    for row in rows:
        assert min(row.ratios) <= row.ratio <= max(row.ratios)
        assert len(row.ratios) == 2
        assert min(row.ratios) > 0
        assert min(row.ours_ms, row.peer_ms) > 0
        assert row.met is None


def test_vocabulary_comparison_leaves_the_allocator_alone_for_transformers_only(monkeypatch):
    opened = {}

    @contextmanager
    def fake_worker(arm, shape, *, keep_memory):
        opened[arm] = keep_memory
        yield lambda: 1.0 if arm == OURS else 2.0

    monkeypatch.setattr(run, "worker", fake_worker)
    (row,) = measure(run.suite()["vocab"][0], rounds=1)
    assert opened == {OURS: True, FUSED_ADAMW: False}
    assert (row.ratio, row.goal, row.met) == (2.0, "at least 1.30", True)


def test_a_worker_answers_each_question():
    with worker(OURS, SHAPES[0], keep_memory=True) as clock:
        assert clock() > 0
        assert clock() > 0


def test_the_masked_expert_is_probed_and_stays_masked(monkeypatch):
    probed, masked = [], []
    judge = ChronovisorMixtralController.judge

    def watched(controller, loss):
        probed.append(controller.suspects())
        verdicts = judge(controller, loss)
        masked.append(bool(controller.masked[0, 0]))
        return verdicts

    monkeypatch.setattr(ChronovisorMixtralController, "judge", watched)
    step = control_arms(SHAPES[0], -0.3, bad_expert=True)[OURS]
    for _ in range(101):
        step()
    assert [step for step, found in enumerate(probed, 1) if (0, 0) in found] == [100]
    assert all(masked)


@pytest.mark.parametrize(("rare", "ratio"), [(False, 1.0), (True, 0.5)])
def test_the_mean_counts_what_few_repeats_take_longer(rare, ratio):
    ours = iter([0.0, 0.0, 0.0, 1.0, 1.0, 4.0])  # after the three that warm up

    @contextmanager
    def clocks():
        yield {OURS: lambda: next(ours), "peer": lambda: 1.0}

    (row,) = measure(Comparison("some", clocks, 3, rounds=1, rare=rare))
    assert row.ratio == ratio


def test_goals_name_peers_that_are_measured():
    for group, comparisons in run.suite().items():
        for comparison in comparisons:
            assert comparison.goals.keys() <= PEERS.get(group, set(STEP_ARMS))
            assert comparison.goals


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_layers_compute_the_same(shape):
    arms = layer_arms(shape)
    outputs = {name: arm() for name, arm in arms.items()}
    torch.testing.assert_close(outputs[OURS], outputs[GROUPED], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(outputs[OURS], outputs[EAGER], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(arms[OURS](), outputs[OURS], atol=0, rtol=0)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_steps_compute_the_same_loss(shape):
    losses = {name: [float(arm()) for _ in range(2)] for name, arm in step_arms(shape).items()}
    (dense,) = (name for name in losses if name.startswith(DENSE))
    for name in losses.keys() - {OURS, dense}:
        assert losses[name][0] == pytest.approx(losses[OURS][0], abs=1e-5)
    assert all(first != second for first, second in losses.values())


@pytest.mark.parametrize("shape", [*SHAPES, *run.SHAPES[:1]], ids=str)
def test_the_dense_model_has_the_active_size_of_ours(shape):
    with torch.device("meta"):
        ours, dense = build_model(shape, OURS), build_model(shape, DENSE)
    routers = shape.layers * shape.num_experts * shape.hidden
    assert ours.num_active_params - routers == sum(parameter.numel() for parameter in dense.parameters())


def test_generation_goes_on_to_the_last_token():
    for arm in decode_arms(Shape(**run.TINY), prompt=3, new=5).values():
        assert arm().shape == (1, 8)


def test_results_keep_other_rows_of_the_day_and_name_no_machine(tmp_path):
    layer, decode = (measure(run.suite(quick=True)[name][0], 1, 1) for name in ("layer", "decode"))
    run.write(layer, tmp_path, "2025-01-01")
    run.write(decode, tmp_path, "2025-01-01")
    page = run.write(layer, tmp_path, "2025-01-01").read_text()
    saved = json.loads((tmp_path / "2025-01-01.json").read_text())
    assert [row["comparison"] for row in saved["rows"]] == [row.comparison for row in [*decode, *layer]]
    assert page.count("\n| ") == 1 + len(decode) + len(layer)
    for secret in (str(Path.home()), str(tmp_path), platform.node()):
        assert secret not in page + json.dumps(saved)


def test_refuses_an_unknown_comparison(capsys):
    with pytest.raises(SystemExit):
        run.main(["--only", "layer,speed"])
    assert "speed" in capsys.readouterr().err
