"""The table of models: which methods were tried on which families, and how they came out.

`models.json` is written by `scripts/model_table.py`, and held to the models by the tests.
"""

import json
from pathlib import Path
from typing import Any

TABLE = Path(__file__).with_name("models.json")

Row = dict[str, Any]
"""The keys are class, text (type of the language model), and one of these three:

methods: a dict from each method to "" where it works, or else to why it is refused.
refused: why the whole family is refused.
untried: why it was not tried.
"""


def load_table() -> dict[str, Row]:
    """The rows of the table, by family."""
    return json.loads(TABLE.read_text(encoding="utf-8"))


def row_text(name: str, row: Row) -> str:
    """A family's row in one line."""
    head = f"{name:<20} {row['class'].removesuffix('ForConditionalGeneration'):<22} {row['text']:<18}"
    if "refused" in row:
        return f"{head} refused: {row['refused']}"
    if "untried" in row:
        return f"{head} not tried: {row['untried']}"
    lacking = [method for method, reason in row["methods"].items() if reason]
    if not lacking:
        return f"{head} all {len(row['methods'])} methods"
    return f"{head} {len(row['methods']) - len(lacking)} of {len(row['methods'])} methods; not {', '.join(lacking)}"
