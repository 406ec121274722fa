"""Actions on brains: list, show, rename, delete, export, upcycle."""

from pathlib import Path

from aios.actions import BrainName, Confirm, Done, action, refuse
from aios.brains.brain import Brain, describe_all
from aios.settings.train import HRMShape


@action()
def list_brains(workspace: Path) -> Done:
    """List brains."""
    found = describe_all(workspace)
    return Done("" if found else "No brain yet; `aios train` and `aios hrm-hf train-actv1` make them.", found)


@action()
def show(workspace: Path, brain: BrainName, /) -> Done:
    """Show a brain.

    Family, size, training, evaluation.
    """
    return Done(value=Brain.find(workspace, brain).describe())


@action()
def rename(workspace: Path, brain: BrainName, new: str, /) -> Done:
    """Rename a brain.

    Parameters
    ----------
    new
        Its new name.
    """
    found = Brain.of_workspace(workspace, brain).rename(new)
    return Done(f"Renamed to {found.path}", {"name": found.name, "path": str(found.path)})


@action()
def delete(workspace: Path, brain: BrainName, /, *, yes: bool = False, confirm: Confirm = refuse) -> Done:
    """Delete a brain with all its checkpoints.

    Parameters
    ----------
    yes
        Do not ask.
    """
    if not yes and not confirm(f"Delete {brain} and all its checkpoints?"):
        return Done("Kept.")
    found = Brain.of_workspace(workspace, brain)
    found.delete()
    return Done(f"Deleted {found.path}", {"name": found.name, "path": str(found.path)})


@action(heavy=True)
def export(workspace: Path, brain: BrainName, out: Path, /) -> Done:
    """Export a brain as a plain transformers checkpoint.

    Parameters
    ----------
    out
        New folder.
    """
    from aios.brains.loaded import load_brain

    model_type = load_brain(Brain.of_workspace(workspace, brain)).export(out)
    return Done(f"Wrote {out}, a {model_type} model of transformers.", {"path": str(out), "model_type": model_type})


@action(heavy=True)
def upcycle(
    workspace: Path,
    brain: BrainName,
    new: str,
    /,
    *,
    num_experts: int = HRMShape.num_experts,
    num_experts_per_tok: int = HRMShape.num_experts_per_tok,
    redraw: float = 0.0,
    seed: int = 0,
) -> Done:
    """Make a brain with experts from a dense one.

    The dense one (train-actv1 --no-moe) stays as it is.

    Parameters
    ----------
    new
        Name of the new brain.
    num_experts
        Experts per layer, each a copy of the dense layer.
    num_experts_per_tok
        Experts each token uses (top-k).
    redraw
        Share of the units drawn again in every expert but the first, so that experts differ from the start.
    seed
        Seed of the routers and of the units drawn again.
    """
    from aios.brains.upcycle import upcycle_brain

    made = upcycle_brain(
        Brain.of_workspace(workspace, brain), new, num_experts, num_experts_per_tok, redraw=redraw, seed=seed
    )
    sizes = f"{made['parameters']:,} parameters, {made['active_parameters']:,} active per token"
    return Done(f"Wrote {made['path']}: {sizes}.\n{made['origin']}", made)
