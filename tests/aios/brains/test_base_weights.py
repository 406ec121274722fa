"""What a new brain starts from: text in another order each pass, weights that fit, fp32."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from aios.brains.brain import Brain
from aios.brains.loaded import load_brain
from aios.brains.train import _sequences
from aios.settings.train import MixtralRun
from chronomoe import ChronovisorMixtralForCausalLM, MixtralConfig
from chronomoe.data.token_store import TokenStore

SHORT = ("--max-steps", 3, "--batch-size", 2, "--seq-len", 32, "--eval-tokens", 512)


def test_every_pass_over_the_text_has_another_order(workspace):
    run = MixtralRun(root=workspace, seq_len=32, max_epochs=2, batch_size=2)
    store = TokenStore.open(workspace / "training_data/prepared")
    sequences = _sequences(run, store)
    half = len(sequences) // 2
    assert half > 10
    first, second = ([sequences[i + n]["input_ids"].tolist() for i in range(half)] for n in (0, half))
    assert first != second


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        ("missing", "are not those of its config"),
        ("truncated", "cannot be loaded"),
        ("small", "do not belong together"),
    ],
)
def test_weights_that_do_not_fit_their_base_are_refused(brain, aios, workspace, damage, said):
    file = brain / "model.safetensors"
    weights = load_file(file)
    if damage == "missing":
        save_file({name: t for name, t in weights.items() if ".layers.0." not in name}, file, {"format": "pt"})
    elif damage == "truncated":
        file.write_bytes(file.read_bytes()[:1000])
    else:
        model = ChronovisorMixtralForCausalLM(MixtralConfig(vocab_size=300, hidden_dim=32, num_layers=1))
        model.save_pretrained(brain)
    outcome = aios("train", "--root", workspace, "--name", "fresh", "--model", brain, *SHORT)
    assert outcome.code in (1, 2)
    assert said in outcome.err


def test_a_bf16_base_is_trained_in_fp32(brain, aios, workspace):
    load_brain(Brain(workspace, brain)).model.to(torch.bfloat16).save_pretrained(brain)
    assert aios("train", "--root", workspace, "--name", "fresh", "--model", brain, *SHORT).code == 0
    weights = load_file(workspace / "artifacts/brains/mixtral/fresh/model.safetensors")
    assert {tensor.dtype for name, tensor in weights.items() if name.startswith("model.")} == {torch.float32}
