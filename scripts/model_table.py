"""Tries every method on every tiny family, and writes the table of models.

    python scripts/model_table.py              # all families: some minutes
    python scripts/model_table.py llava gemma3 # these; the other rows stay as they are
    python scripts/model_table.py --docs       # only writes docs/models.md from the rows

A wrong number ends the script. What is tried, and what it is held to, is in
`tests/helpers/every_method.py`, `every_experiment.py` and `every_answer.py`.
"""

import argparse
import json
import sys
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from mechvlm.families.table import TABLE, Row, load_table  # noqa: E402

DOCS = ROOT / "docs" / "models.md"
HEAD = """# Table of models

Which methods were tried on which families of vision-language models, on tiny models with random
weights and the family's own processor, batches of three images of other sizes and lengths of
prompts, left-padded. ● works: its numbers were held to Hugging Face's own forward or to a naive
formula. ○ is refused, with the reason below. Written by `python scripts/model_table.py`; the lane
`pytest -m families` holds each row to the models. No published weights were at hand.
"""


def row_of(name: str) -> Row:
    """A family's row, from its tiny model."""
    import mechvlm as mv
    from helpers import every_answer, families  # noqa: F401
    from helpers.every_method import METHODS, Case, outcome

    family = families.FAMILIES[name]
    row: Row = {"class": family.hf_class, "text": ""}
    try:
        hf, _ = families.build(name)
    except ImportError as error:
        return {**row, "untried": " ".join(str(error).split()).split(". ")[0]}
    row["text"] = hf.config.get_text_config(decoder=True).model_type
    try:
        case = Case(name)
    except mv.ModelError as error:
        return {**row, "refused": str(error)}
    return {**row, "methods": {method: outcome(work, case) for method, work in METHODS.items()}}


def page(table: dict[str, Row]) -> str:
    """The table as a page of Markdown, with each reason once."""
    methods = next(list(row["methods"]) for row in table.values() if "methods" in row)
    reasons: dict[str, int] = {}

    def cell(reason: str) -> str:
        return "●" if not reason else f"○<sup>{reasons.setdefault(reason, len(reasons) + 1)}</sup>"

    lines = [HEAD, f"| family | class | language model | {' | '.join(methods)} |", "|---" * (3 + len(methods)) + "|"]
    for name, row in table.items():
        if "methods" in row:
            cells = " | ".join(cell(row["methods"][method]) for method in methods)
            lines.append(f"| {name} | {row['class']} | {row['text']} | {cells} |")
    lines += ["", "## Why not", "", *(f"{number}. {reason}" for reason, number in reasons.items())]
    for title, key in (("Refused", "refused"), ("Not tried", "untried")):
        lines += ["", f"## {title}", ""]
        lines += [f"- **{name}** ({row['class']}): {row[key]}" for name, row in table.items() if key in row]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Write the rows, and the page."""
    warnings.filterwarnings("ignore")
    arguments = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    arguments.add_argument("families", nargs="*")
    arguments.add_argument("--docs", action="store_true", help="only write the page from the rows")
    options = arguments.parse_args()
    from helpers.families import FAMILIES

    table = load_table() if TABLE.is_file() else {}
    for name in () if options.docs else options.families or FAMILIES:
        table[name] = row_of(name)
        lacking = [method for method, reason in table[name].get("methods", {}).items() if reason]
        print(name, table[name].get("refused") or table[name].get("untried") or f"lacks {lacking}", flush=True)
        ordered = {family: table[family] for family in FAMILIES if family in table}
        TABLE.write_text(json.dumps(ordered, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    DOCS.write_text(page({family: table[family] for family in FAMILIES if family in table}), encoding="utf-8")


if __name__ == "__main__":
    main()
