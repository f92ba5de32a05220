"""A study's folder, written and read back.

    settings.json           everything that determines the results; written first, and held against whoever goes on
    page.html             one page that works offline; its gallery opens the pages in views/
    views/*.html            the patch view of each of the gallery's examples, by model: run.json says which is which
    views/gallery.parquet   what else the report shows of them: model, example, captions, image and heat (PNG), token, layer, file
    figures/*.png, *.svg    the four figures, and with Winoground a fifth, pairs
    data/*.parquet          the tables below; data/README.txt says what is in them
    skipped.csv             what was set aside: model, example, reason
    run.json                models and revisions, versions, seed, the data's fingerprint, every setting, findings, captions

While a study runs, its folder holds settings.json and, in shards/, one folder for each shard that is done (M-NNNNN, shard
NNNNN of model M; M-pairs-NNNNN of Winoground's pairs) and one for each model's gallery (M-gallery): Parquet tables and an
about.json. What is not whole yet has a name that ends in .tmp. The rest appears at the end, run.json last, and then shards/
goes: what it held is in the tables.

Tables, one value a row; `example` is the data set's id, layers count from 0 (embeddings):

    contextualization    model, example, pair ("inter", "image", "text"), layer, value (mean cosine)
    baseline             model, pair, layer, value: the mean cosine of tokens of different examples
    lens                 model, example, tokens ("image", "text"), captions ("own", "other"; where there are several,
                         also "single", "other_single": the mean over each alone), measure ("precision", "recall"), layer,
                         value (share; empty for 0/0); "other" are those of the data set's next example
    norm_attention       model, dest, dest_position, layer, src, piece, modality, norm (residual-stream units), weight
                         (mean over heads), n: means over n examples
    attention_share      model, example, dest, measure ("norm", "weight"), layer, value: the image tokens' share of the sum
                         over all sources
    phases               model, and the columns of `mechvlm.measures.phases.Phases.to_frame`
    answers, words       of the few examples that the report shows: the model's answer; the words that most of its
                         visual tokens decode to, by layer, with the number of positions

And, where the examples are Winoground's, of the pairs of which both sides were drawn:

    pair_scores          model, pair, tag (empty where the data set has none), text, image, group: whether the pair is right
    pairs                model, pair, image (0, 1), measure ("precision", "recall", "contextualization", "norm attention",
                         "log-likelihood"), layer, condition ("matched": with the image's own caption, "mismatched": with
                         the pair's other one), value: as `mechvlm.WinogroundResult.to_frame`
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

S = TypeVar("S", bound=StudyRecord)


def save_study(study: S, to: Path, progress: Progress, started: float) -> S:
    """Write everything but the tables, which are there, into the folder `to`; gives the study with the seconds it took in all."""
    (to / "data" / "README.txt").write_text(__doc__ or "", encoding="utf-8")
    study.skipped.to_csv(to / "skipped.csv", index=False)
    progress("figures", 0, 0)
    drawn = figures.draw_all(study)
    figures.save_all(drawn, to / "figures")
    progress("report", 0, 0)
    drawn_from = study.curves()
    study = dataclasses.replace(study, seconds=round(time.perf_counter() - started, 2))
    vars(study)["_curves"] = drawn_from  # which took a second, or more
    record = describe(study)
    captions = record["figures"] = {name: caption for name, (_, caption) in drawn.items()}
    files = gallery.file_names(study.views)
    record["views"] = [{"file": file, "model": key[0], "example": key[1]} for key, file in files.items()]
    (to / "views").mkdir()
    for key, file in files.items():
        (to / file).write_text(study.views[key].html, encoding="utf-8")
    _write_gallery(study, files, to)
    html = page.render(study, record, captions, to / "figures", files)
    (to / "report.html").write_text(html, encoding="utf-8")
    (to / "run.json").write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return study


def _write_gallery(study: StudyRecord, files: dict[tuple[str, str], str], to: Path) -> None:
    examples = {example.id: (example, png(image)) for example, image in study.gallery}
    rows = [
        {
            "model": model, "example": id, "captions": list(examples[id][0].captions), "image": examples[id][1],
            "heat": png(study.views[model, id].heat), "token": study.views[model, id].token,
            "layer": study.views[model, id].layer, "file": file,
        }
        for (model, id), file in files.items()
    ]  # fmt: skip
    columns = ["model", "example", "captions", "image", "heat", "token", "layer", "file"]
    pd.DataFrame(rows, columns=columns).to_parquet(to / "views" / "gallery.parquet", index=False)


def png(image: Image.Image) -> bytes:
    """A picture as the bytes of a PNG file, without loss."""
    held = BytesIO()
    image.save(held, "PNG")
    return held.getvalue()


def describe(study: StudyRecord) -> dict:
    """What run.json holds: all that is needed to run the study again, and what it found."""
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
        "phases": {name: _phases(found) for name, found in study.phases.items()},
    }


def _phases(found) -> dict | None:
    if found is None:
        return None
    return {
        "shows_pattern": found.shows_pattern,
        "explanation": found.explanation,
        "support": _plain(found.support),
        "labels": list(found.labels),
        "directions": list(found.directions),
        "boundaries": [int(b) for b in found.boundaries],
        "boundary_intervals": [[_plain(v) for v in pair] for pair in found.boundary_intervals],
    }


def _plain(value):
    """JSON has no NaN, and does not know numpy's numbers."""
    value = value.item() if hasattr(value, "item") else value
    return None if isinstance(value, float) and math.isnan(value) else value


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for package in RECORDED_PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found
