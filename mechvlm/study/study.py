"""Study: what a study found, with its figures; opened again from its folder, and compared with others."""

import os
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from mechvlm.study.compare import Comparison, compare
from mechvlm.study.load import load_study
from mechvlm.study.record import StudyRecord
from mechvlm.study.report.captioned import CaptionedFigure
from mechvlm.study.report.figures import draw, draw_all, save_all
from mechvlm.study.report.summary import summary


class Study(StudyRecord):
    """What a study found. `mechvlm.study.run` makes one, `Study.open` reads one from its folder."""

    @classmethod
    def open(cls, folder: str | os.PathLike) -> "Study":
        """A written study again, from its folder alone: no model is loaded, and none of the data's images.

        The phases are fitted again, from the table and with the recorded seed: they equal the run's.

        Raises:
            InputError: where there is no such folder or no finished study in it, a file of it is missing or damaged (which
                one), or a newer version wrote it.
        """
        return cls(**load_study(Path(folder)))

    def summary(self) -> pd.DataFrame:
        """One row a model: `mechvlm.study.report.summary.summary` says what its columns are."""
        return summary(self)

    def plot(self, name: str) -> CaptionedFigure:
        """A figure and its caption: "phases", "lens", "contextualization" or "norm_attention", of Winoground also "pairs".

        Raises:
            InputError: for another name.
        """
        return draw(self, name)

    def figures(self) -> dict[str, CaptionedFigure]:
        """The report's figures with their captions, by name."""
        return draw_all(self)

    def save_figures(self, folder: str | os.PathLike) -> None:
        """Each of the figures as PNG (200 dpi) and SVG, in a folder that is made where it is missing."""
        save_all(self.figures(), Path(folder))

    def compare(self, others: Sequence[StudyRecord | str | os.PathLike]) -> Comparison:
        """This study and others by relative depth: `mechvlm.compare([self, *others])`."""
        return compare([self, *others])
