"""What training says of a gate and an expert."""

from aios.experts.report import about_the_gate, warnings

CALIBRATION = {
    "recall": 0.971,
    "measured_false_alarm": {"oratory": 0.0095, "python": 0.0},
    "measured_kl_where_open": {"oratory": 0.0214},
}


def metrics(before, always_open):
    return {"before": before, "always_open": always_open}


def test_where_the_gate_opens_and_what_it_does_there():
    said = about_the_gate(CALIBRATION)
    assert said == [
        "Its gate opens on domain 97.1%, oratory 0.95% (0.021 nats of KL there), python 0.00% of the tokens."
    ]
    assert about_the_gate({"note": "no general text"}) == []


def test_a_gate_that_hardly_opens_is_said():
    good = metrics({"domain": 2.0}, {"domain": 1.5})
    assert warnings("laws", CALIBRATION, good) == []
    (said,) = warnings("laws", CALIBRATION | {"recall": 0.01}, good)
    assert "the gate of laws hardly ever opens on its own domain" in said
    assert "--false-alarm" in said


def test_a_domain_that_the_base_masters_is_said():
    (said,) = warnings("laws", CALIBRATION, metrics({"domain": 2.0}, {"domain": 1.99}))
    assert "even always open laws gains 0.5%" in said
    assert warnings("laws", CALIBRATION, metrics({}, {})) == [], "nothing was held out"
