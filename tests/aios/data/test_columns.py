import sys
import tracemalloc
from pathlib import Path

import pytest

from aios.data import unpacking
from aios.data.columns import parquet_documents
from aios.data.sources import Tally
from chronomoe.errors import DataError

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")


def write(path, **columns):
    parquet.write_table(pyarrow.table(columns), path)
    return path


def test_parquet(tmp_path, read):
    path = write(tmp_path / "a.parquet", id=[1, 2, 3], text=["one", None, "three"])
    assert read(path) == ["one", "three"]
    write(path, id=[1], story=["x"], doc=[{"body": "inner", "n": 1}], raw=[b"caf\xc3\xa9"])
    assert read(path, field="doc.body") == ["inner"]
    assert read(path, field="raw") == ["café"]
    assert read(path, field="story+doc.body") == ["xinner"]
    listed = r"a\.parquet has {}; choose one of 'story', 'doc\.body', 'raw' with --field"
    with pytest.raises(DataError, match=listed.format("no obvious text field")):
        read(path)
    for field, missing in (("id", "no text in the field 'id'"), ("other", "no field 'other'")):
        with pytest.raises(DataError, match=listed.format(missing)):
            read(path, field=field)
    write(path, **{"a.b": ["dotted"]})
    assert read(path, field="a.b") == ["dotted"]
    write(path, text=pyarrow.array(["x", "y", "x"]).dictionary_encode())
    assert read(path) == ["x", "y", "x"]


def test_conversations_in_parquet(tmp_path, read):
    path = write(tmp_path / "a.parquet", messages=[[{"role": "user", "content": "Hi"}]], id=[1])
    with pytest.raises(DataError, match=r"a conversation \(messages\).*--field messages"):
        read(path)
    assert read(path, field="messages") == ["user: Hi"]


def test_parquet_with_brackets_in_its_name_is_read_once(tmp_path, read):
    for name in ("a1", "a[1]"):
        write(tmp_path / f"{name}.parquet", text=[name])
    assert read(tmp_path) == ["a1", "a[1]"]
    assert read(tmp_path / "a[1].parquet") == ["a[1]"]


def test_damaged_parquet_is_named(tmp_path, read):
    (tmp_path / "sub").mkdir()
    path = write(tmp_path / "sub/a.parquet", text=[f"some words {i * i}" for i in range(10_000)])
    (tmp_path / "b.txt").write_text("B")
    path.write_bytes(path.read_bytes()[:-100])
    for source in (tmp_path, path):
        with pytest.raises(DataError, match=f"{path} is a damaged or unsupported parquet file"):
            read(source)
    tally = Tally()
    assert read(tmp_path, tally, skip_damaged=True) == ["B"]
    assert str(path) in tally.left_out[0]


def test_a_large_parquet_file_is_never_held_whole(tmp_path, read):
    path = write(tmp_path / "a.parquet", text=[str(i) * 2000 for i in range(12_000)])
    before = pyarrow.total_allocated_bytes()
    tracemalloc.start()
    peak = count = 0
    for text in parquet_documents(str(path), None):
        count += len(text)
        peak = max(peak, pyarrow.total_allocated_bytes() - before)
    held = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count > 80_000_000
    assert peak + held < 30_000_000


@pytest.mark.timeout(60)
def test_a_text_repeated_without_measure_is_refused(tmp_path, read, monkeypatch):
    monkeypatch.setattr(unpacking, "FREE", 10_000_000)
    long = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 5000, pyarrow.int32()), ["word " * 200_000])
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": long}), path, dictionary_pagesize_limit=1 << 30)
    before, held = pyarrow.total_allocated_bytes(), []
    with pytest.raises(DataError, match=r"a\.parquet unpacks to more than [0-9,]+ bytes, 200 times its size"):
        held.extend(pyarrow.total_allocated_bytes() for _ in parquet_documents(str(path), None))
    assert max(held) - before < 200_000_000, "of 5 GB"


def test_optional_packages_are_named_with_their_command(tmp_path, read, monkeypatch):
    for module in ("datasets", "pyarrow"):
        monkeypatch.setitem(sys.modules, module, None)
    Path(tmp_path / "a.parquet").write_bytes(b"PAR1")
    for path, extra in (("hf:org/data", "datasets"), (tmp_path / "a.parquet", "parquet")):
        with pytest.raises(DataError, match=rf"pip install 'chronomoe-aios\[{extra}\]'"):
            read(path)


def test_data_sets_are_streamed_through_the_optional_package(monkeypatch, read):
    class Fake:
        @staticmethod
        def load_dataset(**settings):
            assert settings == {"path": "org/data", "name": "en", "split": "test", "streaming": True}
            return iter([{"id": 1, "text": "one"}, {"id": 2, "text": None}, {"id": 3, "text": "three"}])

    monkeypatch.setitem(sys.modules, "datasets", Fake)
    assert read("hf:org/data:en:test") == ["one", "three"]
