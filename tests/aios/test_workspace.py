import shlex
from pathlib import Path

import pytest

from aios.workspace import Workspace
from chronomoe.errors import ConfigError


@pytest.mark.parametrize("name", ["", "../x", "a/b", ".hidden", "-x", "a b", "x" * 65, "a\n", "/abs"])
def test_a_brain_cannot_be_named_out_of_its_place(name):
    with pytest.raises(ConfigError, match="is not a name"):
        Workspace().brain(name)


def test_commands_can_be_pasted():
    assert Workspace().command("train", "--resume") == "aios train --resume"
    assert shlex.split(Workspace(Path("my work")).command("generate", "a")) == [
        *("aios", "generate", "a", "--root", "my work")
    ]
    assert Workspace(Path("w")).command("goals", "add", "--", "-x") == "aios goals add --root w -- -x"
