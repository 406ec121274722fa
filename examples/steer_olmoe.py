"""Attach steering to an OLMoE of transformers: nothing changes until a field is set, then routing follows it.

python examples/steer_olmoe.py                  a tiny model with random weights
python examples/steer_olmoe.py --model FOLDER   any Mixtral, OLMoE or Qwen MoE checkpoint
"""

import argparse

import torch
from transformers import AutoModelForCausalLM, OlmoeConfig, OlmoeForCausalLM

import chronomoe

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", help="Folder of a checkpoint.")
args = parser.parse_args()

torch.manual_seed(0)
if args.model:
    model = AutoModelForCausalLM.from_pretrained(args.model)
else:
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = OlmoeForCausalLM(
        OlmoeConfig(vocab_size=256, num_experts=8, num_experts_per_tok=2, eos_token_id=None, **shape)
    )
model.eval()
tokens = torch.randint(0, 256, (4, 32))

with torch.no_grad():
    before = model(tokens).logits
    controller = chronomoe.attach(model, dispatch="keep")  # keep: the host's own way to run its experts
    assert torch.equal(model(tokens).logits, before), "neutral fields change no bit"

    # Fields decide which experts a token may use, never how much weight a chosen expert gets.
    model.steering.pressure[0, 5] = 2.0  # layer 0 prefers expert 5
    model.steering.available[1, 2] = False  # layer 1 does not use expert 2
    print("Largest change of a logit:", (model(tokens).logits - before).abs().max().item())

# In training the controller moves the pressure itself: one tick after each backward pass balances the load.
model.train()
model.steering.pressure.zero_()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
for _ in range(10):
    optimizer.zero_grad()
    model(tokens, labels=tokens).loss.backward()  # the router losses are in it
    controller.tick()
    optimizer.step()
print("Pressure of layer 0:", [round(value, 3) for value in model.steering.pressure[0].tolist()])
