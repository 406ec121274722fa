import pytest


@pytest.fixture(scope="module")
def bundle(straight):
    return straight / "artifacts/brains/mixtral/straight"


@pytest.fixture
def generate(aios, straight):
    def call(*options, name="straight"):
        return aios("generate", name, "--root", straight, "--max-new-tokens", 25, *options)

    return call


def test_the_seed_decides(generate):
    texts = [generate("--seed", seed).out for seed in (1, 1, 2, 3)]
    assert len(texts[0]) > 5
    assert texts[0] == texts[1]
    assert len(set(texts)) == 3


def test_temperature_0_is_greedy(generate):
    texts = {generate("--temperature", 0, "--prompt", "The", "--seed", seed).out for seed in range(3)}
    assert len(texts) == 1


def test_streaming_changes_no_text(generate):
    assert generate("--prompt", "The ").out == generate("--prompt", "The ", "--no-stream").out


def test_the_prompt_is_shown_first(generate):
    assert generate("--prompt", "h\u00e9llo \U0001f600").out.startswith("h\u00e9llo \U0001f600")
    assert generate("--prompt", "\udcff").out.startswith("?"), "bytes that are no text"


def test_by_name_bundle_and_checkpoint(generate, aios, bundle, straight, tmp_path, monkeypatch):
    wanted = generate().out
    for path in (bundle, bundle / "checkpoints/step_24"):
        assert aios("generate", path, "--max-new-tokens", 25).out == wanted
    assert aios("generate", bundle / "checkpoints/step_8", "--max-new-tokens", 25).out != wanted
    monkeypatch.chdir(bundle.parent)
    assert aios("generate", "straight", "--max-new-tokens", 25).out == wanted, "a folder right here"
    (tmp_path / "straight").mkdir()
    monkeypatch.chdir(tmp_path)
    assert generate().out == wanted, "a folder of the same name is not in the way"


@pytest.mark.parametrize(
    "options",
    [
        ("--temperature", -1),
        ("--temperature", "nan"),
        ("--temperature", "inf"),
        ("--top-p", 0),
        ("--top-p", 1.1),
        ("--seed", -1),
        ("--seed", 2**64),
        ("--prompt", "x" * 5000),
    ],
)
def test_settings_out_of_range(generate, options):
    outcome = generate(*options)
    assert outcome.code == 2
    assert outcome.err.startswith("aios: ")


def test_a_prompt_too_long_says_how_long(generate):
    assert "the model reads 2048; shorten it" in generate("--prompt", "x " * 5000).err


@pytest.mark.parametrize(
    ("name", "code", "said"),
    [
        ("nope", 1, "brains beside it: straight."),
        ("../x", 1, "there is no brain or checkpoint ../x"),
        ("a b", 2, "is not a name"),
    ],
)
def test_a_brain_that_is_not_there(generate, name, code, said):
    outcome = generate(name=name)
    assert (outcome.code, said in outcome.err) == (code, True), outcome.err
