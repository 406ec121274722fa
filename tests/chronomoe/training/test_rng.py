"""Random generators come back as they were, from tensors that compare equal."""

import random

import numpy as np
import pytest
import torch

from chronomoe.errors import CheckpointError
from chronomoe.training.rng import pack_rng, refuse_wrong_rng, unpack_rng


def draws():
    return [torch.rand(3).tolist(), np.random.rand(3).tolist(), np.random.randn(), random.random(), random.gauss(0, 1)]


@pytest.mark.parametrize("between", [0, 1])
def test_every_generator_draws_the_same_again(between):
    for _ in range(between):
        draws()  # one more number of a pair of Gaussians is kept
    packed = pack_rng()
    first = draws()
    draws()
    refuse_wrong_rng(packed)
    unpack_rng(packed)
    assert all(tensor.equal(pack_rng()[name]) for name, tensor in packed.items())
    assert draws() == first


@pytest.mark.parametrize("change", [{"python": torch.zeros(3)}, {"cpu": torch.zeros(5056)}])
def test_states_of_another_kind_are_refused(change):
    with pytest.raises(CheckpointError, match=next(iter(change))):
        refuse_wrong_rng(pack_rng() | change)
