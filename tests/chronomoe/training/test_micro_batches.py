"""Sequences in pieces: the same text at the same positions, with gradients cut between pieces."""

import torch

from chronomoe.training.micro_batches import ChunkCache, calls, pieces
from tests.chronomoe.training.building import VOCAB, build_model


def tokens(rows=2, length=20):
    return torch.randint(0, VOCAB, (rows, length), generator=torch.Generator().manual_seed(0))


def test_a_short_batch_is_one_call():
    x = tokens()
    (call,) = pieces({"input_ids": x}, x, 20)
    assert set(call) == {"input_ids", "labels", "use_cache"}


def test_the_last_call_of_a_step_is_known():
    x, y = tokens(2, 20), tokens(2, 7)
    found = list(calls([{"input_ids": x}, {"input_ids": y}], [x, y], 8))
    assert [call["input_ids"].shape[1] for call, _ in found] == [8, 8, 4, 7]
    assert [last for _, last in found] == [False, False, False, True]


def test_a_decoder_reads_pieces_as_it_reads_the_whole():
    model, x = build_model().train(), tokens()
    whole = model(input_ids=x, labels=x)
    parts, loss = [], 0.0
    for call in pieces({"input_ids": x}, x, 8):
        output = model(**call, num_items_in_batch=2 * 19)
        parts.append(output.logits.detach())
        loss += model.steering.last_losses["lm"].item()
        output.loss.backward()
    torch.testing.assert_close(torch.cat(parts, 1), whole.logits, rtol=1e-4, atol=1e-4)
    assert abs(loss - torch.nn.functional.cross_entropy(whole.logits[:, :-1].flatten(0, 1), x[:, 1:].flatten())) < 1e-4


def test_padding_of_the_past_is_not_counted():
    model, x = build_model().train(), tokens()
    mask = torch.ones_like(x)
    mask[0, :6] = 0
    for call in pieces({"input_ids": x, "attention_mask": mask}, x.masked_fill(mask == 0, -100), 8):
        model(**call).loss.backward()
    window = model.steering.end_step()
    assert window.tokens.tolist() == [34, 34]


def test_asking_again_before_the_commit_gives_the_same_answer():
    cache, keys = ChunkCache(), torch.ones(1, 1, 3, 2)
    cache.update(keys, keys, 0)
    cache.commit()
    first, second = cache.update(2 * keys, keys, 0), cache.update(2 * keys, keys, 0)
    assert torch.equal(first[0], second[0])
    assert first[0].shape[2] == 6
    assert cache.get_seq_length() == 3
