"""Reading a study's folder. It needs no model, and checks every file before it is used."""

import os
import re
import warnings
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from PIL import Image

from mechvlm.datasets import Example
from mechvlm.errors import InputError
from mechvlm.measures.control_excess import ControlExcess
from mechvlm.measures.phases import Phases
from mechvlm.outside.files import file_inside, printable, require_regular
from mechvlm.outside.integrity import SEAL, check_file, check_seal, check_size, check_type, digest, read_json
from mechvlm.outside.pieces import as_text
from mechvlm.study.curves import controls_of, phases_of
from mechvlm.study.parquet import MOST_TABLE_ROWS, READ_ERRORS, check_kinds, check_parquet, read_columns
from mechvlm.study.record import GalleryView
from mechvlm.study.schema import RunRecord

FOLDER_FORMAT = 3
"""Version of the folder's layout, raised when older versions of mechvlm cannot read a new layout.

A run.json without a version has the first layout. The first layout calls states layers, and counts
the layers of attention from 1; `_counted_from_0` reads it. From the third on run.json is sealed
(`mechvlm.outside.integrity`) and holds the SHA-256 of every other file.
"""
SEALED_FOLDER_FORMAT = 3

COLUMNS = {
    "contextualization": ("model", "example", "pair", "state", "value"),
    "baseline": ("model", "pair", "state", "value"),
    "lens": ("model", "example", "tokens", "captions", "measure", "state", "value"),
    "norm_attention": (
        "model", "dest", "dest_position", "layer", "src", "piece", "modality", "norm", "weight", "n",
    ),
    "attention_share": ("model", "example", "dest", "measure", "layer", "value"),
    "phases": ("model",),
    "answers": ("model", "example", "answer"),
    "words": ("model", "example", "state", "word", "positions"),
    "gallery": ("model", "example", "captions", "image", "heat", "token", "layer", "file"),
}  # fmt: skip
"""The columns that each table must have; of "phases" only one is needed to read it."""
PAIR_COLUMNS = {
    "pair_scores": ("model", "pair", "tag", "text", "image", "group"),
    "pairs": ("model", "pair", "image", "measure", "layer", "condition", "value"),
}
"""The same for the further tables of a study of Winoground."""
ANSWER_COLUMNS = {
    "answer_tokens": ("model", "example", "token", "piece", "word", "group"),
    "answer_attention": ("model", "example", "token", "layer", "norm", "weight"),
    "answer_lens": ("model", "example", "token", "state", "probability", "rank"),
}
"""The same for those of a study that read answers."""
CONTROL_COLUMNS = {"controls": ("model", "example", "control", "state", "value")}
"""The same for what studies of earlier versions lack."""
LARGE_TABLES = ("contextualization", "lens", "attention_share", "answer_attention", "answer_lens")
"""The tables with a value for each example and layer."""
CATEGORIES = ["model", "example", "pair", "tokens", "captions", "measure", "dest"]
"""Columns of the large tables that repeat few texts. As categories, a table takes a fifth."""
READ_FILE = re.compile(r"data/\w+\.parquet|skipped\.csv|views/(gallery\.parquet|[^/\\]+\.html)")
"""The files of a folder that are read when it is opened, beside run.json."""
ROWS_PER_STATE = 100
"""Most rows that a table has for one state of one example."""
MOST_TEXT_BYTES, MOST_PIXELS = 64 * 2**20, 2**24
"""Of skipped.csv or a patch view, and of a picture in the gallery."""


def load_study(folder: Path) -> dict[str, Any]:
    """The fields of a `StudyRecord`, from the folder of a finished study.

    Raises:
        InputError: as `Study.open`.
    """
    folder = folder.expanduser()
    record = _record(folder)
    _check_files(folder, record)
    tables = read_tables(folder, record)
    with_pairs, with_answers = record["dataset"].get("pairs"), record["settings"].get("answers")
    for name in (*COLUMNS, *(PAIR_COLUMNS if with_pairs else ()), *(ANSWER_COLUMNS if with_answers else ())):
        if name != "gallery" and name not in tables:
            raise InputError(f"{folder} is not whole: data/{name}.parquet is missing. Copy or run the study again.")
    for model, about in record["models"].items():
        for name in ("contextualization", "lens"):
            _check_belongs(folder / "data" / f"{name}.parquet", tables[name], model, about)
    gallery, views = _gallery(folder, record)
    phases = {model: _phases(folder, tables, model, record) for model in record["models"]}
    return {
        "tables": tables,
        "phases": phases,
        "controls": {model: _controls(folder, tables, model, phases[model]) for model in phases},
        "skipped": _skipped(folder / "skipped.csv"),
        "settings": record["settings"],
        "models": record["models"],
        "dataset": record["dataset"],
        "gallery": gallery,
        "views": views,
        "seconds": float(record["seconds"]),
        "out": folder,
    }


