"""Train an expert alone in a frozen model, give it a domain gate, save it, attach it, detach it.

    python examples/one_expert.py --steps 50

Commands do the same for a brain on disk: aios experts train, attach, detach.
"""

import argparse
import tempfile
from pathlib import Path

import torch

from chronomoe import ChronovisorMixtralForCausalLM, MixtralConfig
from chronomoe.experts.attachment import attach_expert, detach_expert
from chronomoe.experts.expert import DomainExpert
from chronomoe.experts.file import base_of, read_expert, save_expert
from chronomoe.experts.training import begin, calibrate, fit_gate, trainee

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=50)
args = parser.parse_args()

torch.manual_seed(0)
base = ChronovisorMixtralForCausalLM(MixtralConfig(vocab_size=64, hidden_dim=32, num_layers=3, num_experts=4)).eval()
domain = torch.randint(0, 32, (32, 24))  # its tokens are those below 32,
general = torch.randint(0, 64, (64, 24))  # general text has them all
with torch.no_grad():
    plain = base(domain).logits

# The expert has a network in every MoE layer from the second on; each begins as a copy of the base's most used expert.
width = base.config.intermediate_dim
expert = DomainExpert("laws", hidden_size=32, width=width, layers=[1, 2], gate_layers=[0, 1])
begin(expert, base, domain, redraw=0.5, seed=0)

# Train: the base and its routers are frozen, the expert is open at every token.
with trainee(base, expert, anchor_weight=1.0) as learner:
    optimizer = torch.optim.AdamW(expert.parameters(), lr=2e-3)
    for _ in range(args.steps):
        optimizer.zero_grad()
        loss = learner(domain, labels=domain).loss
        loss.backward()
        optimizer.step()
print(f"Loss on the domain: {loss.item():.3f}")

# The gate: fitted to tell the domain from general text, with a threshold that bounds false alarms and harm.
fit_gate(expert, base, domain, {"general": general[:32]})
attach_expert(base, expert)
found = calibrate(base, expert, {"general": general[32:]}, false_alarm=0.02, harm_kl=0.003)
detach_expert(base, expert.uid)
print(f"Threshold {found['threshold']:.2f} nats.")

with tempfile.TemporaryDirectory() as folder:
    file = Path(folder) / "expert.safetensors"
    header = {
        "created": "2026-01-01T00:00:00+00:00",
        "base": base_of(base),
        "tokenizer_fingerprint": "bytes",
        "training": {"steps": args.steps},
        "calibration": found,
        "metrics": {},
        "goals": [],
        "data": {},
    }
    save_expert(expert.eval(), header, file)
    again, _ = read_expert(file)

attach_expert(base, again)
with torch.no_grad():
    print("Logits differ with the expert:", not torch.equal(base(domain).logits, plain))
detach_expert(base, again.uid)
with torch.no_grad():
    assert torch.equal(base(domain).logits, plain), "detached, the base is what it was, bit for bit"
