"""The words in the figures of experiments: headings, counts of examples, numbers and names."""

from collections.abc import Sequence

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


def answer_label(answers: Sequence[str], versus: Sequence[str] = ()) -> str:
    """The answer in words, if all examples share it; with `versus`, less that other answer."""
    label = text(answers[0], 12) if len(set(answers)) == 1 else "each example's answer"
    if versus:
        label += f" less {text(versus[0], 12) if len(set(versus)) == 1 else 'another'}"
    return label
