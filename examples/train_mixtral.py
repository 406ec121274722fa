"""Train a small Mixtral-style model on the bytes of a text file under the control layer, then resume it.

python examples/train_mixtral.py README.md --steps 200
"""

import argparse
from pathlib import Path

import torch
from torch.utils.data import DataLoader

from chronomoe.chronovisor_mixtral_bridge import ChronovisorMixtralForCausalLM
from chronomoe.mixtral_core import MixtralConfig
from chronomoe.training import ChronoMoETrainer, TrainingConfig

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("text", type=Path, help="Any file; its bytes are the tokens.")
parser.add_argument("--steps", type=int, default=200)
parser.add_argument("--hidden-dim", type=int, default=64)
parser.add_argument("--length", type=int, default=64, help="Tokens per sequence.")
parser.add_argument("--checkpoints", default="checkpoints")
args = parser.parse_args()

# A loader gives dicts with input_ids (batch, sequence); labels are the same tokens, unshifted, when not given.
tokens = torch.frombuffer(bytearray(args.text.read_bytes()), dtype=torch.uint8).long()
sequences = [{"input_ids": row} for row in tokens[: len(tokens) // args.length * args.length].view(-1, args.length)]
held_out = max(1, len(sequences) // 20)
train_loader = DataLoader(sequences[held_out:], batch_size=8)
eval_loader = DataLoader(sequences[:held_out], batch_size=8)

model = ChronovisorMixtralForCausalLM(
    MixtralConfig(
        vocab_size=256,
        hidden_dim=args.hidden_dim,
        num_layers=2,
        num_experts=8,
        enable_chronovisor=True,
    )
)
config = TrainingConfig(
    learning_rate=3e-3,
    max_steps=args.steps,
    initial_kappa=0.5,  # start exploratory
    final_kappa=-0.3,  # end exploitative
    kappa_warmup_steps=args.steps // 10,
    kappa_schedule="cosine",
    use_coherence_gating=True,
    log_every_n_steps=max(1, args.steps // 10),
    save_every_n_steps=max(1, args.steps // 2),
    checkpoint_dir=args.checkpoints,
)
trainer = ChronoMoETrainer(
    model=model,
    config=config,
    train_dataloader=train_loader,
    eval_dataloader=eval_loader,
)
results = trainer.train()
print(f"Trained {results['global_step']} steps.")

# Go back to the middle: weights, optimizer, random state, position in the data and control state all return.
trainer.load_checkpoint(f"step_{max(1, args.steps // 2)}")
trainer.train()
print(trainer.controller.get_valley_health_diagnostics())
