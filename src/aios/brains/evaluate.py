"""Measure a brain on held-out text: alone, with its attached experts, and with goals on."""

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

from aios.brains.brain import Brain
from aios.brains.loaded import LoadedBrain, load_brain
from aios.data.prepared import prepared_with
from chronomoe.data.token_store import TokenStore
from chronomoe.data.windows import HeldoutWindows, heldout_windows
from chronomoe.errors import ConfigError
from chronomoe.training.evaluation import bits_per_byte


def evaluate(
    brain: Brain,
    turn_goals_on: Callable[[LoadedBrain], None] | None = None,
    *,
    text: Path | None = None,
    data: Path | None = None,
    seq_len: int,
    tokens: int,
    batch_size: int,
) -> dict[str, dict[str, float]]:
    """Bits per byte of each domain: ``base``, and where it applies ``experts`` (attached) and ``goals`` (turned on).

    Raises :class:`ConfigError` for text that does not exist, :class:`DataError` for text without held-out documents.
    """
    if min(seq_len, tokens, batch_size) < 1:
        raise ConfigError("--seq-len, --tokens and --batch-size must be at least 1.")
    loaded = load_brain(brain)
    windows = _windows(brain, text, data, min(seq_len, loaded.context_length), tokens)

    def measure() -> dict[str, float]:
        return {name: bits_per_byte(loaded.model, one, batch_size) for name, one in windows.items()}

    found: dict[str, dict[str, float]] = {}
    was_active = [expert.active for expert in loaded.attached]
    for expert in loaded.attached:
        expert.active = False
    found["base"] = measure()
    for expert, was in zip(loaded.attached, was_active, strict=True):
        expert.active = was
    if any(was_active):
        found["experts"] = measure()
    if turn_goals_on is not None:
        turn_goals_on(loaded)
        found["goals"] = measure()
    return found


def _windows(brain: Brain, text: Path | None, data: Path | None, length: int, tokens: int) -> dict[str, HeldoutWindows]:
    if text is not None and data is not None:
        raise ConfigError("--text and --data both say what to evaluate on; give one of them.")
    tokenizer = brain.weights
    if text is not None:
        with TemporaryDirectory() as place:
            out = Path(place) / (text.stem or "text")
            return _held_out(prepared_with(tokenizer, text, out, lambda line: None, held_out=True), length, tokens)
    prepared = data or brain.data
    if prepared is None:
        raise ConfigError("the data this brain was trained on is gone; name text with --text, or prepared data --data.")
    return _held_out(prepared_with(tokenizer, prepared, prepared, lambda line: None), length, tokens)


def _held_out(store: TokenStore, length: int, tokens: int) -> dict[str, HeldoutWindows]:
    found = {
        one.name: heldout_windows(store, one.name, length, tokens)
        for one in store.info.domains
        if one.heldout.documents
    }
    if not found:
        raise ConfigError("there is no held-out text to evaluate on; name some with --text.")
    return found
