"""What the study's figures share: a figure with its caption, panels, curves with their bands, and what a caption counts."""

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

from mechvlm.figures.style import DARK, PALE, Line, banded, style, text
from mechvlm.intervals import N_RESAMPLES
from mechvlm.study.curves import CONFIDENCE
from mechvlm.study.record import StudyRecord

DOTTED = (0, (1, 1.5))
GREY = "#555555"
ACROSS = 2
"""Models side by side; more stand beneath them, so that letters stay as large."""


class CaptionedFigure(NamedTuple):
    """A figure of matplotlib's, and the caption that says what it shows and of how many examples."""

    figure: Figure
    caption: str

    def save(self, path: str | os.PathLike) -> None:
        """Write the figure, as what the file's name ends in: .png (200 dpi), .svg, .pdf."""
        # No date, so that the same study gives the same file.
        date = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}
        with style(), warnings.catch_warnings():
            # A token of a script that the font lacks shows as a box.
            warnings.filterwarnings("ignore", message="Glyph .* missing")
            self.figure.savefig(path, metadata=date.get(Path(path).suffix.lower()))

    def _repr_html_(self) -> str:
        file = io.BytesIO()
        with style(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Glyph .* missing")
            self.figure.savefig(file, format="png")
        source = base64.b64encode(file.getvalue()).decode()
        caption = html.escape(self.caption)
        return (
            f'<figure><img style="max-width: 100%" alt="" src="data:image/png;base64,{source}">'
            f"<figcaption>{caption}</figcaption></figure>"
        )


def panels(
    models: list[str], heights: Sequence[float | int], most: int = ACROSS, same_y: bool = False
) -> tuple[Figure, dict[str, list[Axes]]]:
    """A figure with a block for each model, in rows of `most`: axes of the given heights (inches) that share their layers."""
    across = min(len(models), most)
    down = math.ceil(len(models) / across)
    figure = Figure((1 + 4.6 * across, 0.6 + (0.75 + sum(heights)) * down), layout=ConstrainedLayoutEngine(w_pad=0.09))
    outer = figure.add_gridspec(down, across)
    blocks: dict[str, list[Axes]] = {}
    for i, model in enumerate(models):
        inner = outer[i // across, i % across].subgridspec(len(heights), 1, height_ratios=heights, hspace=0.02)
        block: list[Axes] = []
        for row in range(len(heights)):
            like = next(iter(blocks.values()))[row] if same_y and blocks else None
            block.append(figure.add_subplot(inner[row], sharex=block[0] if block else None, sharey=like))
        for ax in block[:-1]:
            ax.tick_params(labelbottom=False)
        blocks[model] = block
    return figure, blocks


def line_of(
    ax: Axes, rows: pd.DataFrame, line: Line, *, x: str = "layer", thin: bool = False, bands: bool = True
) -> None:
    """One measure of `Study.curves` of one model: its mean within its bands; NaN is left out."""
    rows = rows[rows["mean"].notna()].sort_values(x)
    limits = (0.0, 1.0) if rows["measure"].str.match("precision|recall").all() else (-1.0, 1.0)
    spread, ends = None, None
    if bands and rows["low"].notna().any():
        spread, ends = rows["sd"].to_numpy(), (rows["low"].to_numpy(), rows["high"].to_numpy())
    banded(ax, rows[x].to_numpy(), rows["mean"].to_numpy(), line, spread, ends, limits=limits, thin=thin)


def dotted(ax: Axes, rows: pd.DataFrame, color: str, x: str = "layer") -> None:
    """The anisotropy baseline, which has no spread; nothing where it could not be told."""
    rows = rows[rows["mean"].notna()].sort_values(x)
    if len(rows):
        ax.plot(rows[x].to_numpy(), rows["mean"].to_numpy(), color=color, linestyle=DOTTED, linewidth=1.1)


def legend(figure: Figure, *axes: Axes, bands: bool = True, extra: Sequence = ()) -> None:
    """One legend beneath everything: the axes' lines and `extra`, and in a last column what the bands are."""
    handles = [handle for ax in axes for handle in ax.get_legend_handles_labels()[0]] + list(extra)
    columns = len(handles)
    if bands:
        columns = min(-(-len(handles) // 2) + 1, int(figure.get_figwidth() // 2.4))
        if columns > 2:
            # Legends are filled column by column: here each holds two, and the bands are the last.
            handles += [Line2D([], [], linestyle="none", label=" ")] * (len(handles) % 2)
        handles += [
            Patch(color=GREY, alpha=PALE, linewidth=0, label="± 1 standard deviation"),
            Patch(
                color=GREY,
                alpha=1 - (1 - PALE) * (1 - DARK),
                linewidth=0,
                label=f"{CONFIDENCE:.0%} interval of the mean",
            ),
        ]
    figure.legend(handles=handles, loc="outside lower center", ncols=columns)


def short(model: str, among: list[str]) -> str:
    """The last part of a hub id or a path, where that tells the models apart."""
    tails = [m.rstrip("/").split("/")[-1] for m in among]
    tail = model.rstrip("/").split("/")[-1]
    return text(tail if tails.count(tail) == 1 and tail else model, 40)


def title(study: StudyRecord, model: str) -> str:
    return f"{short(model, list(study.models))}  (n = {study.models[model]['n_examples']})"


def bands(*seeds: int) -> str:
    """What every caption says of lines and bands."""
    return (
        "Lines are means over examples, pale bands their standard deviation to either side, darker bands the "
        f"{CONFIDENCE:.0%} bootstrap interval of the mean ({N_RESAMPLES:,} resamples of the examples, "
        f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))})."
    )


def counts(study: StudyRecord) -> str:
    """What every caption counts: examples read and set aside by each model, the data and the seed of its draw."""
    aside = study.skipped["model"].value_counts()
    models = [
        f"{short(model, list(study.models))} n = {about['n_examples']:,} ({aside.get(model, 0):,} set aside)"
        for model, about in study.models.items()
    ]
    usable = study.dataset.get("usable")
    before = f"; {aside['']:,} set aside before any model read them" if "" in aside else ""
    return (
        f"Examples: {', '.join(models)}; of {study.dataset['n']:,} drawn from "
        f"{f'the {usable:,} of ' if usable else ''}{study.dataset['name']} with seed "
        f"{study.settings['seed']}{before}."
    )
