"""Benchmark: what mechvlm costs, and what other ways to the same numbers cost.

    python scripts/benchmark.py [probes] [pairs] [imports] [sweeps] [heads] [loading] [answer] [host]
                                [--batch N] [--json FILE] [--record]

    probes   the three measures, one by one and in one read, against Hugging Face's outputs,
             TransformerBridge and plain hooks
    pairs    norm-based attention of all pairs of one layer, against the vector of every pair
    imports  import times, and the command's --help
    answer   an answer of 60 tokens: what is read of it, and with a study's measures of its prompt,
             in one forward of both
    sweeps   the causal experiments over all windows of 32 layers, against one whole forward per
             window
    heads    ablation of heads of 32 layers with 32 each, and states restored position by
             position, against one whole forward for each
    host     what a study does outside of the forward, in milliseconds an example, and its rate with
             a stand-in for a device
    loading  mechvlm.load of a model that is in memory, with a known and with a derived record

Costs are given in bare forwards of the same model, on the same weights and inputs. A bare forward
is Hugging Face's own, on a model that nnsight has not touched, with `logits_to_keep=1` and its
default attention. The models have random weights and LLaVA-1.5's token geometry: 576 visual tokens
of about 620, a vocabulary of 32064.

Each time and each memory peak is the median of several runs, in which the cases take turns. Slow
cases run once.

Ratios are compared with the recorded ones (benchmark.json). A change by more than a tenth is
printed. A ratio that got worse by that much, or that misses its bar, ends the run with exit code 1.
`--record` writes this run's ratios into the record.
"""

import argparse
import json
import logging
import sys
from pathlib import Path

import torch
from benchmark_answer import answer
from benchmark_host import host
from benchmark_imports import imports
from benchmark_loading import loading
from benchmark_measure import machine
from benchmark_models import FAMILIES
from benchmark_probes import pairs, probes
from benchmark_sweeps import heads, sweeps
from rich.console import Console
from rich.table import Table

RECORD = Path(__file__).with_name("benchmark.json")
GROUPS = ("probes", "pairs", "imports", "sweeps", "heads", "loading", "answer", "host")
MOVED = 0.1
"""A ratio has moved if it differs from the recorded one by more than this share."""
RATIOS = {
    "of its floor": 0.01, "of a bare forward": 0.005, "of 32 bare forwards": 0.0005,
    "of as many bare forwards": 0.0005, "of import nnsight": 0.02, "times as long": 0.0, "of the device's rate": 0.01,
    "ms an example": 0.5,
}  # fmt: skip
"""The ratios that rows are judged by, and the host's times, which hold for one machine.

A row is judged by the first of them that it has. Each value is the noise of the clock: a smaller
absolute difference is never reported.
"""
MORE_IS_BETTER = ("times as long", "of the device's rate")


def measure(group: str, args: argparse.Namespace) -> tuple[str, list[dict]]:
    """Title and rows of a group. The title names the model and the sizes that were measured."""
    if group == "probes":
        title = f"{args.family}, {args.layers} layers of width {args.width}, {args.dtype}, batch of {args.batch}"
        dtype = getattr(torch, args.dtype)
        return title, probes(args.family, args.layers, args.width, args.batch, args.repeats, args.device, dtype)
    if group == "pairs":
        return f"one layer of width {args.width}, 620 tokens", pairs(args.width, args.repeats, args.device)
    if group == "imports":
        return "imports", imports(args.repeats)
    if group == "heads":
        return "heads and positions, llava, 32 layers of 32 heads, width 256", heads(32, 256, 8, args.repeats)
    if group == "loading":
        title = f"loading, {args.layers} layers of width {args.width}, {args.dtype}"
        return title, loading(args.layers, args.width, args.repeats, args.device, getattr(torch, args.dtype))
    if group == "host":
        return "a study's host at LLaVA-1.5's geometry, batches of 16, one thread of torch", host(args.repeats)
    if group == "answer":
        title = f"an answer of 60 tokens, llava, {args.layers} layers of width {args.width}, {args.dtype}"
        return title, answer(args.layers, args.width, args.repeats, args.device, getattr(torch, args.dtype))
    return "sweeps over 32 windows, llava, 32 layers of width 256, batch of 1", sweeps(32, 256, args.repeats)


