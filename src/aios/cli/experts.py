"""aios experts: what there is, and everything that is done to one."""

import json as jsonlib
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from aios.cli.table import print_table
from aios.experts.settings import ExpertTraining
from aios.store.experts import ExpertEntry, Registry
from aios.workspace import Workspace
from chronomoe.errors import ConfigError

Expert = Annotated[str, Parameter(help="Id of the expert.")]
Brain = Annotated[str, Parameter(help="The brain: its name, family/name or path.")]
Json = Annotated[bool, Parameter(help="Print JSON, for programs.")]
Root = Annotated[Path, Parameter(help="Workspace folder.")]


def list_command(*, json: Json = False, root: Root = Path()) -> None:
    """List the experts of the workspace."""
    experts = Registry(root).entries()
    if json:
        _print([one.to_json() for one in experts])
        return
    if not experts:
        print("No expert yet; `aios experts create` enters one.")
        return
    rows = []
    for one in experts:
        used = [str(one.total_activations), f"{one.avg_routing_weight:.3f}"] if one.total_activations else ["", ""]
        goals = str(len(one.goals)) if one.goals else ""
        kin = [one.parent_expert_id or "", ", ".join(one.attached_to)]
        rows.append([one.expert_id, one.category, _state(one), *used, goals, *kin])
    print_table(["expert", "category", "state", "activations", "weight", "goals", "parent", "attached to"], rows)


def show_command(expert: Expert, /, *, json: Json = False, root: Root = Path()) -> None:
    """Show all that is known of one expert."""
    found = Registry(root).get(expert).to_json()
    if json:
        _print(found)
        return
    width = max(map(len, found))
    for name, value in found.items():
        print(f"{name:<{width}}  {_words(value)}".rstrip())


def create_command(
    expert: Expert,
    /,
    *,
    name: str = "",
    description: str = "",
    category: str = "",
    goal: list[str] | None = None,
    parent: str | None = None,
    json: Json = False,
    root: Root = Path(),
) -> None:
    """Enter an expert that is to be trained later. Its id has up to 64 letters, digits, - and _.

    Parameters
    ----------
    name
        A name for people.
    description
        What it is for.
    category
        A word to sort it by; "general" when not given.
    goal
        Text of a goal; may be given again.
    parent
        Id of the expert it belongs below.
    """
    entry = Registry(root).create(
        expert, name=name, description=description, category=category, goals=goal or (), parent=parent
    )
    _tell(entry, f"Entered {expert}; it has no weights yet.", json)


def train_command(
    expert: Expert,
    /,
    *,
    settings: Annotated[ExpertTraining, Parameter(name="*")] = ExpertTraining(),  # noqa: B008 (frozen)
    json: Json = False,
    root: Root = Path(),
) -> int:
    """Train an expert alone in a brain that stays as it is, and enter it in the registry.

    Ctrl-C ends it; an earlier version of the expert stays until the new one is complete.
    """
    from aios.cli.quiet import quiet_libraries
    from aios.experts.train import train_expert

    quiet_libraries()
    results = train_expert(root, expert, settings, show=(lambda line: print(line, file=sys.stderr)) if json else print)
    if "entry" not in results:
        return 130 if results["interrupted"] else 0
    workspace, entry = Workspace(root), results["entry"]
    after = workspace.command("experts", "attach", expert, "--brain", settings.brain or "BRAIN")
    if entry.attached_to:  # a brain keeps the version it was given
        brain = entry.attached_to[0]
        steps = [workspace.command("experts", word, expert, "--brain", brain) for word in ("detach", "attach")]
        after = " && ".join(steps)
    _tell(entry, f"Next: {after}", json)
    return 0


def attach_command(
    expert: Expert, /, *, brain: Brain, force: bool = False, json: Json = False, root: Root = Path()
) -> None:
    """Attach an expert to a brain, behind its domain gate. The brain's own files stay as they are.

    Parameters
    ----------
    force
        Even if it was trained in another base, when its shapes fit; this is recorded.
    """
    from aios.cli.quiet import quiet_libraries
    from aios.experts.attach import attach

    quiet_libraries()
    _tell(attach(root, expert, brain, force=force), f"Attached {expert} to {brain}.", json)


def detach_command(expert: Expert, /, *, brain: Brain, json: Json = False, root: Root = Path()) -> None:
    """Take an expert off a brain, which is then what it was before, byte for byte."""
    from aios.experts.attach import detach

    uid = detach(root, expert, brain)
    if json:
        _print({"expert_uid": uid, "brain": brain})
    else:
        print(f"Detached {expert} from {brain}.")


def gate_command(expert: Expert, /, *, brain: Brain, text: str, json: Json = False, root: Root = Path()) -> None:
    """Show what the gate of an attached expert makes of a text: running log-odds, and where it opens.

    Parameters
    ----------
    text
        The text, or - to read it from standard input.
    """
    from aios.cli.quiet import quiet_libraries
    from aios.experts.attach import gate_along

    quiet_libraries()
    found = gate_along(root, expert, brain, sys.stdin.read() if text == "-" else text)
    if json:
        _print(found)
        return
    rows = [
        [repr(token), f"{odds:+.2f}", "open" if is_open else ""]
        for token, odds, is_open in zip(found["tokens"], found["log_odds"], found["open"], strict=True)
    ]
    print_table(["token", f"log-odds (opens above {found['threshold']:.2f})", ""], rows)


