"""One progress bar for everything that takes its time."""

from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

T = TypeVar("T")


def track(items: Sequence[T], what: str) -> Iterator[T]:
    """The items one by one, with a bar on stderr that says `what` they are and goes away when they are done.

    Shown where somebody looks, in a terminal or in a notebook that has ipywidgets, and for more than one item.
    """
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    # Without ipywidgets rich draws nothing in a notebook, and leaves a warning there instead.
    somebody = find_spec("ipywidgets") is not None if console.is_jupyter else console.is_terminal
    hidden = len(items) < 2 or not somebody
    with Progress(*columns, console=console, transient=True, disable=hidden) as progress:
        yield from progress.track(items, description=what)
