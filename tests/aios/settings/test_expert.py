import pytest

from aios.settings.expert import ExpertTraining
from chronomoe.errors import ConfigError


@pytest.mark.parametrize(
    "setting",
    [{"steps": 0}, {"lr": 0}, {"redraw": 1.1}, {"harm_kl": -1}, {"eval_tokens": -1}, {"gate_memory": 2}, {"seed": "1"}],
)
def test_settings_are_checked(setting):
    with pytest.raises(ConfigError, match=f"^{next(iter(setting))} is "):
        ExpertTraining(**setting)


def test_its_goal_is_a_text_that_a_goal_can_have():
    assert ExpertTraining(default_goal="be brief").default_goal == "be brief"
    with pytest.raises(ConfigError, match="a goal needs words"):
        ExpertTraining(default_goal=" ")
