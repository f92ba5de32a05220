"""Any data set of images and captions that the library `datasets` can read.

It may be a name on the Hub, a folder that `datasets` wrote or can read, or one Parquet file.

    hf:NAME?image=photo&caption=sentences&id=key&split=test&config=en

`caption` may be given more than once. An option that is left out is chosen when there is only one
choice: the column that holds images; the column called captions, caption, sentences or text; the
only split. Without an `id` column, or where it is null, the row number is the example's id. A
caption is a string, or a dict that holds one under "raw", "caption" or "text".
"""

import os
import sys
from os import PathLike
from pathlib import Path
from typing import Any

from mechvlm.datasets.example import Example
from mechvlm.datasets.files import CAPTION_COLUMNS, SetAside, none_usable, storable_captions, storable_id
from mechvlm.errors import InputError
from mechvlm.inputs.images import StoredImage
from mechvlm.outside.files import require_regular

MOST_ROWS = 5_000_000
"""Rows of a data set. A Parquet file of a few megabytes can claim a thousand million."""


def read_hub(
    name: str,
    image: str | None = None,
    caption: list[str] | None = None,
    id: str | None = None,
    split: str | None = None,
    config: str | None = None,
) -> tuple[list[Example], list[SetAside]]:
    """Read a data set: its usable examples in the order of the rows, and those set aside.

    No image is decoded here.

    Args:
        name: a name on the Hub; a folder that `save_to_disk` wrote, or of files that `datasets`
            knows; or one Parquet file.
        image: the column of images, decoded or as the bytes of a file.
        caption: the columns of captions; each row holds a string or a list of strings.
        id: the column of the examples' ids.
        split: which split.
        config: which configuration.

    Raises:
        InputError: when the data set cannot be loaded, a column or split does not exist (the error
            lists those that do), or no row can be used.
    """
    table = open_table(name, split, config)
    image = image or _only_column(table, [c for c in table.column_names if _holds_images(table, c)], "image")
    columns = caption or [_only_column(table, [c for c in CAPTION_COLUMNS if c in table.column_names], "caption")]
    needed = [image, *columns, *([] if id is None else [id])]
    missing = [column for column in needed if column not in table.column_names]
    if missing:
        raise InputError(f"{name} has no column {', '.join(map(repr, missing))}. It has {_columns(table)}.")
    if not _holds_images(table, image):
        raise InputError(f"The column {image!r} of {name} holds no images. It has {_columns(table)}.")
    images = stored_images(table, image, folders_of(name))
    texts = {column: table.select_columns([column])[column][:] for column in needed[1:]}
    examples: dict[str, Example] = {}
    aside = []
    for row in range(len(table)):
        key = str(row)
        try:
            key = storable_id(None if id is None else texts[id][row]) or key
            captions: list[str] = []
            for column in columns:
                try:
                    captions += storable_captions(texts[column][row])
                except InputError as error:
                    raise InputError(f"the captions of row {row} in {column!r} {error}") from None
            if key in examples:
                raise InputError(f"row {row} uses this id again: the first row with it is kept")
            if not captions:
                raise InputError(f"every caption of row {row} is empty")
            examples[key] = Example(key, images[row], tuple(captions), {"row": row})
        except InputError as error:
            aside.append(SetAside(key, str(error)))
    if not examples:
        raise InputError(f"{name} holds no usable example ({none_usable(aside, 'rows')}).")
    return list(examples.values()), aside


def stored_images(table: Any, column: str, folders: tuple[str, ...]) -> list[StoredImage]:
    """The images of all rows. Each is read from the table when it is opened.

    A row may name a file in one of the `folders` instead.
    """
    import datasets

    if isinstance(table.features[column], datasets.Image):
        table = table.cast_column(column, datasets.Image(decode=False))
    table = table.select_columns([column])
    return [StoredImage(table, row, column, folders) for row in range(len(table))]


