"""What pages have done in threads and other processes: plain functions of plain values."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from aios.sentence import sentence
from aios.store.experts import ExpertEntry, Registry
from chronomoe.errors import ConfigError


def plan(words: list[str]) -> str:
    """What a command that trains says with --dry-run; :class:`ConfigError` with its sentence when it refuses."""
    done = subprocess.run(
        [sys.executable, "-m", "aios", *words, "--dry-run"], stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    if done.returncode:  # killed, it says nothing
        raise ConfigError(done.stderr.rpartition("aios: ")[2].strip() or sentence(MemoryError()))
    return done.stdout.strip()


def change_expert(root: Path, verb: str, *words: str) -> ExpertEntry:
    """freeze, unfreeze, activate, deactivate or rename an expert, in the registry and in its brains."""
    from aios.experts.attach import change

    registry = Registry(root)
    verbs: dict[str, Callable[..., ExpertEntry]] = {
        "freeze": registry.freeze,
        "unfreeze": registry.unfreeze,
        "activate": registry.activate,
        "deactivate": registry.deactivate,
        "rename": registry.rename,
    }
    return change(root, verbs[verb], *words)


def attach(root: Path, expert_id: str, brain: str, force: bool) -> str:
    """Attach an expert to a brain; returns its id."""
    from aios.experts.attach import attach as attach_expert

    return attach_expert(root, expert_id, brain, force=force).expert_id


def detach(root: Path, expert_id: str, brain: str) -> str:
    """Take an expert off a brain; returns its uid."""
    from aios.experts.attach import detach as detach_expert

    return detach_expert(root, expert_id, brain)
