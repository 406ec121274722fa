"""Tokenizers: byte-level BPE trained on the user's own text in seconds, or plain bytes.

Every byte is in the alphabet, so any text round-trips exactly and nothing is ever unknown.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING

from aios.data.plain_text import SEPARATOR
from aios.settings.data import VocabSize
from chronomoe.errors import ConfigError, DataError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

BYTES_VOCAB = 257
"""256 bytes and the separator."""
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)


def check_vocab_size(vocab_size: VocabSize) -> int:
    """The size as a number; :class:`ConfigError` when it has no room for every byte."""
    size = BYTES_VOCAB if vocab_size == "bytes" else vocab_size
    if size < BYTES_VOCAB:
        raise ConfigError(f"vocab_size must be at least {BYTES_VOCAB} (256 bytes and a separator), not {size}.")
    return size


def train_tokenizer(texts: Iterable[str], vocab_size: VocabSize, out_dir: Path) -> int:
    """Train and save a tokenizer; returns its size, smaller than asked when the text has too few merges."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    size = check_vocab_size(vocab_size)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[SEPARATOR],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts if size > BYTES_VOCAB else [], trainer)
    roles = dict.fromkeys(("eos_token", "bos_token", "pad_token", "unk_token"), SEPARATOR)
    saved = PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **roles)
    saved.save_pretrained(str(out_dir))
    return tokenizer.get_vocab_size()


def tokenizer_fingerprint(folder: Path) -> str:
    """Identity of what a tokenizer does: equal for equal tokenizers, however their file is laid out."""
    content = _tokenizer_json(folder)
    # Padding and truncation are the last caller's settings, saved along; they change no token.
    content.pop("padding", None)
    content.pop("truncation", None)
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return blake2b(canonical.encode(), digest_size=16).hexdigest()


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy the tokenizer files of a model folder, byte for byte."""
    _tokenizer_json(source)
    target.mkdir(parents=True, exist_ok=True)
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """A tokenizer opened for preparing data: text in, ids out, nothing added."""

    tokenizer: Tokenizer
    separator_id: int
    vocab_size: int

    @classmethod
    def open(cls, folder: Path) -> Encoder:
        """Load from a folder with a tokenizer.json and an eos_token, which becomes the separator."""
        from tokenizers import Tokenizer

        _tokenizer_json(folder)
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        tokenizer.no_padding()
        tokenizer.no_truncation()
        # A separator spelled out inside a document is text, not the end of it.
        tokenizer.encode_special_tokens = True
        separator = tokenizer.token_to_id(_eos_token(folder))
        if separator is None:
            raise DataError(f"The tokenizer in {folder} has no eos_token to separate documents; set one and save it.")
        return cls(tokenizer=tokenizer, separator_id=separator, vocab_size=max(tokenizer.get_vocab().values()) + 1)

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each text."""
        return [found.ids for found in self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)]


def _eos_token(folder: Path) -> str:
    path = folder / "tokenizer_config.json"
    token = json.loads(path.read_text(encoding="utf-8")).get("eos_token") if path.is_file() else None
    return (token["content"] if isinstance(token, dict) else token) or ""


def _tokenizer_json(folder: Path) -> dict[str, object]:
    path = folder / "tokenizer.json"
    try:
        content: dict[str, object] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{folder} holds no tokenizer.json; name a folder with a saved fast tokenizer.") from None
    except ValueError as error:
        raise DataError(f"{path} is damaged ({error}); save the tokenizer again.") from error
    return content
