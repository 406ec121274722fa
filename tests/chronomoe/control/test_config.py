"""ControlConfig: bad settings are named, arms switch what their names say."""

import math

import pytest

from chronomoe import ControlConfig
from chronomoe.control.config import ABLATIONS
from chronomoe.errors import ConfigError


@pytest.mark.parametrize(
    "settings",
    [{"pressure": "hard"}, {"gamma": -1}, {"gamma": math.nan}, {"leak": 2}, {"coherence_memory": 1.0}, {"bound": 0},
     {"probe_every": 0}, {"health_scale": 0}, {"bound": math.inf}, {"gamma": "0.1"}, {"temperature": "false"},
     {"probe_sequences": 2.5}],
)  # fmt: skip
def test_bad_settings_are_named(settings):
    with pytest.raises(ConfigError, match=next(iter(settings))):
        ControlConfig(**settings)


def test_arms_are_nested():
    arms = {name: ControlConfig(gamma=0.5).ablate(name) for name in ABLATIONS}
    assert all(arm.gamma == 0.5 for arm in arms.values())
    assert arms["none"] == arms["aux"]
    switches = {name: (arm.pressure, arm.temperature, arm.health) for name, arm in arms.items()}
    assert switches == {
        "none": ("off", False, False),
        "aux": ("off", False, False),
        "loss_free": ("sign", False, False),
        "pi": ("pi", False, False),
        "pi_temperature": ("pi", True, False),
        "pi_health": ("pi", False, True),
        "full": ("pi", True, True),
    }
    assert [name for name, arm in arms.items() if arm.initial_noise] == ["full"]
