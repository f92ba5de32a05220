"""Progress on stderr: a bar over items, a line for waiting, and the bar of a study."""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from importlib.util import find_spec
from typing import TypeVar

from rich import progress as rich_progress
from rich.console import Console
from rich.errors import LiveError
from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TextColumn, TimeElapsedColumn

from mechvlm.outside.files import printable

T = TypeVar("T")
Progress = Callable[[str, int, int], None]
"""Called with the stage of long work, how much of it is done, and its total."""

STDERR = Console(stderr=True)
"""The console of every bar and line. Sharing it lets rich stack two that are shown at once."""


def is_watched() -> bool:
    """Whether a moving line would be seen: in a terminal, or in a notebook that has ipywidgets."""
    # Without ipywidgets rich draws nothing in a notebook, and leaves a warning there instead.
    return find_spec("ipywidgets") is not None if STDERR.is_jupyter else STDERR.is_terminal


def track(items: Sequence[T], label: str) -> Iterator[T]:
    """Yield the items one by one, under a bar on stderr that names them by `label`.

    The bar is shown in a terminal or in a notebook with ipywidgets, for two items or more. It
    disappears when the items are done.
    """
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    hidden = len(items) < 2 or not is_watched()
    with rich_progress.Progress(*columns, console=STDERR, transient=True, disable=hidden) as progress:
        yield from progress.track(items, description=printable(label))


class StatusLine:
    """A line on stderr that says what is waited for, and for how long. It disappears afterwards.

    Shown in a terminal or in a notebook with ipywidgets; below a bar, if one is shown.
    """

    def __init__(self, text: str, shown: bool = True):
        columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
        self._line = rich_progress.Progress(
            *columns, console=STDERR, transient=True, disable=not (shown and is_watched())
        )
        self._task = self._line.add_task(printable(text), total=None)
        self.text = text

    def __enter__(self) -> "StatusLine":
        # rich before 14.1 draws one thing at a time and raises this while a bar is shown.
        with suppress(LiveError):
            self._line.start()
        return self

    def __exit__(self, *_) -> None:
        self._line.stop()

    def update(self, text: str, also_print: bool = False) -> None:
        """Change the line's text; `also_print` prints it to stderr as well, where it stays."""
        if also_print and text != self.text:
            print(printable(text), file=sys.stderr)
        self.text = text
        self._line.update(self._task, description=printable(text))


def pace(done: int, left: int, seconds: float) -> str:
    """The speed of `done` items in `seconds`, and the time for those left: "4.2/s, 3 min left"."""
    if not done or seconds <= 0:
        return ""
    rate = done / seconds
    # Below one a second, its inverse is what people can picture.
    speed = f"{rate:.1f}/s" if rate >= 1 else f"{seconds / done:.1f} s each"
    remaining = left / rate
    if not left:
        return speed
    if remaining < 90:
        return f"{speed}, {remaining:.0f} s left"
    return f"{speed}, {remaining / 60:.0f} min left" if remaining < 5400 else f"{speed}, {remaining / 3600:.1f} h left"


class StudyBar(rich_progress.Progress):
    """A study's stages in a terminal, one line each. Stages of reading also show their pace.

    The pace covers the examples of all models that this run has read. Examples read by an earlier
    run are on the bar from the start, but do not count towards the pace.
    """

    def __init__(self) -> None:
        super().__init__(
            TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
            TextColumn("{task.fields[pace]}", markup=False), console=STDERR,
        )  # fmt: skip
        self.line = self.add_task("starting", total=None, pace="")
        self.stage = "starting"
        # When the present stage of reading began, and how many examples were done by then.
        self.reading: tuple[float, int] | None = None
        # Examples read, and seconds spent, in the stages of reading before it.
        self.read, self.spent = 0, 0.0

    def show(self, stage: str, done: int, total: int) -> None:
        """Show a stage's progress. This is the `progress` that `mechvlm.study.run` calls."""
        now = time.monotonic()
        if stage != self.stage:
            self.finish()
            self.line, self.stage = self.add_task(printable(stage), total=total or None, pace=""), stage
            self.reading = (now, done) if stage.endswith("reading") else None
        text = ""
        if self.reading is not None:
            since, first = self.reading
            text = pace(self.read + done - first, total - done, self.spent + now - since)
            self.last = now, done
        self.update(self.line, completed=done, total=total or None, pace=text)

    def finish(self) -> None:
        """Close the stage that is shown."""
        if self.reading is not None:
            (since, first), (now, done) = self.reading, self.last
            self.read, self.spent, self.reading = self.read + done - first, self.spent + now - since, None
        else:
            self.update(self.line, total=1, completed=1)
