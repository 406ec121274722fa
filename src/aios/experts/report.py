"""What the training of an expert says of its gate, and of what would be found out too late."""

from typing import Any

DOMAIN = "domain"
"""Name of an expert's own text in what is measured."""
_RARELY, _LITTLE = 0.05, 0.01
"""A gate open at less of its domain, and an expert that gains less, are worth a note."""


def about_the_gate(calibration: dict[str, Any]) -> list[str]:
    """Where the gate opens, and what it does there."""
    if "measured_false_alarm" not in calibration:
        return []
    harm = calibration["measured_kl_where_open"]
    shares = [f"{DOMAIN} {calibration['recall']:.1%}"] + [
        f"{name} {share:.2%}" + (f" ({harm[name]:.3f} nats of KL there)" if name in harm else "")
        for name, share in calibration["measured_false_alarm"].items()
    ]
    return [f"Its gate opens on {', '.join(shares)} of the tokens."]


def warnings(expert_id: str, calibration: dict[str, Any], metrics: dict[str, Any]) -> list[str]:
    """What somebody would find out too late: an expert that is hardly ever used, or has nothing to add."""
    lines = []
    if calibration.get("recall", 1.0) < _RARELY:
        lines.append(
            f"Note: the gate of {expert_id} hardly ever opens on its own domain: that is too like the base's text, or "
            "the expert does too much harm there. Give more text, or a higher --false-alarm or --harm-kl."
        )
    before, opened = (metrics[name].get(DOMAIN) for name in ("before", "always_open"))
    if before is not None and opened > before * (1 - _LITTLE):
        gain = 1 - opened / before
        lines.append(
            f"Note: even always open {expert_id} gains {gain:.1%} in bits per byte of its domain: the base knows this "
            "text already, or the training was too short (--steps)."
        )
    return lines
