import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from aios.brains.brain import Brain
from aios.brains.loaded import load_brain
from chronomoe.errors import CheckpointError


def load(path):
    return load_brain(Brain(Path(), path))


def damage(folder, file, content):
    path = folder / file
    if content is None:
        path.unlink()
    elif callable(content):
        content(path)
    else:
        path.write_bytes(content)


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("model.safetensors", b"", "cannot be loaded"),
        ("model.safetensors", lambda path: path.write_bytes(path.read_bytes()[:5000]), "cannot be loaded"),
        ("model.safetensors", lambda path: save_file({"x": torch.ones(3)}, path), "is missing"),
        ("config.json", None, "cannot be read"),
        ("config.json", b"{", "cannot be read"),
        ("config.json", b"{}", "does not describe a Mixtral"),
        ("config.json", b'{"model_type": "llama"}', "does not describe a Mixtral"),
        ("tokenizer.json", None, "no tokenizer.json"),
        ("tokenizer.json", b"{}", "cannot be loaded"),
        ("tokenizer_config.json", b"{}", "no eos_token"),
        ("run.json", b"{", "is damaged"),
        ("run.json", b"[]", "is damaged"),
    ],
)
def test_a_damaged_brain_is_refused(brain, file, content, said):
    damage(brain, file, content)
    with pytest.raises(CheckpointError, match=said):
        load(brain)


def test_a_foreign_tokenizer_is_refused(brain, tmp_path, aios):
    text = tmp_path / "a.txt"
    text.write_text("other words altogether " * 900)
    assert aios("data", "prepare", text, "--out", tmp_path / "bytes", "--vocab-size", "bytes").code == 0
    for file in (tmp_path / "bytes/tokenizer").iterdir():
        shutil.copy(file, brain)
    with pytest.raises(CheckpointError, match="not the one the brain was trained with"):
        load(brain)


@pytest.mark.parametrize("place", [".", "checkpoints/step_24"])
def test_a_tokenizer_of_the_right_size_but_other_words_is_refused(brain, place):
    file = brain / place / "tokenizer.json"
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    first, second = list(vocabulary)[-2:]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    file.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="not the one the brain was trained with"):
        load(brain / place)


def test_an_unfinished_brain_is_its_latest_checkpoint(brain):
    wanted = load(brain / "checkpoints/step_24").model.state_dict()
    (brain / "model.safetensors").unlink()
    assert all(tensor.equal(wanted[name]) for name, tensor in load(brain).model.state_dict().items())
    shutil.rmtree(brain / "checkpoints")
    with pytest.raises(CheckpointError, match="holds no weights yet"):
        load(brain)


def test_a_brain_opens_in_plain_transformers(brain):
    from transformers import AutoModelForCausalLM

    plain, ours = AutoModelForCausalLM.from_pretrained(brain), load(brain).model
    ours.steering.reset()  # fields are what plain transformers does not know
    ids = torch.arange(30)[None]
    with torch.no_grad():
        torch.testing.assert_close(plain.eval()(ids).logits, ours(ids).logits)  # other expert kernels
