"""Studies small enough to be stopped and gone on with in a test: shards of one batch, and no figures."""

import pytest

from mechvlm.study.report import figures
from mechvlm.study.report.captioned import CaptionedFigure
from mechvlm.study.running import settings

PROMPT = "what is this"


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Shards of one batch, so that there are several of them; figures take the time here that nothing is tested in."""
    monkeypatch.setattr(settings, "SHARD", 2)
    monkeypatch.setattr(figures, "draw_all", lambda *_: {name: CaptionedFigure(None, "") for name in figures.FIGURES})
    monkeypatch.setattr(figures, "save_all", small_figures)


def small_figures(drawn, folder) -> None:
    folder.mkdir()
    for name in drawn:
        (folder / f"{name}.svg").write_text("a figure")
