"""A map of all heads: layers upwards, heads to the right."""

from matplotlib.axes import Axes
from torch import Tensor

from mechvlm.figures.style import heatmap


def head_map(ax: Axes, values: Tensor, layers, label: str, **limits) -> None:
    """Draw `values` [layer head] with a color bar that `label` names; NaN stays white."""
    n_heads = values.shape[1]
    mesh = heatmap(ax, values.numpy(), layers, **limits)
    ax.set_xticks(range(0, n_heads, -(-n_heads // 16)))
    ax.set_xlabel("head")
    ax.figure.colorbar(mesh, ax=ax, label=label, pad=0.02).outline.set_visible(False)


def head_map_size(n_layers: int, n_heads: int) -> dict[str, float]:
    """Width and height of a figure in which such a map can be read, in inches."""
    return {"width": min(5.6 + 0.14 * n_heads, 10), "height": min(2 + 0.2 * n_layers, 8)}
