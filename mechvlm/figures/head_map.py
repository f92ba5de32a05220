"""A map of all heads: layers upwards, heads to the right."""

from matplotlib.axes import Axes
from torch import Tensor

from mechvlm.figures.style import color_bar, heatmap, number_ticks


def head_map(ax: Axes, values: Tensor, layers, label: str, **limits) -> None:
    """Draw `values` [layer head] with a color bar that `label` names; NaN stays white."""
    mesh = heatmap(ax, values.numpy(), layers, **limits)
    number_ticks(ax.xaxis, range(values.shape[1]))
    ax.set_xlabel("head")
    color_bar(ax, mesh, label)


def head_map_size(n_layers: int, n_heads: int) -> tuple[float, float]:
    """Width and height of a figure in which such a map can be read, in inches."""
    return min(5.6 + 0.14 * n_heads, 10), min(2 + 0.2 * n_layers, 8)