def ratios(row: dict) -> dict[str, tuple[str, float]]:
    """Name and value of each ratio that judges a row, by its key in the record.

    The time is under the row's case, the memory, where it was measured, under "<case>, memory".
    """
    judged = {}
    name = next((name for name in RATIOS if name in row), None)
    if name is not None:
        judged[row["case"]] = (name, row[name])
    if "peak of bare" in row:
        judged[f"{row['case']}, memory"] = ("peak of bare", row["peak of bare"])
    return judged


def missed(row: dict) -> str | None:
    """A sentence about the first bar that the row misses, or None."""
    for value, bar, is_maximum in (
        ("of its floor", "bar", True), ("peak of bare", "memory bar", True), ("of a bare forward", "share bar", True),
        ("of as many bare forwards", "most", True),
        ("seconds", "limit", True), ("times as long", "least", False),
        ("ms an example", "most ms", True), ("of the device's rate", "least rate", False),
    ):  # fmt: skip
        limit = row.get(bar)
        if limit is not None and (row[value] > limit if is_maximum else row[value] < limit):
            return f"{row['case']}: {value} {row[value]:.3f}, the bar is {limit:.3f}"
    return None


def moved(title: str, rows: list[dict], record: dict) -> list[tuple[str, bool]]:
    """A sentence about each ratio that differs from the record by more than `MOVED`.

    With each sentence: whether the ratio got worse.
    """
    moves = []
    for row in rows:
        for case, (name, value) in ratios(row).items():
            before = record.get(title, {}).get(case)
            if before is None:
                continue
            change = value / before - 1
            if abs(change) > MOVED and abs(value - before) > RATIOS.get(name, 0.0):
                worse = (change > 0) != (name in MORE_IS_BETTER)
                moves.append((f"{case}: {name} {before:.3f} -> {value:.3f} ({'worse' if worse else 'better'})", worse))
    return moves


def as_table(title: str, rows: list[dict]) -> Table:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    table = Table(title=title, title_justify="left")
    for name in columns:
        table.add_column(name, justify="left" if name == "case" else "right")
    for row in rows:
        table.add_row(*(_cell(name, row.get(name)) for name in columns))
    return table


def _cell(name: str, value) -> str:
    if value is None or isinstance(value, str):
        return value or ""
    return f"{value:.1e}" if name == "apart" else f"{value:.0f}" if name == "above MB" else f"{value:.3f}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("groups", nargs="*", metavar="GROUP", help=f"groups to run: {', '.join(GROUPS)} (default: all)")
    add("--family", default="llava", choices=FAMILIES, help="model of the probes (default: llava)")
    add("--layers", type=int, default=8, help="layers of the decoder (default: 8; LLaVA-1.5-7B: 32)")
    add("--width", type=int, default=2048, help="d_model, a multiple of 128 (default: 2048; LLaVA-1.5-7B: 4096)")
    add("--batch", type=int, default=1, help="examples per forward, in the probes (default: 1)")
    add("--device", default="cpu", help="cpu or cuda (default: cpu)")
    add(
        "--dtype",
        default="float32",
        choices=("float32", "bfloat16", "float16"),
        help="of the weights (default: float32)",
    )
    add("--repeats", type=int, default=5, help="runs of each case (default: 5)")
    add("--json", metavar="FILE", help="also write the tables to this file, as JSON")
    add("--record", action="store_true", help=f"write the ratios into {RECORD.name}")
    args = parser.parse_args()
    if unknown := set(args.groups) - set(GROUPS):
        parser.error(f"no such group: {sorted(unknown)}; choose from {', '.join(GROUPS)}")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    record = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    console, host = Console(width=170), machine(args.device)
    console.print(host)
    recorded = record.setdefault(host, {})
    failures, tables = [], {}
    for group in args.groups or GROUPS:
        title, rows = measure(group, args)
        tables[title] = rows
        console.print(as_table(title, rows))
        for sentence, worse in moved(title, rows, recorded):
            console.print(f"moved: {sentence}", markup=False)
            failures += [sentence] if worse else []
        for sentence in filter(None, map(missed, rows)):
            console.print(f"missed: {sentence}", markup=False)
            failures.append(sentence)
        if args.record:
            recorded[title] = {case: round(value, 4) for row in rows for case, (_, value) in ratios(row).items()}
    if args.json:
        Path(args.json).write_text(json.dumps({"machine": host, "tables": tables}, indent=1) + "\n")
    if args.record:
        RECORD.write_text(json.dumps(record, indent=1) + "\n")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
