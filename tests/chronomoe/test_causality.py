"""A future token changes no past logit: every dispatch, with and without cache, steered and not."""

import pytest
import torch

import chronomoe
from tests.chronomoe.conftest import FAMILIES

CUT = 9


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm", "sorted"])
@pytest.mark.parametrize("family", FAMILIES)
def test_without_cache(host, tokens, family, implementation):
    model = host(family).eval()
    steering = chronomoe.attach(model, dispatch=implementation).steering
    steering.pressure.normal_()
    steering.log_temperature.normal_()
    changed = tokens.clone()
    changed[:, CUT:] = (changed[:, CUT:] + 7) % 61
    before, after = model(tokens).logits, model(changed).logits
    torch.testing.assert_close(before[:, :CUT], after[:, :CUT], rtol=0, atol=1e-5)
    assert (before[:, CUT:] - after[:, CUT:]).abs().max() > 1e-2


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm", "sorted"])
@pytest.mark.parametrize("family", FAMILIES)
def test_token_by_token_with_cache_equals_all_at_once(host, tokens, family, implementation):
    model = host(family).eval()
    steering = chronomoe.attach(model, dispatch=implementation).steering
    steering.pressure.normal_()
    whole = model(tokens[:1]).logits
    cache, steps = None, []
    with torch.no_grad():
        for position in range(tokens.shape[1]):
            output = model(tokens[:1, position : position + 1], past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            steps.append(output.logits)
    torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_of_a_past_logit_never_reaches_a_future_token(host, tokens, family):
    model = host(family).train()
    chronomoe.attach(model)
    embeddings = model.get_input_embeddings()(tokens).detach().requires_grad_()
    model(inputs_embeds=embeddings).logits[:, :CUT].sum().backward()
    assert embeddings.grad[:, CUT:].abs().max() == 0
    assert embeddings.grad[:, :CUT].abs().max() > 0


def test_loss_is_of_the_next_token(host, tokens):
    """A model that copies its input gets no reward: labels are shifted inside."""
    model = host("mixtral").eval()
    chronomoe.attach(model)
    logits = model(tokens).logits
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    torch.testing.assert_close(model(tokens, labels=tokens).loss, expected)
