"""The training loop: micro-batches, evaluation that moves nothing, faults it survives."""

import itertools
import os
import signal
import threading

import pytest
import torch
from torch.utils.data import DataLoader

from chronomoe.errors import ConfigError, DataError, TrainingError
from chronomoe.training import ChronoMoETrainer, TrainingConfig
from chronomoe.training.checkpoint import list_checkpoints
from tests.chronomoe.everything import differing, everything
from tests.chronomoe.training.building import (
    VOCAB,
    build_data,
    build_model,
    build_trainer,
    equal_weights,
    held_out,
    poison,
    records,
)


def test_micro_batches_change_nothing(tmp_path):
    data = build_data(24, padded=True)
    trainers = []
    for batch_size, accumulation in ((6, 1), (2, 3)):
        torch.manual_seed(0)
        config = TrainingConfig(
            checkpoint_dir=str(tmp_path / str(batch_size)), batch_size=batch_size, max_steps=4, learning_rate=1e-3,
            gradient_accumulation_steps=accumulation, log_every_n_steps=1, lambda_balance=0.5, initial_kappa=0.0,
        )  # fmt: skip
        trainer = ChronoMoETrainer(build_model(), config, DataLoader(data, batch_size=batch_size), show=lambda s: None)
        trainer.train()
        trainers.append(trainer)
    a, b = (records(tmp_path / name) for name in ("6", "2"))
    for mine, theirs in zip(a, b, strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
        assert mine["lb_loss"] == pytest.approx(theirs["lb_loss"], rel=1e-4)
        assert mine["tokens"] == theirs["tokens"]
    for mine, theirs in zip(trainers[0].model.parameters(), trainers[1].model.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=2e-4)


def test_bits_per_byte_are_the_code_length_of_the_text(tmp_path):
    windows = held_out()
    trainer = build_trainer(tmp_path, eval_data={"a": windows, "b": held_out(2)}, batch_size=3)
    result = trainer.evaluate()
    logits = trainer.model(windows.input_ids).logits.log_softmax(-1)
    picked = logits.gather(-1, windows.targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    nats = -(picked * (windows.targets != -100)).sum()
    expected = nats.item() / torch.tensor(2.0).log().item() / windows.num_bytes
    assert result["a"] == pytest.approx(expected, rel=1e-4)
    assert result["mean"] == pytest.approx((result["a"] + result["b"]) / 2)


def test_evaluation_moves_nothing(tmp_path):
    trainer = build_trainer(tmp_path, eval_data={"a": held_out()}, eval_every_n_steps=1000)
    trainer.train()
    before = everything(trainer.model)
    state = torch.get_rng_state()
    trainer.evaluate()
    assert torch.equal(torch.get_rng_state(), state)
    assert not differing(before, everything(trainer.model))
    assert trainer.steering.statistics.sums.abs().sum() == 0
    assert trainer.model.training


def test_evaluation_on_a_loader_is_the_mean_over_its_tokens(tmp_path):
    data = build_data(5, padded=True)
    trainer = build_trainer(tmp_path, data=data, eval_data=DataLoader(data, batch_size=2))
    rows = []
    for row in data:
        keep = int(row["attention_mask"].sum())
        ids = row["input_ids"][:keep].unsqueeze(0)
        rows.append((trainer.model.eval()(ids, labels=ids).loss.item() * (keep - 1), keep - 1))
    assert trainer.evaluate()["loss"] == pytest.approx(sum(a for a, _ in rows) / sum(n for _, n in rows), rel=1e-4)


def test_it_learns(tmp_path):
    row = {"input_ids": torch.arange(16) % 5}
    trainer = build_trainer(tmp_path, data=[row] * 8, max_steps=30)
    trainer.train()
    losses = [record["lm_loss"] for record in records(tmp_path)]
    assert losses[0] > 3
    assert losses[-1] < 0.5


def test_router_losses_are_in_the_log_and_in_the_loss(tmp_path):
    build_trainer(tmp_path, max_steps=2, lambda_balance=0.3).train()
    for record in records(tmp_path):
        extra = record["loss"] - record["lm_loss"] - 0.001 * record["z_loss"]
        assert extra == pytest.approx(0.3, rel=0.05)
        assert 0.9 < record["lb_loss"] < 2
        assert len(record["load"]) == 2
        assert sum(record["load"][0]) == pytest.approx(1)


def test_lb_loss_is_that_of_the_steps_own_load(tmp_path):
    trainer = build_trainer(tmp_path, max_steps=1)
    trainer.train()
    window = trainer.window
    expected = 4 * (
        window.assignments / (2 * window.tokens[:, None]) * window.probability / window.tokens[:, None]
    ).sum(-1)
    assert records(tmp_path)[0]["lb_loss"] == pytest.approx(expected.mean().item(), rel=1e-5)


def test_gradients_are_clipped_to_the_norm(tmp_path):
    trainer = build_trainer(tmp_path, max_steps=1, max_grad_norm=1e-3)
    seen = []
    update = trainer._update

    def look(why_not):
        seen.append(torch.stack([p.grad.norm() for p in trainer.model.parameters()]).norm().item())
        update(why_not)

    trainer._update = look
    trainer.train()
    assert seen[0] == pytest.approx(1e-3, rel=1e-3)
    assert records(tmp_path)[0]["grad_norm"] > 1e-2


def test_batches_that_are_no_dicts_are_refused(tmp_path):
    trainer = build_trainer(tmp_path, data=[row["input_ids"] for row in build_data()])
    with pytest.raises(ConfigError, match="input_ids"):
        trainer.train()


class Stream(torch.utils.data.IterableDataset):
    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        yield from self.rows


def test_a_stream_without_length_trains_when_the_steps_are_given(tmp_path):
    def trainer(rows, **settings):
        config = TrainingConfig(checkpoint_dir=str(tmp_path / str(len(rows))), **settings)
        return ChronoMoETrainer(build_model(), config, DataLoader(Stream(rows), batch_size=4), show=lambda line: None)

    assert trainer(build_data(), max_steps=8).train()["finished"]
    with pytest.raises(ConfigError, match="max_steps"):
        trainer(build_data())
    with pytest.raises(DataError, match="no batch"):
        trainer([], max_steps=8).train()


def test_an_infinite_loss_with_finite_gradients_is_skipped(tmp_path):
    trainer = build_trainer(tmp_path, max_steps=2)
    trainer.model.register_forward_hook(lambda m, i, output: setattr(output, "loss", output.loss + float("inf")))
    assert trainer.train()["skipped_steps"] == 2


def test_decay_is_on_matrices_only(tmp_path):
    trainer = build_trainer(tmp_path, weight_decay=0.3)
    groups = trainer.optimizer.param_groups
    assert [group["weight_decay"] for group in groups] == [0.3, 0.0, 0.3]
    assert all(p.dim() >= 2 for p in groups[0]["params"])
    assert all(p.dim() < 2 for p in groups[1]["params"])
    assert sum(len(group["params"]) for group in groups) == len(list(trainer.model.parameters()))
    assert groups[0]["fused"]
    routers = [layer.mlp.gate.weight for layer in trainer.model.model.layers]
    assert all(any(p is router for p in groups[2]["params"]) for router in routers)


def test_routers_may_learn_at_a_rate_of_their_own(tmp_path):
    trainer = build_trainer(
        tmp_path, learning_rate=1e-2, router_lr_scale=0.5, lr_schedule="constant", lr_warmup_steps=0
    )
    assert [group["lr"] for group in trainer.optimizer.param_groups] == [1e-2, 1e-2, 5e-3]


def test_learning_rate_warms_up_then_falls_to_a_tenth(tmp_path):
    build_trainer(tmp_path, max_steps=20, lr_warmup_steps=4).train()
    rates = [record["lr"] for record in records(tmp_path)]
    assert rates[:4] == pytest.approx([0.0025, 0.005, 0.0075, 0.01])
    assert rates[-1] == pytest.approx(0.001)
    assert all(a >= b for a, b in itertools.pairwise(rates[3:]))


def test_epochs_end_with_a_smaller_step_and_the_run_goes_on(tmp_path):
    trainer = build_trainer(tmp_path, max_steps=None, max_epochs=2, gradient_accumulation_steps=4)
    result = trainer.train()
    assert trainer.total_steps == 4  # 6 batches an epoch: 4 + 2
    assert result["global_step"] == 4
    assert trainer.state.tokens == 2 * 22 * 16


def test_a_non_finite_step_is_skipped_counted_and_moves_nothing(tmp_path):
    trainer = build_trainer(tmp_path, poison(build_model(), {2}), max_steps=3)
    snapshots = []
    after = trainer._after_step
    trainer._after_step = lambda: (snapshots.append((
        {k: v.clone() for k, v in trainer.model.state_dict().items()}, trainer.steering.load.clone()
    )), after())[1]  # fmt: skip
    result = trainer.train()
    assert result["skipped_steps"] == 1
    assert all(torch.equal(snapshots[1][0][name], value) for name, value in snapshots[2][0].items())
    assert torch.equal(snapshots[1][1], snapshots[2][1])
    assert trainer.steering.statistics.sums.abs().sum() == 0


def test_too_many_non_finite_steps_end_the_run_with_suspects(tmp_path):
    trainer = build_trainer(tmp_path, poison(build_model(), set(range(100))), max_nonfinite_steps=3)
    with pytest.raises(TrainingError, match=r"3 steps in a row.*learning rate"):
        trainer.train()


def test_ctrl_c_saves_and_stops_after_the_step(tmp_path):
    trainer = build_trainer(tmp_path, save_every_n_steps=1000)
    after = trainer._after_step

    def interrupt():
        if trainer.state.step == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return after()

    trainer._after_step = interrupt
    before = signal.getsignal(signal.SIGINT)
    result = trainer.train()
    assert result["interrupted"]
    assert not result["finished"]
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_3"]
    assert signal.getsignal(signal.SIGINT) is before
    trainer._after_step = after
    assert trainer.train()["finished"]


def test_training_in_a_thread_works(tmp_path):
    trainer, results = build_trainer(tmp_path, max_steps=2), []
    thread = threading.Thread(target=lambda: results.append(trainer.train()))
    thread.start()
    thread.join()
    assert results[0]["finished"]


def test_an_empty_loader_is_an_error(tmp_path):
    with pytest.raises(DataError, match="no batch"):
        ChronoMoETrainer(build_model(), TrainingConfig(checkpoint_dir=str(tmp_path)), DataLoader([]))


def test_plain_and_dense_models_train_too(tmp_path, host):
    plain = host("qwen3_moe", vocab_size=VOCAB)
    trainer = build_trainer(tmp_path / "a", plain, max_steps=3)
    trainer.train()
    assert plain.steering is trainer.steering
    reloaded = type(plain).from_pretrained(tmp_path / "a" / "step_3")
    assert all(torch.equal(plain.state_dict()[name], tensor) for name, tensor in reloaded.state_dict().items())
    import transformers

    dense = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
    ))  # fmt: skip
    assert build_trainer(tmp_path / "b", dense, max_steps=3).train()["finished"]
    assert "lb_loss" not in records(tmp_path / "b")[0]


