"""Words that fit the room they have, however wide their axes become."""

import re
from collections.abc import Iterable, Sequence
from math import inf

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text

from mechvlm.figures.legends import make_room
from mechvlm.figures.panels import panel_of

SPACES, SIGNS = re.compile(r"(?<= )(?<!= )(?![=%])"), re.compile(r"(?<=[/_-])")
"""A line ends after a space, though not in "n = 5" or "9 %". Where a word alone is longer than a
line, it ends after one of these signs."""
BAR = "<colorbar>"
"""How matplotlib labels the axes of a color bar. They are part of a panel, and none themselves."""
LETTERS_TO_CUT_TO = "nnn"
"""Words are shortened in cells that have room for so many letters, and left out in others."""
GAP = 0.06
"""Between the words of two panels, in inches."""
WITHIN_CELL = 0.92
"""The share of a cell's width that its words may take."""
MOST_LAYOUTS = 6
"""Most figures need two."""


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
        rooms: how long a line could be, each time that one was measured since `settle` asked.
        most: how long a line may be at most, once `settle` has decided.
    """

    within: Axes
    rooms: list[float]
    most: float

    def _get_wrapped_text(self) -> str:
        """The hook of matplotlib's own `set_wrap`, which knows the width of figures alone."""
        upright = self.get_rotation() % 180 == 90
        room = room_of(self.within, upright, "center" if upright else self.get_horizontalalignment())
        self.rooms.append(room)
        return self._within(room)

    def _within(self, room: float) -> str:
        return "\n".join(self._broken(line, min(room, self.most)) for line in self.get_text().split("\n"))

    def _broken(self, line: str, room: float) -> str:
        lines: list[str] = []
        for piece in self._pieces(line, room):
            if lines and self.width_of((lines[-1] + piece).rstrip()) <= room:
                lines[-1] += piece
            else:
                lines.append(piece)
        return "\n".join(part.rstrip() for part in lines)

    def _pieces(self, line: str, room: float) -> Iterable[str]:
        for word in SPACES.split(line):
            yield from (word,) if self.width_of(word.rstrip()) <= room else SIGNS.split(word)

    def is_settled(self) -> bool:
        """Whether the lines were the same whenever they were measured, and are so now."""
        if self.rooms:  # an empty text is not measured
            self._get_wrapped_text()
        return len({self._within(room) for room in self.rooms}) < 2

    def narrow(self) -> None:
        """Break lines from now on as where there was least room."""
        self.most = min([self.most, *self.rooms])


def room_of(ax: Axes, upright: bool = False, align: str = "center") -> float:
    """How long a line along the axes may be, in pixels.

    It may go half of the way to the panels at both sides, or else to the edges of the figure.

    Args:
        ax: the axes.
        upright: of a line that runs upwards.
        align: "center", or "left" or "right" for a line that begins or ends where the axes do.
    """
    along, across = (1, 0) if upright else (0, 1)
    figure = ax.get_figure(root=True)
    assert figure is not None
    (low, high), own = figure.bbox.get_points()[:, along], ax.bbox.get_points()
    for other in figure.axes:
        box, is_bar = other.bbox.get_points(), other.get_label() == BAR and ax.get_label() != BAR
        apart = box[0, across] >= own[1, across] or box[1, across] <= own[0, across]
        if panel_of(other) is panel_of(ax) or is_bar or apart:
            continue
        if box[1, along] <= own[0, along]:
            low = max(low, (box[1, along] + own[0, along]) / 2)
        elif box[0, along] >= own[1, along]:
            high = min(high, (box[0, along] + own[1, along]) / 2)
    start, stop = own[:, along]
    middle = (start + stop) / 2
    rooms = {"left": high - start, "right": stop - low, "center": 2 * min(middle - low, high - middle)}
    room = float(rooms[align]) - GAP * figure.dpi
    # A long name beside low axes would run up into their title.
    return min(room, ax.bbox.height) if upright else room


def fit(text: Text, ax: Axes) -> None:
    """Let a text of matplotlib's end its lines where its panel does; `set_text` keeps that."""
    text.__class__ = FittedText
    text.within, text.rooms, text.most = ax, [], inf  # type: ignore[attr-defined]


class NameText(MeasuredText):
    """A name of a tick, broken between words where it is wider than the place it names.

    Attributes:
        within: the axes.
    """

    within: Axes

    def _get_wrapped_text(self) -> str:
        """The words in lines as wide as one unit of x."""
        (left, _), (right, _) = self.within.transData.transform([(0, 0), (1, 0)])
        room = WITHIN_CELL * abs(right - left)
        lines: list[str] = []
        for number, word in enumerate(self.get_text().replace("\n", " \n").split(" ")):
            if number and not word.startswith("\n") and self.width_of(f"{lines[-1]} {word}") <= room:
                lines[-1] += f" {word}"
            else:
                lines.append(word.lstrip("\n"))
        return "\n".join(lines)


def name_places(ax: Axes, names: Sequence[str]) -> None:
    """Name the places 0, 1, ... along x, in lines that end before those of the next place."""
    ax.set_xticks(range(len(names)), names)
    ax.tick_params(axis="x", length=0)
    ax.grid(False, axis="x")
    for tick in ax.xaxis.get_major_ticks():
        tick.label1.__class__ = NameText
        tick.label1.within = ax  # type: ignore[attr-defined]


def settle(figure: Figure) -> None:
    """Lay a figure out until its lines stay.

    A title that breaks takes height, and the axes beneath it change their width too, so that it may
    not break any more. Of such a pair the broken lines are kept, for which there is always room.
    """
    engine, texts = figure.get_layout_engine(), figure.findobj(FittedText)
    make_room(figure)
    for text in texts:
        text.most = inf  # type: ignore[attr-defined]
    for number in range(MOST_LAYOUTS if engine is not None else 0):
        for text in texts:
            text.rooms.clear()  # type: ignore[attr-defined]
        engine.execute(figure)  # type: ignore[union-attr]
        make_room(figure)
        unsettled = [text for text in texts if not text.is_settled()]  # type: ignore[attr-defined]
        # The first layout moves everything. Of the last one all lines are kept: one more follows.
        for text in (unsettled if number else ()) if unsettled else texts:
            text.narrow()  # type: ignore[attr-defined]
        if not unsettled:
            return


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
        width *= WITHIN_CELL
        if self.may_be_cut and self.width_of(LETTERS_TO_CUT_TO) > width:
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
