"""matplotlib's settings: what figures set, and what they take from the user's own rcParams."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import matplotlib as mpl

UNCHANGED: tuple[tuple[tuple[str, ...], dict[str, Any]], ...] = (
    (("axes.spines.top",), {"axes.spines.top": False}),
    (("axes.spines.right",), {"axes.spines.right": False}),
    (
        ("axes.grid", "axes.axisbelow", "grid.color", "grid.linewidth"),
        {"axes.grid": True, "axes.axisbelow": True, "grid.color": "#e4e4e4", "grid.linewidth": 0.6},
    ),
    (("font.size", "axes.titlesize"), {"axes.titlesize": "medium"}),
    (("font.size", "legend.fontsize"), {"legend.fontsize": "small"}),
)
"""Of a new figure, where the user's own rcParams are still matplotlib's: (those, ours instead)."""
ALWAYS = {"text.usetex": False}
"""Tokens hold any character, and most of them mean something else to LaTeX."""
SAVED = {"pdf.fonttype": 42, "ps.fonttype": 42, "svg.fonttype": "none"}
"""Letters stay letters in a saved file: TrueType. Venues refuse matplotlib's own Type 3."""


def unchanged() -> dict[str, Any]:
    """What of `UNCHANGED` the user has not set otherwise."""
    now: Any = mpl.rcParams
    default: Any = mpl.rcParamsDefault
    chosen = [ours for keys, ours in UNCHANGED if all(now[key] == default[key] for key in keys)]
    return {key: value for ours in chosen for key, value in ours.items()}


@contextmanager
def settings(values: dict[str, Any]) -> Iterator[None]:
    """Context with these rcParams; it changes nothing outside."""
    # mpl.rc_context would undo too much: in a notebook the first figure loads the backend, which
    # turns on interactive mode for good. Undone, no later figure would be shown.
    now: Any = mpl.rcParams
    before = {key: now[key] for key in values}
    now.update(values)
    try:
        yield
    finally:
        now.update(before)


def marker_size(thin: bool = False) -> float:
    """The size of a curve's markers in points: half a letter, also in a journal's small type."""
    return (0.3 if thin else 0.45) * float(mpl.rcParams["font.size"])


def pen(color: str = "#222222") -> str:
    """A dark grey for lines and words, or the user's own color of text, as on a dark background."""
    own = mpl.rcParams["text.color"]
    return color if own == mpl.rcParamsDefault["text.color"] else own
