"""aios goals explain and teach: what goals do in a brain."""

import dataclasses
import json as jsonlib
import sys
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from aios.cli.table import print_table
from aios.goals.flags import GoalFlags
from aios.goals.lesson import Lesson

Flat = Parameter(name="*")
Brain = Annotated[str, Parameter(help="The brain: its name, family/name or path.")]


def explain_command(
    *,
    brain: Brain,
    text: str,
    goals: Annotated[GoalFlags, Flat] = GoalFlags(),  # noqa: B008 (frozen)
    json: Annotated[bool, Parameter(help="Print JSON, for programs.")] = False,
    root: Path = Path(),
) -> None:
    """Show where the tokens of a text go with goals off and on: each layer's experts, and the gates of attached ones.

    Without --goal all active goals of the workspace are on.

    Parameters
    ----------
    text
        The text, or - to read it from standard input.
    root
        Workspace folder.
    """
    from aios.cli.quiet import quiet_libraries

    quiet_libraries()
    from aios.brains.bundle import find_brain, load_brain
    from aios.goals.use import explain, words

    if not goals.any:
        goals = dataclasses.replace(goals, goals_active=True)
    bundle = find_brain(root, brain)
    model, tokenizer = load_brain(bundle)
    words_read = sys.stdin.read() if text == "-" else text
    effect, found = explain(root, bundle, model, tokenizer, goals, words_read)
    if json:
        print(jsonlib.dumps(found, indent=2))
        return
    print("\n".join(words(effect)))
    print(f"On this text: output KL {found['text_kl']:.4f} nats a token")
    rows = [[f"expert {name}: gate open", f"{before:.1%}", f"{found['on']['open'][name]:.1%}"]
            for name, before in found["off"]["open"].items()]  # fmt: skip
    for layer, shares in enumerate(found["off"]["share"]):
        after = found["on"]["share"][layer]
        rows += [[f"layer {layer}, expert {number}", f"{before:.1%}", f"{now:.1%}"]
                 for number, (before, now) in enumerate(zip(shares, after, strict=True))]  # fmt: skip
    print_table([f"share of {found['tokens']} tokens", "goals off", "goals on"], rows)


def teach_command(
    *,
    brain: Brain,
    goal: tuple[str, ...],
    dataset_file: tuple[Path, ...],
    lesson: Annotated[Lesson, Flat] = Lesson(),  # noqa: B008 (frozen)
    json: Annotated[bool, Parameter(help="Print JSON, for programs.")] = False,
    root: Path = Path(),
) -> int:
    """Teach the routers of a brain what goals mean, each by a text; nothing else changes. --goals-learned uses it.

    Parameters
    ----------
    goal
        Number or text of a goal; may be given again.
    dataset_file
        Its text: a file, a folder, or prepared data; one for each goal, in their order.
    root
        Workspace folder.
    """
    from aios.cli.quiet import quiet_libraries

    quiet_libraries()
    from aios.goals.teach import teach

    show = (lambda line: print(line, file=sys.stderr)) if json else print
    found = teach(root, brain, goal, dataset_file, lesson, show)
    if json:
        print(jsonlib.dumps(found, indent=2))
    elif found["finished"]:
        rows = [[text, f"{bits['off']:.4f}", f"{bits['on']:.4f}", f"{bits['on'] / bits['off'] - 1:+.2%}"]
                for text, bits in found["bits_per_byte"].items()]  # fmt: skip
        print_table(["bits per byte on the text of", "goal off", "goal on", ""], rows)
    return 0 if found["finished"] else 130
