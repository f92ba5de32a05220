"""A study's figures in all formats: one layout, one drawing a file, and half of them beside."""

import io
import pickle
import subprocess
import sys

import matplotlib as mpl
import pytest
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from mechvlm.figures import saving
from mechvlm.figures.style import style
from mechvlm.study.report.captioned import CaptionedFigure, panels


def drawn() -> Figure:
    """A figure whose labels need room, with a color bar."""
    with style():
        figure, blocks = panels(["one", "two"], (1.2, 0.8))
        for top, bottom in blocks.values():
            top.plot([0, 1, 2], [0.1, 1000, 3])
            top.set_ylabel("a label\nof two lines")
            figure.colorbar(bottom.pcolormesh([[1, 2], [3, 4]], rasterized=True), ax=bottom)
        return figure


@pytest.fixture
def draws(monkeypatch) -> list[Figure]:
    """Every figure that this process draws, once for each time."""
    figures: list[Figure] = []
    draw = Figure.draw
    monkeypatch.setattr(Figure, "draw", lambda self, renderer: figures.append(self) or draw(self, renderer))
    return figures


@pytest.mark.parametrize("own", [{}, {"figure.constrained_layout.use": True}, {"figure.autolayout": True}])
def test_each_file_is_drawn_once_and_the_png_is_that_of_the_figure_alone(tmp_path, draws, own):
    with mpl.rc_context(own):
        figure, alone = drawn(), drawn()
        engine = figure.get_layout_engine()
        draws.clear()
        saving.save_formats(figure, tmp_path, "figure")
        assert len(draws) == len(saving.FIGURE_FORMATS)
        assert figure.get_layout_engine() is engine
        assert isinstance(engine, ConstrainedLayoutEngine)
        assert figure.dpi == alone.dpi
        CaptionedFigure(alone, "").save(tmp_path / "alone.png")
    assert {path.name for path in tmp_path.iterdir()} == {*(f"figure.{s}" for s in saving.FIGURE_FORMATS), "alone.png"}
    assert (tmp_path / "figure.png").read_bytes() == (tmp_path / "alone.png").read_bytes()


@pytest.mark.parametrize("own", [{}, {"figure.autolayout": True, "pdf.compression": 0}])
def test_files_are_the_same_from_either_process(tmp_path, draws, own):
    """The other process has the first, and perhaps the third, if it is done by then."""
    names = ("first", "second", "third")
    with mpl.rc_context(own):
        figures = {name: drawn() for name in names}
        draws.clear()
        saving.save_each(figures.items(), tmp_path / "new" / "figures")
        assert len(draws) in (len(saving.FIGURE_FORMATS), 2 * len(saving.FIGURE_FORMATS))
        for name in names:
            saving.save_formats(drawn(), tmp_path, name)
    for name in names:
        for suffix in saving.FIGURE_FORMATS:
            file = f"{name}.{suffix}"
            assert (tmp_path / "new" / "figures" / file).read_bytes() == (tmp_path / file).read_bytes(), file


@pytest.mark.parametrize(
    "program",
    ["import sys; sys.exit(1)", "import sys, pickle; pickle.load(sys.stdin.buffer)", "print('hello'); input()"],
)
def test_all_are_saved_where_the_other_process_cannot_run(tmp_path, monkeypatch, program):
    """It ends at once, or after it was asked, or says something else."""
    popen = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda _, **settings: popen([sys.executable, "-c", program], **settings))
    saving.save_each([("first", drawn()), ("second", drawn())], tmp_path)
    assert len(list(tmp_path.iterdir())) == 2 * len(saving.FIGURE_FORMATS)


def test_all_are_saved_where_no_process_can_be_started(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", str(tmp_path / "no python"))
    saving.save_each([("first", drawn()), ("second", drawn())], tmp_path)
    assert len(list(tmp_path.iterdir())) == 2 * len(saving.FIGURE_FORMATS)


def test_an_error_of_the_other_process_is_raised(tmp_path):
    (tmp_path / "first.svg").mkdir()
    with pytest.raises(IsADirectoryError, match=r"first\.svg"):
        saving.save_each([("first", drawn()), ("second", drawn())], tmp_path)


def test_the_other_process_ends_with_the_block(tmp_path, monkeypatch):
    """Also where drawing is stopped: it is out of reach of the signal that stops this one."""
    begun = []
    popen = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: begun.append(popen(*a, **k)) or begun[0])

    def stopped():
        yield "first", drawn()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        saving.save_each(stopped(), tmp_path)
    assert begun[0].poll() is not None


def test_figures_are_served_until_there_are_no_more(tmp_path):
    orders = b"".join(pickle.dumps(({}, drawn(), folder, "a")) for folder in (tmp_path, tmp_path / "no"))
    replies = io.BytesIO()
    saving.serve(io.BytesIO(orders), replies)
    replies.seek(0)
    assert pickle.load(replies) is None
    assert isinstance(pickle.load(replies), FileNotFoundError)
    assert replies.read() == b""
    assert len(list(tmp_path.iterdir())) == len(saving.FIGURE_FORMATS)
