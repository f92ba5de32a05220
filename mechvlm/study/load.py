"""A study's folder, read back: no model is needed for it, and nothing is taken on trust that can be checked."""

import json
import os
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from mechvlm.datasets import Example
from mechvlm.errors import InputError
from mechvlm.study.curves import phases_of
from mechvlm.study.record import Shown

FOLDER_FORMAT = 1
"""The folder's layout; counted up where an older version could no longer read it. Folders without a number are the first."""

COLUMNS = {
    "contextualization": ("model", "example", "pair", "layer", "value"),
    "baseline": ("model", "pair", "layer", "value"),
    "lens": ("model", "example", "tokens", "captions", "measure", "layer", "value"),
    "norm_attention": (
        "model", "dest", "dest_position", "layer", "src", "piece", "modality", "norm", "weight", "n",
    ),
    "attention_share": ("model", "example", "dest", "measure", "layer", "value"),
    "phases": ("model",),
    "answers": ("model", "example", "answer"),
    "words": ("model", "example", "layer", "word", "positions"),
    "gallery": ("model", "example", "captions", "image", "heat", "token", "layer", "file"),
}  # fmt: skip
PAIR_COLUMNS = {
    "pair_scores": ("model", "pair", "tag", "text", "image", "group"),
    "pairs": ("model", "pair", "image", "measure", "layer", "condition", "value"),
}
"""Of the tables that a study of Winoground has besides."""
PER_EXAMPLE = ("contextualization", "lens", "attention_share")
REPEATED = ["model", "example", "pair", "tokens", "captions", "measure", "dest"]
"""Text that stands in very many rows of the tables above: as categories, a table is a fifth of its size."""
RECORDED = ("models", "dataset", "settings", "seconds")


def load_study(folder: Path) -> dict[str, Any]:
    """What `Study` is made of, from a finished study's folder. `Study.open` says what is raised."""
    record = _record(folder)
    tables = read_tables(folder)
    for name in (*COLUMNS, *(PAIR_COLUMNS if record["dataset"].get("pairs") else ())):
        if name != "gallery" and name not in tables:
            raise InputError(f"{folder} is not whole: data/{name}.parquet is missing. Copy or run the study again.")
    for model, about in record["models"].items():
        for name in ("contextualization", "lens"):
            held = tables[name].loc[tables[name]["model"] == model, "example"].nunique()
            if held != about["n_examples"]:
                raise InputError(
                    f"{folder / 'data' / name}.parquet holds {held} examples of {model}, where run.json counts "
                    f"{about['n_examples']}: they are not of one study. Copy or run it again."
                )
    settings = record["settings"]
    shown, views = _gallery(folder)
    return {
        "tables": tables,
        "phases": {
            model: phases_of(tables["contextualization"], model, settings["seed"]) for model in record["models"]
        },
        "skipped": _skipped(folder / "skipped.csv"),
        "settings": settings,
        "models": record["models"],
        "dataset": record["dataset"],
        "gallery": shown,
        "views": views,
        "seconds": record["seconds"],
        "out": folder,
    }


def read_tables(folder: Path) -> dict[str, pd.DataFrame]:
    """The tables in a study's `data/`, by name."""
    tables = {path.stem: _table(path) for path in sorted((folder / "data").glob("*.parquet"))}
    # What Arrow read into and keeps for the next time is more than the tables are.
    pa.default_memory_pool().release_unused()
    return tables


def picture(data: bytes) -> Image.Image:
    """The picture of a PNG file's bytes."""
    image = Image.open(BytesIO(data))
    image.load()
    return image


def _gallery(folder: Path) -> tuple[list[tuple[Example, Image.Image]], dict[tuple[str, str], Shown]]:
    """The few examples that the report shows, and their patch views by (model, example id)."""
    path = folder / "views" / "gallery.parquet"
    gallery: dict[str, tuple[Example, Image.Image]] = {}
    views = {}
    for row in _table(path).itertuples():
        try:
            image, html = picture(row.image), (folder / row.file).read_text(encoding="utf-8")
            views[row.model, row.example] = Shown(html, picture(row.heat), row.token, row.layer)
        except (OSError, ValueError) as error:
            raise _damaged(folder / row.file, error) from error
        gallery.setdefault(row.example, (Example(row.example, image, tuple(row.captions)), image))
    return list(gallery.values()), views


def _record(folder: Path) -> dict[str, Any]:
    """run.json, which is written last: a folder that holds it is whole."""
    path = folder / "run.json"
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "is not there"
        raise InputError(f"{folder} {what}; a study is opened by its folder, the one that holds run.json and data/.")
    if not path.is_file():
        if (folder / "settings.json").is_file() or any(folder.rglob("*.parquet")):
            raise InputError(
                f"The study in {folder} is not finished: there is no run.json yet. Run the command that began it again: "
                "it goes on from there."
            )
        raise InputError(f"{folder} holds no study: there is no run.json. `mechvlm study --out DIR` writes one.")
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _damaged(path, error) from error
    if not isinstance(record, dict):
        raise _damaged(path, f"it holds a {type(record).__name__}")
    written = record.get("format", 1)
    if isinstance(written, int) and written > FOLDER_FORMAT:
        raise InputError(
            f"{folder} was written by a newer mechvlm ({record.get('versions', {}).get('mechvlm', 'of unknown version')}, "
            f"folder format {written}; this one reads up to {FOLDER_FORMAT}). Update: pip install -U mechvlm."
        )
    if missing := [key for key in RECORDED if key not in record]:
        raise _damaged(path, f"it lacks {', '.join(missing)}")
    if "seed" not in record["settings"]:
        raise _damaged(path, "its settings lack the seed")
    for model, about in record["models"].items():
        for key in ("n_layers", "n_examples", "dtype", "seconds"):
            if key not in about:
                raise _damaged(path, f"it says no {key} of {model}")
    return record


def _table(path: Path) -> pd.DataFrame:
    try:
        table = _columns(path, REPEATED if path.stem in PER_EXAMPLE else ())
    except (OSError, ValueError) as error:  # pyarrow's own are both
        raise _damaged(path, error) from error
    if missing := [column for column in (COLUMNS | PAIR_COLUMNS).get(path.stem, ()) if column not in table]:
        raise _damaged(path, f"it lacks the columns {', '.join(missing)}")
    for column in table.select_dtypes("category"):
        # In the order of text, not of first appearance: sorted as users expect.
        table[column] = table[column].cat.reorder_categories(sorted(table[column].cat.categories))
    return table


def _columns(path: Path, repeated: Sequence[str]) -> pd.DataFrame:
    """A Parquet file, column by column: what is held beside the table while it is read is one column's."""

    def column(name: str) -> pd.Series:
        return pd.read_parquet(path, columns=[name], read_dictionary=[name] if name in repeated else None)[name]

    names = [name for name in pq.read_schema(path).names if not name.startswith("__index_level_")]
    return pd.DataFrame({name: column(name) for name in names}, copy=False)


def _skipped(path: Path) -> pd.DataFrame:
    try:
        # "" is a model's name here (none had seen the example), and an id may be "007" or "NA".
        return pd.read_csv(path, keep_default_na=False, dtype=str)[["model", "example", "reason"]]
    except (OSError, ValueError, KeyError) as error:
        raise _damaged(path, error) from error


def _damaged(path: str | os.PathLike, reason: object) -> InputError:
    return InputError(
        f"{path} is missing or damaged ({str(reason).strip().splitlines()[0]}). Copy or run the study again."
    )
