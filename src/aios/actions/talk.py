"""Actions that let a brain speak: generate and chat; and one answer, which the pages ask for too."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from aios.actions import Ask, Done, Flat, Note, Show, Write, action, ignore, refuse_to_ask, to_stderr
from aios.brains.brain import Brain
from aios.settings.goals import GoalFlags
from aios.settings.sampling import Sampling
from chronomoe.allocator import keep_freed_memory
from chronomoe.errors import ChronoMoEError

if TYPE_CHECKING:
    from aios.brains.loaded import LoadedBrain


@action(heavy=True)
def generate(
    workspace: Path,
    name: str | None = None,
    *,
    brain: str = "small",
    prompt: str = "",
    sampling: Annotated[Sampling, Flat] = Sampling(),  # noqa: B008 (frozen)
    goals: Annotated[GoalFlags, Flat] = GoalFlags(),  # noqa: B008 (frozen)
    stream: bool = True,
    write: Write = ignore,
    note: Note = to_stderr,
) -> Done:
    """Sample text from a trained brain.

    Parameters
    ----------
    name
        The same as --brain.
    brain
        Name of a brain, family/name, or the path of a bundle or checkpoint.
    prompt
        Text to continue; without one a document is begun.
    stream
        Print while sampling.
    """
    from aios.experts.use import record_use
    from chronomoe.hosts.capture import RoutingCounts, capture_routing

    prompt = prompt.encode("utf-8", "replace").decode()  # a shell may hand over bytes that are no text
    loaded = _load(workspace, name or brain, sampling)
    if goals.wanted:
        for line in _turn_on(loaded, goals):
            note(line)
    pieces = loaded.stream(prompt, **sampling.settings)
    text = prompt
    write(prompt)
    counts = RoutingCounts(loaded.model)
    with capture_routing(loaded.model, gate_callback=counts.add_gate):
        for piece in pieces if stream else ["".join(pieces)]:
            text += piece
            write(piece)
    record_use(loaded, counts)
    write("\n")
    return Done(value={"text": text})


@action(heavy=True)
def chat(
    workspace: Path,
    name: str | None = None,
    *,
    brain: str = "small",
    sampling: Annotated[Sampling, Flat] = Sampling(),  # noqa: B008 (frozen)
    experts: bool = False,
    goals: Annotated[GoalFlags, Flat] = GoalFlags(),  # noqa: B008 (frozen)
    ask: Ask = refuse_to_ask,
    write: Write = ignore,
    show: Show = print,
) -> Done:
    """Talk to a brain.

    It continues the text so far, yours included. An empty line ends, /new begins a new text. /goal 3 (or its text)
    turns a goal on, /goal off turns all of them off.

    Parameters
    ----------
    name
        The same as --brain.
    brain
        Name of a brain, family/name, or the path of a bundle or checkpoint.
    experts
        Show after each answer which experts its tokens used.
    """
    loaded = _load(workspace, name or brain, sampling)
    if goals.any:
        for line in _turn_on(loaded, goals):
            show(line)
    for line in loaded.answer_length(sampling.max_new_tokens)[1]:
        show(line)
    text, turn = "", 0
    while True:
        try:
            said = ask("> ")
        except EOFError:
            break
        if not said.strip():
            break
        if said.strip() == "/new":
            text = ""
        elif said.split()[0] == "/goal":
            for line in _change_goal(loaded, goals, said):
                show(line)
        else:
            seeded = dataclasses.replace(sampling, seed=sampling.seed + turn)
            done = answer(loaded, f"{text}{said}\n", seeded, write)
            write("\n")
            text, turn = done.text, turn + 1
            for line in [*(done.experts if experts else []), *done.segments]:
                show(f"  {line}")
    return Done()


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a brain said."""

    text: str
    """All of the text so far, the answer and a line end included."""
    tokens: int
    seconds: float
    stopped: bool
    """Was it cut short by the reader?"""
    cut: Sequence[str]
    """A line if the answer may be shorter than wanted."""
    experts: Sequence[str]
    """Lines on the experts its tokens used."""
    segments: Sequence[str]
    """A line on what it cost, of a brain that halts."""


def answer(
    loaded: "LoadedBrain",
    text: str,
    sampling: Sampling,
    write: Callable[[str], Any],
    stopped: Callable[[], bool] = lambda: False,
) -> Answer:
    """Continue ``text``, as much of its end as the brain has room for.

    ``write`` gets each piece as it is made; after each, ``stopped`` says whether no more is wanted.
    """
    from aios.brains.loaded import expert_lines
    from aios.experts.use import record_use
    from chronomoe.hosts.capture import count_routing

    length, cut = loaded.answer_length(sampling.max_new_tokens)
    sampling = dataclasses.replace(sampling, max_new_tokens=length)
    text = loaded.end_within(text, loaded.context_length - length - 1)
    loaded.segments_per_token()  # count from here on
    pieces = loaded.stream(text, **sampling.settings)
    began, tokens, cut_short = time.monotonic(), -1, False  # one piece a token, and what is left at the end
    with count_routing(loaded.model) as counts:
        for one in pieces:
            text, tokens = text + one, tokens + 1
            write(one)
            if stopped():
                tokens, cut_short = tokens + 1, True
                break
        pieces.close()
    seconds = time.monotonic() - began
    experts = [*expert_lines(counts), *record_use(loaded, counts)]
    return Answer(f"{text}\n", tokens, seconds, cut_short, cut, experts, loaded.segments_per_token())


def _load(root: Path, brain: str, sampling: Sampling) -> "LoadedBrain":
    from aios.brains.loaded import load_brain

    keep_freed_memory()
    loaded = load_brain(Brain.at(root, brain))
    loaded.set_halting(sampling.halt, sampling.segments)
    return loaded


def _turn_on(loaded: "LoadedBrain", goals: GoalFlags) -> list[str]:
    from aios.goals.use import describe_effect, turn_on_goals

    return describe_effect(turn_on_goals(loaded, goals))


def _change_goal(loaded: "LoadedBrain", goals: GoalFlags, said: str) -> list[str]:
    wanted = said.strip().removeprefix("/goal").strip()
    now = (wanted,) if wanted not in ("", "off") else ()
    goals = dataclasses.replace(goals, goal=now, goals_active=False, goals_remembered=False)
    try:
        lines = _turn_on(loaded, goals)
    except ChronoMoEError as error:
        return [str(error)]
    return lines if now else ["Goals: off"]
