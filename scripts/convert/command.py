"""The command line that the conversions share."""

import argparse
import inspect
import sys
from collections.abc import Callable
from pathlib import Path

from tensors import ConversionError


def command(convert: Callable[..., object], options: dict[str, str], arguments: list[str] | None) -> None:
    """Run a conversion as its file's command.

    Args:
        convert: takes `checkpoint`, the options and `out`. Its file's docstring is the help.
        options: what each option beside `--out` is, for the help; all are required.
        arguments: by default those of the process.
    """
    help_text = inspect.getmodule(convert).__doc__ or ""
    parser = argparse.ArgumentParser(
        description=help_text.split("\n")[0], epilog=help_text.split("\n\n", 1)[1],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    checkpoint, *required = options.items()
    parser.add_argument(checkpoint[0], help=checkpoint[1])
    for name, text in (*required, ("out", "the folder to write; new or empty")):
        parser.add_argument(f"--{name}", required=True, help=text)
    try:
        convert(**vars(parser.parse_args(arguments)))
    except ConversionError as error:
        sys.exit(f"{Path(inspect.getfile(convert)).name}: {error}")
