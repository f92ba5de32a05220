"""Files of a study's folder. `save_study` writes them, `mechvlm.study.load` reads them back.

    report.html             the report: one page that works offline; its gallery links to views/
    views/*.html            patch views of the gallery's examples, one page for each model and
                            example; run.json lists which file is which
    views/gallery.parquet   the rest of what the gallery shows, a row for each page: model, example,
                            captions, image and heat (PNG files: a small copy of the image, and the
                            same with the heat that the page shows first), token and layer (of that
                            heat), file (the page)
    figures/*.png, *.svg,   the four figures phases, lens, contextualization and norm_attention;
    figures/*.pdf           for Winoground also pairs, with answers also answers
    data/*.parquet          the tables described below
    data/README.txt         this description
    skipped.csv             the examples that were set aside: model (empty for an example set aside
                            before any model read it), example, reason
    settings.json           every setting that determines the results; it is written first, and a
                            run that continues the study must have the same settings
    run.json                models and their revisions, versions of packages, seed, fingerprint of
                            the data, all settings, findings, and the captions of the figures; the
                            SHA-256 of every file above but settings.json, of the settings in it
                            and of each model's example ids, and of run.json's own content

While a study runs, its folder holds settings.json, a lock file (.lock) and the folder shards/. In
shards/ there is one folder for each finished shard, a fixed number of consecutive examples:
M-NNNNN is shard NNNNN of model M, M-pairs-NNNNN is a shard of Winoground's pairs, and M-gallery
holds the gallery of model M. Models and shards are numbered from 0. Each of these folders holds
Parquet tables and an about.json, with their SHA-256, that of the settings, and the ids of the
examples. A run that continues the study checks them: a damaged shard is made again, and one of
another study refused. Galleries are always made again. Names that end in .tmp belong to unfinished
files and folders. All other files are written at the end, run.json last. Then the folders in
shards/ are deleted: the files above hold all of their content.

The tables. `example` is the id in the data set. A model has layers 0 to n_layers - 1; `layer` is
what a layer does. `state` is what is read between layers, 0 (embeddings) to n_layers: state l is
what layer l reads. (Folders of format 1, as run.json says, call states layers, and count the layers
of attention from 1. `Study.open` reads both.)

    contextualization    model, example, pair ("inter", "image", "text"), state, value: the mean
                         cosine between image and text tokens, among image tokens, among text
                         tokens
    baseline             model, pair, state, value: the same mean over tokens of different examples
    lens                 model, example, tokens, captions, measure ("precision", "recall",
                         "word_share"), state, value: a share of words, 0 to 1, empty for 0/0;
                         "word_share" is the share of the tokens that decode to a word, of which
                         alone precision is (studies of earlier versions lack it). tokens: the words
                         are decoded from "image" or "text" tokens. captions: they are compared with
                         the example's "own" captions or with the "other" ones of the data set's
                         next example; where there are several captions, "single" and "other_single"
                         are the mean over each caption alone. Text tokens are compared with the
                         "own" captions only; "word_share" stands with these too
    norm_attention       model, dest ("last_text", "last_image"), dest_position, layer, src (the
                         position of the source), piece (its text), modality, norm (residual-stream
                         units), weight (mean over heads), n: means over n examples
    attention_share      model, example, dest, measure ("norm", "weight"), layer, value: the image
                         tokens' share of the sum over all sources, 0 to 1
    phases               a row for each rising or falling segment of the inter-modal curve: model,
                         and the columns of `mechvlm.measures.phases.Phases.to_frame`
    controls             model, example, control ("noise", "words", "text"), state, value: the mean
                         cosine between image and text tokens ("inter" of contextualization) with
                         that at the image's positions, for the first examples
    answers              model, example, answer: the model's answer to the prompt, for the gallery's
                         examples
    words                model, example, state, word, positions: the words that most visual tokens
                         decode to, and the number of these tokens, for the gallery's examples

For a study that read answers (`--answers`) also three tables. `token` counts an answer's tokens,
from 0:

    answer_tokens        model, example, token, piece (its text), word (that it is of, empty for
                         none), group (of the word: "object", "color", "function" or "other", as
                         `mechvlm.measures.word_groups` says)
    answer_attention     model, example, token, layer, norm, weight: the image tokens' share, 0 to
                         1, of the sums over all sources, at the position that wrote the token
    answer_lens          model, example, token, state, probability, rank: those of the token at the
                         position that wrote it, by the logit lens; rank 1 is the likeliest

For Winoground also two tables of the pairs with both sides among the examples:

    pair_scores          model, pair, tag (empty where the data set has none), text, image, group:
                         whether the pair is right by each score
    pairs                model, pair, image (0, 1), measure ("precision", "recall",
                         "contextualization", "norm attention", "log-likelihood"), layer, condition
                         ("matched": with the image's own caption, "mismatched": with the other
                         caption of the pair), value: as in `mechvlm.WinogroundResult.to_frame`.
                         `layer` is the layer of "norm attention", and the state of all else
"""

