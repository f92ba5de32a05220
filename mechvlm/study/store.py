"""A study's folder, written and read back.

    report.html             one page that works offline; its gallery opens the pages in views/
    views/*.html            the patch view of each of the gallery's examples, by model: run.json says which is which
    figures/*.png, *.svg    the four figures
    data/*.parquet          the tables below; data/README.txt says what is in them
    skipped.csv             what was set aside: model, example, reason
    run.json                models and revisions, versions, seed, the data's fingerprint, every setting, findings, captions

Tables, one value a row; `example` is the data set's id, layers count from 0 (embeddings):

    contextualization    model, example, pair ("inter", "image", "text"), layer, value (mean cosine)
    baseline             model, pair, layer, value: the mean cosine of tokens of different examples
    lens                 model, example, tokens ("image", "text"), captions ("own", "other"), measure ("precision",
                         "recall"), layer, value (share; empty for 0/0)
    norm_attention       model, dest, dest_position, layer, src, piece, modality, norm (residual-stream units), weight
                         (mean over heads), n: means over n examples
    phases               model, and the columns of `mechvlm.phases.Phases.to_frame`
    answers, words       of the few examples that the report shows: the model's answer; the words that most of its
                         visual tokens decode to, by layer, with the number of positions
"""

import dataclasses
import hashlib
import json
import math
import os
import platform
import time
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pandas as pd
import torch

from mechvlm import bundled
from mechvlm.errors import InputError
from mechvlm.study import figures, gallery, report
from mechvlm.study.opened import FORMAT
from mechvlm.study.runner import Progress
from mechvlm.study.study import Study
from mechvlm.study.summary import summary

PACKAGES = ("mechvlm", "torch", "transformers", "nnsight", "numpy", "pandas", "matplotlib", "pillow", "simplemma")
MEASURES = {
    "logit lens": {"k": 1, "positions": "all", "final_norm": True},
    "words": {"by": "word", "lemmas": True, "stop_words": "left out", "non_words": "left out"},
    "contextualization": {"self_pairs": True, "special_tokens": False, "baseline_subtracted": False},
    "norm-based attention": {"destinations": ["last_text", "last_image"], "heads": "summed before the norm"},
    "phases": {"max_segments": 6, "n_bootstrap": 1000, "confidence": 0.95},
}


def write(study: Study, out: Path, progress: Progress, started: float) -> Study:
    """Write everything; gives the study with `out` and the seconds that it took in all.

    Raises:
        InputError: when the folder cannot be written to.
    """
    try:
        progress("tables", 0, 0)
        (out / "data").mkdir(parents=True)
        for name, table in study.tables.items():
            table.to_parquet(out / "data" / f"{name}.parquet", index=False)
        (out / "data" / "README.txt").write_text(__doc__ or "", encoding="utf-8")
        study.skipped.to_csv(out / "skipped.csv", index=False)
        progress("figures", 0, 0)
        drawn = figures.draw_all(study)
        figures.save_all(drawn, out / "figures")
        progress("report", 0, 0)
        study = dataclasses.replace(study, seconds=round(time.perf_counter() - started, 2), out=out)
        record = describe(study)
        captions = record["figures"] = {name: caption for name, (_, caption) in drawn.items()}
        files = gallery.file_names(study.views)
        record["views"] = [{"file": file, "model": key[0], "example": key[1]} for key, file in files.items()]
        (out / "views").mkdir()
        for key, file in files.items():
            (out / file).write_text(study.views[key].html, encoding="utf-8")
        page = report.render(study, record, captions, out / "figures", files)
        (out / "report.html").write_text(page, encoding="utf-8")
        # Last: a folder with a run.json is a whole one.
        (out / "run.json").write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise InputError(f"The study cannot be written to {out} ({error}). Is the disk full?") from error
    return study


def read_tables(out: str | os.PathLike) -> dict[str, pd.DataFrame]:
    """The tables of a written study, by name.

    Raises:
        InputError: where there are none.
    """
    found = sorted((Path(out) / "data").glob("*.parquet"))
    if not found:
        raise InputError(f"{out} holds no data/*.parquet: it is no study's folder.")
    return {path.stem: pd.read_parquet(path) for path in found}


def describe(study: Study) -> dict:
    """What run.json holds: all that is needed to run the study again, and what it found."""
    rows = summary(study).to_dict("records")
    return {
        "study": "Wei et al. 2024, A Study on Multi-modal Interaction in Vision Large Language Models",
        "format": FORMAT,
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "models": {name: about | _weights(name, about) for name, about in study.models.items()},
        "dataset": study.dataset,
        "seed": study.settings["seed"],
        "settings": study.settings | {"measures": MEASURES},
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


def _weights(name: str, about: dict) -> dict:
    """A hub id has its revision; of a folder, the weights themselves are hashed."""
    folder = bundled.path(name) if name in bundled.NAMES else Path(name)
    files = sorted(folder.glob("*.safetensors")) if about["revision"] is None and folder.is_dir() else []
    if not files:
        return {}
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    # Of one file, its own hash: what `sha256sum` says.
    return {"sha256": hashlib.sha256(files[0].read_bytes()).hexdigest() if len(files) == 1 else digest.hexdigest()}


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found
