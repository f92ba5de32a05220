"""What the command prints of a study."""

import sys

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mechvlm.study.record import StudyRecord
from mechvlm.study.report.page import interval, number
from mechvlm.study.report.pairs import pair_lines
from mechvlm.study.report.summary import summary


def show(study: StudyRecord) -> None:
    """Print the summary of a study that was written: one row a model, what was set aside, and where the report is."""
    assert study.out is not None, "the command names a folder for every study"
    table = Table(
        title="Words on visual tokens, inter-modal cosine and phases", box=box.SIMPLE_HEAD, title_justify="left"
    )
    for name in ("model", "layers", "n"):
        table.add_column(name, justify="left" if name == "model" else "right", overflow="fold")
    for name in (
        "precision\nbest (layer)",
        "at 0",
        "other\ncaptions",
        "recall\nbest (layer)",
        "at 0",
        "other\ncaptions",
    ):
        table.add_column(name, justify="right")
    for name in ("cosine\nlow (layer)", "\nhigh (layer)", "phases", "s"):
        table.add_column(name, justify="left" if name == "phases" else "right")
    for row in summary(study).to_dict("records"):
        cells = [row["model"], row["layers"], row["n"]]
        for measure, layer in (("precision", "best_layer"), ("recall", "recall_layer")):
            cells += [f"{number(row[measure])} ({number(row[layer], 0)})\n{interval(row, measure)}"]
            cells += [number(row[f"{measure}_0"]), number(row[f"{measure}_other"])]
        cells += [f"{row[end]:.2f} ({row[f'{end}_layer']})\n{interval(row, end)}" for end in ("lowest", "highest")]
        cells += [row["phases"], f"{row['seconds']:.0f}"]
        table.add_row(*(escape(str(cell)) for cell in cells))
    # A table that is piped is not cut to 80 columns.
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(table)
    print("Beneath each mean, its 95 % bootstrap interval over examples.")
    for line in pair_lines(study):
        print(line)
    if len(study.skipped):
        print(f"{len(study.skipped)} set aside; reasons in {study.out / 'skipped.csv'}")
    print(f"{study.seconds:.0f} s. Open {study.out / 'report.html'}")
