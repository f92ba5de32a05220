"""What the `plot` of every result shares: where it draws, its title, its size, and one example.

A result's `plot` is a function of a `Canvas`, under the decorator `plots`, which gives it the same
four arguments everywhere:

>>> fig, (left, right) = plt.subplots(1, 2, figsize=(7, 2.5), layout="constrained")
>>> lens.plot(left, example=0)
>>> norms.plot(right, title="What the last token reads")

The figure keeps the user's own rcParams: fonts, sizes, colors. Where these are still matplotlib's,
a new figure has a pale grid, fewer spines, and smaller titles and legends.

A figure that `plot` opens belongs to pyplot, as with pandas: a notebook shows it at the end of its
cell, `plt.show()` in a window, and a script that makes many closes them with `plt.close`. On given
axes pyplot is not even loaded.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mechvlm.figures.fitted import fit, settle
from mechvlm.figures.panels import top_axis
from mechvlm.figures.settings import ALWAYS, SAVED, pen, settings, unchanged

Size = tuple[float | int, float | int]
"""Width and height in inches."""

SHARED_ARGUMENTS = """
Shared by all plots:
    ax: where to draw; by default a new figure.
    title: instead of this plot's own; False leaves the title and the note beneath it out.
    figsize: (width, height) of the new figure in inches.
    example: the number of one example, to plot it alone.
"""


class TrueTypeFigure(Figure):
    """A figure that saves letters as letters of a font, whoever calls `savefig`."""

    def draw(self, renderer) -> None:
        """As matplotlib's, once the layout has room for the lines into which its titles break."""
        settle(self)
        super().draw(renderer)

    def savefig(self, *args, **kwargs) -> None:
        """As matplotlib's, with TrueType fonts in PDF and PS, and text in SVG."""
        with settings(SAVED):
            super().savefig(*args, **kwargs)


@dataclass(frozen=True)
class Canvas:
    """Where a result is drawn.

    Attributes:
        ax: the axes, given or new.
        title: as the caller wants it: None for the plot's own, False for none, or the words.
        example: the number of the only example, where the caller chose one.
        is_new: whether the figure was made for this plot.
    """

    ax: Axes
    title: str | bool | None
    example: int | None
    is_new: bool

    def head(self, title: str, note: str = "", ax: Axes | None = None) -> None:
        """Write the title, and a note on what the numbers are between it and the axes.

        `ax.set_title` replaces the title later. The note is the label of a second x axis at the
        top, so that matplotlib keeps every title above it.

        Args:
            title: unless the caller chose another.
            note: one line or several.
            ax: the axes that get both; by default this canvas's own.
        """
        if self.title is False:
            return
        ax = self.ax if ax is None else ax
        fit(ax.set_title(title if self.title is None else str(self.title)), ax)
        if self.example is not None:
            note = f"example {self.example}" + (f"; {note}" if note else "")
        if note:
            place = mpl.rcParams["axes.titlelocation"]
            top_axis(ax).set_xlabel(
                note, loc=place, fontsize="small", color=pen("#444444"), labelpad=4, linespacing=1.1
            )
            fit(top_axis(ax).xaxis.label, ax)


def plots(
    size: Size | Callable[..., Size] = (6, 3.6), stacked: bool = False
) -> Callable[[Callable], Callable[..., Axes]]:
    """Make `plot(self, ax=None, title=None, figsize=None, example=None, ...)` of `draw`.

    That one is `draw(self, canvas, ...)`; its own options follow the shared ones.

    Args:
        size: of a new figure, or a function that gives it for the result and the options.
        stacked: whether there are panels one above the other, which need a higher row of a grid.
    """

    def decorate(draw: Callable) -> Callable[..., Axes]:
        me, _, *own = inspect.signature(draw).parameters.values()
        shared = [inspect.Parameter(name, me.kind, default=None) for name in ("ax", "title", "figsize", "example")]
        own = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in own]
        signature = inspect.Signature([me, *shared, *own])

        @wraps(draw)
        def plot(self, *args, **kwargs):
            options = signature.bind(self, *args, **kwargs).arguments
            ax, title, figsize, example = (options.pop(parameter.name, None) for parameter in shared)
            result = self if example is None else self.single(example)
            del options[me.name]
            with canvas(ax, title, figsize, size(result, **options) if callable(size) else size, example) as drawn_on:
                before = set(drawn_on.ax.figure.axes) - {drawn_on.ax}
                draw(result, drawn_on, **options)
                for axes in set(drawn_on.ax.figure.axes) - before:
                    for words in (axes.title, axes.xaxis.label, axes.yaxis.label):
                        fit(words, axes)
            return drawn_on.ax

        plot.stacked = stacked  # type: ignore[attr-defined]
        plot.__signature__ = signature  # type: ignore[attr-defined]
        del plot.__wrapped__  # type: ignore[attr-defined]  # whose parameters are others
        plot.__doc__ = f"{inspect.cleandoc(draw.__doc__ or '')}\n{SHARED_ARGUMENTS}"
        return plot

    return decorate


@contextmanager
def canvas(
    ax: Axes | None, title: str | bool | None, figsize: Size | None, size: Size, example: int | None = None
) -> Iterator[Canvas]:
    """The given axes, or those of a new pyplot figure; a new figure is closed again on an error.

    Raises:
        ValueError: for both `ax` and `figsize`: given axes have their figure's size.
        TypeError: for an `ax` that is no axes, or a title that is neither words, None nor False.
    """
    if title is not None and title is not False and not isinstance(title, str):
        raise TypeError(f"title={title!r} was given: a title is words, or False for none.")
    if ax is not None:
        if not isinstance(ax, Axes):
            raise TypeError(f"ax is a matplotlib Axes, not {type(ax).__name__}: of several, give one.")
        if figsize is not None:
            raise ValueError(f"figsize={figsize} is for a new figure; these axes have one: ax.figure.set_size_inches.")
        keep_letters(ax)
        with settings(ALWAYS):
            yield Canvas(ax, title, example, is_new=False)
        return
    with new_figure(size if figsize is None else figsize) as figure:
        yield Canvas(figure.add_subplot(), title, example, is_new=True)


@contextmanager
def new_figure(size: Size) -> Iterator[Figure]:
    """A new pyplot figure in the user's style; it is closed again on an error."""
    import matplotlib.pyplot as plt  # only here: a study draws on its own figures, without pyplot

    with settings(ALWAYS | unchanged()):
        figure = plt.figure(figsize=size, layout="constrained", FigureClass=TrueTypeFigure)
        try:
            yield figure
        except BaseException:
            plt.close(figure)
            raise


def keep_letters(ax: Axes) -> None:
    """Let the figure that the caller made save its letters as `TrueTypeFigure` does."""
    figure = ax.get_figure(root=True)
    if type(figure) is Figure:
        figure.__class__ = TrueTypeFigure
