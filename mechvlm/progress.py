"""One progress bar for everything that takes its time."""

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

T = TypeVar("T")
Progress = Callable[[str, int, int], None]
"""Called with a stage of long work, how much of it is done, and how much there is."""

STDERR = Console(stderr=True)
"""Of all that is drawn: two on one screen must know of each other."""


def somebody_looks() -> bool:
    """Whether a line that moves would be seen: in a terminal, or in a notebook that has ipywidgets."""
    # Without ipywidgets rich draws nothing in a notebook, and leaves a warning there instead.
    return find_spec("ipywidgets") is not None if STDERR.is_jupyter else STDERR.is_terminal


def track(items: Sequence[T], what: str) -> Iterator[T]:
    """The items one by one, with a bar on stderr that says `what` they are and goes away when they are done.

    Shown where somebody looks, in a terminal or in a notebook that has ipywidgets, and for more than one item.
    """
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    hidden = len(items) < 2 or not somebody_looks()
    with rich_progress.Progress(*columns, console=STDERR, transient=True, disable=hidden) as progress:
        yield from progress.track(items, description=what)


class StatusLine:
    """One line on stderr that says what is waited for, and for how long; it goes away when that is over.

    Shown where somebody looks; under a bar, where one is drawn.
    """

    def __init__(self, text: str, shown: bool = True):
        columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
        self._line = rich_progress.Progress(
            *columns, console=STDERR, transient=True, disable=not (shown and somebody_looks())
        )
        self._task = self._line.add_task(text, total=None)
        self.text = text

    def __enter__(self) -> "StatusLine":
        with suppress(LiveError):  # rich before 14.1 draws one thing at a time: then there is a bar already
            self._line.start()
        return self

    def __exit__(self, *_) -> None:
        self._line.stop()

    def say(self, text: str, aloud: bool = False) -> None:
        """Change the line; `aloud` writes what is new as a line that stays, wherever stderr goes."""
        if aloud and text != self.text:
            print(text, file=sys.stderr)
        self.text = text
        self._line.update(self._task, description=text)


def pace(done: int, left: int, seconds: float) -> str:
    """How fast things went, `done` in so many seconds, and how long those that are left will take: "4.2/s, 3 min left"."""
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
    """A study's stages in a terminal, one line each; the examples of all models on one line, with their pace.

    The pace is that of this run: what an earlier one did stands on the bar from the beginning, and counts for no speed.
    """

    def __init__(self) -> None:
        super().__init__(
            TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
            TextColumn("{task.fields[pace]}", markup=False), console=STDERR,
        )  # fmt: skip
        self.line = self.add_task("starting", total=None, pace="")
        self.stage = "starting"
        self.reading: tuple[float, int] | None = None  # this stage's start, and what was done by then
        self.read, self.spent = 0, 0.0  # by the stages of reading before it

    def show(self, stage: str, done: int, total: int) -> None:
        """As `mechvlm.study.run` calls its `progress`."""
        now = time.monotonic()
        if stage != self.stage:
            self.finish()
            self.line, self.stage = self.add_task(stage, total=total or None, pace=""), stage
            self.reading = (now, done) if stage.endswith("reading") else None
        text = ""
        if self.reading is not None:
            since, first = self.reading
            text = pace(self.read + done - first, total - done, self.spent + now - since)
            self.last = now, done
        self.update(self.line, completed=done, total=total or None, pace=text)

    def finish(self) -> None:
        """The stage that is shown is done."""
        if self.reading is not None:
            (since, first), (now, done) = self.reading, self.last
            self.read, self.spent, self.reading = self.read + done - first, self.spent + now - since, None
        else:
            self.update(self.line, total=1, completed=1)
