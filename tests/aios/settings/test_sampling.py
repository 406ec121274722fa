import subprocess
import sys

import pytest

from aios.settings.sampling import Sampling
from chronomoe.errors import ConfigError


def test_what_the_sampler_takes():
    assert Sampling(seed=3, halt="max").settings == {
        "max_new_tokens": 100, "temperature": 0.8, "top_p": 0.95, "top_k": 50, "seed": 3,
    }  # fmt: skip
    with pytest.raises(ConfigError, match=r"^halt is 'never'; use one of exact, max\.$"):
        Sampling(halt="never")


def test_settings_import_nothing_heavy():
    code = (
        "import sys, aios.settings.sampling, aios.settings.expert, aios.settings.goals;"
        "sys.exit(bool({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
