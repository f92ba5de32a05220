"""Parquet files of others, before they are read.

They are measured by their footers, and held to the kinds of their columns.
"""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

READ_ERRORS = (OSError, ValueError, LookupError, TypeError, AttributeError, pa.ArrowException)
"""What pyarrow and pandas raise for a damaged file."""
MOST_TABLE_ROWS = 5_000_000
"""Rows that any table may have, beside those that its study's examples and states account for."""
PLAIN_BYTES = 64 * 2**20
EXPANSION = 30
"""Snappy, which writes these files, makes them at most 21 times smaller."""
CODECS = ("SNAPPY", "UNCOMPRESSED")
"""Others make a page a thousand times smaller, whatever the footer says of its size."""
NUMBERS = ("state", "layer", "value", "norm", "weight", "positions", "n", "src", "dest_position", "probability", "rank")
"""Columns that hold numbers wherever they stand."""
TEXTS = (
    "model", "example", "pair", "measure", "dest", "piece", "modality", "condition", "answer", "group", "file", "control",
)  # fmt: skip
"""Columns that hold text wherever they stand, but for `BOOLEANS`."""
BOOLEANS = {"pair_scores": ("text", "image", "group")}


def check_parquet(path: Path, most_rows: int = MOST_TABLE_ROWS, categories: Sequence[str] = ()) -> pa.Schema:
    """The columns of a Parquet file that holds no more than it may, counting repeated texts.

    Texts of columns that are read as `categories` are held once, and not counted.

    Raises:
        one of READ_ERRORS: where the file is damaged, or too large once it is read.
    """
    footer = pq.read_metadata(path)
    if footer.num_rows > most_rows:
        raise ValueError(f"it has {footer.num_rows:,} rows, and at most {most_rows:,} belong there")
    groups = [footer.row_group(i) for i in range(footer.num_row_groups)]
    chunks = [group.column(i) for group in groups for i in range(group.num_columns)]
    if others := {chunk.compression for chunk in chunks}.difference(CODECS):
        raise ValueError(f"it is compressed by {', '.join(sorted(others))}, and only {' and '.join(CODECS)} are read")
    if (values := max((chunk.num_values for chunk in chunks), default=0)) > most_rows:
        raise ValueError(f"a column has {values:,} values, and at most {most_rows:,} belong there")
    schema = footer.schema.to_arrow_schema()
    plain = sum(group.total_byte_size for group in groups) + _repeated_bytes(path, schema, categories)
    if plain > (most := PLAIN_BYTES + EXPANSION * path.stat().st_size):
        raise ValueError(f"its {path.stat().st_size:,} bytes become {plain:,} once they are read, more than {most:,}")
    return schema


def _repeated_bytes(path: Path, schema: pa.Schema, categories: Sequence[str]) -> int:
    """The bytes of all texts of a file, each as often as it stands there.

    A file may hold one long text once and name it in every row. Texts are read as such names here,
    a column at a time.
    """
    total = 0
    for field in schema:
        text = pa.types.is_string(field.type) or pa.types.is_binary(field.type)
        if text and field.name not in categories:
            column = pq.read_table(path, columns=[field.name], read_dictionary=[field.name], partitioning=None)[0]
            for part in column.chunks:
                if isinstance(part, pa.DictionaryArray):
                    total += pc.sum(pc.binary_length(part.dictionary).take(part.indices)).as_py() or 0
    return total


def check_kinds(table: str, schema: pa.Schema) -> None:
    """Raise ValueError where a column of numbers or of text holds something else."""
    for field in schema:
        kind, booleans = field.type, BOOLEANS.get(table, ())
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind
        if pa.types.is_null(kind):  # of a table without rows
            continue
        if field.name in booleans:
            right = pa.types.is_boolean(kind)
        elif field.name in NUMBERS:
            right = pa.types.is_integer(kind) or pa.types.is_floating(kind)
        else:
            right = field.name not in TEXTS or pa.types.is_string(kind) or pa.types.is_large_string(kind)
        if not right:
            raise ValueError(f"its column {field.name} holds {field.type}")


def read_columns(path: Path, names: Sequence[str], categories: Sequence[str]) -> pd.DataFrame:
    """Columns of a file, read one by one: so the buffers beside the table are one column's."""

    def column(name: str) -> pd.Series:
        return pd.read_parquet(path, columns=[name], read_dictionary=[name] if name in categories else None)[name]

    return pd.DataFrame({name: column(name) for name in names}, copy=False)