def _check_files(folder: Path, record: dict[str, Any]) -> None:
    """Raise InputError for a file that is read here and differs from its checksum in run.json."""
    if SEAL not in record:
        warnings.warn(
            f"{folder} is of an earlier mechvlm, which wrote no checksums: damage in it would not be seen.",
            stacklevel=4,
        )
        return
    for name in filter(READ_FILE.fullmatch, {"skipped.csv": None, "views/gallery.parquet": None, **record["files"]}):
        try:
            check_file(folder / name, record["files"].get(name))
        except (OSError, ValueError) as error:
            raise _damaged(folder / name, error) from error


def _check_belongs(path: Path, table: pd.DataFrame, model: str, about: dict[str, Any]) -> None:
    """Raise InputError for a table of other examples or states than those that run.json names."""
    rows = table[table["model"] == model]
    n_examples, n_states = rows["example"].nunique(), rows["state"].nunique()
    digest_of_ids, problem = examples_digest(table, model), ""
    if n_examples != about["n_examples"]:
        problem = f"holds {n_examples} examples of {model}, but run.json counts {about['n_examples']}"
    elif n_states != about["n_layers"] + 1:
        problem = f"holds {n_states} states of {model}, but run.json counts {about['n_layers']} layers"
    elif about.get("examples", digest_of_ids) != digest_of_ids:
        problem = f"holds other examples of {model} than run.json names"
    if problem:
        raise InputError(f"{path} {problem}: the two files are of different studies. Copy or run the study again.")


def examples_digest(table: pd.DataFrame, model: str) -> str:
    """The digest of the ids of a model's examples in a table, in order."""
    return digest(table.loc[table["model"] == model, "example"].unique().tolist())


def _phases(folder: Path, tables: dict[str, pd.DataFrame], model: str, record: dict[str, Any]) -> Phases | None:
    try:
        return phases_of(tables["contextualization"], model, record["settings"]["seed"])
    except (ValueError, LookupError, TypeError, RuntimeError) as error:
        raise _damaged(folder / "data" / "contextualization.parquet", error) from error


def _controls(folder: Path, tables: dict[str, pd.DataFrame], model: str, phases: Phases | None) -> ControlExcess | None:
    try:
        return controls_of(tables, model, phases)
    except (ValueError, LookupError, TypeError, RuntimeError) as error:
        raise _damaged(folder / "data" / "controls.parquet", error) from error


def read_tables(folder: Path, record: dict[str, Any] | None = None) -> dict[str, pd.DataFrame]:
    """The tables in a study's `data/`, by name, as today's format has them.

    Args:
        folder: of the study.
        record: its run.json; None for tables that this process has just written.

    Raises:
        InputError: for a table that is damaged, or larger than the study that run.json describes.
    """
    if record is not None and SEAL in record:
        names = [name for name in record["files"] if READ_FILE.fullmatch(name) and name.startswith("data/")]
        paths = [folder / name for name in sorted(names)]
    else:
        paths = sorted((folder / "data").glob("*.parquet"))
    tables = {path.stem: _table(path, record) for path in paths}
    # Arrow keeps its buffers for later reads, and they are larger than the tables.
    pa.default_memory_pool().release_unused()
    return tables


