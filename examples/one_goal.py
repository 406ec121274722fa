"""Let a goal prefer one of a model's own experts, within a budget of what it may change.

    python examples/one_goal.py

Commands do the same for a brain on disk: aios goals add, link-expert, explain.
"""

import torch

from chronomoe import ChronovisorMixtralForCausalLM, MixtralConfig
from chronomoe.goals.steer import Goal, GoalSettings, turn_off, turn_on

torch.manual_seed(0)
model = ChronovisorMixtralForCausalLM(MixtralConfig(vocab_size=256, hidden_dim=32, num_layers=2, num_experts=8)).eval()
text = torch.randint(0, 256, (8, 32))
with torch.no_grad():
    plain = model(text).logits

goal = Goal(text="Quote licences word for word", weight=1.0, slots=((None, 3),))  # expert 3 of every layer
effect = turn_on(model, [goal], GoalSettings(kl=0.01), text)  # the size of the bias is found for that budget, on a text
print(f"Bias {effect.beta:.2f} logits; the output changes by {effect.kl:.4f} nats per token.")
print(f"Share of expert 3: {effect.share_before[0][3]:.3f} before, {effect.share_after[0][3]:.3f} after.")

turn_off(model)
with torch.no_grad():
    assert torch.equal(model(text).logits, plain), "without goals the model is what it was, bit for bit"
