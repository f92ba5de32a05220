"""Reading a study's folder. It needs no model, and checks every file before it is used."""

import json
import os
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from mechvlm.datasets import Example
from mechvlm.errors import InputError
from mechvlm.results import as_text
from mechvlm.study.curves import phases_of
from mechvlm.study.record import GalleryView

FOLDER_FORMAT = 2
"""Version of the folder's layout, raised when older versions of mechvlm cannot read a new layout.

A run.json without a version has the first layout. The first layout calls states layers, and counts
the layers of attention from 1; `_counted_from_0` reads it.
"""

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
LARGE_TABLES = ("contextualization", "lens", "attention_share")
"""The tables with a value for each example and layer."""
CATEGORIES = ["model", "example", "pair", "tokens", "captions", "measure", "dest"]
"""Columns of the large tables that repeat few texts. As categories, a table takes a fifth."""
REQUIRED_KEYS = ("models", "dataset", "settings", "seconds")
"""The keys that run.json must have."""


def load_study(folder: Path) -> dict[str, Any]:
    """The fields of a `StudyRecord`, from the folder of a finished study.

    Raises:
        InputError: as `Study.open`.
    """
    folder = folder.expanduser()
    record = _record(folder)
    tables = read_tables(folder, record.get("format", 1))
    for name in (*COLUMNS, *(PAIR_COLUMNS if record["dataset"].get("pairs") else ())):
        if name != "gallery" and name not in tables:
            raise InputError(f"{folder} is not whole: data/{name}.parquet is missing. Copy or run the study again.")
    for model, about in record["models"].items():
        for name in ("contextualization", "lens"):
            n_examples = tables[name].loc[tables[name]["model"] == model, "example"].nunique()
            if n_examples != about["n_examples"]:
                raise InputError(
                    f"{folder / 'data' / name}.parquet holds {n_examples} examples of {model}, but run.json counts "
                    f"{about['n_examples']}: the two files are of different studies. Copy or run the study again."
                )
    settings = record["settings"]
    gallery, views = _gallery(folder, record.get("format", 1))
    return {
        "tables": tables,
        "phases": {
            model: phases_of(tables["contextualization"], model, settings["seed"]) for model in record["models"]
        },
        "skipped": _skipped(folder / "skipped.csv"),
        "settings": settings,
        "models": record["models"],
        "dataset": record["dataset"],
        "gallery": gallery,
        "views": views,
        "seconds": record["seconds"],
        "out": folder,
    }


def read_tables(folder: Path, folder_format: int = FOLDER_FORMAT) -> dict[str, pd.DataFrame]:
    """The tables in a study's `data/`, by name, as today's format has them."""
    tables = {path.stem: _table(path, folder_format) for path in sorted((folder / "data").glob("*.parquet"))}
    # Arrow keeps its buffers for later reads, and they are larger than the tables.
    pa.default_memory_pool().release_unused()
    return tables


def decode_png(data: bytes) -> Image.Image:
    """The image in the bytes of a PNG file."""
    image = Image.open(BytesIO(data))
    image.load()
    return image


def _gallery(
    folder: Path, folder_format: int
) -> tuple[list[tuple[Example, Image.Image]], dict[tuple[str, str], GalleryView]]:
    """The examples of the report's gallery, and their patch views by (model, example id)."""
    path = folder / "views" / "gallery.parquet"
    gallery: dict[str, tuple[Example, Image.Image]] = {}
    views = {}
    for row in _table(path, folder_format).itertuples():
        try:
            image, html = decode_png(row.image), (folder / row.file).read_text(encoding="utf-8")
            views[row.model, row.example] = GalleryView(html, decode_png(row.heat), row.token, row.layer)
        except (OSError, ValueError) as error:
            raise _damaged(folder / row.file, error) from error
        gallery.setdefault(row.example, (Example(row.example, image, tuple(row.captions)), image))
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
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _damaged(path, error) from error
    if not isinstance(record, dict):
        raise _damaged(path, f"it holds a {type(record).__name__}")
    folder_format = record.get("format", 1)
    if isinstance(folder_format, int) and folder_format > FOLDER_FORMAT:
        raise InputError(
            f"{folder} was written by a newer mechvlm ({record.get('versions', {}).get('mechvlm', 'of unknown version')}, "
            f"folder format {folder_format}; this one reads up to {FOLDER_FORMAT}). Update: pip install -U mechvlm."
        )
    if missing := [key for key in REQUIRED_KEYS if key not in record]:
        raise _damaged(path, f"it lacks {', '.join(missing)}")
    if "seed" not in record["settings"]:
        raise _damaged(path, "its settings lack the seed")
    for model, about in record["models"].items():
        for key in ("n_layers", "n_examples", "dtype", "seconds"):
            if key not in about:
                raise _damaged(path, f"it lacks {key} of {model}")
    return record


def _table(path: Path, folder_format: int) -> pd.DataFrame:
    try:
        table = _columns(path, CATEGORIES if path.stem in LARGE_TABLES else ())
    except (OSError, ValueError) as error:  # pyarrow's errors are subclasses of these
        raise _damaged(path, error) from error
    if folder_format == 1:
        table = _counted_from_0(path.stem, table)
    if missing := [column for column in (COLUMNS | PAIR_COLUMNS).get(path.stem, ()) if column not in table]:
        raise _damaged(path, f"it lacks the columns {', '.join(missing)}")
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


def _columns(path: Path, categories: Sequence[str]) -> pd.DataFrame:
    """A Parquet file, read column by column: so the buffers beside the table are one column's."""

    def column(name: str) -> pd.Series:
        return pd.read_parquet(path, columns=[name], read_dictionary=[name] if name in categories else None)[name]

    names = [name for name in pq.read_schema(path).names if not name.startswith("__index_level_")]
    return pd.DataFrame({name: column(name) for name in names}, copy=False)


def _skipped(path: Path) -> pd.DataFrame:
    try:
        # Read as text: a model may be "" (no model had read the example), an id "007" or "NA".
        return pd.read_csv(path, keep_default_na=False, dtype=str)[["model", "example", "reason"]]
    except (OSError, ValueError, KeyError) as error:
        raise _damaged(path, error) from error


def _damaged(path: str | os.PathLike, reason: object) -> InputError:
    return InputError(
        f"{path} is missing or damaged ({str(reason).strip().splitlines()[0]}). Copy or run the study again."
    )
