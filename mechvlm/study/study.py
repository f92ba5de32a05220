"""Study: what a study found."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from PIL import Image

from mechvlm.datasets import Example
from mechvlm.phases import Phases

if TYPE_CHECKING:
    from mechvlm.study.gallery import Shown


@dataclass(frozen=True)
class Study:
    """What a study found.

    Attributes:
        tables: by the name of their file in `data/`: "contextualization", "baseline", "lens", "norm_attention",
            "phases", "answers", "words"; `mechvlm.study.store` says what is in them.
        phases: by model. None for a model of fewer than 3 states, which has no curve to segment.
        skipped: model, example, reason: what was set aside ("" for model: before any model saw it).
        settings: everything that was asked for, after defaults.
        models: by name: class, revision, dtype, device, layers, examples read, threads, seconds.
        dataset: the examples' name, number and fingerprint.
        gallery: a few examples, with a small picture each.
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
    views: "dict[tuple[str, str], Shown]" = field(repr=False)
    seconds: float
    out: Path | None = None
