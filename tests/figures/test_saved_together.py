"""A study's figures in all formats: one layout, one drawing a file, the PNG of a figure alone."""

import matplotlib as mpl
import pytest
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from mechvlm.figures.style import style
from mechvlm.study.report.captioned import CaptionedFigure, panels
from mechvlm.study.report.figures import FIGURE_FORMATS, save_all


def drawn() -> CaptionedFigure:
    """A figure whose labels need room, with a color bar."""
    with style():
        figure, blocks = panels(["one", "two"], (1.2, 0.8))
        for top, bottom in blocks.values():
            top.plot([0, 1, 2], [0.1, 1000, 3])
            top.set_ylabel("a label\nof two lines")
            figure.colorbar(bottom.pcolormesh([[1, 2], [3, 4]], rasterized=True), ax=bottom)
        return CaptionedFigure(figure, "")


@pytest.fixture
def draws(monkeypatch) -> list[Figure]:
    """Every figure that is drawn, once for each time."""
    figures: list[Figure] = []
    draw = Figure.draw
    monkeypatch.setattr(Figure, "draw", lambda self, renderer: figures.append(self) or draw(self, renderer))
    return figures


@pytest.mark.parametrize("own", [{}, {"figure.constrained_layout.use": True}, {"figure.autolayout": True}])
def test_each_file_is_drawn_once_and_the_png_is_that_of_the_figure_alone(tmp_path, draws, own):
    with mpl.rc_context(own):
        first, second, alone = drawn(), drawn(), drawn()
        engines = [captioned.figure.get_layout_engine() for captioned in (first, second)]
        draws.clear()
        save_all({"first": first, "second": second}, tmp_path / "figures")
        assert len(draws) == 2 * len(FIGURE_FORMATS)
        assert [captioned.figure.get_layout_engine() for captioned in (first, second)] == engines
        assert all(isinstance(engine, ConstrainedLayoutEngine) for engine in engines)
        assert first.figure.dpi == alone.figure.dpi
        alone.save(tmp_path / "alone.png")
    names = {path.name for path in (tmp_path / "figures").iterdir()}
    assert names == {f"{name}.{suffix}" for name in ("first", "second") for suffix in FIGURE_FORMATS}
    for name in ("first", "second"):
        assert (tmp_path / "figures" / f"{name}.png").read_bytes() == (tmp_path / "alone.png").read_bytes()
