"""The words in the figures of experiments: headings, counts of examples, numbers and names."""

from collections.abc import Sequence

from matplotlib.axes import Axes
from torch import Tensor

from mechvlm.figures.style import text

INTERVAL = "95 % bootstrap interval"
ALONE = "n = 1 example, so no interval"
"""Stands in a note in place of `INTERVAL` when there is only one example."""


def n_examples(values: Tensor) -> str:
    """How many examples of `values` [..., example] have a number that is not NaN, in words."""
    n = values.shape[-1]
    with_value = int((~values.isnan()).flatten(0, -2).any(0).sum())
    return f"n = {n} examples" if with_value == n else f"n = {with_value} of {n} examples"


def window_width(windows: tuple[tuple[int, int], ...]) -> str:
    """The width of the widest window, in words: the decoder's ends cut the others short."""
    width = max(stop - start for start, stop in windows)
    return "at one layer" if width == 1 else f"in windows of {width} layers"


def short_name(name: str) -> str:
    """The last part of a hub id or a path."""
    return text(name.rstrip("/").split("/")[-1], 40)


def number(value: float | Tensor, digits: int) -> str:
    """A number with this many decimals and a true minus sign; -0 becomes 0."""
    return f"{round(float(value), digits) + 0.0:.{digits}f}".replace("-", "−")


def heading(ax: Axes, title: str, note: str, above: int = 6) -> None:
    """A title, and beneath it a note in plain letters on what the numbers are.

    Args:
        ax: gets the title and the note.
        title: in bold.
        note: one line or several.
        above: distance of the note from the axes, in points.
    """
    ax.set_title(title, pad=above + 2 + 10 * (note.count("\n") + 1))
    ax.annotate(
        note, (0, 1), xycoords="axes fraction", xytext=(0, above), textcoords="offset points", fontsize=8, color="#444444",
        va="bottom", linespacing=1.1,
    )  # fmt: skip


def answer_label(answers: Sequence[str], versus: Sequence[str] = ()) -> str:
    """The answer in words, if all examples share it; with `versus`, less that other answer."""
    label = text(answers[0], 12) if len(set(answers)) == 1 else "each example's answer"
    if versus:
        label += f" less {text(versus[0], 12) if len(set(versus)) == 1 else 'another'}"
    return label
