"""Interleaved measurement: arms take turns (A B C C B A ...), so that what disturbs the machine disturbs them alike.

A round gives the median seconds of each arm over its repeats (the mean, where few repeats take longer by design),
hence one ratio per peer; the result is the median of those ratios over the rounds. Nothing to run here: see run.py.
"""

import gc
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from statistics import fmean, median

from benchmarks.arms import DENSE, OURS, Arm

Clocks = dict[str, Callable[[], float]]
"""Arm -> a function that does its work once and returns the seconds it took."""

WARM_UPS = 3


@dataclass(frozen=True)
class Comparison:
    """Ours against some peers at one job."""

    name: str
    open: Callable[[], AbstractContextManager[Clocks]]
    """Build the arms, ``ours`` among them; leaving the context ends what they started."""
    repeats: int
    rounds: int = 3
    goals: dict[str, float] = field(default_factory=dict)
    """Peer -> bound: of ours / peer from above for a dense peer, of peer / ours from below for others."""
    rare: bool = False
    """Some repeats take longer by design: the mean of a round counts, not its median."""


@dataclass(frozen=True)
class Row:
    """One figure of the report."""

    comparison: str
    figure: str
    """Which ratio of times: ``ours / dense`` (lower is better) or ``<peer> / ours`` (higher is better)."""
    ratio: float
    ratios: list[float]
    """One per round; ``ratio`` is their median."""
    goal: str
    met: bool | None
    ours_ms: float
    peer_ms: float
    repeats: int
    time_of_day: str


def seconds_of(arm: Arm) -> float:
    """The seconds that one call of ``arm`` takes."""
    start = time.perf_counter()
    arm()
    return time.perf_counter() - start


def in_process(build: Callable[[], dict[str, Arm]]) -> Callable[[], AbstractContextManager[Clocks]]:
    """Arms that run in this process, as :attr:`Comparison.open` wants them."""
    return lambda: nullcontext({name: partial(seconds_of, arm) for name, arm in build().items()})


def measure(comparison: Comparison, rounds: int | None = None, repeats: int | None = None) -> list[Row]:
    """Make one row per peer. Each round builds the arms anew and warms them up (which compiles what is compiled).

    Where an arm's tensors happen to lie in memory can cost it a few parts in a hundred, the same in all its turns.
    """
    repeats = repeats or comparison.repeats
    medians = []
    for _ in range(rounds or comparison.rounds):
        with comparison.open() as clocks:
            for clock in clocks.values():
                for _ in range(WARM_UPS):
                    clock()
            medians.append(_round(clocks, repeats, fmean if comparison.rare else median))
    return [_row(comparison, peer, medians, repeats) for peer in medians[0] if peer != OURS]


def _round(clocks: Clocks, repeats: int, typical: Callable[[list[float]], float]) -> dict[str, float]:
    seconds: dict[str, list[float]] = {name: [] for name in clocks}
    gc.collect()
    for turn in range(repeats):
        for name in list(clocks)[:: -1 if turn % 2 else 1]:
            seconds[name].append(clocks[name]())
    return {name: typical(values) for name, values in seconds.items()}


def _row(comparison: Comparison, peer: str, medians: list[dict[str, float]], repeats: int) -> Row:
    dense, bound = peer.startswith(DENSE), comparison.goals.get(peer)
    ratios = [one[OURS] / one[peer] if dense else one[peer] / one[OURS] for one in medians]
    figure = f"ours / {peer}" if dense else f"{peer} / ours"
    ratio, goal, met = median(ratios), "", None
    if bound is not None:
        goal, met = (f"at most {bound:.2f}", ratio <= bound) if dense else (f"at least {bound:.2f}", ratio >= bound)
    ours_ms, peer_ms = (1000 * median(one[name] for one in medians) for name in (OURS, peer))
    now = datetime.now().strftime("%H:%M")
    return Row(comparison.name, figure, ratio, ratios, goal, met, ours_ms, peer_ms, repeats, now)
