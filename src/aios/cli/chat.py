"""aios chat."""

import dataclasses
import sys
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from aios.brains.sampling import Sampling
from aios.goals.flags import GoalFlags


def chat(
    name: str | None = None,
    *,
    brain: str = "small",
    sampling: Annotated[Sampling, Parameter(name="*")] = Sampling(),  # noqa: B008 (frozen)
    experts: bool = False,
    goals: Annotated[GoalFlags, Parameter(name="*")] = GoalFlags(),  # noqa: B008 (frozen)
    root: Path = Path(),
) -> None:
    """Talk to a brain: it continues the text so far, yours included. An empty line ends, /new begins a new text.

    /goal 3 (or its text) turns a goal on in the middle of a talk, /goal off all of them off.

    Parameters
    ----------
    name
        The same as --brain.
    brain
        Name of a brain, family/name, or the path of a bundle or checkpoint.
    experts
        Show after each answer which experts its tokens used.
    root
        Workspace folder.
    """
    from aios.cli.quiet import quiet_libraries

    quiet_libraries()
    from aios.brains.bundle import find_brain, load_brain
    from aios.brains.generate import answer_length, end_within, expert_lines, set_halting, stream_text, thought
    from aios.experts.attach import note_use
    from aios.goals.use import turn_on_goals, words
    from chronomoe.allocator import keep_freed_memory
    from chronomoe.errors import ChronoMoEError
    from chronomoe.hosts.capture import count_routing

    keep_freed_memory()
    bundle = find_brain(root, name or brain)
    model, tokenizer = load_brain(bundle)
    set_halting(model, sampling.halt, sampling.segments)
    if goals.any:
        print("\n".join(words(turn_on_goals(root, bundle, model, tokenizer, goals))))
    max_new_tokens, told = answer_length(model, sampling.max_new_tokens)
    for line in told:
        print(line)
    text, turn = "", 0
    while True:
        try:
            said = input("> ")
        except EOFError:
            break
        if not said.strip():
            break
        if said.strip() == "/new":
            text = ""
            continue
        if said.split()[0] == "/goal":
            wanted = said.strip().removeprefix("/goal").strip()
            now = (wanted,) if wanted not in ("", "off") else ()
            changed = dataclasses.replace(goals, goal=now, goals_active=False, goals_remembered=False)
            try:
                effect = turn_on_goals(root, bundle, model, tokenizer, changed)
                print("\n".join(words(effect)) if now else "Goals: off")
            except ChronoMoEError as error:
                print(error)
            continue
        text = f"{text}{said}\n"
        text = end_within(tokenizer, text, model.config.max_position_embeddings - max_new_tokens - 1)
        with count_routing(model) as counts:
            settings = {"max_new_tokens": max_new_tokens, "seed": sampling.seed + turn}
            for piece in stream_text(model, tokenizer, text, **sampling.settings | settings):
                text += piece
                sys.stdout.write(piece)
                sys.stdout.flush()
        sys.stdout.write("\n")
        text += "\n"
        turn += 1
        used = [*expert_lines(counts), *note_use(root, model, counts)]
        for line in [*(used if experts else []), *thought(model)]:
            print(f"  {line}")
