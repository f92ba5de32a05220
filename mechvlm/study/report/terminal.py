"""The summary of a study in the terminal."""

import sys
from collections.abc import Sequence
from typing import Literal

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mechvlm.outside.files import printable
from mechvlm.study.record import StudyRecord
from mechvlm.study.report.answer_figure import answer_sentence
from mechvlm.study.report.captioned import short_name
from mechvlm.study.report.page import format_interval, format_number
from mechvlm.study.report.pairs import pair_lines
from mechvlm.study.report.summary import summary

SUMMARY_COLUMNS = (
    "model", "layers", "n", "precision\nbest (state)", "at 0", "other\ncaptions", "decode to\na word",
    "recall\nbest (state)", "at 0", "other\ncaptions", "cosine\nlow (state)", "\nhigh (state)", "phases", "s",
)  # fmt: skip
NARROW_TABLES = {
    "Words on visual tokens: precision": (0, 1, 2, 3, 4, 5, 6), "Words on visual tokens: recall": (0, 7, 8, 9),
    "Inter-modal cosine and phases": (0, 10, 11, 12, 13),
}  # fmt: skip
"""The columns of each table in a terminal that is too narrow for all of them in one."""


def _table(title: str, columns: Sequence[int], rows: Sequence[Sequence[str]]) -> Table:
    """These columns of the rows, by their numbers in `SUMMARY_COLUMNS`."""
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
    for name in (SUMMARY_COLUMNS[i] for i in columns):
        overflow: Literal["fold", "ellipsis"] = "fold" if name in ("model", "layers", "n") else "ellipsis"
        table.add_column(name, justify="left" if name in ("model", "phases") else "right", overflow=overflow)
    for row in rows:
        table.add_row(*(row[i] for i in columns))
    return table


def print_summary(study: StudyRecord) -> None:
    """Print a row per model, the number of examples set aside, and where the report is."""
    assert study.out is not None, "the command gives every study a folder"
    rows = []
    for row in summary(study).to_dict("records"):
        cells = [short_name(row["model"], list(study.models)), row["layers"], row["n"]]
        for measure, state in (("precision", "best_state"), ("recall", "recall_state")):
            best = f"{format_number(row[measure])} ({format_number(row[state], 0)})"
            cells += [f"{best}\n{format_interval(row, measure)}"]
            cells += [format_number(row[f"{measure}_0"]), format_number(row[f"{measure}_other"])]
            if measure == "precision":
                cells += [f"{format_number(row['word_share'])}\n{format_interval(row, 'word_share')}"]
        for name in ("lowest", "highest"):
            cells += [f"{row[name]:.2f} ({row[f'{name}_state']})\n{format_interval(row, name)}"]
        cells += [row["phases"], f"{row['seconds']:.0f}"]
        rows.append([escape(printable(cell)) for cell in cells])
    # Without a terminal rich assumes 80 columns, which would cut the table.
    console = Console(width=None if sys.stdout.isatty() else 160)
    whole = _table("Words on visual tokens, inter-modal cosine and phases", range(len(SUMMARY_COLUMNS)), rows)
    endless = console.options.update(max_width=10_000)
    if console.measure(whole, options=endless).maximum <= console.width:
        console.print(whole)
    else:
        for title, columns in NARROW_TABLES.items():
            console.print(_table(title, columns, rows))
    print("Beneath each mean, its 95 % bootstrap interval over examples.")
    for model, controls in study.controls.items():
        if controls is not None and controls.n_examples > 1 and controls.phases.n_segments:
            print(printable(f"{short_name(model, list(study.models))}: {controls.sentence}"))
    for line in pair_lines(study):
        print(printable(line))
    if sentence := answer_sentence(study):
        print(printable(sentence))
    if len(study.skipped):
        print(printable(f"{len(study.skipped)} set aside; the reasons are in {study.out / 'skipped.csv'}"))
    print(printable(f"{study.seconds:.0f} s. Open {study.out / 'report.html'}"))
