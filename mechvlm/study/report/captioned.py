"""Shared by the figures of a study: captions, panels, and curves with their bands."""

import base64
import html
import io
import math
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from mechvlm.figures.saving import save
from mechvlm.figures.style import DARK, PALE, Line, banded, style, text
from mechvlm.intervals import N_RESAMPLES
from mechvlm.study.curves import CONFIDENCE
from mechvlm.study.record import StudyRecord

DOTTED = (0, (1, 1.5))
GREY = "#555555"
MODELS_PER_ROW = 2
"""Models side by side. Further models go into rows beneath, so that the text keeps its size."""


class CaptionedFigure(NamedTuple):
    """A matplotlib figure and its caption, which says what it shows and of how many examples.

    A notebook shows both.

    Example:
        >>> study.plot("lens").save("lens.pdf")
    """

    figure: Figure
    caption: str

    def save(self, path: str | os.PathLike) -> None:
        """Write the figure to a file, in the format of the suffix: .png (200 dpi), .svg, .pdf."""
        save(self.figure, Path(path))

    def _repr_html_(self) -> str:
        file = io.BytesIO()
        with style(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Glyph .* missing")
            self.figure.savefig(file, format="png")
        source = base64.b64encode(file.getvalue()).decode()
        caption = html.escape(self.caption)
        # An inch is as long as in what `plot` of a result shows, whatever the file's own dots.
        width = f"{self.figure.get_figwidth() * self.figure.dpi:.0f}px"
        return (
            f'<figure><img style="width: {width}; max-width: 100%" alt="" src="data:image/png;base64,{source}">'
            f"<figcaption>{caption}</figcaption></figure>"
        )


def panels(
    models: list[str], heights: Sequence[float | int], per_row: int = MODELS_PER_ROW, same_y: bool = False
) -> tuple[Figure, dict[str, list[Axes]]]:
    """Make a figure with a block of axes per model: the figure, and {model: axes, top first}.

    Args:
        models: in this order, `per_row` side by side.
        heights: of the axes in a block, in inches. They share their x axis, the layers.
        per_row: the number of models side by side.
        same_y: whether corresponding axes of all models share their y axis.
    """
    across = min(len(models), per_row)
    down = math.ceil(len(models) / across)
    figure = Figure((1 + 4.6 * across, 0.6 + (0.75 + sum(heights)) * down), layout=ConstrainedLayoutEngine(w_pad=0.09))
    outer = figure.add_gridspec(down, across)
    blocks: dict[str, list[Axes]] = {}
    for i, model in enumerate(models):
        inner = outer[i // across, i % across].subgridspec(len(heights), 1, height_ratios=heights, hspace=0.02)
        block: list[Axes] = []
        for row in range(len(heights)):
            sharey = next(iter(blocks.values()))[row] if same_y and blocks else None
            block.append(figure.add_subplot(inner[row], sharex=block[0] if block else None, sharey=sharey))
        for ax in block[:-1]:
            ax.tick_params(labelbottom=False)
        blocks[model] = block
    return figure, blocks


def draw_curve(
    ax: Axes,
    rows: pd.DataFrame,
    line: Line,
    *,
    x: str = "layer",
    thin: bool = False,
    bands: bool = True,
    spread: bool = True,
) -> None:
    """Draw one measure of one model (rows of `Study.curves`): the mean within its bands.

    NaN is left out. Without `spread` the band of the interval is drawn alone: of more than two
    curves, both bands of each would hide one another.
    """
    rows = rows[rows["mean"].notna()].sort_values(x)
    limits = (0.0, 1.0) if rows["measure"].str.match("precision|recall|word_share").all() else (-1.0, 1.0)
    deviation, ends = None, None
    if bands and rows["low"].notna().any():
        deviation = rows["sd"].to_numpy() if spread else None
        ends = rows["low"].to_numpy(), rows["high"].to_numpy()
    banded(ax, rows[x].to_numpy(), rows["mean"].to_numpy(), line, deviation, ends, limits=limits, thin=thin)


def draw_baseline(ax: Axes, rows: pd.DataFrame, color: str, x: str = "layer") -> None:
    """Draw an anisotropy baseline, which has no spread, as a dotted line. NaN is left out."""
    rows = rows[rows["mean"].notna()].sort_values(x)
    if len(rows):
        ax.plot(rows[x].to_numpy(), rows["mean"].to_numpy(), color=color, linestyle=DOTTED, linewidth=1.1)


def legend(figure: Figure, *axes: Axes, bands: bool = True, spread: bool = True, extra: Sequence = ()) -> None:
    """Draw one legend below the figure.

    It holds the lines of `axes`, then `extra`, and in a last column the bands that were drawn. It
    has as many columns as the figure has room for.
    """
    handles = [handle for ax in axes for handle in ax.get_legend_handles_labels()[0]] + list(extra)
    columns = len(handles)
    if bands:
        columns = min(-(-len(handles) // 2) + 1, int(figure.get_figwidth() // 2.4))
        if columns > 2:
            # Legends are filled column by column, here with two entries each. An empty entry makes
            # the number even, so that the two bands fill the last column.
            handles += [Line2D([], [], linestyle="none", label=" ")] * (len(handles) % 2)
        deviation = Patch(color=GREY, alpha=PALE, linewidth=0, label="± 1 standard deviation")
        opacity = 1 - (1 - PALE) * (1 - DARK) if spread else DARK
        interval = Patch(color=GREY, alpha=opacity, linewidth=0, label=f"{CONFIDENCE:.0%} interval of the mean")
        handles += [deviation, interval] if spread else [interval]
    while True:
        drawn = figure.legend(handles=handles, loc="outside lower center", ncols=columns)
        if columns == 1 or drawn.get_window_extent().width <= figure.bbox.width:
            return
        drawn.remove()
        columns -= 1


def short_name(model: str, models: list[str]) -> str:
    """The last part of a hub id or a path, unless several of the `models` share it."""
    tails = [m.rstrip("/").split("/")[-1] for m in models]
    tail = model.rstrip("/").split("/")[-1]
    return text(tail if tails.count(tail) == 1 and tail else model, 40)


def panel_title(study: StudyRecord, model: str) -> str:
    return f"{short_name(model, list(study.models))}  (n = {study.models[model]['n_examples']})"


def describe_bands(*seeds: int, spread: bool = True) -> str:
    """The sentence of a caption on lines and bands."""
    deviation = "pale bands their standard deviation to either side, darker bands" if spread else "bands"
    return (
        f"Lines are means over examples, {deviation} the {CONFIDENCE:.0%} bootstrap interval of the mean "
        f"({N_RESAMPLES:,} resamples of the examples, seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))})."
    )


def describe_counts(study: StudyRecord) -> str:
    """The sentence of a caption on examples: read and set aside by each model, data, seed."""
    n_aside = study.skipped["model"].value_counts()
    models = [
        f"{short_name(model, list(study.models))} n = {about['n_examples']:,} ({n_aside.get(model, 0):,} set aside)"
        for model, about in study.models.items()
    ]
    usable = study.dataset.get("usable")
    before = f"; {n_aside['']:,} set aside before any model read them" if "" in n_aside else ""
    return (
        f"Examples: {', '.join(models)}; of {study.dataset['n']:,} drawn from "
        f"{f'the {usable:,} of ' if usable else ''}{study.dataset['name']} with seed "
        f"{study.settings['seed']}{before}."
    )