def decode_png(data: bytes) -> Image.Image:
    """The image in the bytes of a PNG file.

    Raises:
        OSError, ValueError: where it is damaged, or larger than a gallery's pictures.
    """
    try:
        image = Image.open(BytesIO(data), formats=("PNG",))
        if image.width * image.height > MOST_PIXELS:
            raise ValueError(f"a picture has {image.width} x {image.height} pixels")
        image.load()
    except (SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(str(error)) from error
    return image


def _gallery(
    folder: Path, record: dict[str, Any]
) -> tuple[list[tuple[Example, Image.Image]], dict[tuple[str, str], GalleryView]]:
    """The examples of the report's gallery, and their patch views by (model, example id)."""
    gallery: dict[str, tuple[Example, Image.Image]] = {}
    views = {}
    for row in _table(folder / "views" / "gallery.parquet", record).itertuples():
        try:
            page = file_inside(folder, row.file)
            if not READ_FILE.fullmatch(row.file) or (SEAL in record and row.file not in record["files"]):
                raise ValueError("it is no page of this folder")
            require_regular(page, MOST_TEXT_BYTES, "pages")
            image, html = decode_png(row.image), page.read_text(encoding="utf-8")
            views[row.model, row.example] = GalleryView(html, decode_png(row.heat), row.token, row.layer)
            example = Example(row.example, image, tuple(row.captions))
        except (OSError, ValueError, TypeError) as error:
            raise _damaged(f"{folder}/{printable(row.file)}", error) from error
        gallery.setdefault(row.example, (example, image))
    return list(gallery.values()), views


def _record(folder: Path) -> dict[str, Any]:
    """The content of run.json. The file is written last, so a folder that holds it is complete."""
    path = folder / "run.json"
    if not folder.is_dir():
        problem = "is a file" if folder.exists() else "is not there"
        raise InputError(f"{folder} {problem}; a study is opened by its folder, the one that holds run.json and data/.")
    if not path.is_file():
        if (folder / "settings.json").is_file() or any(folder.rglob("*.parquet")):
            raise InputError(
                f"The study in {folder} is not finished: there is no run.json yet. Run the command that began it again: "
                "it continues where it stopped."
            )
        raise InputError(f"{folder} holds no study: there is no run.json. `mechvlm study --out DIR` writes one.")
    try:
        record = read_json(path)
        folder_format = record.get("format", 1)
        if isinstance(folder_format, int) and folder_format > FOLDER_FORMAT:
            raise InputError(
                f"{folder} was written by a newer mechvlm ({_version_of(record)}, folder format {folder_format}; this one reads "
                f"up to {FOLDER_FORMAT}). Update: pip install -U mechvlm."
            )
        if SEAL in record or folder_format == SEALED_FOLDER_FORMAT:
            check_seal(record)
        check_type(record, RunRecord)
    except InputError:
        raise
    except (OSError, ValueError) as error:
        raise _damaged(path, error) from error
    return record


def _version_of(record: dict[str, Any]) -> str:
    versions = record.get("versions")
    return (
        str(versions.get("mechvlm", "of unknown version"))[:40] if isinstance(versions, dict) else "of unknown version"
    )


def _table(path: Path, record: dict[str, Any] | None) -> pd.DataFrame:
    models = {} if record is None else record["models"]
    n_states = sum(about["n_examples"] * (about["n_layers"] + 1) for about in models.values())
    try:
        check_size(path)
        categories = CATEGORIES if path.stem in LARGE_TABLES else ()
        schema = check_parquet(path, MOST_TABLE_ROWS + ROWS_PER_STATE * n_states, categories)
        check_kinds(path.stem, schema)
        names = [column for column in schema.names if not column.startswith("__index_level_")]
        table = read_columns(path, names, categories)
    except READ_ERRORS as error:
        raise _damaged(path, error) from error
    if record is not None and record.get("format", 1) == 1:
        table = _counted_from_0(path.stem, table)
    if missing := [
        column
        for column in (COLUMNS | PAIR_COLUMNS | ANSWER_COLUMNS | CONTROL_COLUMNS).get(path.stem, ())
        if column not in table
    ]:
        raise _damaged(path, f"it lacks the columns {', '.join(missing)}")
    for column in table.columns.intersection([*CATEGORIES, "state", "layer"]):
        if table[column].isna().any():
            raise _damaged(path, f"its column {column} has rows without a value")
    for column in table.select_dtypes("category"):
        # Categories come in the order of first appearance; users expect a sort by text.
        table[column] = table[column].cat.reorder_categories(sorted(table[column].cat.categories))
    return table


def _counted_from_0(name: str, table: pd.DataFrame) -> pd.DataFrame:
    """A table of the first format, with states called so and layers counted from 0."""
    if name == "phases":
        return table.rename(columns={"first_layer": "first_state", "last_layer": "last_state"})
    if "piece" in table:  # the first format holds the tokenizer's pieces
        table = table.assign(piece=as_text(tuple(table["piece"])))
    if "layer" not in table:
        return table
    if "state" in COLUMNS.get(name, ()):
        return table.rename(columns={"layer": "state"})
    of_attention = table["measure"] == "norm attention" if name == "pairs" else True
    return table.assign(layer=table["layer"].where(~np.broadcast_to(of_attention, len(table)), table["layer"] - 1))


def _skipped(path: Path) -> pd.DataFrame:
    try:
        check_size(path, MOST_TEXT_BYTES)
        # Read as text: a model may be "" (no model had read the example), an id "007" or "NA".
        return pd.read_csv(path, keep_default_na=False, dtype=str)[["model", "example", "reason"]]
    except (OSError, ValueError, KeyError) as error:
        raise _damaged(path, error) from error


def _damaged(path: str | os.PathLike, reason: object) -> InputError:
    return InputError(
        f"{path} is missing or damaged ({str(reason).strip().splitlines()[0]}). Copy or run the study again."
    )
