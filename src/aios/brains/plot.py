"""Pictures of a run: loss; kappa, R and gate; load of every expert; the landscape of structural temperature."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from aios.brains.brain import Brain
from aios.brains.metrics import read_metrics
from chronomoe.errors import CheckpointError, ConfigError

Axes = Any
_HEAT = "cividis"  # the same to colour-blind eyes, and in grey


def plot_run(run: Path, out: Path | None = None) -> list[Path]:
    """Draw a bundle (or a metrics.jsonl) into ``out``, ``plots/`` beside the metrics by default; returns the files.

    Raises :class:`ConfigError` without matplotlib, :class:`CheckpointError` when there is nothing to draw.
    """
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        raise ConfigError("drawing needs matplotlib: pip install 'chronomoe-aios[plots]'.") from None
    file = run if run.is_file() else Brain(Path(), run).metrics
    steps = read_metrics(file)
    if not steps:
        raise CheckpointError(f"{file} has no record of a training step yet; train on, or log more often.")
    evaluations = read_metrics(file, "eval")
    out = out or file.parent / "plots"
    out.mkdir(parents=True, exist_ok=True)
    written = []
    for name, draw in _PICTURES.items():
        figure = pyplot.figure(figsize=(9, 5), layout="constrained")
        try:
            if draw(figure, steps, evaluations):
                figure.savefig(out / f"{name}.png", dpi=110)
                written.append(out / f"{name}.png")
        except (TypeError, ValueError) as error:  # fields are read as they come
            raise CheckpointError(f"{file} holds something that is no number, so {name} cannot be drawn.") from error
        finally:
            pyplot.close(figure)
    return written


def _loss(figure: Any, steps: list[dict[str, Any]], evaluations: list[dict[str, Any]]) -> bool:
    axes = figure.add_subplot()
    x = [record["step"] for record in steps]
    axes.plot(x, [record.get("lm_loss", record.get("loss")) for record in steps], label="training, nats per token")
    axes.set(xlabel="step", ylabel="loss")
    names = [
        name for name in (evaluations[0] if evaluations else {}) if name not in ("event", "step", "mean", "segments")
    ]
    if names:
        right = axes.twinx()
        for name, style in zip(names, ["--o", "--s", "--^", "--D", "--v"] * len(names), strict=False):
            right.plot(
                [record["step"] for record in evaluations],
                [record.get(name) for record in evaluations],
                style,
                color=f"C{1 + names.index(name)}",
                label=f"held out: {name}",
            )
        right.set_ylabel("bits per byte" if names != ["loss"] else "held-out loss")
        right.legend(loc="upper right")
    axes.legend(loc="lower left")
    return True


def _control(figure: Any, steps: list[dict[str, Any]], _: Any) -> bool:
    steps = [record for record in steps if {"kappa", "R", "gate"} <= record.keys()]
    axes = figure.add_subplot()
    for name, style in (("kappa", "-"), ("R", "--"), ("gate", ":")):
        axes.plot([record["step"] for record in steps], [record[name] for record in steps], style, label=name)
    axes.set(xlabel="step", ylim=(-1.05, 1.05))
    axes.legend()
    return bool(steps)


def _heat_maps(figure: Any, steps: list[dict[str, Any]], name: str, label: str, scale: Callable[[int], float]) -> bool:
    """One row of heat maps, a layer each: experts against steps."""
    import numpy as np
    from matplotlib.ticker import MaxNLocator

    steps = [record for record in steps if record.get(name)]
    if not steps:
        return False
    shape = np.shape(steps[-1][name])
    steps = [record for record in steps if np.shape(record[name]) == shape]  # a brain that grew: its latest form
    values = np.array([record[name] for record in steps])  # (steps, layers, experts)
    values = values * scale(values.shape[-1])
    x = [record["step"] for record in steps]
    grid = figure.subplots(1, values.shape[1], sharey=True, squeeze=False)[0]
    for layer, axes in enumerate(grid):
        image = axes.imshow(
            values[:, layer].T,
            aspect="auto",
            origin="lower",
            interpolation="nearest",
            cmap=_HEAT,
            vmin=values.min(),
            vmax=max(values.max(), values.min() + 1e-9),
            extent=(x[0], max(x[-1], x[0] + 1), -0.5, values.shape[-1] - 0.5),
        )
        axes.set(title=f"layer {layer}", xlabel="step")
    grid[0].set_ylabel("expert")
    grid[0].yaxis.set_major_locator(MaxNLocator(integer=True))
    figure.colorbar(image, ax=list(grid), label=label)
    return True


_PICTURES: dict[str, Callable[[Any, list[dict[str, Any]], list[dict[str, Any]]], bool]] = {
    "loss": _loss,
    "control": _control,
    "load": lambda figure, steps, _: _heat_maps(figure, steps, "load", "load, 1 = fair share", float),
    "landscape": lambda figure, steps, _: _heat_maps(figure, steps, "T_bar", "structural temperature", lambda n: 1.0),
}
