"""Any data set of images and captions that the library `datasets` reads: of the Hub, a folder of it, or Parquet files.

    hf:NAME?image=photo&caption=sentences&id=key&split=test&config=en

`caption` may be given more than once. What is not given is found where there is only one choice: the column that holds
images; the column called captions, caption, sentences or text; the only split. An `id` column names the examples; without
one the number of the row does.
"""

from os import PathLike
from pathlib import Path
from typing import Any

from mechvlm.datasets.example import Example
from mechvlm.datasets.files import SetAside, storable, texts
from mechvlm.errors import InputError
from mechvlm.inputs.images import StoredImage

CAPTION_COLUMNS = ("captions", "caption", "sentences", "text")


def read_hub(
    name: str,
    image: str | None = None,
    caption: list[str] | None = None,
    id: str | None = None,
    split: str | None = None,
    config: str | None = None,
) -> tuple[list[Example], list[SetAside]]:
    """The usable examples in the order of the rows, and those set aside with their reasons. No image is decoded here.

    Args:
        name: on the Hub, or a folder: of `save_to_disk`, or of files that `datasets` knows; or one Parquet file.
        image: the column of images, decoded or as the bytes of a file.
        caption: the columns of captions, a string or a list of them in each row.
        id: the column that names the examples.
        split: which split.
        config: which configuration.

    Raises:
        InputError: for a data set that cannot be had, a column or split that is not there (it lists what there is), or
            where no row can be used.
    """
    table = open_table(name, split, config)
    image = image or _only(table, [c for c in table.column_names if _holds_images(table, c)], "image")
    columns = caption or [_only(table, [c for c in CAPTION_COLUMNS if c in table.column_names], "caption")]
    asked = [image, *columns, *([] if id is None else [id])]
    missing = [column for column in asked if column not in table.column_names]
    if missing:
        raise InputError(f"{name} has no column {', '.join(map(repr, missing))}. It has {_columns(table)}.")
    if not _holds_images(table, image):
        raise InputError(f"The column {image!r} of {name} holds no images. It has {_columns(table)}.")
    images = stored(table, image)
    words = {column: table.select_columns([column])[column][:] for column in asked[1:]}
    examples: dict[str, Example] = {}
    aside = []
    for row in range(len(table)):
        key = storable(str(words[id][row])) if id is not None else str(row)
        try:
            found = [texts(words[column][row]) for column in columns]
            if None in found:
                column = columns[found.index(None)]
                raise InputError(f"row {row} holds no caption in {column!r}, a string or a list of strings")
            if key in examples:
                raise InputError(f"row {row} uses this id again: the first row with it is kept")
            captions = tuple(text for some in found if some is not None for text in some)
            if not captions:
                raise InputError(f"every caption of row {row} is empty")
            examples[key] = Example(key, images[row], captions, {"row": row})
        except InputError as error:
            aside.append(SetAside(key, str(error)))
    if not examples:
        why = f"{len(aside)} rows, none usable; {aside[0].id}: {aside[0].reason}" if aside else "it is empty"
        raise InputError(f"{name} holds no usable example ({why}).")
    return list(examples.values()), aside


def stored(table: Any, column: str) -> list[StoredImage]:
    """Every row's image, each read from the table when it is opened."""
    import datasets

    if isinstance(table.features[column], datasets.Image):
        table = table.cast_column(column, datasets.Image(decode=False))
    table = table.select_columns([column])
    return [StoredImage(table, row, column) for row in range(len(table))]


def open_table(name: str | PathLike, split: str | None = None, config: str | None = None) -> Any:
    """A `datasets.Dataset`: one split of what `name` is.

    Raises:
        InputError: where it cannot be had, or has several splits and none is named.
    """
    try:
        import datasets
    except ImportError as error:
        raise InputError(f"hf:NAME needs the library datasets ({error}): pip install datasets") from error
    path = Path(name)
    try:
        if (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file():
            loaded = datasets.load_from_disk(str(path))
        elif path.suffix == ".parquet" and path.is_file():
            loaded = datasets.load_dataset("parquet", data_files=str(path))
        else:
            names = datasets.get_dataset_split_names(str(name), config)
            _one_of(names, split, str(name))
            loaded = datasets.load_dataset(str(name), config, split=split or names[0])
    except InputError:
        raise
    except Exception as error:
        # Of many kinds: no such name, no access, no network, a file of another format.
        reason = " ".join(str(error).split())[:400]
        raise InputError(
            f"The library datasets gives no {str(name)!r} ({type(error).__name__}: {reason}). It takes a name of the Hub, a "
            "folder that save_to_disk wrote, a folder of files, or one Parquet file."
        ) from error
    if isinstance(loaded, datasets.DatasetDict):
        loaded = loaded[_one_of(list(loaded), split, str(name))]
    return loaded


def _one_of(names: list[str], split: str | None, of: str) -> str:
    if split is None and len(names) == 1:
        return names[0]
    if split not in names:
        asked = "several splits" if split is None else f"no split {split!r}"
        raise InputError(f"{of} has {asked}: there are {', '.join(names)}. Choose: hf:{of}?split={names[0]}")
    return split


def _only(table: Any, found: list[str], kind: str) -> str:
    if len(found) != 1:
        what = f"the columns {', '.join(found)} could be" if found else "no column is known to be"
        raise InputError(f"Which column is the {kind}? Here {what}. Name it, ?{kind}=COLUMN, of {_columns(table)}.")
    return found[0]


def _holds_images(table: Any, column: str) -> bool:
    """Images, bytes, or {"bytes", "path"} as the Hub's Parquet files have them."""
    import datasets

    kind = table.features[column]
    if isinstance(kind, dict):
        return set(kind) == {"bytes", "path"}
    return isinstance(kind, datasets.Image) or getattr(kind, "dtype", "") in ("binary", "large_binary")


def _columns(table: Any) -> str:
    def kind(feature: Any) -> str:
        return getattr(feature, "dtype", None) or type(feature).__name__

    return ", ".join(f"{name} ({kind(feature)})" for name, feature in table.features.items())
