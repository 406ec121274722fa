"""No token sees a later one: every mode, segment, window, padding side, cache and chunking."""

import pytest
import torch
from transformers import DynamicCache

from chronomoe.training.micro_batches import ChunkCache
from tests.chronomoe.hrm.building import VOCAB, build, tokens

CUT = 9
VARIANTS = [
    {},
    {"use_moe": False},
    {"grad_mode": "one_step"},
    {"grad_mode": "all"},
    {"window_size": 4},
    {"pos_encodings": "learned"},
    {"halting": "max"},
    {"halt_cap": 2},
    {"halt_max_steps": 1, "H_cycles": 1, "L_cycles": 3},
    {"steering": {"capacity_factor": 0.6}},
    {"steering": {"capacity_factor": 1.25}, "grad_mode": "all"},
]


def changed(x):
    x = x.clone()
    x[:, CUT:] = (x[:, CUT:] + 7) % VOCAB
    return x


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_a_later_token_changes_no_earlier_state_of_any_segment(variant, training):
    model, x = build(**variant, halt_exploration=0.0), tokens()
    model.train(training)
    before, after = model(x), model(changed(x))
    assert len(before.states) == len(after.states)
    for first, second in zip(before.states, after.states, strict=True):
        torch.testing.assert_close(first[:, :CUT], second[:, :CUT], rtol=0, atol=1e-5)
    torch.testing.assert_close(before.logits[:, :CUT], after.logits[:, :CUT], rtol=0, atol=1e-5)
    assert (before.logits[:, CUT:] - after.logits[:, CUT:]).abs().max() > 1e-2


def test_a_window_ends_what_a_token_reaches():
    model, x = build(window_size=4, halt_max_steps=1, H_cycles=1, L_cycles=1, h_layers=1, l_layers=1), tokens()
    model.eval()
    other = x.clone()
    other[:, 0] = (other[:, 0] + 7) % VOCAB
    moved = (model(x).logits != model(other).logits).any(dim=-1).any(dim=0)
    # Two blocks, each passing on over three places.
    assert moved.nonzero().flatten().tolist() == list(range(7))


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_gradient_of_an_earlier_logit_never_reaches_a_later_token(variant):
    model, x = build(**variant).train(), tokens()
    embedded = model.model.embed_tokens(x).detach().requires_grad_()
    model(inputs_embeds=embedded).logits[:, :CUT].sum().backward()
    assert embedded.grad[:, CUT:].abs().max() == 0
    assert embedded.grad[:, :CUT].abs().max() > 0


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_token_by_token_with_cache_equals_all_at_once_halting_included(variant):
    model, x = build(**variant), tokens(1)
    whole = model(x)
    cache, logits, segments = DynamicCache(config=model.config), [], []
    with torch.no_grad():
        for start, end in [(0, 5), *((t, t + 1) for t in range(5, 17))]:
            output = model(x[:, start:end], past_key_values=cache, use_cache=True)
            logits.append(output.logits)
            segments.append(output.segments)
    torch.testing.assert_close(torch.cat(logits, 1), whole.logits, rtol=1e-4, atol=1e-4)
    assert torch.equal(torch.cat(segments, 1), whole.segments)
    if not variant:
        assert len(whole.segments.unique()) == 3, "the model halts early, late and in between"


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("variant", [{}, {"pos_encodings": "learned"}, {"window_size": 4}, {"use_moe": False}], ids=str)
def test_padding_on_either_side_changes_nothing(variant, side):
    model, x = build(**variant), tokens(2)
    mask = torch.ones_like(x)
    pad = torch.full((2, 5), 3)
    parts, masks = ([pad, x], [pad * 0, mask]) if side == "left" else ([x, pad], [mask, pad * 0])
    padded = model(torch.cat(parts, 1), attention_mask=torch.cat(masks, 1)).logits
    own = padded[:, 5:] if side == "left" else padded[:, :-5]
    torch.testing.assert_close(own, model(x).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("variant", [{}, {"window_size": 4}, {"pos_encodings": "learned"}], ids=str)
def test_a_text_read_in_pieces_is_the_same_text(variant):
    model, x = build(**variant, halt_exploration=0.0).train(), tokens(2)
    whole, cache, pieces = model(x, labels=x).logits, ChunkCache(), []
    for start, end in ((0, 6), (6, 12), (12, 17)):
        output = model(x[:, start:end], labels=x[:, start:end], past_key_values=cache)
        output.loss.backward()
        cache.commit()
        pieces.append(output.logits)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-4, atol=1e-4)


def test_generate_is_the_same_with_and_without_cache_and_with_left_padding():
    model, x = build(), tokens(1, 5)
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    cached = model.generate(x, **settings)
    assert torch.equal(cached, model.generate(x, use_cache=False, **settings))
    padded = torch.cat([torch.full((1, 4), 3), x], 1)
    mask = torch.cat([torch.zeros(1, 4, dtype=torch.long), torch.ones_like(x)], 1)
    assert torch.equal(model.generate(padded, attention_mask=mask, **settings)[:, 9:], cached[:, 5:])


def test_generation_calls_the_model_once_a_token_and_stops_thinking_where_it_halts():
    model, calls = build(), []
    model.model.L_module.register_forward_hook(lambda module, args, output: calls.append(output.shape[1]))
    model.generate(tokens(1, 5), max_new_tokens=12, do_sample=False, pad_token_id=0)
    prompt, after = [n for n in calls if n == 5], [n for n in calls if n == 1]
    assert len(prompt) + len(after) == len(calls)
    per_segment = model.config.H_cycles * model.config.L_cycles
    assert 11 * per_segment <= len(after) < 11 * per_segment * 3, "fewer than three segments for each of 11 tokens"
    assert 1 < model.model.mean_segments < 3


def test_a_batch_generates_what_each_row_would_alone():
    model, x = build(), tokens(3, 6)
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    together = model.generate(x, **settings)
    for row in range(3):
        assert torch.equal(together[row : row + 1], model.generate(x[row : row + 1], **settings))
