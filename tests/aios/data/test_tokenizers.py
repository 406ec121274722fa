import json
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aios.data.tokenizers import Encoder, copy_tokenizer, tokenizer_fingerprint, train_tokenizer
from chronomoe.errors import ConfigError, DataError

TEXTS = [f"the quick brown fox number {i} jumps over the lazy dog, quickly and again\n" for i in range(200)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    assert train_tokenizer(iter(TEXTS), 300, path) == 300
    return path


@pytest.fixture(scope="module")
def encoder(folder):
    return Encoder.open(folder)


@settings(max_examples=100, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
def test_any_text_round_trips(encoder, text):
    [ids] = encoder.encode([text])
    assert encoder.tokenizer.decode(ids) == text
    assert encoder.separator_id not in ids


def test_a_spelled_out_separator_is_text(encoder):
    [ids] = encoder.encode(["a <|endoftext|> b"])
    assert encoder.separator_id not in ids
    assert encoder.tokenizer.decode(ids) == "a <|endoftext|> b"


def test_transformers_loads_it(folder, encoder):
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(folder)
    assert loaded.eos_token_id == loaded.bos_token_id == loaded.pad_token_id == encoder.separator_id
    text = "Fox  \n\tdé\u0301jà 狐 don 't ."
    assert loaded(text)["input_ids"] == encoder.encode([text])[0]
    assert loaded.decode(loaded(text)["input_ids"]) == text
    assert len(loaded) == encoder.vocab_size == 300


def test_merges_are_learned(encoder):
    text = TEXTS[0]
    assert len(encoder.encode([text])[0]) < len(text) / 2


def test_bytes(tmp_path):
    assert train_tokenizer(iter(TEXTS), "bytes", tmp_path) == 257
    encoder = Encoder.open(tmp_path)
    text = TEXTS[0] + "é狐"
    assert len(encoder.encode([text])[0]) == len(text.encode())
    assert sorted({*encoder.tokenizer.get_vocab().values()}) == list(range(257))


def test_too_small_a_vocabulary(tmp_path):
    with pytest.raises(ConfigError, match="at least 257"):
        train_tokenizer(iter(TEXTS), 256, tmp_path)


def test_training_is_the_same_in_another_process(folder, tmp_path):
    code = (
        "import sys; from pathlib import Path; from aios.data.tokenizers import train_tokenizer;"
        f"train_tokenizer({TEXTS!r}, 300, Path(sys.argv[1]))"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    assert tokenizer_fingerprint(tmp_path) == tokenizer_fingerprint(folder)


def test_fingerprint_sees_content_only(folder, tmp_path):
    copy_tokenizer(folder, tmp_path)
    path = tmp_path / "tokenizer.json"
    content = json.loads(path.read_text("utf-8"))
    content["padding"] = {"strategy": "BatchLongest"}
    path.write_text(json.dumps(dict(reversed(content.items())), indent=8), "utf-8")
    assert tokenizer_fingerprint(tmp_path) == tokenizer_fingerprint(folder)
    content["model"]["merges"].pop()
    path.write_text(json.dumps(content), "utf-8")
    assert tokenizer_fingerprint(tmp_path) != tokenizer_fingerprint(folder)


def test_unusable_folders(folder, tmp_path):
    with pytest.raises(DataError, match=r"holds no tokenizer\.json"):
        tokenizer_fingerprint(tmp_path)
    copy_tokenizer(folder, tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(DataError, match="no eos_token"):
        Encoder.open(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(DataError, match="damaged"):
        Encoder.open(tmp_path)
