"""A trained model: its routing has learned something that can be harmed."""

import copy

import pytest

from tests.chronomoe.control.building import build, text, train


@pytest.fixture(scope="session")
def learned():
    model = build(seed=2)
    train(model, 150, data=text)
    return model


@pytest.fixture
def model(learned):
    return copy.deepcopy(learned)


@pytest.fixture
def fresh():
    controller = build().controller
    controller.ticks.fill_(25)
    return controller
