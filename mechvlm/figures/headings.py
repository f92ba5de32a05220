"""What the figures of experiments say in words: headings, counts of examples, numbers and names."""

from collections.abc import Sequence

from matplotlib.axes import Axes
from torch import Tensor

from mechvlm.figures.style import text

INTERVAL = "95 % bootstrap interval"
ALONE = "n = 1 example, so no interval"


def n_examples(values: Tensor) -> str:
    """How many examples have a value at all, of how many."""
    n = values.shape[-1]
    seen = int((~values.isnan()).flatten(0, -2).any(0).sum())
    return f"n = {n} examples" if seen == n else f"n = {seen} of {n} examples"


def window_width(windows: tuple[tuple[int, int], ...]) -> str:
    """The width of the whole windows: at the ends of the decoder they are cut."""
    width = max(stop - start for start, stop in windows)
    return "at one layer" if width == 1 else f"in windows of {width} layers"


def short_name(name: str) -> str:
    """The last part of a hub id or a path."""
    return text(name.rstrip("/").split("/")[-1], 40)


def number(value: float | Tensor, digits: int) -> str:
    # Adding 0 makes a plain 0 of -0.
    return f"{round(float(value), digits) + 0.0:.{digits}f}".replace("-", "−")


def heading(ax: Axes, title: str, note: str, above: int = 6) -> None:
    """A title, and beneath it in plain letters what the reader must know of the numbers; `above` the axes, in points."""
    ax.set_title(title, pad=above + 2 + 10 * (note.count("\n") + 1))
    ax.annotate(
        note, (0, 1), xycoords="axes fraction", xytext=(0, above), textcoords="offset points", fontsize=8, color="#444444",
        va="bottom", linespacing=1.1,
    )  # fmt: skip


def toward(answers: Sequence[str], versus: Sequence[str] = ()) -> str:
    """What was measured, in words: the answer where all examples have the same."""
    shown = text(answers[0], 12) if len(set(answers)) == 1 else "each example's answer"
    if versus:
        shown += f" less {text(versus[0], 12) if len(set(versus)) == 1 else 'another'}"
    return shown
