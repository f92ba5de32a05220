"""Pictures of what a CircuitsVis view first shows, for where scripts or frames are stripped."""

import io
import warnings
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from mechvlm.figures import style as look
from mechvlm.probes.logit_lens import LogitLensResult

CHIP_COLORS = "PuOr_r"
"""Colors for values of either sign; readable for the color-blind."""
CHIPS_PER_LINE = 24


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


def chips(values: Float[Tensor, " pos"], labels: Sequence[str], title: str, unit: str) -> bytes:
    """Tokens in lines, each on the color of its value; a label with a line break ends its line."""
    lines: list[list[int]] = [[]]
    for i, label in enumerate(labels):
        lines[-1].append(i)
        if label.endswith("\n") or len(lines[-1]) == CHIPS_PER_LINE:
            lines.append([])
    lines = [line for line in lines if line]
    width = max(map(len, lines))
    shown = np.full((len(lines), width), np.nan)
    with look.style():
        ax = preview_axes(max(6.0, 2 + 0.42 * width), 1 + 0.3 * len(lines))
        for row, line in enumerate(lines):
            shown[row, : len(line)] = values[line].numpy()
        low, high = min(float(values.min()), 0.0), max(float(values.max()), 0.0)
        most = max(-low, high) or 1.0
        cmap, limits = (CHIP_COLORS, (-most, most)) if low < 0 else ("Blues", (0, most))
        mesh = ax.imshow(shown, cmap=cmap, vmin=limits[0], vmax=limits[1], aspect="auto")
        for row, line in enumerate(lines):
            for col, i in enumerate(line):
                dark = abs(shown[row, col]) > 0.6 * most
                ax.text(
                    col, row, look.text(labels[i], 7), ha="center", va="center", fontsize=5.5,
                    color="white" if dark else "#222222",
                )  # fmt: skip
        ax.set_axis_off()
        ax.set_title(look.text(title, 200))
        ax.figure.colorbar(mesh, ax=ax, label=look.text(unit, 60))
        return to_png(ax)


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
