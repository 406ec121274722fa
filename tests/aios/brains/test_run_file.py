"""run.json: what it keeps, and what is refused of it."""

import json
from pathlib import Path

import pytest

from aios.brains.run_file import RUN_FILE, RunFile
from aios.settings.actv1 import ACTv1Run
from aios.settings.train import HRMShape, MixtralRun
from chronomoe.errors import CheckpointError

OLD = Path(__file__).parents[2] / "fixtures/0.1.0/workspace/artifacts/brains"


@pytest.mark.parametrize(
    "run", [MixtralRun(seed=3, data=Path("d")), ACTv1Run(seed=3, shape=HRMShape(hidden_size=8), iterate=True)]
)
def test_the_family_says_what_the_run_is(tmp_path, run):
    file = RunFile(family=run.family, run=run, published_step=4, bits_per_byte=1.5, upcycled={"from": "x"})
    file.write_file(tmp_path / RUN_FILE)
    found = RunFile.of(tmp_path / RUN_FILE)
    assert (found, type(found.run)) == (file, type(run))
    assert found.training_json()["seed"] == 3
    assert found.training_json()["max_steps"] == run.resolved().max_steps


@pytest.mark.parametrize("brain", ["mixtral/small", "actv1/thinker"])
def test_a_run_of_0_1_0_is_refused(brain):
    with pytest.raises(CheckpointError, match=r"run\.json was made by version 0\.1\.0, .*; train the brain again"):
        RunFile.of(OLD / brain / RUN_FILE)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"family": "llama"}, "family is 'llama'; use one of mixtral, actv1"),
        ({"family": None}, "family is None"),
        ({"run": []}, r"run: \[\] is no object"),
        ({"run": {"seed": -1}}, "run: seed is -1"),
        ({"run": {"shape": {"num_experts": "4"}}}, "run.shape: num_experts is '4'"),
        ({"run": {"root": "/"}}, "there is no setting 'root'"),
        ({"published_step": -1}, "published_step is -1"),
        ({"bits_per_byte": "1"}, "bits_per_byte is '1'"),
    ],
)
def test_a_damaged_one_names_the_wrong_key(tmp_path, change, said):
    RunFile(family="mixtral", run=MixtralRun()).write_file(tmp_path / RUN_FILE)
    content = json.loads((tmp_path / RUN_FILE).read_text()) | change
    (tmp_path / RUN_FILE).write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=said):
        RunFile.of(tmp_path / RUN_FILE)


def test_a_missing_one(tmp_path):
    with pytest.raises(CheckpointError, match="there is no brain"):
        RunFile.of(tmp_path / RUN_FILE)
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(CheckpointError, match="has lost its run"):
        RunFile.of(tmp_path / RUN_FILE)
