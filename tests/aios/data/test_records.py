import json

import pytest

from chronomoe.errors import DataError


def test_jsonl_fields(tmp_path, read):
    path = tmp_path / "a.jsonl"
    path.write_text('{"id": 1, "content": "c"}\n\n"bare"\n{"text": "t\\ud800", "title": "T"}\n{"text": null}\n')
    assert read(path) == ["c", "bare", "t?"]
    path.write_text('{"id": 1, "title": "T"}\n')
    assert read(path, field="title") == ["T"]
    with pytest.raises(DataError, match=r"line 1 has no obvious text field; choose one of 'title' with --field"):
        read(path)
    with pytest.raises(DataError, match="line 1 has no text in the field 'id'; choose one of 'title' with --field"):
        read(path, field="id")
    path.write_text('{"text": "fine"}\n{broken\n')
    with pytest.raises(DataError, match="line 2 is not JSON"):
        read(path)
    path.write_text('{"id": 1}\n')
    with pytest.raises(DataError, match=r"line 1 has no obvious text field, and no other text \(it holds 'id'\)"):
        read(path)
    path.write_text("[1]\n")
    with pytest.raises(DataError, match="line 1 holds neither text nor an object"):
        read(path)


def test_nested_fields(cases, read, tmp_path):
    texts = read(cases / "nested.jsonl", field="doc.body")
    assert len(texts) == 20
    assert texts[0].startswith("Note 1: the river")
    with pytest.raises(DataError, match=r"nested\.jsonl, line 1 has no obvious text field; choose one of 'doc\.body'"):
        read(cases / "nested.jsonl")
    for field in ("doc", "doc.meta", "doc.meta.n", "doc.body.x", "body"):
        with pytest.raises(
            DataError, match=rf"no (text in the )?field '{field}'; choose one of 'doc\.body' with --field"
        ):
            read(cases / "nested.jsonl", field=field)
    (tmp_path / "a.jsonl").write_text('{"doc.body": "dotted", "doc": {"body": "inner"}}\n')
    assert read(tmp_path / "a.jsonl", field="doc.body") == ["dotted"], "a name that has a dot comes first"


def test_conversations_are_named_and_have_a_way_on(cases, read, tmp_path):
    with pytest.raises(DataError, match=r"line 1 holds a conversation \(messages\).*--field messages") as error:
        read(cases / "messages.jsonl")
    assert str(cases / "messages.jsonl") in str(error.value)
    texts = read(cases / "messages.jsonl", field="messages")
    assert len(texts) == 21
    assert texts[0].startswith("user: How high was the river on day 1?\n\nassistant: Note 1")
    turns = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
    (tmp_path / "a.jsonl").write_text(json.dumps({"id": 3, "conversations": turns}))
    with pytest.raises(DataError, match="--field conversations"):
        read(tmp_path / "a.jsonl")
    assert read(tmp_path / "a.jsonl", field="conversations") == ["human: Hi\n\ngpt: Hello"]
    parts = [{"role": "user", "content": [{"type": "text", "text": "See"}, {"type": "image"}]}, {"content": None}]
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": parts, "text": "beside"}))
    assert read(tmp_path / "a.jsonl", field="messages") == ["user: See"]
    assert read(tmp_path / "a.jsonl") == ["beside"], "a text field is used as before"


def test_prompts_and_completions_are_named_and_have_a_way_on(cases, read, tmp_path):
    with pytest.raises(DataError, match=r"a prompt and its completion.*--field prompt\+completion"):
        read(cases / "completions.jsonl")
    texts = read(cases / "completions.jsonl", field="prompt+completion")
    assert len(texts) == 20
    assert texts[0].startswith("Day 1: Note 1: the river")
    assert read(cases / "completions.jsonl", field="completion")[0].startswith(" Note 1")
    (tmp_path / "a.csv").write_text("instruction,output\nAdd.,2\n")
    with pytest.raises(DataError, match=r"--field instruction\+output"):
        read(tmp_path / "a.csv")
    assert read(tmp_path / "a.csv", field="instruction+output") == ["Add.2"]


def test_json_lines_survive_chunk_borders(tmp_path, read):
    texts = [f"{i} " + "é" * (i * 37 % 5000) for i in range(100)]
    (tmp_path / "a.jsonl").write_text(
        "".join(json.dumps({"text": t}, ensure_ascii=False) + "\n" for t in texts), "utf-8"
    )
    assert read(tmp_path / "a.jsonl") == texts


def test_a_record_without_end_is_refused_at_its_limit(tmp_path, read, monkeypatch):
    monkeypatch.setattr("aios.data.readers.LONGEST_RECORD", 100_000)
    (tmp_path / "a.jsonl").write_text('{"text": "short"}\n{"text": "' + "x" * 200_000 + '"}\n')
    with pytest.raises(DataError, match=r"a\.jsonl, line 2 is longer than 100,000 characters"):
        read(tmp_path / "a.jsonl")
