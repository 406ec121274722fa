"""Tokenizers: byte-level BPE trained on the user's own text in seconds, or plain bytes.

Every byte is in the alphabet, so any text round-trips exactly and nothing is ever unknown.
"""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
_SLOW_FILES = ("tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "sentencepiece.bpe.model")
_ENDS = ("<|endoftext|>", "</s>", "<eos>", "<|end_of_text|>", "[SEP]")
"""What tokenizers commonly call the token that ends a text."""


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
    """Copy the tokenizer files of a model folder, byte for byte; those of another tokenizer make way."""
    _tokenizer_json(source)
    target.mkdir(parents=True, exist_ok=True)
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
        else:
            (target / name).unlink(missing_ok=True)


def find_tokenizer(path: Path) -> Path:
    """The folder of a tokenizer: ``path``, or that of its tokenizer.json, or the one within prepared data."""
    if path.name == "tokenizer.json" and path.is_file():
        return path.parent
    inner = path / "tokenizer"
    return inner if not (path / "tokenizer.json").is_file() and (inner / "tokenizer.json").is_file() else path


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

        content = _tokenizer_json(folder)
        try:
            tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        except Exception as error:  # the library raises nothing narrower
            raise DataError(f"{folder}/tokenizer.json is no tokenizer ({error}); save the tokenizer again.") from error
        tokenizer.no_padding()
        tokenizer.no_truncation()
        # A separator spelled out inside a document is text, not the end of it.
        tokenizer.encode_special_tokens = True
        name = _eos_token(folder)
        separator = tokenizer.token_to_id(name)
        if separator is None:
            raise _no_separator(folder, name, content)
        return cls(tokenizer=tokenizer, separator_id=separator, vocab_size=max(tokenizer.get_vocab().values()) + 1)

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each text."""
        return [found.ids for found in self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)]


def _eos_token(folder: Path) -> str:
    """The token that ends a text; its name may be text, or a description with a ``content``."""
    for file in (folder / "tokenizer_config.json", folder / "special_tokens_map.json"):
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            continue
        except ValueError as error:
            raise DataError(f"{file} is damaged ({error}); save the tokenizer again.") from error
        token = content.get("eos_token") if isinstance(content, dict) else None
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str) and token:
            return token
    return ""


def _no_separator(folder: Path, name: str, content: dict[str, Any]) -> DataError:
    missing = f"names the eos_token {name!r}, which it does not have" if name else "has no eos_token"
    added = content.get("added_tokens")
    special = [one["content"] for one in added or () if one.get("special")] if isinstance(added, list) else []
    if special:
        chosen = max(special, key=lambda token: (token in _ENDS, -special.index(token)))
        remedy = f'add "eos_token": {json.dumps(chosen)} to {folder / "tokenizer_config.json"}'
        others = [token for token in special if token != chosen][:9]
        remedy += f" (or another special token: {', '.join(others)})" if others else ""
    else:
        remedy = "it has no special token at all, so train one with `aios data tokenizer`"
    return DataError(f"The tokenizer in {folder} {missing}, which separates documents; {remedy}.")


def _tokenizer_json(folder: Path) -> dict[str, Any]:
    path = folder / "tokenizer.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("it is no object with named values")
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(f"{folder} holds no tokenizer.json; {_how_to_make_one(folder)}.") from None
    except ValueError as error:
        raise DataError(f"{path} is damaged ({error}); save the tokenizer again.") from error
    return content


def _how_to_make_one(folder: Path) -> str:
    if any((folder / name).is_file() for name in _SLOW_FILES):
        code = f"from transformers import AutoTokenizer as A; A.from_pretrained({str(folder)!r}).save_pretrained"
        return f"make it from the other files there: python -c {shlex.quote(f'{code}({str(folder)!r})')}"
    return "name a folder with a saved fast tokenizer, or train one with `aios data tokenizer`"
