import pytest

from aios.settings.goals import GoalFlags, Lesson, TrainingGoals
from chronomoe.errors import ConfigError
from chronomoe.goals.settings import GoalSettings


@pytest.mark.parametrize(
    ("kind", "setting"),
    [
        (GoalFlags, {"goal_strength": 5.5}),
        (GoalFlags, {"goal_kl": 0}),
        (GoalFlags, {"goal_beta": 1.5}),
        (GoalFlags, {"goal_likeness": -0.1}),
        (TrainingGoals, {"goal_domain_weight": 0}),
        (Lesson, {"steps": 0}),
        (Lesson, {"lr": 0}),
        (Lesson, {"anchor_weight": -1}),
    ],
)
def test_settings_are_checked(kind, setting):
    with pytest.raises(ConfigError, match=f"^{next(iter(setting))} is "):
        kind(**setting)


def test_the_library_gets_what_the_flags_say():
    flags = GoalFlags(goal=("1",), goal_strength=1.5, goal_kl=0.2, goal_beta=0.5, goal_layers=(1,), goal_likeness=0.3)
    assert flags.effect == GoalSettings(strength=1.5, kl=0.2, beta=0.5, layers=(1,), likeness=0.3)
    assert GoalFlags().effect == GoalSettings()


def test_goals_that_act_but_are_not_named_are_refused():
    assert not GoalFlags().wanted
    assert GoalFlags(goals_active=True, goal_kl=0.1).wanted
    with pytest.raises(ConfigError, match="--goal-kl needs a goal"):
        _ = GoalFlags(goal_kl=0.1).wanted
    with pytest.raises(ConfigError, match="--goals-forget trains on"):
        TrainingGoals(goals_forget=True, goal=("1",))
    with pytest.raises(ConfigError, match="--goals-learned is for using"):
        TrainingGoals(goals_learned=True, goal=("1",))
