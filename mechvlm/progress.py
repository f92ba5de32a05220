"""Progress: a bar over items, a line for waiting, and the bar of a study.

In a terminal they are drawn on stderr by rich. In a notebook they are a line of HTML, which needs
no ipywidgets, and stays as it was left: a bar that is done is full and says how long it took.
"""

import html
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

from rich import progress as rich_progress
from rich.console import Console
from rich.errors import LiveError
from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Column

from mechvlm.outside.files import printable

T = TypeVar("T")
Progress = Callable[[str, int, int], None]
"""Called with the stage of long work, how much of it is done, and its total."""

STDERR = Console(stderr=True)
"""The console of every bar and line. Sharing it lets rich stack two that are shown at once."""
PATIENCE = 0.5
"""Seconds that work may take in a notebook before a bar says what it does."""
EVERY = 0.2
"""Seconds between two changes of a notebook's bar."""


def is_watched() -> bool:
    """Whether rich's moving lines would be seen: in a terminal."""
    # In a notebook rich needs ipywidgets, and without them leaves a red warning instead.
    return STDERR.is_terminal and not STDERR.is_jupyter


class NotebookBar:
    """A bar below a notebook's cell, shown once the work has taken half a second."""

    def __init__(self, label: str):
        self.label = label
        self.since = self.changed = time.monotonic()
        self.done = self.total = 0
        self.note = ""
        self._handle: Any = None
        # Work that says nothing for long, such as the loading of a model, is shown as well.
        self._lock, self._timer = threading.RLock(), threading.Timer(PATIENCE, self._appear)
        self._timer.daemon, self._finished = True, False
        self._timer.start()

    def show(self, done: int, total: int, note: str = "") -> None:
        """Show how much is done, of how much; a `total` of 0 is unknown."""
        with self._lock:
            self.done, self.total, self.note = done, total, note
            if self._handle is not None and time.monotonic() - self.changed >= EVERY:
                self._display()

    def finish(self, word: str = "done") -> None:
        """Leave the bar with the time that it took; one never shown stays so.

        A bar whose work is done is full. Where the count ended early, as that of one model of
        several, it is left out.
        """
        self._timer.cancel()
        with self._lock:
            self._finished, self.note = True, f"{word}, {time.monotonic() - self.since:.0f} s"
            if word == "done" and self.done < self.total:
                self.done = self.total = 1
            if self._handle is not None:
                self._display()

    def _appear(self) -> None:
        with self._lock:
            if not self._finished:
                self._display()

    def _display(self) -> None:
        from IPython.display import display  # a notebook has it

        self.changed = time.monotonic()
        count = f"{self.done} of {self.total}" if self.total > 1 else ""
        text = " · ".join(filter(None, (printable(self.label), count, self.note)))
        bar = f'<progress value="{self.done}" max="{self.total}"></progress> ' if self.total else ""
        shown = {"text/plain": text, "text/html": f"<div>{bar}{html.escape(text)}</div>"}
        if self._handle is None:
            self._handle = display(shown, raw=True, display_id=True)
        else:
            self._handle.update(shown, raw=True)


def track(items: Sequence[T], label: str) -> Iterator[T]:
    """Yield the items one by one, under a bar that names them by `label`.

    The bar is shown in a terminal or a notebook, for two items or more. In a terminal it disappears
    when the items are done.
    """
    if STDERR.is_jupyter and len(items) > 1:
        yield from _track_in_notebook(items, label)
        return
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    hidden = len(items) < 2 or not is_watched()
    with rich_progress.Progress(*columns, console=STDERR, transient=True, disable=hidden) as progress:
        yield from progress.track(items, description=printable(label))


def _track_in_notebook(items: Sequence[T], label: str) -> Iterator[T]:
    bar, word = NotebookBar(label), "stopped"
    try:
        for number, item in enumerate(items):
            bar.show(number, len(items))
            yield item
        bar.show(len(items), len(items))
        word = "done"
    finally:
        bar.finish(word)


class StatusLine:
    """A line that says what is waited for, and for how long. It disappears afterwards.

    Shown on stderr in a terminal, below a bar if one is shown. In a notebook it stays.
    """

    def __init__(self, text: str, shown: bool = True):
        columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
        self._line = rich_progress.Progress(
            *columns, console=STDERR, transient=True, disable=not (shown and is_watched())
        )
        self._task = self._line.add_task(printable(text), total=None)
        self._bar: NotebookBar | None = None
        self._shown, self.text = shown, text

    def __enter__(self) -> "StatusLine":
        if self._shown and STDERR.is_jupyter:
            self._bar = NotebookBar(self.text)
        # rich before 14.1 draws one thing at a time and raises this while a bar is shown.
        with suppress(LiveError):
            self._line.start()
        return self

    def __exit__(self, kind: type | None = None, *_) -> None:
        self._line.stop()
        if self._bar is not None:
            self._bar.finish("done" if kind is None else "stopped")

    def update(self, text: str, also_print: bool = False) -> None:
        """Change the line's text; `also_print` prints it to stderr as well, where it stays."""
        if also_print and text != self.text:
            print(printable(text), file=sys.stderr)
        self.text = text
        self._line.update(self._task, description=printable(text))
        if self._bar is not None:
            self._bar.label = text
            self._bar.show(0, 0)


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
            # In a narrow terminal a stage's name is folded: other columns would lose digits.
            TextColumn("{task.description}", markup=False, table_column=Column(overflow="fold")),
            BarColumn(12 if STDERR.width < 100 else 40, table_column=Column(no_wrap=True)),
            MofNCompleteColumn(), TimeElapsedColumn(),
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


@contextmanager
def study_stages() -> Iterator[Progress]:
    """The `progress` of a study that was given none: bars in a notebook, and nothing elsewhere."""
    stages = _NotebookStages()
    word = "stopped"
    try:
        yield stages.show if STDERR.is_jupyter else lambda stage, done, total: None
        word = "done"
    finally:
        if stages.bar is not None:
            stages.bar.finish(word)


class _NotebookStages:
    """A study's stages in a notebook, one bar each."""

    bar: NotebookBar | None = None
    first = 0

    def show(self, stage: str, done: int, total: int) -> None:
        if self.bar is None or stage != self.bar.label:
            if self.bar is not None:
                self.bar.finish()
            self.bar, self.first = NotebookBar(stage), done
        bar = self.bar
        bar.show(done, total, pace(done - self.first, total - done, time.monotonic() - bar.since) if total else "")
