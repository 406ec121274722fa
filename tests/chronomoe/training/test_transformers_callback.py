"""One line steers a plain transformers.Trainer run."""

import pytest
import torch
import transformers

from chronomoe.training import ChronoMoECallback
from tests.chronomoe.everything import differing, everything


@pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_plain_trainer_run(host, tmp_path, accumulation):
    model = host("mixtral")
    callback = ChronoMoECallback(model)
    rows = [{"input_ids": torch.randint(0, 61, (12,))} for _ in range(16)]
    for row in rows:
        row["labels"] = row["input_ids"]
    args = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=3, per_device_train_batch_size=4, logging_steps=1, report_to=[],
        gradient_accumulation_steps=accumulation, save_strategy="no", disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    trainer = transformers.Trainer(model=model, args=args, train_dataset=rows, callbacks=[callback])
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logged) == 3
    for entry in logged:
        assert 0.9 < entry["lb_loss"] < 4
        assert entry["max_violation"] >= 0
    assert model.steering.load.sum(-1).tolist() == pytest.approx([1, 1])
    assert model.steering.statistics.sums.abs().sum() == 0
    assert not torch.all(model.steering.load == 0.25)
    assert int(model.controller.ticks) == 3
    assert int(model.controller.window.tokens[0]) == 4 * 12 * accumulation, "one window is one whole step"


def test_it_attaches(host):
    model = host("olmoe")
    callback = ChronoMoECallback(model)
    assert model.controller is callback.controller
    assert model.steering.config.balance_scope == "step"


@pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")
def test_a_resumed_run_goes_on_with_its_control_layer(host, tmp_path):
    def run(resume=None):
        model = host("mixtral")
        torch.manual_seed(0)
        rows = [{"input_ids": (row := torch.randint(0, 61, (12,))), "labels": row} for _ in range(16)]
        args = transformers.TrainingArguments(
            output_dir=str(tmp_path), max_steps=4, per_device_train_batch_size=4, save_steps=2, logging_strategy="no",
            report_to=[], disable_tqdm=True, use_cpu=True,
        )  # fmt: skip
        callback = ChronoMoECallback(model)
        trainer = transformers.Trainer(model=model, args=args, train_dataset=rows, callbacks=[callback])
        trainer.train(resume_from_checkpoint=resume)
        return everything(model)

    straight = run()
    assert straight["controller.ticks"] == 4
    assert straight["steering.pressure"].any()
    # transformers' own resuming loses the experts of a Mixtral, so the layer alone is compared.
    resumed = run(str(tmp_path / "checkpoint-4"))
    assert not [name for name in differing(straight, resumed) if name.startswith(("steering.", "controller."))]


def test_broken_experts_are_searched_once_after_a_step_that_is_not_finite(host, monkeypatch):
    model = host("mixtral")
    callback = ChronoMoECallback(model)
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj[2] = torch.nan
    searches = []
    search = callback.controller.mask_broken
    monkeypatch.setattr(callback.controller, "mask_broken", lambda: searches.append(1) or search())
    x = torch.randint(0, 61, (2, 12))
    model.train()(input_ids=x, labels=x).loss.backward()
    with pytest.warns(UserWarning, match="expert 2 of layer 1 is masked"):
        callback.on_optimizer_step(None, None, None)
    assert searches == [1]
