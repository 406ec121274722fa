"""What the process that runs brains does: answers, and what `aios goals explain` measures, on a loaded brain.

And every action that needs torch, as attaching an expert: the manager has no other process for that.
"""

import dataclasses
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from aios.actions import Action, Done
from aios.actions.quiet import quiet_libraries
from aios.actions.table import find
from aios.actions.talk import answer
from aios.brains.brain import Brain
from aios.brains.loaded import LoadedBrain, load_brain
from aios.goals.explain import explain, shares
from aios.goals.use import describe_effect, find_goals, turn_on_goals
from aios.settings.goals import GoalFlags
from aios.settings.sampling import Sampling
from chronomoe.allocator import keep_freed_memory
from chronomoe.data.token_store import TokenStore
from chronomoe.data.windows import heldout_windows
from chronomoe.errors import ConfigError
from chronomoe.goals.steer import GoalEffect, turn_off
from chronomoe.hosts.capture import count_routing

_WINDOWS, _LENGTH = 8, 128


class Tasks:
    """Holds one brain, and loads it again when its files have changed."""

    def __init__(self, root: Path, piece: Callable[[str], bool]) -> None:
        self.root, self.piece = root, piece
        self._loaded: LoadedBrain | None = None
        self._mark: Any = None
        self._measured: tuple[Any, GoalEffect] | None = None
        quiet_libraries()
        keep_freed_memory()

    def text(self, brain: str, *, domain: str, longest: int) -> str:
        """The first characters of the held-out text of a domain of the brain's data."""
        loaded = self._load(brain)
        store = _store(loaded)
        tokens = [] if store is None else store.domain(domain).heldout.tokens[:longest].tolist()
        return str(loaded.tokenizer.decode(tokens, skip_special_tokens=True))[:longest]

    def explain(self, brain: str, *, text: str, flags: GoalFlags) -> dict[str, Any]:
        """What `aios goals explain` prints, with its sentences as ``lines``."""
        loaded = self._load(brain, flags)
        # A slider asks for one strength after the other: what is the same for all of them is measured once.
        goals = find_goals(loaded.brain, loaded.tokenizer, flags)
        same = self._mark, goals, dataclasses.replace(flags, goal_strength=0.0)
        measured = self._measured[1] if self._measured and self._measured[0] == same else None
        effect, found = explain(loaded, flags, text, measured=measured)
        self._measured = same, effect
        return found | {"lines": describe_effect(effect)}

    def inspect(self, brain: str, *, text: str, flags: GoalFlags, segment: int | None = None) -> dict[str, Any]:
        """The same for each token; and shares of the held-out text of each domain, goals off."""
        loaded = self._load(brain, flags)
        effect, found = explain(loaded, flags, text, each_token=True, segment=segment)
        turn_off(loaded.model)
        store, config = _store(loaded), loaded.model.config
        length = min(_LENGTH, loaded.context_length)
        domains = {
            name: _shares(loaded, heldout_windows(store, name, length, _WINDOWS * length).input_ids[:_WINDOWS])
            for name in ([] if store is None else store.domains)
            if store is not None and len(store.domains[name].heldout)
        }
        layers = loaded.family.layer_names(config, len(found["off"]["share"]))
        more = {"lines": describe_effect(effect), "domains": domains, "layers": layers}
        return found | more | {"max_segments": loaded.family.segments(config), "room": loaded.context_length}

    def chat(self, brain: str, *, text: str, flags: GoalFlags, sampling: Sampling) -> dict[str, Any]:
        """Continue ``text`` as `aios chat` does: the :class:`~aios.actions.talk.Answer` as a dictionary.

        With ``lines``, what there is to say about it.
        """
        loaded = self._load(brain, flags)
        loaded.set_halting(sampling.halt, sampling.segments)
        lines = describe_effect(turn_on_goals(loaded, flags)) if flags.any else []
        wanted = True

        def write(piece: str) -> None:
            nonlocal wanted
            wanted = self.piece(piece)

        done = answer(loaded, text, sampling, write, lambda: not wanted)
        return vars(done) | {"lines": [*lines, *done.cut, *done.experts, *done.segments]}

    def run(self, command: str, arguments: dict[str, Any]) -> Done:
        """Call the action of a command."""
        action: Action[...] = find(command)
        return action.run(self.root, arguments)

    def _load(self, brain: str, flags: GoalFlags | None = None) -> LoadedBrain:
        """This brain as it is on disk now, no goal on."""
        found = Brain.of_workspace(self.root, brain)
        if flags is not None and flags.any and found.data != found.own_data:
            raise ConfigError(
                "goals are measured on the data of the brain, and this page reads nothing outside the workspace: "
                f"{found.data}; use `aios goals explain` instead."
            )
        files = [file for kind in ("*.json", "*.safetensors", "experts/*") for file in sorted(found.weights.glob(kind))]
        mark = [(file, (state := file.stat()).st_ino, state.st_mtime_ns, state.st_size) for file in files]
        if self._loaded is None or mark != self._mark:
            self._loaded = self._mark = self._measured = None  # never two at once
            gc.collect()
            self._loaded, self._mark = load_brain(found), mark
        self._loaded.set_halting()
        turn_off(self._loaded.model)
        return self._loaded


@torch.no_grad()
def _shares(loaded: LoadedBrain, windows: torch.Tensor) -> dict[str, Any]:
    with count_routing(loaded.model) as counts:
        loaded.model(input_ids=windows, use_cache=False)
    return shares(counts)


def _store(loaded: LoadedBrain) -> TokenStore | None:
    place = loaded.brain.own_data
    return None if place is None else TokenStore.open(place)
