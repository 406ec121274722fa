import shlex


def test_next_command_works_when_pasted(made, aios):
    root, printed = made
    words = shlex.split(printed.splitlines()[-1].removeprefix("Next: "))
    assert words[:2] == ["aios", "train"]
    outcome = aios(*words[1:], "--dry-run", "--seq-len", 8, "--num-layers", 1)
    assert outcome.code == 0
    assert "3,000 steps x 64 tokens" in outcome.out
    assert not (root / "artifacts/brains").exists()


def test_twice_changes_nothing_and_overwrite_makes_it_anew(workspace, aios):
    def contents():
        # data.json names the sources, and the workspace is a copy from another place.
        return {path: path.read_bytes() for path in workspace.rglob("*") if path.is_file() and path.name != "data.json"}

    files = contents()
    toml, config = workspace / "run.toml", workspace / "artifacts/hf_implant/base_model/config.json"
    toml.write_text("max_steps = 5\n")
    config.unlink()
    again = ("init", "--root", workspace, "--max-bytes", 60000, "--vocab-size", 400)
    assert aios(*again).code == 0
    assert toml.read_text() == "max_steps = 5\n"
    assert config.read_bytes() == files[config]
    assert aios(*again, "--overwrite").code == 0
    assert contents() == files


def test_a_place_that_cannot_be_written(aios, tmp_path):
    (tmp_path / "file").write_text("")
    outcome = aios("init", "--root", tmp_path / "file", "--max-bytes", 1000)
    assert outcome.code == 1
    assert "file/training_data: Not a directory." in outcome.err


def test_settings_that_cannot_work(aios, tmp_path):
    outcome = aios("init", "--root", tmp_path / "w", "--vocab-size", 3, "--max-bytes", 1000)
    assert outcome.code == 2
    assert "vocab_size must be at least 257" in outcome.err
    assert not (tmp_path / "w/run.toml").exists()
