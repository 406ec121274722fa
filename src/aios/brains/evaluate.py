"""Measure a brain on held-out text: alone, with its attached experts, and with goals on."""

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

from aios.brains.bundle import data_of, find_brain, load_brain, model_folder
from aios.data.prepare import prepared_with
from aios.settings.goals import GoalFlags
from chronomoe.data.token_store import TokenStore
from chronomoe.data.windows import HeldoutWindows, heldout_windows
from chronomoe.errors import ConfigError
from chronomoe.training.evaluation import bits_per_byte

Show = Callable[[str], None]


def evaluate(
    root: Path,
    brain: str,
    goals: GoalFlags,
    *,
    text: Path | None = None,
    data: Path | None = None,
    seq_len: int,
    tokens: int,
    batch_size: int,
    show: Show = print,
) -> dict[str, dict[str, float]]:
    """Bits per byte of each domain: ``base``, and where it applies ``experts`` (attached) and ``goals`` (on).

    Raises :class:`ConfigError` for a brain, text or goal there is none of, :class:`DataError` for text without held-out
    documents.
    """
    if min(seq_len, tokens, batch_size) < 1:
        raise ConfigError("--seq-len, --tokens and --batch-size must be at least 1.")
    bundle = find_brain(root, brain)
    model, tokenizer = load_brain(bundle)
    windows = _windows(root, bundle, text, data, min(seq_len, model.config.max_position_embeddings), tokens)

    def measure() -> dict[str, float]:
        return {name: bits_per_byte(model, one, batch_size) for name, one in windows.items()}

    attached = list(getattr(model, "subbrains", {}).values())
    found: dict[str, dict[str, float]] = {}
    active = [expert.active for expert in attached]
    for expert in attached:
        expert.active = False
    found["base"] = measure()
    for expert, was in zip(attached, active, strict=True):
        expert.active = was
    if any(active):
        found["experts"] = measure()
    if goals.wanted:
        from aios.goals.use import turn_on_goals, words

        for line in words(turn_on_goals(root, bundle, model, tokenizer, goals)):
            show(line)
        found["goals"] = measure()
    return found


def _windows(
    root: Path, bundle: Path, text: Path | None, data: Path | None, length: int, tokens: int
) -> dict[str, HeldoutWindows]:
    if text is not None and data is not None:
        raise ConfigError("--text and --data both say what to evaluate on; give one of them.")
    tokenizer = model_folder(bundle)
    if text is not None:
        with TemporaryDirectory() as place:
            out = Path(place) / (text.stem or "text")
            return _held_out(prepared_with(tokenizer, text, out, lambda line: None, held_out=True), length, tokens)
    prepared = data or data_of(root, bundle)
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
