"""Words that fit the room they have, however wide their axes become."""

import re

from matplotlib.axes import Axes
from matplotlib.text import Text

BREAKS = re.compile(r"(?<=[\s/_-])")
"""A line may end after these characters."""
BAR = "<colorbar>"
"""How matplotlib labels the axes of a color bar. They are part of a panel, and none themselves."""
GAP = 0.06
"""Between the words of two panels, in inches."""


class MeasuredText(Text):
    """Words that know how long they would be."""

    def width_of(self, words: str) -> float:
        """The width of these words in this text's font, in pixels."""
        return self._get_rendered_text_width(words)  # type: ignore[attr-defined]


class FittedText(MeasuredText):
    """Text whose lines end before those of the next panel: a title, a note, an axis's name.

    Lines are broken whenever the text is measured or drawn, so it fits after a later change of the
    layout as well. `get_text` gives the words as they were set.

    Attributes:
        within: the axes that it belongs to.
    """

    within: Axes

    def _get_wrapped_text(self) -> str:
        """The hook of matplotlib's own `set_wrap`, which knows the width of figures alone."""
        room = room_of(self.within, upright=self.get_rotation() % 180 == 90)
        return "\n".join(self._broken(line, room) for line in self.get_text().split("\n"))

    def lines(self) -> str:
        """The words as they are drawn now, with their breaks."""
        return self._get_wrapped_text()

    def _broken(self, line: str, room: float) -> str:
        lines: list[str] = []
        for piece in BREAKS.split(line):
            if lines and self.width_of((lines[-1] + piece).rstrip()) <= room:
                lines[-1] += piece
            else:
                lines.append(piece)
        return "\n".join(part.rstrip() for part in lines)


def room_of(ax: Axes, upright: bool = False) -> float:
    """How long a line may be that is centered on the axes, in pixels.

    It may go half of the way to the panels at both sides, or else to the edges of the figure.

    Args:
        ax: the axes.
        upright: of a line that runs upwards.
    """
    along, across = (1, 0) if upright else (0, 1)
    figure = ax.get_figure(root=True)
    assert figure is not None
    (low, high), own = figure.bbox.get_points()[:, along], ax.bbox.get_points()
    for other in figure.axes:
        box, is_bar = other.bbox.get_points(), other.get_label() == BAR and ax.get_label() != BAR
        apart = box[0, across] >= own[1, across] or box[1, across] <= own[0, across]
        if other is ax or is_bar or apart:
            continue
        if box[1, along] <= own[0, along]:
            low = max(low, (box[1, along] + own[0, along]) / 2)
        elif box[0, along] >= own[1, along]:
            high = min(high, (box[0, along] + own[1, along]) / 2)
    middle = own[:, along].mean()
    room = 2 * float(min(middle - low, high - middle)) - GAP * figure.dpi
    # A long name beside low axes would run up into their title.
    return min(room, 1.1 * ax.bbox.height) if upright else room


def fit(text: Text, ax: Axes) -> None:
    """Let a text of matplotlib's end its lines where its panel does; `set_text` keeps that."""
    text.__class__ = FittedText
    text.within = ax  # type: ignore[attr-defined]


class CellText(MeasuredText):
    """Words in a cell of a map: shortened where the cell is narrow, left out where it is small.

    Attributes:
        cell: width and height of the cell in the units of the axes.
        may_be_cut: whether a part of the words says something; a part of a number does not.
    """

    cell: tuple[float | int, float | int]
    may_be_cut: bool

    def _get_wrapped_text(self) -> str:
        """The words that fit into the cell."""
        ax, figure = self.axes, self.get_figure(root=True)
        assert ax is not None
        assert figure is not None
        corners = ax.transData.transform([(0, 0), self.cell])
        width, height = abs(corners[1] - corners[0])
        if self.get_rotation() % 180 == 90:
            width, height = height, width
        lines = self.get_text().split("\n")
        tall = 1.2 * len(lines) * float(self.get_fontsize()) * figure.dpi / 72
        if tall > height:
            return ""
        if max(map(self.width_of, lines)) <= width:
            return self.get_text()
        if not self.may_be_cut:
            return ""
        for end in range(len(lines[0]) - 1, 0, -1):
            if self.width_of(lines[0][:end] + "…") <= width:
                return lines[0][:end] + "…"
        return ""


def write_in_cell(
    ax: Axes,
    x: float | int,
    y: float | int,
    words: str,
    cell: tuple[float | int, float | int] = (1, 1),
    may_be_cut: bool = False,
    **looks,
) -> None:
    """Write words into the middle of a cell of a map, if it has room for them when it is drawn."""
    # Clipped, so that the layout does not wait for the words.
    written = ax.text(x, y, words, ha="center", va="center", clip_on=True, **looks)
    written.__class__ = CellText
    written.cell, written.may_be_cut = cell, may_be_cut  # type: ignore[attr-defined]
