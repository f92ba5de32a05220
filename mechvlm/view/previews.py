"""Pictures of what a CircuitsVis view first shows, for where scripts or frames are stripped."""

import io
import warnings
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from torch import Tensor

from mechvlm.figures import style as look
from mechvlm.probes.logit_lens import LogitLensResult
from mechvlm.view.drawn import BELOW_COLOR, FRAME_COLOR, drawn_views
from mechvlm.view.pooling import readable
from mechvlm.view.stage import Stage
from mechvlm.view.units import TokenUnits

CHIPS_PER_LINE, CHIP_LINES = 8, 10
"""Words in a line of a picture, and how many lines fit before it grows."""


def preview_axes(width: float | int, height: float | int) -> Axes:
    """Axes of a figure (inches) outside pyplot, so that no notebook shows it by itself."""
    return Figure((width, height), layout="constrained").add_subplot()


def to_png(ax: Axes) -> bytes:
    """The axes' figure as a PNG. A pyplot figure is closed, or a notebook would show it too."""
    import matplotlib.pyplot as plt  # only here, as in `mechvlm.figures.style.axes`

    file = io.BytesIO()
    figure = ax.get_figure(root=True)
    assert figure is not None
    with look.style(), warnings.catch_warnings():
        # Tokens come in more scripts than one font has; the page itself has the reader's fonts.
        warnings.filterwarnings("ignore", "Glyph .* missing")
        figure.savefig(file, format="png", dpi=80)
    plt.close(figure)
    return file.getvalue()


def pattern(values: Float[Tensor, "dest src"], names: Sequence[str], title: str, unit: str) -> bytes:
    """One attention pattern, destinations down, sources across."""
    with look.style():
        side = max(5.0, 1.4 + 0.17 * len(names))
        ax = preview_axes(side + 1, side)
        mesh = ax.imshow(values.numpy(), cmap=look.HEAT, vmin=0)
        labels = [look.text(name, 10) for name in names]
        ax.set_xticks(range(len(names)), labels, rotation=90, fontsize=6)
        ax.set_yticks(range(len(names)), labels, fontsize=6)
        ax.grid(False)
        ax.set_xlabel("source")
        ax.set_ylabel("destination")
        ax.set_title(look.text(title, 200))
        ax.figure.colorbar(mesh, ax=ax, label=unit, shrink=0.8)
        return to_png(ax)


def tokens(units: TokenUnits, values: Sequence[float | None], title: str, unit: str) -> bytes:
    """Values as frames on the images and as colors of the words beside them, each to its largest.

    Args:
        units: a unit for each token.
        values: one for each unit; None for none.
        title: of the picture.
        unit: what the values are.
    """
    views = drawn_views(units.tokens) if units.cells else []
    by_position = np.zeros(len(units.tokens))
    for (position,), value in zip(units.positions, values, strict=True):
        by_position[position] = value or 0.0
    stages = []
    for number, image in enumerate(units.pictures):
        own = [view for view in views if view.image == number]
        heats = [np.where(p < 0, 0.0, by_position[p]) for view in own if (p := view.positions) is not None]
        stages += [Stage(image.convert("RGB"), own, heats)] if own else []
    words = [number for number in range(len(values)) if number not in set(units.cells)]
    with look.style():
        height = max(4.6, 1.2 + 0.3 * -(-len(words) // CHIPS_PER_LINE))
        figure = Figure((4.2 * len(stages) + 5.4, height), layout="constrained")
        ratios = [4.2] * len(stages) + [5.4]
        *left, right = figure.subplots(1, len(ratios), squeeze=False, width_ratios=ratios)[0]
        top = max((float(stage.top) for stage in stages), default=0.0)
        for ax, stage in zip(left, stages, strict=True):
            stage.draw(ax, top)
            ax.set_title(look.text(f"{unit}: at most {top:.3g}", 60), fontweight="normal")
        shown = np.array([np.nan if (value := values[number]) is None else value for number in words])
        chips(right, shown, [units.pieces[number] for number in words], unit)
        figure.suptitle(look.text(title, 200))
        return to_png(right)


def chips(ax: Axes, values: Float[np.ndarray, " word"], labels: Sequence[str], unit: str) -> None:
    """Words in lines of eight, each on the color of its value; NaN stays white."""
    shown = np.full((-(-len(labels) // CHIPS_PER_LINE), CHIPS_PER_LINE), np.nan)
    shown.flat[: len(values)] = values
    most, low = float(np.nanmax(np.abs(values), initial=0.0)) or 1.0, float(np.nanmin(values, initial=0.0))
    # As on the page: words stay readable on the fullest color.
    below, above = (np.array(color) / 255 * 0.58 + 0.42 for color in (BELOW_COLOR, FRAME_COLOR))
    cmap = LinearSegmentedColormap.from_list("chips", ([below] if low < 0 else []) + [np.ones(3), above])
    mesh = ax.imshow(shown, cmap=cmap, vmin=-most if low < 0 else 0.0, vmax=most, aspect="auto")
    for number, label in enumerate(labels):
        row, col = divmod(number, CHIPS_PER_LINE)
        ax.text(col, row, look.text(readable(label), 9), ha="center", va="center", fontsize=7, color="#222222")
    ax.set_xticks(np.arange(CHIPS_PER_LINE) - 0.5)
    ax.set_yticks(np.arange(len(shown)) - 0.5)
    ax.grid(color="white", linewidth=2)
    ax.set_ylim(max(len(shown), CHIP_LINES) - 0.5, -0.5)  # few words do not fill the height
    ax.set_axisbelow(False)
    ax.tick_params(length=0, labelbottom=False, labelleft=False)
    for spine in ax.spines.values():
        spine.set_visible(False)
    ax.figure.colorbar(mesh, ax=ax, location="bottom", shrink=0.7, aspect=36, label=look.text(unit, 60))


def by_layer(values: Float[Tensor, "layer pos"], layers: Sequence[int], title: str, unit: str) -> bytes:
    """What one destination reads from each source, layer by layer."""
    with look.style():
        ax = preview_axes(8, 1.6 + 0.22 * len(layers))
        mesh = look.heatmap(ax, values.numpy(), list(layers))
        ax.set_xlabel("source token, in order")
        ax.set_title(look.text(title, 200))
        ax.figure.colorbar(mesh, ax=ax, label=unit, pad=0.01)
        return to_png(ax)


def words(lens: LogitLensResult) -> bytes:
    """The likeliest tokens at every state, of up to 16 positions, evenly spaced."""
    n = len(lens.position)
    step = -(-n // 16)
    spaced = lens.at(lens.position[::step])
    with look.style():
        ax = spaced.plot(preview_axes(2 + 0.5 * len(spaced.position), 1.6 + 0.28 * len(spaced.states)))
        if step > 1:
            ax.set_title(f"{ax.get_title(loc='left')} ({len(range(0, n, step))} of {n} positions)")
        return to_png(ax)
