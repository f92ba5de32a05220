"""Studies small enough to stop and resume in a test: shards of one batch, and no figures."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

PROMPT = "what is this"


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Several shards of one batch each; no figures, which are slow and not tested here."""
    monkeypatch.setattr("mechvlm.study.running.settings.EXAMPLES_PER_SHARD", 2)
    with without_figures():
        yield


@contextmanager
def without_figures() -> Iterator[None]:
    """A study's folder has a small file for each figure: drawing takes most of a small study."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mechvlm.study.report.figures.save_all", small_figures)
        yield


@contextmanager
def gallery_of(n_examples: int) -> Iterator[None]:
    """A study's gallery shows this many examples: each costs an answer and a page."""
    with pytest.MonkeyPatch.context() as patch:
        for module in ("merge", "rows", "runner", "shards"):
            patch.setattr(f"mechvlm.study.running.{module}.GALLERY_EXAMPLES", n_examples)
        yield


@pytest.fixture
def undrawn() -> Iterator[None]:
    with without_figures():
        yield


def small_figures(study, folder) -> dict[str, str]:
    """One file for each figure, in place of the figures."""
    from mechvlm.study.report.figures import _figures_of

    folder.mkdir()
    for name in _figures_of(study):
        (folder / f"{name}.svg").write_text("a figure")
    return dict.fromkeys(_figures_of(study), "")
