import shlex
from pathlib import Path

import pytest

from aios.data.prepare import make_tokenizer, prepare
from aios.data.prepared import prepared_with
from aios.data.sources import Source, parse_source
from aios.data.tokenizers import tokenizer_fingerprint
from aios.settings.data import PrepareConfig
from chronomoe.errors import ConfigError, DataError


@pytest.fixture
def tokenizer(cases, tmp_path):
    source = Source(name="x", path=str(cases / "scripts.txt"))
    make_tokenizer([source], tmp_path / "my tokenizer", PrepareConfig(vocab_size=300), report=lambda line: None)
    return tmp_path / "my tokenizer"


def test_text_is_prepared_and_prepared_data_taken(cases, tokenizer, tmp_path):
    made = prepared_with(tokenizer, cases / "scripts.txt", tmp_path / "one", lambda line: None)
    assert made.info.tokenizer_fingerprint == tokenizer_fingerprint(tokenizer)
    assert prepared_with(tokenizer, made.path, tmp_path / "two", lambda line: None).info == made.info
    assert not (tmp_path / "two").exists()


def test_data_of_another_tokenizer_says_how_to_go_on(cases, tokenizer, tmp_path, aios):
    source = parse_source(f"river={cases / 'scripts.txt'}")
    prepare([source], tmp_path / "my data", PrepareConfig(vocab_size="bytes"), report=lambda line: None)
    with pytest.raises(ConfigError, match="another tokenizer than the brain's; prepare it") as error:
        prepared_with(tokenizer, tmp_path / "my data", tmp_path / "two", lambda line: None)
    command = str(error.value).split("`")[1]
    assert aios(*shlex.split(command)[1:]).code == 0
    assert prepared_with(tokenizer, tmp_path / "my data", tmp_path / "two", lambda line: None)


@pytest.mark.parametrize(("name", "flag"), [("nested.jsonl", "--field"), ("open-quote.csv", "--no-quotes")])
def test_a_flag_that_text_needs_is_named_with_the_command_that_has_it(cases, tokenizer, tmp_path, name, flag):
    with pytest.raises(DataError, match=flag) as error:
        prepared_with(tokenizer, cases / name, tmp_path / "out", lambda line: None)
    words = shlex.split(str(error.value).split("`")[1])
    assert words[:3] == ["aios", "data", "prepare"]
    assert f"text={cases / name}" in words
    assert Path(words[words.index("--tokenizer") + 1]) == tokenizer
