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
from aios.brains.bundle import data_of, load_brain, model_folder, own_data
from aios.brains.generate import set_halting
from aios.brains.shelf import existing_brain
from aios.goals.use import asked_goals, explain, shares, turn_on_goals, words
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
    """Holds one brain, and reads it again when its files have changed."""

    def __init__(self, root: Path, piece: Callable[[str], bool]) -> None:
        self.root, self.piece = root, piece
        self.model: Any = None
        self.tokenizer: Any = None
        self._mark: Any = None
        self._halting: dict[str, Any] = {}
        self._measured: tuple[Any, GoalEffect] | None = None
        quiet_libraries()
        keep_freed_memory()

    def text(self, brain: str, *, domain: str, longest: int) -> str:
        """The first characters of the held-out text of a domain of the brain's data."""
        bundle = self._load(brain)
        store = self._store(bundle)
        tokens = [] if store is None else store.domain(domain).heldout.tokens[:longest].tolist()
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True))[:longest]

    def explain(self, brain: str, *, text: str, flags: GoalFlags) -> dict[str, Any]:
        """What `aios goals explain` prints, with its sentences as ``lines``."""
        bundle = self._load(brain, flags)
        # A slider asks for one strength after the other: what is the same for all of them is measured once.
        goals = asked_goals(self.root, bundle, self.tokenizer, flags)
        same = self._mark, goals, dataclasses.replace(flags, goal_strength=0.0)
        measured = self._measured[1] if self._measured and self._measured[0] == same else None
        effect, found = explain(self.root, bundle, self.model, self.tokenizer, flags, text, measured=measured)
        self._measured = same, effect
        return found | {"lines": words(effect)}

    def inspect(self, brain: str, *, text: str, flags: GoalFlags, segment: int | None = None) -> dict[str, Any]:
        """The same for each token; and shares of the held-out text of each domain, goals off."""
        bundle = self._load(brain, flags)
        effect, found = explain(
            self.root, bundle, self.model, self.tokenizer, flags, text, each_token=True, segment=segment
        )
        turn_off(self.model)
        store, config = self._store(bundle), self.model.config
        length = min(_LENGTH, config.max_position_embeddings)
        domains = {
            name: self._shares(heldout_windows(store, name, length, _WINDOWS * length).input_ids[:_WINDOWS])
            for name in ([] if store is None else store.domains)
            if store is not None and len(store.domains[name].heldout)
        }
        layers = [str(layer) for layer in range(len(found["off"]["share"]))]
        if config.model_type == "hrm_actv1":
            layers = [f"{layer} ({'low' if int(layer) < config.l_layers else 'high'})" for layer in layers]
        segments = config.halt_max_steps if config.model_type == "hrm_actv1" else 1
        more = {"lines": words(effect), "domains": domains, "layers": layers, "max_segments": segments}
        return found | more | {"room": config.max_position_embeddings}

    @torch.no_grad()
    def _shares(self, windows: torch.Tensor) -> dict[str, Any]:
        with count_routing(self.model) as counts:
            self.model(input_ids=windows, use_cache=False)
        return shares(counts)

    def chat(self, brain: str, *, text: str, flags: GoalFlags, sampling: Sampling) -> dict[str, Any]:
        """Continue ``text`` as `aios chat` does: the :class:`~aios.actions.talk.Answer` as a dictionary.

        With ``lines``, what there is to say about it.
        """
        bundle = self._load(brain, flags)
        set_halting(self.model, sampling.halt, sampling.segments)
        lines = words(turn_on_goals(self.root, bundle, self.model, self.tokenizer, flags)) if flags.any else []
        wanted = True

        def write(piece: str) -> None:
            nonlocal wanted
            wanted = self.piece(piece)

        done = answer(self.root, self.model, self.tokenizer, text, sampling, write, lambda: not wanted)
        return vars(done) | {"lines": [*lines, *done.cut, *done.experts, *done.segments]}

    def run(self, command: str, arguments: dict[str, Any]) -> Done:
        """Call the action of a command."""
        action: Action[...] = find(command)
        return action.run(self.root, arguments)

    def _load(self, brain: str, flags: GoalFlags | None = None) -> Path:
        """Have this brain, as it is on disk now, with no goal on yet."""
        bundle = existing_brain(self.root, brain)
        if flags is not None and flags.any and data_of(self.root, bundle) != own_data(self.root, bundle):
            raise ConfigError(
                "goals are measured on the data of the brain, and this page reads nothing outside the workspace: "
                f"{data_of(self.root, bundle)}; use `aios goals explain` instead."
            )
        folder = model_folder(bundle)
        files = [file for kind in ("*.json", "*.safetensors", "experts/*") for file in sorted(folder.glob(kind))]
        mark = [(file, (state := file.stat()).st_ino, state.st_mtime_ns, state.st_size) for file in files]
        if mark != self._mark:
            self.model = self.tokenizer = self._mark = self._measured = None  # never two at once
            gc.collect()
            self.model, self.tokenizer = load_brain(bundle)
            self._mark = mark
            config = self.model.config
            self._halting = {name: getattr(config, name) for name in ("halting", "halt_cap") if hasattr(config, name)}
        for name, value in self._halting.items():
            setattr(self.model.config, name, value)
        turn_off(self.model)
        return bundle

    def _store(self, bundle: Path) -> TokenStore | None:
        place = own_data(self.root, bundle)
        return None if place is None else TokenStore.open(place)
