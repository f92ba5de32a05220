"""The legend of a study's figure: in as many columns as fit, for one model as for several."""

import pytest

from mechvlm.figures.style import LINES, style
from mechvlm.study.report.captioned import legend, panels


@pytest.mark.parametrize(("n_models", "letters", "columns"), [(1, 8, 2), (1, 44, 1), (2, 8, 4), (2, 44, 3), (3, 44, 3)])
def test_it_stays_within_the_figure(n_models, letters, columns):
    with style():
        figure, blocks = panels([f"m{i}" for i in range(n_models)], (2.0,))
        (ax,) = blocks["m0"]
        for line in list(LINES)[:5]:
            ax.plot([0, 1], label=f"{line} {'e' * letters}"[:letters])
        legend(figure, ax)
        figure.canvas.draw()
    (drawn,) = figure.legends
    extent = drawn.get_window_extent()
    assert 0 <= extent.x0 < extent.x1 <= figure.bbox.width
    assert drawn._ncols == columns
    assert len({text.get_text() for text in drawn.get_texts()} - {" "}) == 7
