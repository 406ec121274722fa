"""aios plot."""

from pathlib import Path


def plot(run: str, *, out: Path | None = None, root: Path = Path()) -> None:
    """Draw a run: loss, kappa/R/gate, load of every expert, landscape of structural temperature, as PNG.

    Parameters
    ----------
    run
        Name of a brain, or the path of a bundle or of a metrics.jsonl.
    out
        Folder for the pictures; plots/ beside the metrics when not given.
    root
        Workspace folder.
    """
    from aios.brains.bundle import find_brain
    from aios.brains.plot import plot_run

    for path in plot_run(Path(run) if Path(run).is_file() else find_brain(root, run), out):
        print(f"Wrote {path}")
