"""What lies beside a saved model is saved, loaded and copied together, and the model itself stays plain."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import MixtralForCausalLM

from chronomoe import ChronovisorMixtralForCausalLM, sidecars
from chronomoe.errors import CheckpointError
from chronomoe.experts.attachment import attach_expert, detach_expert
from chronomoe.goals.conditioning import attach_conditioning
from chronomoe.hrm import HRMACTv1ForCausalLM
from tests.chronomoe.everything import differing, everything
from tests.chronomoe.experts.conftest import BASES, build_base, build_expert

OLD = Path(__file__).parents[1] / "fixtures/0.1.0/workspace/artifacts/brains"
HEADER = {
    "created": "2026-01-01", "base": {"hidden_size": 32, "act": "silu"}, "tokenizer_fingerprint": "t", "training": {},
    "calibration": {}, "metrics": {}, "goals": [],
}  # fmt: skip


def trained(family):
    """A model whose control layer has moved: live and mean pressure differ, and there is noise."""
    model = build_base(family).train()
    rows = torch.randint(0, 61, (4, 24), generator=torch.Generator().manual_seed(2))
    for kappa in (0.9, 0.9, 0.5):
        model.controller.set_knob(kappa)
        model(input_ids=rows, labels=rows).loss.backward()
        model.controller.tick()
    return model.eval()


def with_expert(family):
    model, expert = build_base(family), build_expert("laws")
    expert.header = HEADER
    attach_expert(model, expert)
    return model


@torch.no_grad()
def logits(model, tokens):
    return model(tokens, use_cache=False).logits


@pytest.mark.parametrize("family", BASES)
def test_a_saved_model_is_plain_with_its_state_beside_it(family, tmp_path):
    model = trained(family)
    model.save_pretrained(tmp_path)
    names = load_file(tmp_path / "model.safetensors").keys()
    assert not [name for name in names if name.startswith(("steering.", "controller."))]
    assert {"chronovisor.json", "chronovisor.safetensors"} <= {file.name for file in tmp_path.iterdir()}
    if family == "mixtral":
        _, info = MixtralForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
        assert not info["unexpected_keys"]
        assert not info["missing_keys"]


@pytest.mark.parametrize("family", BASES)
def test_loading_deploys_and_keeps_what_a_resumed_run_goes_on_from(family, tmp_path):
    model = trained(family)
    assert not torch.equal(model.controller.live_pressure, model.controller.mean_pressure)
    assert model.steering.exploration > 0
    model.save_pretrained(tmp_path)
    back = type(model).from_pretrained(tmp_path)
    assert torch.equal(back.steering.pressure, model.controller.mean_pressure)
    assert back.steering.exploration == 0
    assert sorted(differing(everything(model), everything(back))) == ["steering.exploration", "steering.pressure"]
    assert back.controller.meta_knob.kappa == 0.5
    with model.controller.deployed():
        rows = torch.randint(0, 61, (2, 9))
        assert torch.equal(logits(back.eval(), rows), logits(model, rows))


@pytest.mark.parametrize("family", BASES)
def test_a_model_that_version_010_saved_is_refused_in_one_sentence(family):
    kind, name = {
        "mixtral": (ChronovisorMixtralForCausalLM, "mixtral/small"), "hrm": (HRMACTv1ForCausalLM, "actv1/thinker"),
    }[family]  # fmt: skip
    with pytest.raises(CheckpointError, match=r"saved by version 0\.1\.0.*train the model again"):
        kind.from_pretrained(OLD / name)


def test_experts_are_loaded_however_the_path_is_given(tokens, tmp_path):
    model = with_expert("mixtral")
    expected = logits(model, tokens)
    model.save_pretrained(tmp_path / "one")
    kind = type(model)
    for back in (
        kind.from_pretrained(tmp_path / "one"),
        kind.from_pretrained(pretrained_model_name_or_path=str(tmp_path / "one")),
        kind.from_pretrained(tmp_path, subfolder="one"),
    ):
        assert torch.equal(logits(back.eval(), tokens), expected)


def test_experts_are_loaded_from_the_cache_of_the_hub(tokens, tmp_path):
    model = with_expert("mixtral")
    model.steering.pressure[0, 1] = 0.4
    expected = logits(model, tokens)
    revision = "0" * 40
    repository = tmp_path / "models--someone--something"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text(revision)
    model.save_pretrained(repository / "snapshots" / revision)
    back = type(model).from_pretrained("someone/something", cache_dir=tmp_path, local_files_only=True).eval()
    assert torch.equal(back.steering.pressure, model.steering.pressure)
    assert torch.equal(logits(back, tokens), expected)


def test_saving_again_removes_what_is_gone(tmp_path):
    model = with_expert("mixtral")
    attach_conditioning(model)
    model.save_pretrained(tmp_path)
    found = {file for pattern in sidecars.SIDECARS for file in tmp_path.glob(pattern)}
    assert len(found) == 5
    detach_expert(model, "laws")
    model.steering.conditioning = None
    model.save_pretrained(tmp_path, control=False)
    assert not [file for file in found if file.exists()]
    assert not (tmp_path / "experts").exists()
    back = type(model).from_pretrained(tmp_path)
    assert back.steering.neutral
    assert int(back.controller.ticks) == 0


def test_half_of_the_control_state_is_an_error(tmp_path):
    model = trained("mixtral")
    model.save_pretrained(tmp_path)
    (tmp_path / "chronovisor.json").unlink()
    with pytest.raises(CheckpointError, match=r"chronovisor\.json"):
        type(model).from_pretrained(tmp_path)


def test_copying_takes_all_of_them(tokens, tmp_path):
    model = with_expert("mixtral")
    attach_conditioning(model)
    model.save_pretrained(tmp_path / "one")
    (tmp_path / "two").mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(tmp_path / "one" / name, tmp_path / "two")
    sidecars.copy(tmp_path / "one", tmp_path / "two")
    for pattern in sidecars.SIDECARS:
        assert [file.name for file in (tmp_path / "one").glob(pattern)] == [
            file.name for file in (tmp_path / "two").glob(pattern)
        ]
    back = type(model).from_pretrained(tmp_path / "two").eval()
    assert torch.equal(logits(back, tokens), logits(model, tokens))
