"""Steer a plain transformers.Trainer run: add one callback.

python examples/trainer_callback.py --steps 50
"""

import argparse
import tempfile

import torch
from transformers import MixtralConfig, MixtralForCausalLM, Trainer, TrainingArguments

from chronomoe.training import ChronoMoECallback

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=50)
args = parser.parse_args()

torch.manual_seed(0)
shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
model = MixtralForCausalLM(MixtralConfig(vocab_size=256, num_key_value_heads=2, num_local_experts=4, **shape))
text = torch.randint(0, 256, (64, 32))
data = [{"input_ids": row, "labels": row} for row in text]

with tempfile.TemporaryDirectory() as folder:
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            folder,
            max_steps=args.steps,
            per_device_train_batch_size=8,
            logging_steps=5,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        ),
        train_dataset=data,
        callbacks=[ChronoMoECallback(model)],
    )
    trainer.train()

for record in trainer.state.log_history:
    if "lb_loss" in record:
        print(f"step {record['step']}: loss {record['loss']}, balance {record['lb_loss']:.3f}, R {record['R']:.2f}")
