"""The training loop: micro-batches, evaluation that moves nothing, faults it survives."""

import os
import signal
import threading

import pytest
import torch
from torch.utils.data import DataLoader

from chronomoe.errors import ConfigError, DataError, TrainingError
from chronomoe.training import ChronoMoETrainer, TrainingConfig
from chronomoe.training.trainer_file import list_checkpoints
from tests.chronomoe.training.building import (
    VOCAB,
    AfterStep,
    build_data,
    build_model,
    build_trainer,
    poison,
    records,
)


def test_it_learns(tmp_path):
    row = {"input_ids": torch.arange(16) % 5}
    trainer = build_trainer(tmp_path, data=[row] * 8, max_steps=30)
    trainer.train()
    losses = [record["lm_loss"] for record in records(tmp_path)]
    assert losses[0] > 3
    assert losses[-1] < 0.5


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


def test_epochs_end_with_a_smaller_step_and_the_run_goes_on(tmp_path):
    trainer = build_trainer(tmp_path, max_steps=None, max_epochs=2, gradient_accumulation_steps=4)
    result = trainer.train()
    assert trainer.total_steps == 4  # 6 batches an epoch: 4 + 2
    assert result["global_step"] == 4
    assert trainer.state.tokens == 2 * 22 * 16


def test_too_many_non_finite_steps_end_the_run_with_suspects(tmp_path):
    trainer = build_trainer(tmp_path, poison(build_model(), set(range(100))), max_nonfinite_steps=3)
    with pytest.raises(TrainingError, match=r"3 steps in a row.*learning rate"):
        trainer.train()


def test_ctrl_c_saves_and_stops_after_the_step(tmp_path):
    trainer = build_trainer(tmp_path, save_every_n_steps=1000)

    def interrupt(step):
        if step.number == 3:
            os.kill(os.getpid(), signal.SIGINT)

    trainer.callbacks.append(AfterStep(interrupt))
    before = signal.getsignal(signal.SIGINT)
    result = trainer.train()
    assert result["interrupted"]
    assert not result["finished"]
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_3"]
    assert signal.getsignal(signal.SIGINT) is before
    trainer.callbacks.pop()
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


def test_bf16_trains(tmp_path):
    trainer = build_trainer(tmp_path, precision="bf16", max_steps=3)
    assert trainer.train()["finished"]
    assert next(trainer.model.parameters()).dtype == torch.float32
