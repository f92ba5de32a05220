"""Saves figures as files: each is laid out once for all of them, and some of them elsewhere.

matplotlib draws in Python, on one core. So a process of its own takes part. It starts in half a
second, for it imports matplotlib and nothing of models.
"""

import pickle
import subprocess
import sys
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import matplotlib as mpl
from matplotlib.figure import Figure

from mechvlm.figures.settings import settings
from mechvlm.figures.style import style

FIGURE_FORMATS = ("png", "svg", "pdf")
"""The files of each figure of a report."""


def save(figure: Figure, path: Path) -> None:
    """Write the figure in the format of the suffix, with the look of reports and without a date."""
    # Without a date the same study gives the same file.
    no_date = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}
    with style(), warnings.catch_warnings():
        # Where the font lacks a script, its tokens show as boxes.
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        figure.savefig(path, metadata=no_date.get(path.suffix.lower()))


def save_formats(figure: Figure, folder: Path, name: str) -> None:
    """Write the figure in all `FIGURE_FORMATS`, with the layout of the PNG."""
    with laid_out(figure):
        for suffix in FIGURE_FORMATS:
            save(figure, folder / f"{name}.{suffix}")


@contextmanager
def laid_out(figure: Figure) -> Iterator[None]:
    """Find the figure's layout at the resolution of saved files, and keep it in the block.

    With an engine of layouts, even one that does nothing, matplotlib draws everything once more for
    each file.
    """
    engine, resolution = figure.get_layout_engine(), figure.dpi
    assert engine is not None  # every figure of a study is made with one
    with style(), settings({"figure.autolayout": False, "figure.constrained_layout.use": False}):
        figure.dpi = mpl.rcParams["savefig.dpi"]
        engine.execute(figure)
        figure.dpi = resolution
        figure.set_layout_engine(None)
        yield
    figure.set_layout_engine(engine)


def save_each(figures: Iterable[tuple[str, Figure]], folder: Path) -> None:
    """Write each figure in all `FIGURE_FORMATS`, in this process or one beside it.

    The other one begins before the first figure is asked for, so they may be drawn meanwhile. It
    gets the first one, and another whenever it has none; so the first should be the one that takes
    longest. Where it cannot run, as in a Python whose modules it does not find, this one saves all:
    the files are the same.

    Raises:
        OSError: of either process, such as for a full disk.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(1, "mechvlm-figures") as asking, _process() as process:
        elsewhere: list[tuple[str, Figure, Future[bool]]] = []
        for name, figure in figures:
            if process is not None and all(saved.done() for _, _, saved in elsewhere):
                elsewhere.append((name, figure, asking.submit(_was_saved, process, figure, folder, name)))
            else:
                save_formats(figure, folder, name)
        for name, figure, saved in elsewhere:
            if not saved.result():
                save_formats(figure, folder, name)


@contextmanager
def _process() -> Iterator[subprocess.Popen | None]:
    """The process beside, until the end of the block; None where none can be started.

    It is out of reach of Ctrl-C in a terminal: that ends this process, which ends the other.
    """
    try:
        process = subprocess.Popen(
            [sys.executable, "-m", __name__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            start_new_session=True,
        )  # fmt: skip
    except OSError:
        yield None
        return
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def _was_saved(process: subprocess.Popen, figure: Figure, folder: Path, name: str) -> bool:
    """Have the process save the figure, and raise its error. False if the process is gone.

    One that answers anything else is ended: it must not write while this process does.
    """
    assert process.stdin is not None
    assert process.stdout is not None
    own = dict.copy(mpl.rcParams)  # asked in any other way, it would choose a backend
    del own["backend"]
    try:
        process.stdin.write(pickle.dumps((own, figure, folder, name)))
        process.stdin.flush()
        error = pickle.load(process.stdout)
    except (BrokenPipeError, EOFError, pickle.UnpicklingError):
        process.kill()
        process.wait()
        return False
    if error is not None:
        raise error
    return True


def serve(orders: BinaryIO, replies: BinaryIO) -> None:
    """Save figures as they come in, until there are no more; answer each with None or its error."""
    while True:
        try:
            own, figure, folder, name = pickle.load(orders)
        except EOFError:
            return
        error = None
        try:
            mpl.rcParams.update(own)
            save_formats(figure, folder, name)
        except OSError as raised:
            error = raised
        pickle.dump(error, replies)
        replies.flush()


if __name__ == "__main__":
    serve(sys.stdin.buffer, sys.stdout.buffer)
