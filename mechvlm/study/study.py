"""Study: a study's results and figures. It opens finished studies and compares several."""

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
    """The results of a study. `mechvlm.study.run` returns one; `Study.open` reads one.

    Example:
        >>> study = Study.open("results")
        >>> study.summary()
        >>> study.plot("phases").save("phases.png")
    """

    @classmethod
    def open(cls, folder: str | os.PathLike) -> "Study":
        """Open a finished study from its folder alone, without its models and images.

        Every file that is read must match its SHA-256 in run.json. A folder of an earlier version
        has none: it is opened after a warning that says so. The phases are fitted again, from the
        tables and with the recorded seed. So they equal those of the run.

        Args:
            folder: the folder of a finished study.

        Raises:
            InputError: when there is no such folder, it holds no finished study, a file in it is
                missing, damaged or of another study (the error names it), or a newer version of
                mechvlm wrote it.
        """
        return cls(**load_study(Path(folder)))

    def summary(self) -> pd.DataFrame:
        """One row per model. `mechvlm.study.report.summary.summary` describes the columns."""
        return summary(self)

    def plot(self, name: str) -> CaptionedFigure:
        """Draw one figure of the report, with its caption.

        Args:
            name: "phases", "lens", "contextualization" or "norm_attention"; for Winoground also
                "pairs", with answers "answers".

        Raises:
            InputError: for another name.
        """
        return draw(self, name)

    def figures(self) -> dict[str, CaptionedFigure]:
        """Draw all figures of the report, with their captions, by name."""
        return draw_all(self)

    def save_figures(self, folder: str | os.PathLike) -> None:
        """Save each figure as PNG (200 dpi), SVG and PDF. A missing folder is made."""
        save_all(self, Path(folder))

    def compare(self, others: Sequence[StudyRecord | str | os.PathLike]) -> Comparison:
        """Compare this study with others by relative depth: `mechvlm.compare([self, *others])`."""
        return compare([self, *others])
