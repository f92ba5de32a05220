"""What the commands share: messages, quiet libraries, names of new files."""

import gc
import itertools
import shutil
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mechvlm.outside.files import printable


def print_stderr(message: str) -> None:
    """Print a message that may hold text of a file or a server: its escapes are written out."""
    # Not with rich, which would read brackets in paths and tokens as markup, and wrap long lines.
    print(printable(message), file=sys.stderr)


def say(message: str) -> None:
    """The same on stdout, for what a command answers."""
    print(printable(message))


def say_lines(text: str, indent: int = 6) -> None:
    """Print lines; in a terminal, long ones go on in the next line, `indent` columns in."""
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    for line in text.split("\n"):
        say(line if width is None else wrapped(line, width, indent))


def wrapped(line: str, width: int, indent: int) -> str:
    """A line, broken between words where it is wider than `width`."""
    start = line[: len(line) - len(line.lstrip())]
    lines = textwrap.wrap(
        line.lstrip(), width, initial_indent=start, subsequent_indent=" " * indent, break_long_words=False,
        break_on_hyphens=False, replace_whitespace=False,
    )  # fmt: skip
    return "\n".join(lines)


@contextmanager
def importing() -> Iterator[None]:
    """A block of imports in which garbage is not collected, nor what they made ever after.

    The libraries' 800,000 objects stay until the end. The collector would walk through them many
    times meanwhile, for every model and figure again, and once more on the way out.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if collects:
            gc.enable()


def quiet_libraries() -> None:
    """Silence the bars of libraries, and their warnings on things that are handled here.

    They would tear the command's own bars.
    """
    import logging
    import os
    import warnings

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", message=".*requires torchvision.*")
    logging.getLogger("matplotlib").setLevel(logging.WARNING)
    # It warns of every retry; if all of them fail, the error says so.
    logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def check_new_file(out: Path) -> None:
    """Raise InputError unless a new file can be written to `out`. Nothing stays there."""
    from mechvlm.errors import InputError

    if out.exists():
        problem = "a folder" if out.is_dir() else "there already, and is not written over"
        raise InputError(f"{out} is {problem}. Give another --out, a file.")
    if not out.parent.is_dir():
        raise InputError(f"The folder {out.parent} is not there. Make it first, or give another --out.")
    try:
        out.touch()
        out.unlink()
    except OSError as error:
        raise InputError(f"Nothing can be written to {out} ({error.strerror}). Give another --out.") from error


def free_name(name: str) -> str:
    """The first of NAME, NAME-2, NAME-3, ... that does not exist, or is an empty folder."""
    first = Path(name)
    names = itertools.chain([name], (f"{first.stem}-{i}{first.suffix}" for i in itertools.count(2)))
    return next(n for n in names if not Path(n).exists() or (Path(n).is_dir() and not any(Path(n).iterdir())))
