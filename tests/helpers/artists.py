"""Values read back from a picture's artists, at the places where a reader sees them."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import Collection, PolyCollection, QuadMesh
from matplotlib.colors import to_hex
from matplotlib.image import AxesImage
from matplotlib.lines import Line2D
from matplotlib.text import Annotation


def on_screen(artist: QuadMesh | AxesImage) -> np.ndarray:
    """A map's values as they lie on the screen, upper row first, left column first; NaN for gaps.

    Its rows and columns are turned by the direction of the axes and by the map's own.
    """
    values = np.ma.filled(np.ma.asarray(artist.get_array(), dtype=float), np.nan)
    x, y = edges_of(artist)
    to_screen = artist.axes.transData.transform
    rises = to_screen((x[0], y[-1]))[1] > to_screen((x[0], y[0]))[1]
    leftwards = to_screen((x[-1], y[0]))[0] < to_screen((x[0], y[0]))[0]
    return values[:: -1 if rises else 1, :: -1 if leftwards else 1]


def edges_of(artist: QuadMesh | AxesImage) -> tuple[np.ndarray, np.ndarray]:
    """The borders of a map's columns and rows in data coordinates, in the order of its array."""
    if isinstance(artist, QuadMesh):
        corners = np.asarray(artist.get_coordinates())
        return corners[0, :, 0], corners[:, 0, 1]
    rows, cols = artist.get_array().shape
    left, right, bottom, top = artist.get_extent()
    first, last = (top, bottom) if artist.origin == "upper" else (bottom, top)
    return np.linspace(left, right, cols + 1), np.linspace(first, last, rows + 1)


def value_at(artist: QuadMesh | AxesImage, x: float, y: float) -> float:
    """The value of the cell that covers a point in data coordinates."""
    values = np.ma.filled(np.ma.asarray(artist.get_array(), dtype=float), np.nan)
    at = []
    for edges, place in zip(edges_of(artist), (x, y), strict=True):
        ends = np.sort(np.stack([edges[:-1], edges[1:]]), axis=0)
        (cell,) = np.flatnonzero((ends[0] < place) & (place < ends[1]))
        at.append(cell)
    return float(values[at[1], at[0]])


def mesh_of(ax: Axes) -> QuadMesh:
    """The only mesh of the axes."""
    (mesh,) = (c for c in ax.collections if isinstance(c, QuadMesh))
    return mesh


def bar_of(artist: QuadMesh | AxesImage) -> Axes:
    """The axes of a map's own color bar."""
    return artist.colorbar.ax


def x_ticks(ax: Axes) -> dict[float, str]:
    """{place: label} along x, of the ticks that can be seen."""
    return _ticks(ax.get_xticks(), ax.get_xticklabels(), ax.get_xlim())


def y_ticks(ax: Axes) -> dict[float, str]:
    """{place: label} along y, of the ticks that can be seen."""
    return _ticks(ax.get_yticks(), ax.get_yticklabels(), ax.get_ylim())


def numbered(ticks: dict[float, str]) -> bool:
    """Whether ticks name their own places: 0 among them, and enough of them to read the others."""
    return ticks == {at: str(round(at)) for at in ticks} and 0 in ticks and 2 <= len(ticks) <= 14


def _ticks(places, labels, limits) -> dict[float, str]:
    low, high = sorted(limits)
    pairs = zip(places, labels, strict=True)
    return {float(at): label.get_text() for at, label in pairs if low <= at <= high}


def note_of(ax: Axes) -> str:
    """The note between a plot's title and its axes; "" where there is none."""
    return next((top.get_xlabel() for top in ax.child_axes), "")


def words_at(ax: Axes) -> dict[tuple[float, float], str]:
    """{(x, y): text} of the texts at points of the data.

    An annotation's point is the one that it belongs to; headings, which have none, are left out.
    """
    texts = [t for t in ax.texts if getattr(t, "xycoords", "data") == "data"]
    places = [(t.xy if isinstance(t, Annotation) else t.get_position(), t.get_text()) for t in texts]
    return {(float(x), float(y)): words for (x, y), words in places}


def line_of(ax: Axes, label: str) -> Line2D:
    """The only line with this label."""
    (line,) = (line for line in ax.lines if line.get_label() == label)
    return line


def lines_like(ax: Axes, color: str, dash) -> list[Line2D]:
    """The lines of this color and dash (as `Line2D` was given it)."""
    alike = Line2D([], [], linestyle=dash, linewidth=1)
    return [line for line in ax.lines if to_hex(line.get_color()) == color.lower() and _same_dash(line, alike)]


def _same_dash(a: Line2D, b: Line2D) -> bool:
    return a._unscaled_dash_pattern == b._unscaled_dash_pattern


def bands(ax: Axes, color: str | None = None) -> list[Collection]:
    """The filled bands of the axes, in the order drawn; of one color."""
    filled = [c for c in ax.collections if isinstance(c, PolyCollection) and not isinstance(c, QuadMesh)]
    return [c for c in filled if color is None or to_hex(c.get_facecolor()[0]) == color.lower()]


def ends_of(band: Collection, along: int = 0) -> dict[float, tuple[float, float]]:
    """{x: (low, high)} of a band along x (0) or y (1)."""
    ends: dict[float, tuple[float, float]] = {}
    for path in band.get_paths():
        for vertex in path.vertices:
            at, value = float(vertex[along]), float(vertex[1 - along])
            low, high = ends.get(at, (value, value))
            ends[at] = min(low, value), max(high, value)
    return ends