def _refuse_long(path: Path) -> None:
    """Raises InputError for local Parquet files with too many rows, before a row is read."""
    import pyarrow.parquet as pq

    for file in [path] if path.is_file() else path.rglob("*.parquet") if path.is_dir() else ():
        require_regular(file, sys.maxsize, "tables")
        if file.suffix.lower() == ".parquet":
            try:
                rows = pq.read_metadata(file).num_rows
            except (OSError, ValueError) as error:  # pyarrow's errors are subclasses of these
                raise InputError(f"{file} is no Parquet file ({str(error).splitlines()[0]}). Fetch it again.") from None
            if rows > MOST_ROWS:
                raise InputError(f"{file} has {rows:,} rows; at most {MOST_ROWS:,} are read.")


def folders_of(name: str) -> tuple[str, ...]:
    """The folders of a data set's files: its own, or those of what was fetched from the Hub."""
    path = Path(os.path.expanduser(name))
    if path.exists():
        return (str(path.absolute() if path.is_dir() else path.absolute().parent),)
    from huggingface_hub.constants import HF_HUB_CACHE

    import datasets

    return (str(datasets.config.HF_DATASETS_CACHE), str(datasets.config.DOWNLOADED_DATASETS_PATH), HF_HUB_CACHE)


def open_table(name: str | PathLike, split: str | None = None, config: str | None = None) -> Any:
    """One split of a data set, as a `datasets.Dataset`.

    Raises:
        InputError: when it cannot be loaded, or has several splits and `split` names none.
    """
    try:
        import datasets
    except ImportError as error:
        raise InputError(f"hf:NAME needs the library datasets ({error}): pip install datasets") from error
    name = os.path.expanduser(name)
    path = Path(name)
    _refuse_long(path)
    try:
        if (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file():
            loaded = datasets.load_from_disk(str(path))
        elif path.suffix.lower() == ".parquet" and path.is_file():
            # Not load_dataset, which tells a server on the internet that Parquet was read.
            loaded = datasets.DatasetDict({"train": datasets.Dataset.from_parquet(str(path))})
        elif not path.exists() and (path.is_absolute() or name.startswith(".") or path.suffix.lower() == ".parquet"):
            raise InputError(
                f"There is no file or folder {name}: hf:PATH needs one, and hf:OWNER/NAME a name on the Hub."
            )
        else:
            names = datasets.get_dataset_split_names(str(name), config)
            _choose_split(names, split, str(name))
            loaded = datasets.load_dataset(str(name), config, split=split or names[0])
    except InputError:
        raise
    except Exception as error:
        # The library raises many types: for an unknown name, no access, no network, another format.
        reason = " ".join(str(error).split())[:400]
        raise InputError(
            f"The library datasets cannot load {str(name)!r} ({type(error).__name__}: {reason}). Give a name on the Hub, a "
            "folder that save_to_disk wrote, a folder of files, or one Parquet file."
        ) from error
    if isinstance(loaded, datasets.DatasetDict):
        loaded = loaded[_choose_split(list(loaded), split, str(name))]
    return loaded


def _choose_split(names: list[str], split: str | None, name: str) -> str:
    if split is None and len(names) == 1:
        return names[0]
    if split not in names:
        problem = "several splits" if split is None else f"no split {split!r}"
        raise InputError(f"{name} has {problem}: there are {', '.join(names)}. Choose: hf:{name}?split={names[0]}")
    return split


def _only_column(table: Any, candidates: list[str], kind: str) -> str:
    if len(candidates) != 1:
        choice = f"the columns {', '.join(candidates)} could be" if candidates else "no column is known to be"
        raise InputError(
            f"Which column is the {kind}? Here {choice}. Name it with ?{kind}=COLUMN; there are {_columns(table)}."
        )
    return candidates[0]


def _holds_images(table: Any, column: str) -> bool:
    """Whether a column holds images, bytes, or {"bytes", "path"} as the Hub's Parquet files do."""
    import datasets

    kind = table.features[column]
    if isinstance(kind, dict):
        return set(kind) == {"bytes", "path"}
    return isinstance(kind, datasets.Image) or getattr(kind, "dtype", "") in ("binary", "large_binary")


def _columns(table: Any) -> str:
    def kind(feature: Any) -> str:
        return getattr(feature, "dtype", None) or type(feature).__name__

    return ", ".join(f"{name} ({kind(feature)})" for name, feature in table.features.items())
