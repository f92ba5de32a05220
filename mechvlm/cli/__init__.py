"""The command `mechvlm`. Heavy libraries are imported only by the commands that need them.

So `mechvlm --help` does not wait for torch.
"""

import argparse
import difflib
import re
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version

from mechvlm.cli.console import print_stderr
from mechvlm.cli.models import check_model, list_models
from mechvlm.cli.options import parser
from mechvlm.cli.study import run_study
from mechvlm.cli.view import write_view

COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "study": run_study, "view": write_view, "models": list_models, "check": check_model,
}  # fmt: skip
"""What each command does; it returns the exit code."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    0 done, 1 impossible as asked, 2 wrong usage, 3 stopped half-way (the same command continues),
    130 stopped by Ctrl-C, 143 stopped by SIGTERM.

    Args:
        argv: the arguments; by default those of the process.
    """
    typed = list(sys.argv[1:] if argv is None else argv)
    arguments, unknown = parser().parse_known_args(typed)
    arguments.typed = typed
    if unknown:
        arguments.parser.error(f"unrecognized arguments: {' '.join(unknown)}{_meant(unknown, arguments.parser)}")
    if arguments.command == "study":
        _check_usage(arguments)
    if arguments.version:
        print(f"mechvlm {_version()}")
        return 0
    if arguments.command is None:
        parser().print_help()
        return 2
    try:
        return COMMANDS[arguments.command](arguments)
    except KeyboardInterrupt:
        print_stderr("Stopped.")
        return 130
    except BrokenPipeError:
        # The reader of the output (head, less) has ended, so nobody would see a message.
        sys.stderr.close()
        return 1
    except Exception as error:
        message = _user_message(error)
        if message is None:
            raise
        print_stderr(f"Error: {message}")
        return 3 if type(error).__name__ == "StoppedError" else 1


def _check_usage(arguments: argparse.Namespace) -> None:
    if arguments.ray is None and (arguments.workers is not None or arguments.gpus_per_worker is not None):
        arguments.parser.error("--workers and --gpus-per-worker need a Ray cluster: give --ray auto or its address too")
    if arguments.ray is not None and arguments.workers is None:
        arguments.parser.error("--ray needs the number of workers: give --workers N")


def _user_message(error: Exception) -> str | None:
    """The message of an error that the user can do something about; None for a bug."""
    from mechvlm.errors import InputError, ModelError, NonFiniteError, RemoteError, StoppedError, ViewError

    if isinstance(error, InputError | ModelError | NonFiniteError | RemoteError | StoppedError | ViewError):
        return str(error)
    if type(error).__name__ == "OutOfMemoryError":
        return "The device has not enough memory. Try --dtype bfloat16, --device cpu, or for a study a smaller --batch-size."
    return None


def _meant(unknown: Sequence[str], of: argparse.ArgumentParser) -> str:
    """The options of the command that misspelled ones are close to, for a message."""
    known = re.findall(r"--[a-z-]+", of.format_usage())
    near = [match for word in unknown for match in difflib.get_close_matches(word.split("=")[0], known, n=1)]
    return f". Did you mean {' '.join(near)}?" if near else ""


def _version() -> str:
    try:
        return version("mechvlm")
    except PackageNotFoundError:
        return "(not installed)"