import dataclasses
import json
import math
import platform
import time
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from io import BytesIO
from pathlib import Path
from typing import TypeVar

import pandas as pd
import torch
from PIL import Image

from mechvlm.measures.control_excess import ControlExcess
from mechvlm.measures.phases import Phases
from mechvlm.outside.integrity import digests_of_files, sealed
from mechvlm.progress import Progress
from mechvlm.study.load import FOLDER_FORMAT
from mechvlm.study.record import StudyRecord
from mechvlm.study.report import figures, gallery, page
from mechvlm.study.report.summary import summary

RECORDED_PACKAGES = (
    "mechvlm",
    "torch",
    "transformers",
    "nnsight",
    "numpy",
    "pandas",
    "pyarrow",
    "matplotlib",
    "pillow",
    "simplemma",
)
"""The packages whose versions run.json records."""

S = TypeVar("S", bound=StudyRecord)


def save_study(study: S, to: Path, progress: Progress, started: float, settings_key: str = "") -> S:
    """Write every file but the tables, which are in the folder `to` already.

    `settings_key` is the digest of the settings in settings.json.

    Returns the study with the seconds of the whole run, counted from `started` (perf_counter).
    """
    (to / "data" / "README.txt").write_text(__doc__ or "", encoding="utf-8")
    study.skipped.to_csv(to / "skipped.csv", index=False)
    progress("figures", 0, 0)
    captions = figures.save_all(study, to / "figures")
    progress("report", 0, 0)
    computed = {name: value for name, value in vars(study).items() if name.endswith("_curves")}
    study = dataclasses.replace(study, seconds=round(time.perf_counter() - started, 2))
    # The copy has lost the cached curves, which take a second or more to compute.
    vars(study).update(computed)
    record = run_record(study)
    record["figures"] = captions
    files = gallery.file_names(study.views)
    record["views"] = [{"file": file, "model": model, "example": id} for (model, id), file in files.items()]
    (to / "views").mkdir()
    for key, file in files.items():
        (to / file).write_text(study.views[key].html, encoding="utf-8")
    _write_gallery(study, files, to)
    html = page.render(study, record, captions, to / "figures", files)
    (to / "report.html").write_text(html, encoding="utf-8")
    record |= {"settings_digest": settings_key, "files": digests_of_files(to)}
    (to / "run.json").write_text(json.dumps(sealed(record), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return study


def _write_gallery(study: StudyRecord, files: dict[tuple[str, str], str], to: Path) -> None:
    captions = {example.id: list(example.captions) for example, _ in study.gallery}
    images = {example.id: encode_png(image) for example, image in study.gallery}
    columns = ["model", "example", "captions", "image", "heat", "token", "layer", "file"]
    rows = []
    for (model, id), file in files.items():
        view = study.views[model, id]
        rows.append([model, id, captions[id], images[id], encode_png(view.heat), view.token, view.layer, file])
    pd.DataFrame(rows, columns=columns).to_parquet(to / "views" / "gallery.parquet", index=False)


def encode_png(image: Image.Image) -> bytes:
    """An image as the bytes of a PNG file, which loses nothing."""
    file = BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def run_record(study: StudyRecord) -> dict:
    """The content of run.json but captions and views: how to run the study again, and findings."""
    rows = summary(study).to_dict("records")
    return {
        "study": "Wei et al. 2024, A Study on Multi-modal Interaction in Vision Large Language Models",
        "format": FOLDER_FORMAT,
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "models": study.models,
        "dataset": study.dataset,
        "seed": study.settings["seed"],
        "settings": study.settings,
        "versions": _versions(),
        "skipped": len(study.skipped),
        "seconds": study.seconds,
        "findings": [{key: _plain(value) for key, value in row.items()} for row in rows],
        "phases": {model: _phases(phases, study.controls.get(model)) for model, phases in study.phases.items()},
    }


def _phases(phases: Phases | None, controls: ControlExcess | None) -> dict | None:
    if phases is None:
        return None
    return {
        "shows_pattern": phases.shows_pattern,
        "explanation": phases.explanation,
        "support": _plain(phases.support),
        "labels": list(phases.labels),
        "directions": list(phases.directions),
        "boundaries": [int(b) for b in phases.boundaries],
        "boundary_intervals": [[_plain(end) for end in ends] for ends in phases.boundary_intervals],
        "controls": None
        if controls is None
        else {
            "n_examples": controls.n_examples,
            "exceeding": list(controls.exceeding),
            "shows_pattern": controls.shows_pattern,
            "verdict": controls.verdict,
        },
    }


def _plain(value):
    """The value as JSON can hold it: a plain number for one of numpy's, None for NaN."""
    value = value.item() if hasattr(value, "item") else value
    return None if isinstance(value, float) and math.isnan(value) else value


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version(), "platform": platform.platform()}
    for package in RECORDED_PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    if torch.cuda.is_available():
        versions["gpu"] = torch.cuda.get_device_name()
    return versions
