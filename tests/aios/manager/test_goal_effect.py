"""The table beside the sliders: what is before, and what after."""

from aios.manager.goal_effect import _rows


def test_before_is_goals_off_and_after_is_goals_on():
    off = {"share": [[0.25, 0.75]], "open": {"laws": 0.1}}
    on = {"share": [[0.4, 0.6]], "open": {"laws": 0.9}}
    assert _rows({"off": off, "on": on}) == [
        {"name": "gate of laws open", "before": "10.0%", "after": "90.0%"},
        {"name": "layer 0, expert 0", "before": "25.0%", "after": "40.0%"},
        {"name": "layer 0, expert 1", "before": "75.0%", "after": "60.0%"},
    ]
