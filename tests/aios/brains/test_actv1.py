"""What train-actv1 asks of the machine."""

import os

import pytest

from aios.brains.actv1 import wants_cpu
from aios.settings.actv1 import ACTv1Run
from chronomoe.errors import ConfigError


def test_checking_the_machine_returns_the_device_and_leaves_the_environment():
    before = dict(os.environ)
    assert wants_cpu(ACTv1Run(device="cpu"), lambda line: None)
    assert not wants_cpu(ACTv1Run(device="auto"), lambda line: None)
    assert dict(os.environ) == before


@pytest.mark.parametrize("device", ["abacus", "cuda:1"])
def test_a_device_that_cannot_be_chosen_is_refused(device):
    with pytest.raises(ConfigError):
        wants_cpu(ACTv1Run(device=device), lambda line: None)
