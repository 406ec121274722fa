"""Prepared data on the way to something else, and the commands that make it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from aios.data.prepare import prepare
from aios.data.sources import FlagNeededError, Source, prepare_command
from aios.data.tokenizers import tokenizer_fingerprint
from aios.settings.data import PrepareConfig
from chronomoe.data.token_store import TokenStore
from chronomoe.errors import ConfigError


def again_command(store: TokenStore, tokenizer: Path) -> str:
    """The `aios data prepare` that makes prepared data again with another tokenizer."""
    sources = [(one.name, path) for one in store.info.domains for path in one.sources]
    return prepare_command(sources, tokenizer, store.path)


def prepared_with(
    tokenizer: Path, text: Path, out: Path, show: Callable[[str], None], *, held_out: bool = False
) -> TokenStore:
    """Text prepared with the tokenizer in a folder: ``text`` itself if it is prepared data, else made in ``out``.

    ``held_out`` keeps all of it from training. Raises :class:`ConfigError` for data of another tokenizer.
    """
    if (text / "data.json").is_file():
        found = TokenStore.open(text)
    else:
        config = PrepareConfig(tokenizer=tokenizer, heldout_fraction=0.1)
        source = Source(name=out.name, path=str(text), held_out=held_out)
        with flags_explained(text, tokenizer):
            warnings = prepare([source], out, config, report=lambda _: None).warnings
        for warning in warnings:
            show(f"Note: {warning}")
        found = TokenStore.open(out)
    if found.info.tokenizer_fingerprint != tokenizer_fingerprint(tokenizer):
        raise ConfigError(
            f"{text} was prepared with another tokenizer than the brain's; prepare it with that one: "
            f"`{again_command(found, tokenizer)}`."
        )
    return found


@contextmanager
def flags_explained(text: Path, tokenizer: Path) -> Iterator[None]:
    """Where text is prepared on the way to something else: an error that names a flag says which command has it."""
    try:
        yield
    except FlagNeededError as error:
        command = prepare_command([("text", str(text))], tokenizer, "PREPARED")
        raise FlagNeededError(error.problem, f"{error.advice}: `{command} ...`, then name PREPARED instead") from error
