"""The `aios` command. One module per command; help and completion import neither torch nor transformers.

Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted. Errors are one sentence; --debug shows the traceback.
"""

import io
import os
import signal
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path

import cyclopts
from rich.console import Console

from aios.sentence import sentence
from chronomoe import __version__
from chronomoe.errors import ConfigError

app = cyclopts.App(
    name="aios",
    help="Train, steer and grow small Mixture-of-Experts language models.",
    help_epilogue="Add --debug to any command for the traceback of an error.",
    version=__version__,
    suppress_keyboard_interrupt=False,
)
data = cyclopts.App(name="data", help="Prepare text for training.")
app.command(data)
data.command("aios.cli.data:prepare_command", name="prepare", help="Turn files and folders of text into training data.")
brains = cyclopts.App(name="brains", help="See to the brains of a workspace.")
app.command(brains)
brains.command("aios.cli.brains:list_command", name="list", help="List them.")
brains.command("aios.cli.brains:show_command", name="show", help="Show one.")
brains.command("aios.cli.brains:rename_command", name="rename", help="Give one another name.")
brains.command("aios.cli.brains:delete_command", name="delete", help="Delete one with all its checkpoints.")
brains.command("aios.cli.brains:export_command", name="export-hf", help="Write one as a transformers checkpoint.")
brains.command("aios.cli.brains:upcycle_command", name="upcycle", help="Make one with experts from a dense one.")
app.command("aios.cli.chat:chat", help="Talk to a trained brain.")
app.command("aios.cli.demo:demo", help="Run the whole job on sample text: prepare, train, resume, evaluate, sample.")
app.command("aios.cli.doctor:doctor", help="Print the environment, for a bug report.")
app.command("aios.cli.evaluate:evaluate", help="Measure a brain on held-out text, with its experts and goals.")
experts = cyclopts.App(name="experts", help="See to the experts of a workspace.")
app.command(experts)
experts.command("aios.cli.experts:list_command", name="list", help="List them.")
experts.command("aios.cli.experts:show_command", name="show", help="Show one.")
experts.command("aios.cli.experts:create_command", name="create", help="Enter one that is to be trained later.")
experts.command("aios.cli.experts:train_command", name="train", help="Train one alone in a brain.")
experts.command("aios.cli.experts:attach_command", name="attach", help="Attach one to a brain.")
experts.command("aios.cli.experts:detach_command", name="detach", help="Take one off a brain.")
experts.command("aios.cli.experts:gate_command", name="gate", help="Show what a gate makes of a text.")
experts.command("aios.cli.experts:export_command", name="export", help="Copy the file of one.")
experts.command("aios.cli.experts:import_command", name="import", help="Enter a file from elsewhere.")
experts.command("aios.cli.experts:freeze_command", name="freeze", help="Keep the weights of one from training.")
experts.command("aios.cli.experts:unfreeze_command", name="unfreeze", help="Let one be trained.")
experts.command("aios.cli.experts:activate_command", name="activate", help="Let tokens be routed to one.")
experts.command("aios.cli.experts:deactivate_command", name="deactivate", help="Keep tokens from one.")
experts.command("aios.cli.experts:set_parent_command", name="set-parent", help="Put one below another.")
experts.command("aios.cli.experts:clear_parent_command", name="clear-parent", help="Take one from below its parent.")
experts.command("aios.cli.experts:rename_command", name="rename", help="Give one another id.")
experts.command("aios.cli.experts:delete_command", name="delete", help="Delete one with its weights.")
experts.command("aios.cli.experts:stats_command", name="stats", help="Count them, and who is used how much.")
goals = cyclopts.App(
    name="goals", help="See to the goals of a workspace. `aios goals-add` and so on are the same commands."
)
app.command(goals)
for name, text in {
    "add": "Enter one, or activate it again.",
    "list": "List the active ones, or all.",
    "list-for-expert": "List those of an expert.",
    "get-expert": "Show whom one is linked to.",
    "link-expert": "Link one to an expert.",
    "unlink-expert": "Take links of one away.",
    "weigh": "Let one count for more or less.",
    "activate": "Let one count.",
    "deactivate": "Let one rest.",
    "remove": "Delete one.",
    "remove-like": "Delete those that hold a text.",
}.items():
    place = f"aios.cli.goals:{name.replace('-', '_')}_command"
    goals.command(place, name=name, help=text)
    app.command(place, name=f"goals-{name}", help=text, show=False)
goals.command("aios.cli.goal_use:explain_command", name="explain", help="Show what goals do to a text in a brain.")
goals.command("aios.cli.goal_use:teach_command", name="teach", help="Teach the routers of a brain what goals mean.")
app.command("aios.cli.generate:generate", help="Sample text from a trained brain.")
app.command("aios.cli.init:init", help="Prepare a workspace: sample text, tokenizer, base model.")
app.command(
    "aios.cli.manager:manager",
    name="manager",
    alias="gui",
    help="See and steer a workspace in the browser; also `aios gui`.",
)
app.command("aios.cli.plot:plot", help="Draw a run: loss, control, load, landscape.")
hrm_hf = cyclopts.App(name="hrm-hf", help="Train hierarchical reasoning models.")
app.command(hrm_hf)
hrm_hf.command(
    "aios.cli.hrm_hf:train_actv1_command", name="train-actv1", help="Train an HRM ACTv1 with experts on a text."
)
hrm_hf.command("aios.cli.hrm_hf:arch_summary", name="arch-summary", help="Print what an architecture costs.")
app.command("aios.cli.train:train", help="Train a Mixtral-style brain.")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line and exit with its code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a model may write what the terminal cannot show
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C; training takes both over while it runs
    end = words.index("--") if "--" in words else len(words)  # what follows is text
    debug = "--debug" in words[:end] or os.environ.get("AIOS_DEBUG") == "1"
    sys.exit(run([word for word in words[:end] if word != "--debug"] + words[end:], debug=debug))


def run(words: Sequence[str], *, debug: bool = False) -> int:
    """Run one command line; returns the exit code."""
    try:
        if list(words[:2]) == ["hrm-hf", "train-actv1"]:
            from aios.cli.hrm_hf import refuse

            refuse(list(words[2:]))
        _read_config_file(words)
        result = app(words, exit_on_error=False, print_error=True, result_action="return_value")
        return result if isinstance(result, int) else 0
    except cyclopts.CycloptsError:
        return 2
    except KeyboardInterrupt:
        _complain("interrupted; what was saved before is untouched.")
        return 130
    except BrokenPipeError:
        # The reader (head, less) has seen enough; Python would complain once more when it flushes at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if debug:
            raise
        _complain(sentence(error))
        return 2 if isinstance(error, ConfigError) else 1


def _complain(words: str) -> None:
    Console(stderr=True, highlight=False, markup=False, soft_wrap=True).print(f"aios: {words}")


def _read_config_file(words: Sequence[str]) -> None:
    """Let the keys of --config FILE stand in for flags that are not given."""
    app.config = ()
    for position, word in enumerate(words):
        name, _, path = word.partition("=")
        if name == "--config":
            path = path or (words[position + 1] if position + 1 < len(words) else "")
            if not os.path.isfile(path):
                raise ConfigError(f"there is no config file {path or '(none given)'}.")
            try:
                values = tomllib.loads(Path(path).read_text(encoding="utf-8"))
            except ValueError as error:
                raise ConfigError(f"{path} is not valid TOML: {error}.") from error
            # Below its command, for cyclopts takes a key at the top that is a command's name (data) for that command.
            for command in reversed(app.parse_commands(words)[0]):
                values = {command: values}
            app.config = (cyclopts.config.Dict(values, source=path),)
