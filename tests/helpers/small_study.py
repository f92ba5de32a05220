"""Studies small enough to stop and resume in a test: shards of one batch, and no figures."""

import pytest

from mechvlm.study.report import figures
from mechvlm.study.report.captioned import CaptionedFigure
from mechvlm.study.running import settings

PROMPT = "what is this"


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Several shards of one batch each; no figures, which are slow and not tested here."""
    monkeypatch.setattr(settings, "EXAMPLES_PER_SHARD", 2)
    monkeypatch.setattr(figures, "draw_all", lambda *_: {name: CaptionedFigure(None, "") for name in figures.FIGURES})
    monkeypatch.setattr(figures, "save_all", small_figures)


def small_figures(captioned, folder) -> None:
    """One file for each figure, in place of the figures."""
    folder.mkdir()
    for name in captioned:
        (folder / f"{name}.svg").write_text("a figure")
