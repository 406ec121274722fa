"""Tokens as HTML: text is text, whatever it says."""

from aios.manager.tokens import shares_html, tokens_html

EVIL = "<img src=x onerror='alert(1)'>\""


def test_text_and_names_are_escaped():
    look = {"chosen": [[[0], [1]]], "weights": [[[1.0], [1.0]]], "open_at": {EVIL: [False, True]}, "segments": None}
    html = tokens_html(["", EVIL], look, 0)
    assert "<img" not in html
    assert "&lt;img" in html
    assert html.count("<span") == 2
    found = {
        "off": {"share": [[0.5, 0.5]], "open": {EVIL: 0.5}},
        "domains": {EVIL: {"share": [[0.5, 0.5]], "open": {EVIL: 0.1}}},
    }
    table = shares_html(found | {"on": found["off"]}, 0, True)
    assert "<img" not in table
    assert "&lt;img" in table
