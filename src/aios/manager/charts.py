"""Charts of a run as ECharts options: colours and strokes that colour-blind eyes tell apart. No web in here."""

from typing import Any

from aios.manager.runs import RunLog

LINES = {
    "loss": "Loss, nats per token",
    "bits": "Held out, bits per byte",
    "control": "kappa, R and gate",
    "lb_loss": "Balance loss (1 is balanced)",
    "landscape": "Valleys, ridges and dead experts",
    "lr": "Learning rate",
    "tokens_per_second": "Tokens per second",
}
HEAT = {"load": "Load (1 is a fair share)", "T_bar": "Structural temperature"}
PALETTE = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
"""Okabe and Ito's, without yellow."""
_SYMBOLS = ["circle", "rect", "triangle", "diamond", "pin", "arrow", "roundRect"]
_ROW = 24
"""Height of a legend."""
_CIVIDIS = ["#00224e", "#35456c", "#666970", "#948e77", "#c8b866", "#fee838"]
Series = list[tuple[str, list[list[float]]]]


def lines(chart: str, runs: list[tuple[str, RunLog]]) -> dict[str, Any] | None:
    """Options of a line chart of one run, or of two; None when there is nothing to draw."""
    series: list[dict[str, Any]] = []
    legends: list[dict[str, Any]] = []
    for number, (run, log) in enumerate(runs):
        drawn = [
            _line(name if len(runs) == 1 else f"{run}: {name}", points, place, second=number > 0)
            for place, (name, points) in enumerate(_series(chart, log))
            if points
        ]
        if drawn:  # a row of the legend for each run
            names = [line["name"] for line in drawn]
            legends.append({"data": names, "top": _ROW * len(legends), "left": 0, "type": "scroll"})
        series += drawn
    if not series:
        return None
    return {
        "animation": False,
        "grid": {"left": 8, "right": 16, "top": 14 + _ROW * len(legends), "bottom": 8, "containLabel": True},
        "legend": legends,
        # As text: a name is never read as HTML.
        "tooltip": {"trigger": "axis", "renderMode": "richText"},
        "xAxis": {"type": "value", "min": "dataMin", "max": "dataMax", "splitLine": {"show": False}},
        "yAxis": {
            "type": "value",
            "scale": True,
            "axisLabel": {"hideOverlap": True},
            "minInterval": int(chart == "landscape"),
        },
        "series": series,
    }


def _series(chart: str, log: RunLog) -> Series:
    if chart == "bits":
        return [(domain, log.bits(domain)) for domain in log.domains()]
    if chart == "control":
        return [(name, log.line(name)) for name in ("kappa", "R", "gate")]
    if chart == "landscape":
        return [(name.replace("_", " "), _means(log.line(name))) for name in ("valleys", "ridges", "dead_experts")]
    if chart == "loss":
        return [("training", log.line("lm_loss") or log.line("loss"))]
    return [(chart.replace("_", " "), log.line(chart))]


def _means(points: list[list[float]]) -> list[list[float]]:
    """Of some records each, where there are many: counts that jump back and forth would hide each other."""
    size = -(-len(points) // 60)
    groups = [points[at : at + size] for at in range(0, len(points), max(1, size))]
    return [[group[-1][0], sum(value for _, value in group) / len(group)] for group in groups]


def _line(name: str, points: list[list[float]], place: int, *, second: bool) -> dict[str, Any]:
    stroke = ["solid", "dashed", "dotted"][place % 3]
    return {
        "name": name,
        "type": "line",
        "data": points,
        "symbol": _SYMBOLS[place % len(_SYMBOLS)],
        "symbolSize": 6,
        "showSymbol": len(points) < 40,
        "itemStyle": {"color": PALETTE[(place + (3 if second else 0)) % len(PALETTE)]},
        "lineStyle": {"width": 2, "type": "dashed" if second else stroke},
    }


def heat(name: str, log: RunLog, layer: int) -> dict[str, Any] | None:
    """Options of a heat map of one layer, experts against steps; None when there is nothing to draw."""
    steps, rows = log.columns(name, layer)
    if not rows:
        return None
    width = len(rows[0])
    scale = width if name == "load" else 1.0
    cells = [
        [column, expert, round(row[expert] * scale, 3)]
        for column, row in enumerate(rows)
        for expert in range(width)
        if isinstance(row[expert], (int, float))
    ]
    values = [cell[2] for cell in cells] or [0.0]
    return {
        "animation": False,
        "grid": {"left": 8, "right": 72, "top": 8, "bottom": 8, "containLabel": True},
        "tooltip": {"renderMode": "richText"},
        "xAxis": {"type": "category", "data": steps},
        "yAxis": {"type": "category", "data": [f"expert {number}" for number in range(width)]},
        "visualMap": {
            "min": min(values),
            "max": max(*values, min(values) + 1e-3),
            "precision": 2,
            "text": [f"{max(values):.2f}", f"{min(values):.2f}"],
            "orient": "vertical",
            "right": 0,
            "top": "center",
            "itemHeight": 140,
            "inRange": {"color": _CIVIDIS},
        },
        "series": [{"name": HEAT[name], "type": "heatmap", "data": cells}],
    }
