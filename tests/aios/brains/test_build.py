"""The model that a run begins with, from the weights it names."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from aios.brains.brain import Brain
from aios.brains.build import build_model, load_student
from aios.brains.families import load_weights
from chronomoe.data.store_info import read_info
from chronomoe.errors import CheckpointError


@pytest.fixture
def start(brain):
    """Builds a model of the shape of the brain from the weights in a folder or file."""
    root, run = brain.parents[3], Brain(brain.parents[3], brain).run.run

    def build(weights):
        info = read_info(root / "training_data/prepared")
        base = root / "artifacts/hf_implant/base_model"
        return build_model(
            run.family, base, run.shape, info, seed=9, seq_len=run.seq_len, capacity=None, weights=weights
        )

    return build


def test_weights_are_those_of_the_folder_or_of_its_file(brain, start):
    wanted = load_weights(brain).state_dict()
    for source in (brain, brain / "model.safetensors"):
        found = start(source).state_dict()
        assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
    assert not all(torch.equal(tensor, wanted[name]) for name, tensor in start(None).state_dict().items())


def test_weights_that_are_not_finite_are_refused(brain, start, tmp_path):
    tensors = load_file(brain / "model.safetensors")
    tensors["model.norm.weight"][0] = torch.nan
    file = tmp_path / "bad.safetensors"
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"bad\.safetensors are not finite \(model\.norm\.weight\)"):
        start(file)


def test_a_file_of_another_model_is_refused_by_its_own_name(brain, start, tmp_path):
    model = start(None)
    file = tmp_path / "other.safetensors"
    save_file({"something": torch.zeros(2)}, file)
    with pytest.raises(CheckpointError, match=r"the weights in .*other\.safetensors do not fit this model"):
        load_student(model, file)
    file.write_bytes(b"no weights")
    with pytest.raises(CheckpointError, match="holds no weights that can be read"):
        load_student(model, file)
