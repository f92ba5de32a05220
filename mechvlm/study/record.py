"""The data of a study: its tables, and the frames and curves computed from them."""

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from PIL import Image

from mechvlm.datasets import Example
from mechvlm.errors import InputError
from mechvlm.measures.control_excess import ControlExcess
from mechvlm.measures.phases import Phases
from mechvlm.study import curves
from mechvlm.study.answer_curves import answer_curves


class GalleryView(NamedTuple):
    """An example of the report's gallery as one model reads it."""

    html: str
    """The page of its patch view."""
    heat: Image.Image
    """The image with the heat that the page shows first: what `token` reads at `layer`."""
    token: str
    layer: int


def shortened_names(names: list[str], most: int = 3) -> str:
    """Names in a row, each up to 30 letters; of many the first ones, and how many more."""
    shown = ", ".join(name if len(name) <= 30 else name[:29] + "…" for name in names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


@dataclass(frozen=True, repr=False)
class StudyRecord:
    """The data of a study.

    Attributes:
        tables: each by the name of its file in `data/`: "contextualization", "baseline", "lens",
            "norm_attention", "attention_share", "phases", "controls", "answers", "words", and for
            Winoground "pair_scores" and "pairs"; with answers "answer_tokens", "answer_attention"
            and "answer_lens". The docstring of `mechvlm.study.save` describes them. In the
            large tables, with a value for each example and layer, the columns of text are
            categories (with pandas before 3, group by them with `observed=True`).
        phases: by model; None for a model of fewer than 3 states, too few for a curve.
        skipped: the examples that were set aside: model, example, reason. The model is "" for an
            example that was set aside before any model read it.
        settings: every setting, with its default filled in, and "measures": how each measure was
            computed.
        models: for each model its class, revision, dtype, device, number of layers and of examples
            read, threads and seconds.
        dataset: the name, number and fingerprint of the examples, and `usable`, the number of
            examples to draw from. For Winoground also `pairs`, the number of pairs with both sides
            among the examples, and `half_pairs`, of those with one side only.
        gallery: a few examples, each with a small picture of it. In a study opened from its folder
            the small picture is also the example's image.
        views: the gallery's patch views, by (model, example id); empty for a study without folder.
        seconds: of the whole run, including writing its files.
        out: the study's folder; None for a study without folder.
        controls: by model, its phases held to the same curves with other things in the image's
            place (`mechvlm.contextualization_controls`), on the first examples; None for a model
            without controls or phases, and empty for studies of earlier versions.
    """

    tables: dict[str, pd.DataFrame]
    phases: dict[str, Phases | None]
    skipped: pd.DataFrame
    settings: dict[str, Any]
    models: dict[str, dict[str, Any]]
    dataset: dict[str, Any]
    gallery: list[tuple[Example, Image.Image]]
    views: dict[tuple[str, str], GalleryView]
    seconds: float
    out: Path | None = None
    controls: dict[str, ControlExcess | None] = field(default_factory=dict)

    def __repr__(self) -> str:
        n = len(self.models)
        names = shortened_names([name.rstrip("/").split("/")[-1] for name in self.models])
        where = "no folder" if self.out is None else f"folder {self.out.name!r}"
        return (
            f"{type(self).__name__}({n} model{'s' * (n != 1)}: {names}; {self.dataset['n']:,} examples of "
            f"{self.dataset['name'][-40:]}; {where})"
        )

    def frame(self, measure: str | None = None) -> pd.DataFrame:
        """Every value: model, example, layer, measure, value.

        `layer` is the layer of the shares (0 to n_layers - 1), and the state of all else (0, the
        embeddings, to n_layers). State l is what layer l reads.

        Measures:
            `cosine_inter`, `cosine_image`, `cosine_text`: mean cosine, -1 to 1.
            `precision`, `recall`: of the words that image tokens decode to, against the image's
                own captions; shares, 0 to 1, NaN for 0/0.
            `precision_other`, `recall_other`: a control, against another image's captions.
            `precision_text`, `recall_text`: a control, of the words on text tokens.
            `word_share`, `word_share_text`: the share of the image tokens, and of the text tokens,
                that decode to a word, of which alone precision is. Studies of earlier versions lack
                it.
            `precision_single`, `recall_single`, `precision_other_single`, `recall_other_single`:
                the mean over each caption alone, where images have several captions.
            `norm_share_last_text`, `norm_share_last_image`: the image tokens' share (0 to 1) of the
                norms written to that destination.
            `weight_share_last_text`, `weight_share_last_image`: their share of the raw weights.

        `tables["norm_attention"]` has norms and weights for each source, as means over examples.

        Args:
            measure: one measure; by default all.

        Raises:
            InputError: for a measure that this study does not hold.

        Example:
            >>> Study.open("results").frame("precision").groupby(["model", "layer"])["value"].mean()
        """
        return _select(curves.tidy(self.tables), measure).astype({"model": str, "example": str, "measure": str})

    def curves(self, measure: str | None = None) -> pd.DataFrame:
        """The curve of each measure: model, measure, layer, n, mean, sd, low, high.

        Mean and standard deviation are over the n examples that have a value. Low and high are the
        ends of the 95 % bootstrap interval of the mean, with the study's seed
        (`mechvlm.intervals.mean_interval`); NaN for one example. The measures are those of `frame`
        and the anisotropy baselines `cosine_inter_baseline`, `cosine_image_baseline` and
        `cosine_text_baseline`, which are computed from all examples together and have no spread.

        Args:
            measure: one measure; by default all.

        Raises:
            InputError: for a measure that this study does not hold.

        Example:
            >>> Study.open("results").curves("cosine_inter")
        """
        return _select(self._curves, measure).copy()

    def answer_curves(self, measure: str | None = None) -> pd.DataFrame:
        """The curves of the answers, for a study that read them (`answers=True`).

        `mechvlm.study.answer_curves.answer_curves` says which measures there are, and what the
        columns model, measure, group, at, n, mean, sd, low and high hold.

        Args:
            measure: one measure; by default all.

        Raises:
            InputError: for a study that read no answers, or a measure that is not there.

        Example:
            >>> Study.open("results").answer_curves("norm_share")  # by group of words
        """
        if "answer_tokens" not in self.tables:
            raise InputError("This study read no answers: run it with answers=True (mechvlm study --answers).")
        return _select(self._answer_curves, measure).copy()

    @cached_property
    def _answer_curves(self) -> pd.DataFrame:
        return answer_curves(self.tables, self.settings["seed"])

    @cached_property
    def _curves(self) -> pd.DataFrame:
        return curves.curves(self.tables, self.models, self.settings["seed"])


def _select(frame: pd.DataFrame, measure: str | None) -> pd.DataFrame:
    if measure is None:
        return frame
    curves.check_measures([measure], frame)
    return frame[frame["measure"] == measure].reset_index(drop=True)