def test_gradient_checkpointing_changes_nothing_but_memory(tmp_path):
    models = []
    for flag in (False, True):
        trainer = build_trainer(tmp_path / str(flag), gradient_checkpointing=flag, max_steps=3)
        trainer.train()
        models.append(trainer.model)
    assert equal_weights(*models)


def test_bf16_trains(tmp_path):
    trainer = build_trainer(tmp_path, precision="bf16", max_steps=3)
    assert trainer.train()["finished"]
    assert next(trainer.model.parameters()).dtype == torch.float32


def test_samples_do_not_disturb_the_run(tmp_path):
    def run(folder, sample):
        trainer = build_trainer(folder, eval_data={"a": held_out()}, eval_every_n_steps=3)
        trainer.sample = sample
        trainer.train()
        return trainer.model

    noisy = run(tmp_path / "a", lambda model: str(torch.rand(10).sum()))
    assert equal_weights(noisy, run(tmp_path / "b", None))
    assert len(records(tmp_path / "a", "sample")) == 4


def test_goals_are_turned_on_before_the_first_step_and_each_evaluation(tmp_path):
    trainer = build_trainer(tmp_path, max_steps=6, eval_every_n_steps=4)
    seen = []

    def goals():
        seen.append(trainer.state.step)
        trainer.model.steering.goal_bias[0, 1] = 0.5
        return {"event": "goal_bias", "beta": 0.5}

    trainer.goals, trainer.goals_key = goals, "x"
    trainer.train()
    assert seen == [0, 4, 6]
    assert [record["step"] for record in records(tmp_path, "goal_bias")] == seen
    assert trainer.model.steering.has_goals
