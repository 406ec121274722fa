"""The steered Mixtral: round trips with plain transformers both ways, its own saving, generation."""

import pytest
import torch
from transformers import MixtralForCausalLM

from chronomoe import ChronovisorMixtralForCausalLM, MixtralConfig
from chronomoe.errors import ConfigError
from tests.chronomoe.everything import differing, everything


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = MixtralConfig(vocab_size=61, hidden_dim=32, num_layers=2, num_experts=4, num_attention_heads=4,
                           max_seq_length=64, initializer_range=0.1)  # fmt: skip
    return ChronovisorMixtralForCausalLM(config).eval()


def test_a_plain_checkpoint_loads_with_equal_logits(host, tokens, tmp_path):
    plain = host("mixtral").eval()
    plain.save_pretrained(tmp_path)
    ours = ChronovisorMixtralForCausalLM.from_pretrained(tmp_path).eval()
    plain.set_experts_implementation("sorted")
    assert torch.equal(ours(tokens).logits, plain(tokens).logits)
    assert ours.steering.neutral
    assert all(ours.steering.all_available)
    assert torch.all(ours.steering.load == 0.25)
    assert ours.steering.statistics.sums.abs().sum() == 0


@pytest.mark.parametrize("tied", [False, True])
def test_export_gives_a_plain_checkpoint_with_equal_logits(tokens, tmp_path, tied):
    config = MixtralConfig(vocab_size=61, hidden_dim=32, num_layers=2, num_experts=4, tie_word_embeddings=tied)
    model = ChronovisorMixtralForCausalLM(config).eval()
    model.export_plain(tmp_path)
    plain, info = MixtralForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    plain.set_experts_implementation("sorted")
    assert torch.equal(plain.eval()(tokens).logits, model(tokens).logits)
    assert "steering" not in (tmp_path / "config.json").read_text()


def test_saving_keeps_the_fields(model, tokens, tmp_path):
    model.steering.pressure[1, 2] = 0.7
    model.steering.available[0, 1] = False
    model.steering.load[0] = torch.tensor([0.1, 0.2, 0.3, 0.4])
    model.save_pretrained(tmp_path)
    back = ChronovisorMixtralForCausalLM.from_pretrained(tmp_path).eval()
    assert not differing(everything(back), everything(model))
    assert torch.equal(back(tokens).logits, model(tokens).logits)


def test_sorted_is_the_default_and_another_can_be_asked_for(model):
    assert model.config._experts_implementation == "sorted"
    config = MixtralConfig(vocab_size=61, hidden_dim=32, num_layers=1)
    config._experts_implementation = "eager"
    assert ChronovisorMixtralForCausalLM(config).config._experts_implementation == "eager"


def test_chronovisor_can_be_disabled(tokens):
    config = MixtralConfig(vocab_size=61, hidden_dim=32, num_layers=1, enable_chronovisor=False)
    model = ChronovisorMixtralForCausalLM(config).eval()
    before = model(tokens).logits
    model.steering.pressure.normal_(std=10)
    assert torch.equal(model(tokens).logits, before)


@pytest.mark.parametrize("settings", [{"steering": {"temperature_form": "raw"}}, {"control": {"anti_windup": 1.0}}])
def test_settings_of_version_010_are_refused_in_one_sentence(settings):
    (name,) = next(iter(settings.values()))
    with pytest.raises(ConfigError, match=rf"no setting '{name}'.*version 0\.1\.0"):
        ChronovisorMixtralForCausalLM(MixtralConfig(vocab_size=61, hidden_dim=32, num_layers=1, **settings))


def test_generation_with_and_without_cache_is_the_same(model, tokens):
    settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    cached = model.generate(tokens[:1, :5], use_cache=True, **settings)
    assert torch.equal(cached, model.generate(tokens[:1, :5], use_cache=False, **settings))
    assert cached.shape == (1, 17)


def test_padding_on_the_left_does_not_change_the_continuation(model, tokens):
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    alone = model.generate(tokens[:1, :6], **settings)
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), tokens[:1, :6]], 1)
    mask = torch.tensor([[0, 0, 0] + [1] * 6])
    assert torch.equal(model.generate(padded, attention_mask=mask, **settings)[:, 3:], alone)


def test_active_parameters(model):
    total = sum(p.numel() for p in model.parameters())
    one_expert = 3 * 32 * model.config.intermediate_size
    assert total - model.num_active_params == 2 * 2 * one_expert


def test_a_bf16_checkpoint_trains_with_fields_and_counts_in_fp32(model, tokens, tmp_path):
    model.steering.pressure.copy_(torch.linspace(-0.3, 0.3, model.steering.pressure.numel()).view(2, -1))
    model.save_pretrained(tmp_path)
    lower = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16).train()
    assert lower.dtype == torch.bfloat16
    assert torch.equal(lower.steering.pressure, model.steering.pressure)
    assert lower.steering.available.dtype == torch.bool
    loss = lower(input_ids=tokens, labels=tokens).loss
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad.isfinite().all() for p in lower.parameters())
    window = lower.steering.end_step()
    assert torch.equal(window.assignments.sum(dim=-1), torch.full((2,), 2.0 * tokens.numel()))


def test_loading_starts_with_an_empty_window(model, tmp_path):
    model.save_pretrained(tmp_path)
    held = [torch.full((100, 1000), 7.0) for _ in range(20)]  # so that fresh memory is not all zeros
    del held
    assert not type(model).from_pretrained(tmp_path).steering.statistics.sums.any()


def test_steering_works_in_inference_mode(tokens):
    with torch.inference_mode():
        model = ChronovisorMixtralForCausalLM(MixtralConfig(vocab_size=61, hidden_dim=32, num_layers=2)).eval()
        before = model(tokens).logits.clone()
        model.steering.pressure[:, 0] += 50
        assert not torch.equal(model(tokens).logits, before)


def test_a_bf16_model_exports_as_bf16(model, tokens, tmp_path):
    lower = model.to(torch.bfloat16)
    lower.export_plain(tmp_path)
    plain = MixtralForCausalLM.from_pretrained(tmp_path)
    assert plain.dtype == torch.bfloat16
    assert all(torch.equal(lower.state_dict()[name], tensor) for name, tensor in plain.state_dict().items())
