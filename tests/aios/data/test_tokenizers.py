import json
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aios.data.tokenizers import Encoder, copy_tokenizer, find_tokenizer, tokenizer_fingerprint, train_tokenizer
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


@pytest.fixture
def copy(folder, tmp_path):
    """A copy of the tokenizer without names of special tokens."""
    copy_tokenizer(folder, tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    return tmp_path


@pytest.mark.parametrize("eos", ["<|endoftext|>", {"content": "<|endoftext|>", "lstrip": False, "special": True}])
@pytest.mark.parametrize("config", ["{}", '{"eos_token": null}', None])
def test_a_separator_that_only_the_map_names_is_found(copy, encoder, eos, config):
    from aios.brains.loaded import load_tokenizer

    file = copy / "tokenizer_config.json"
    file.unlink() if config is None else file.write_text(config)
    (copy / "special_tokens_map.json").write_text(json.dumps({"eos_token": eos}))
    assert Encoder.open(copy).separator_id == encoder.separator_id
    assert load_tokenizer(copy).eos_token_id == encoder.separator_id
    (copy / "special_tokens_map.json").unlink()
    file.write_text(json.dumps({"eos_token": eos}))
    assert Encoder.open(copy).separator_id == encoder.separator_id


def test_no_separator_is_said_with_the_remedy(copy):
    with pytest.raises(
        DataError, match=r'has no eos_token, which.*; add "eos_token": ".*" to .*/tokenizer_config.json'
    ) as error:
        Encoder.open(copy)
    assert str(copy) in str(error.value)
    added = str(error.value).split("add ")[1].split(" to ")[0]
    (copy / "tokenizer_config.json").write_text("{" + added + "}")
    assert Encoder.open(copy).separator_id == 0, "what it says works"
    (copy / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    with pytest.raises(DataError, match="names the eos_token '</s>', which it does not have"):
        Encoder.open(copy)
    content = json.loads((copy / "tokenizer.json").read_text("utf-8"))
    (copy / "tokenizer.json").write_text(json.dumps({**content, "added_tokens": []}))
    with pytest.raises(DataError, match="no special token at all, so train one with `aios data tokenizer`"):
        Encoder.open(copy)


def test_of_several_special_tokens_the_likely_one_is_advised(copy):
    content = json.loads((copy / "tokenizer.json").read_text("utf-8"))
    one = content["added_tokens"][0]
    content["added_tokens"] = [{**one, "content": name} for name in ("<pad>", "<s>", "</s>", "<unk>")]
    (copy / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=r'add "eos_token": "</s>".*\(or another special token: <pad>, <s>, <unk>\)'):
        Encoder.open(copy)


def test_unusable_folders(folder, tmp_path):
    with pytest.raises(DataError, match=r"holds no tokenizer\.json; name a folder"):
        tokenizer_fingerprint(tmp_path)
    (tmp_path / "vocab.json").write_text("{}")
    with pytest.raises(DataError, match=rf"{tmp_path} holds no tokenizer\.json; make it from the other files"):
        Encoder.open(tmp_path)
    copy_tokenizer(folder, tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(DataError, match=r"tokenizer_config\.json is damaged"):
        Encoder.open(tmp_path)
    for data, said in (("{", "damaged"), ("[]", "damaged"), ("{}", "is no tokenizer")):
        (tmp_path / "tokenizer.json").write_text(data)
        with pytest.raises(DataError, match=f"{tmp_path}/tokenizer.json is.*{said.split()[-1]}"):
            Encoder.open(tmp_path)


def test_a_copy_replaces_all_of_another_tokenizer(folder, tmp_path):
    (tmp_path / "special_tokens_map.json").write_text('{"eos_token": "</s>"}')
    (tmp_path / "config.json").write_text("{}")
    copy_tokenizer(folder, tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"config.json", "tokenizer.json", "tokenizer_config.json"}


def test_a_tokenizer_is_found_by_its_folder_its_file_or_prepared_data(folder, tmp_path):
    copy_tokenizer(folder, tmp_path / "data/tokenizer")
    for path in (tmp_path / "data", tmp_path / "data/tokenizer", tmp_path / "data/tokenizer/tokenizer.json"):
        assert find_tokenizer(path) == tmp_path / "data/tokenizer"
    assert find_tokenizer(tmp_path) == tmp_path, "what has none is named as it was given"