def export_command(expert: Expert, out: Path, /, *, root: Root = Path()) -> None:
    """Copy the file of an expert, to be imported elsewhere.

    Parameters
    ----------
    out
        New file, or a folder.
    """
    from aios.experts.attach import export

    print(f"Wrote {export(root, expert, out)}")


def import_command(
    file: Path, /, *, expert_id: Annotated[str | None, Parameter(name="--id")] = None, json: Json = False,
    root: Root = Path(),
) -> None:  # fmt: skip
    """Enter an expert file from elsewhere; damaged and foreign ones are refused.

    Parameters
    ----------
    file
        An expert.safetensors.
    expert_id
        Another id than its own.
    """
    from aios.experts.attach import bring_in

    entry = bring_in(root, file, expert_id)
    _tell(entry, f"Entered {entry.expert_id}.", json)


def freeze_command(expert: Expert, /, *, json: Json = False, root: Root = Path()) -> None:
    """Keep the weights of an expert from training."""
    _tell(_changed(root, Registry(root).freeze, expert), f"Froze {expert}.", json)


def unfreeze_command(expert: Expert, /, *, json: Json = False, root: Root = Path()) -> None:
    """Let an expert be trained."""
    _tell(_changed(root, Registry(root).unfreeze, expert), f"{expert} may be trained.", json)


def activate_command(expert: Expert, /, *, json: Json = False, root: Root = Path()) -> None:
    """Let tokens be routed to an expert."""
    _tell(_changed(root, Registry(root).activate, expert), f"{expert} is active.", json)


def deactivate_command(expert: Expert, /, *, json: Json = False, root: Root = Path()) -> None:
    """Keep tokens from an expert."""
    _tell(_changed(root, Registry(root).deactivate, expert), f"{expert} is inactive.", json)


def _changed(root: Path, action: Any, *arguments: Any) -> ExpertEntry:
    from aios.experts.attach import change

    return change(root, action, *arguments)


def set_parent_command(expert: Expert, parent: str, /, *, json: Json = False, root: Root = Path()) -> None:
    """Put an expert below another.

    Parameters
    ----------
    parent
        Id of the other.
    """
    _tell(Registry(root).set_parent(expert, parent), f"{expert} is below {parent}.", json)


def clear_parent_command(expert: Expert, /, *, json: Json = False, root: Root = Path()) -> None:
    """Take an expert from below its parent."""
    _tell(Registry(root).clear_parent(expert), f"{expert} has no parent.", json)


def rename_command(expert: Expert, new: str, /, *, json: Json = False, root: Root = Path()) -> None:
    """Give an expert another id.

    Parameters
    ----------
    new
        Its new id.
    """
    _tell(_changed(root, Registry(root).rename, expert, new), f"Renamed to {new}.", json)


def delete_command(
    expert: Expert,
    /,
    *,
    children: Literal["refuse", "orphan", "cascade"] = "refuse",
    force: bool = False,
    yes: bool = False,
    json: Json = False,
    root: Root = Path(),
) -> None:
    """Delete an expert with its weights.

    Parameters
    ----------
    children
        What becomes of experts below it: a reason to refuse, left without a parent, or deleted too.
    force
        Even when it is attached to a brain.
    yes
        Do not ask.
    """
    if not yes:
        if not sys.stdin.isatty():
            raise ConfigError("deleting cannot be undone; add --yes to mean it.")
        below = " and all below it" if children == "cascade" else ""
        if input(f"Delete {expert}{below} with its weights? [y/N] ").strip().lower() not in ("y", "yes"):
            print("Kept.")
            return
    gone = Registry(root).delete(expert, children, force=force)
    if json:
        _print([one.to_json() for one in gone])
    else:
        print(f"Deleted {', '.join(one.expert_id for one in gone)}.")


def stats_command(*, json: Json = False, root: Root = Path()) -> None:
    """Count the experts, and say who is used how much."""
    stats = Registry(root).stats()
    if json:
        _print(stats)
        return
    used = [one for one in stats.pop("usage") if one["total_activations"]]
    print(_words({name.replace("_", " "): value for name, value in stats.items()}))
    if used:
        rows = [
            [one["expert_id"], str(one["total_activations"]), f"{one['share']:.1%}", f"{one['avg_routing_weight']:.3f}"]
            for one in used
        ]
        print_table(["expert", "activations", "share", "weight"], rows)


def _state(entry: ExpertEntry) -> str:
    marks = ["active" if entry.is_active else "inactive"]
    marks += ["frozen"] * entry.is_frozen
    marks += [] if entry.version else ["no weights"]
    return ", ".join(marks)


def _tell(entry: ExpertEntry, sentence: str, json: bool) -> None:
    if json:
        _print(entry.to_json())
    else:
        print(sentence)


def _print(value: Any) -> None:
    print(jsonlib.dumps(value, indent=2))


def _words(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {entry}" for name, entry in value.items() if entry is not None)
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return "" if value is None else str(value)
