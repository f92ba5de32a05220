"""What a study found, as data: its tables, and the frames and curves that are made of them."""

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from PIL import Image

from mechvlm.datasets import Example
from mechvlm.measures.phases import Phases
from mechvlm.study import curves


class Shown(NamedTuple):
    """A gallery's example as one model reads it."""

    html: str
    """The page of its patch view."""
    heat: Image.Image
    """What `token` reads from the image at `layer`, as the page first shows it."""
    token: str
    layer: int


@dataclass(frozen=True)
class StudyRecord:
    """What a study found.

    Attributes:
        tables: by the name of their file in `data/`: "contextualization", "baseline", "lens", "norm_attention",
            "phases", "answers", "words", and of Winoground "pair_scores" and "pairs"; `mechvlm.study.save` says what is in them.
            The text columns of the large ones, one value an example and layer, are categories (with pandas before
            3, group them by `observed=True`).
        phases: by model. None for a model of fewer than 3 states, which has no curve to segment.
        skipped: model, example, reason: what was set aside ("" for model: before any model saw it).
        settings: everything that was asked for, after defaults, and "measures": how each was made.
        models: by name: class, revision, dtype, device, layers, examples read, threads, seconds.
        dataset: the examples' name, number and fingerprint, and `usable`, how many they were drawn from; of Winoground also
            `pairs`, those with both sides among the examples, and `half_pairs`, those with only one.
        gallery: a few examples, with a small picture each; of an opened study the small pictures are the images.
        views: their patch views, by (model, example id), where a folder was asked for.
        seconds: of the whole run, files included.
        out: the folder, None where none was asked for.
    """

    tables: dict[str, pd.DataFrame] = field(repr=False)
    phases: dict[str, Phases | None] = field(repr=False)
    skipped: pd.DataFrame = field(repr=False)
    settings: dict[str, Any]
    models: dict[str, dict[str, Any]]
    dataset: dict[str, Any]
    gallery: list[tuple[Example, Image.Image]] = field(repr=False)
    views: dict[tuple[str, str], Shown] = field(repr=False)
    seconds: float
    out: Path | None = None

    def frame(self, measure: str | None = None) -> pd.DataFrame:
        """Every value: model, example, layer, measure, value; of one measure, or of all. Layers count from 0 (embeddings).

        Measures: `cosine_inter`, `cosine_image`, `cosine_text` (mean cosine, -1 to 1); `precision` and `recall` (shares, 0 to
        1; NaN for 0/0) of the words that image tokens decode to, and their controls: `precision_other`, `recall_other`
        against another image's captions, `precision_text`, `recall_text` of the words on text tokens. Where images have
        several captions, `precision_single`, `recall_single`, `precision_other_single`, `recall_other_single`: the mean over each
        caption alone. `norm_share_last_text`, `norm_share_last_image`, `weight_share_last_text`, `weight_share_last_image`:
        the image tokens' share (0 to 1) of the norms written to that destination, and of the raw weights; source by source,
        as means over examples, they are in `tables["norm_attention"]`.

        Raises:
            InputError: for a measure that is not there.
        """
        return _of(curves.tidy(self.tables), measure).astype({"model": str, "example": str, "measure": str})

    def curves(self, measure: str | None = None) -> pd.DataFrame:
        """Each curve: model, measure, layer, n, mean, sd, low, high; of one measure, or of all.

        Over the n examples that have a value: mean, standard deviation, and the ends of the 95 % bootstrap interval of the
        mean, drawn with the study's seed (`mechvlm.intervals.mean_interval`; NaN for one example). Beside the measures of
        `frame`, the anisotropy baselines `cosine_inter_baseline`, `cosine_image_baseline`, `cosine_text_baseline`: of
        all examples together, so without spread.

        Raises:
            InputError: for a measure that is not there.
        """
        return _of(self._curves, measure).copy()

    @cached_property
    def _curves(self) -> pd.DataFrame:
        return curves.curves(self.tables, self.models, self.settings["seed"])


def _of(frame: pd.DataFrame, measure: str | None) -> pd.DataFrame:
    if measure is None:
        return frame
    curves.check_measures([measure], frame)
    return frame[frame["measure"] == measure].reset_index(drop=True)
