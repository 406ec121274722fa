import bz2
import gzip
import lzma
import sys
import tracemalloc
import zipfile

import pytest

from aios.data import unpacking
from aios.data.sources import Tally
from chronomoe.errors import DataError

zstd = pytest.importorskip("backports.zstd" if sys.version_info < (3, 14) else "compression.zstd")
PACK = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress, "zst": zstd.compress}
TEXT = "".join(f'{{"text": "line {i} of {i * i}"}}\n' for i in range(3000)).encode()


@pytest.mark.parametrize("kind", PACK)
def test_compressed_json_lines(kind, tmp_path, read):
    path = tmp_path / f"a.jsonl.{kind}"
    path.write_bytes(PACK[kind](TEXT))
    assert len(read(path)) == 3000
    path.write_bytes(PACK[kind](TEXT) + PACK[kind](TEXT))
    assert len(read(path)) == 6000, "packed in two parts, as parallel packers do"


@pytest.mark.parametrize("kind", PACK)
def test_a_damaged_archive_below_a_folder_is_named(kind, tmp_path, read):
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "plain.txt").write_text("plain")
    path, whole = tmp_path / f"a/b/c.jsonl.{kind}", PACK[kind](TEXT)
    middle = len(whole) // 2
    turned = whole[:middle] + bytes(255 - byte for byte in whole[middle : middle + 40]) + whole[middle + 40 :]
    for data in (whole[:middle], whole[:-1], turned, b"not packed at all"):
        path.write_bytes(data)
        # Turned bits may come out as no JSON or no text before the check of the archive itself is reached.
        problem = "" if data == turned else " is a damaged or unsupported archive"
        with pytest.raises(DataError, match=f"^{path}{problem}"):
            read(path)
        if data != turned:
            with pytest.raises(DataError, match=f"^{path}{problem}.*--skip-damaged"):
                read(tmp_path)
        tally = Tally()
        assert read(tmp_path, tally, skip_damaged=True) == ["plain"]
        assert [sentence.startswith(f"{path}{problem}") for sentence in tally.left_out] == [True]
        assert read(tmp_path, Tally(damaged=tally.damaged)) == ["plain"], "a second pass knows them"


def test_bits_that_were_turned_are_noticed_by_the_archive(tmp_path, read):
    text = "some words\n" * 10_000
    for kind, pack in PACK.items():
        whole = bytearray(pack(text.encode()))
        whole[-6] ^= 1
        (tmp_path / f"a.txt.{kind}").write_bytes(whole)
        if kind != "zst":  # packed without a checksum
            with pytest.raises(DataError, match=rf"a\.txt\.{kind} is a damaged"):
                read(tmp_path / f"a.txt.{kind}")


def test_zip(tmp_path, read):
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("b/two.csv", "text\n2\n")
        archive.writestr("a/one.txt", "1")
        archive.writestr("c.txt.gz", gzip.compress(b"3"))
        archive.writestr("__MACOSX/._one.txt", "no")
        archive.writestr("image.png", b"\0\1")
    tally = Tally()
    assert read(tmp_path / "a.zip", tally) == ["1", "2", "3"]
    assert tally.left_out[0].startswith(f"{tmp_path}/a.zip:image.png is not text")
    assert not (tmp_path / "a").exists()


def test_a_damaged_member_of_a_zip_is_named(tmp_path, read):
    (tmp_path / "sub").mkdir()
    path = tmp_path / "sub/a.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("good.txt", "good")
        archive.writestr("bad.txt", "these words are turned")
        archive.writestr("cut.txt.gz", gzip.compress(b"cut " * 100)[:-10])
    path.write_bytes(path.read_bytes().replace(b"these words", b"other words"))
    with pytest.raises(DataError, match=r"sub/a\.zip:bad\.txt is a damaged.*--skip-damaged"):
        read(tmp_path)
    for source in (tmp_path, path):
        tally = Tally()
        assert read(source, tally, skip_damaged=True) == ["good"]
        assert [sentence.split(" is ")[0] for sentence in tally.left_out] == [f"{path}:bad.txt", f"{path}:cut.txt.gz"]
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(DataError, match=r"sub/a\.zip is a damaged"):
        read(tmp_path)
    with pytest.raises(DataError, match=r"holds no text \(.*sub/a\.zip is a damaged"):
        read(tmp_path, skip_damaged=True)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", [*PACK, "zip", "gz.gz"])
def test_what_unpacks_without_measure_is_refused(kind, tmp_path, read, monkeypatch):
    monkeypatch.setattr(unpacking, "FREE", 4_000_000)
    path, bomb = tmp_path / f"a.txt.{kind}", b"word word\n" * 3_000_000
    if kind == "zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
            for number in range(10):
                archive.writestr(f"{number}.txt", bomb[: len(bomb) // 10])
    elif kind == "gz.gz":
        path.write_bytes(gzip.compress(gzip.compress(bomb)))
    else:
        path.write_bytes(PACK[kind](bomb))
    tracemalloc.start()
    with pytest.raises(DataError, match=rf"a\.txt\.{kind} unpacks to more than [0-9,]+ bytes, 200 times its size"):
        read(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16_000_000


def test_text_that_shrinks_well_is_unpacked(tmp_path, read):
    text = "the same words come again and again\n" * 100_000
    (tmp_path / "a.txt.xz").write_bytes(lzma.compress(text.encode()))
    assert "".join(read(tmp_path / "a.txt.xz")) == text


def test_zst_needs_an_optional_package_where_python_has_none(tmp_path, read, monkeypatch):
    for module in ("backports", "compression"):
        monkeypatch.setitem(sys.modules, module, None)
    (tmp_path / "a.jsonl.zst").write_bytes(zstd.compress(TEXT))
    with pytest.raises(DataError, match=r"pip install 'chronomoe-aios\[zstd\]'"):
        read(tmp_path / "a.jsonl.zst")
