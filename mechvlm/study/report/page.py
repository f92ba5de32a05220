"""report.html: one page with everything in it. It asks the network for nothing, and runs no script.

Only the patch views, which need scripts, are pages of their own beside it.
"""

import base64
import re
from pathlib import Path

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined

from mechvlm import bundled
from mechvlm.study.record import StudyRecord
from mechvlm.study.report.pairs import pair_section
from mechvlm.study.report.summary import course, summary
from mechvlm.view.packing import picture

FIGURE_TITLES = {
    "phases": "The four-phase diagram",
    "lens": "Words on visual tokens",
    "contextualization": "Contextualization",
    "norm_attention": "Norm-based attention",
}
MOST_SKIPPED = 50
"""Rows of skipped.csv that the page lists; the file has them all."""


def render(
    study: StudyRecord, record: dict, captions: dict[str, str], figures: Path, views: dict[tuple[str, str], str]
) -> str:
    """The page, of a study, what run.json says of it, the figures' captions and files (SVG), and its views' files.

    Whatever came from outside (ids, captions, answers, names of models and files) is escaped.
    """
    environment = Environment(
        loader=PackageLoader("mechvlm.study.report", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters["number"] = number
    environment.globals["interval"] = interval
    rows = summary(study).to_dict("records")
    return environment.get_template("page.html.j2").render(
        study=study,
        record=record,
        rows=rows,
        figures=[
            {"name": name, "title": title, "caption": captions[name], "source": _svg(figures / f"{name}.svg")}
            for name, title in FIGURE_TITLES.items()
        ],
        pairs=_pairs(study, captions, figures),
        phases=[_phases(study, model) for model in study.models],
        gallery=_gallery(study, views),
        skipped=study.skipped.head(MOST_SKIPPED).to_dict("records"),
        settings=_flat(record["settings"]),
        notes={model: note for model in study.models if (note := training_note(model))},
    )


def number(value, digits: int = 2) -> str:
    """A number to so many digits after the point, and a dash for none."""
    if value is None or pd.isna(value):
        return "–"
    return f"{value:.{digits}f}" if isinstance(value, float) else str(value)


def interval(row: dict, name: str) -> str:
    """The ends of a mean's interval, and nothing where it has none."""
    low, high = row[f"{name}_low"], row[f"{name}_high"]
    return "" if pd.isna(low) else f"{number(low)} to {number(high)}"


def training_note(model: str) -> str:
    """What a bundled model's card says of its loss on visual positions, and of the lens: it reads what was taught.

    The paragraphs of the card's section "Training" that speak of either. Empty for models that are not bundled.
    """
    card = bundled.path(model) / "README.md" if model in bundled.NAMES else None
    if card is None or not card.is_file():
        return ""
    _, _, training = card.read_text(encoding="utf-8").partition("## Training\n")
    paragraphs = (" ".join(p.split()) for p in training.partition("\n## ")[0].split("\n\n"))
    # Read as text: the marks of emphasis would only be in the way.
    return " ".join(re.sub(r"[*`]+", "", p) for p in paragraphs if re.search(r"\bloss is on\b|\blens reads\b", p))


def _pairs(study: StudyRecord, captions: dict[str, str], figures: Path) -> dict | None:
    """The section of Winoground's pairs; its figure is there where a pair could be read."""
    section = pair_section(study)
    if section is None:
        return None
    figure = None
    if "pairs" in captions:
        figure = {"caption": captions["pairs"], "source": _svg(figures / "pairs.svg")}
    return section | {"figure": figure}


def _phases(study: StudyRecord, model: str) -> dict:
    found = study.phases[model]
    if found is None:
        return {"model": model, "course": course(found), "shows_pattern": False, "explanation": "", "rows": []}
    return {
        "model": model, "course": course(found), "shows_pattern": found.shows_pattern, "explanation": found.explanation,
        "rows": found.to_frame().to_dict("records"),
    }  # fmt: skip


def _gallery(study: StudyRecord, views: dict[tuple[str, str], str]) -> list[dict]:
    shown = []
    for example, image in study.gallery:
        models = []
        for model in study.models:
            answer = study.tables["answers"].query("model == @model and example == @example.id")["answer"]
            if answer.empty:
                continue
            words = study.tables["words"].query("model == @model and example == @example.id")
            by_layer = {layer: part["word"].tolist() for layer, part in words.groupby("layer")}
            n = study.models[model]["n_layers"]
            layers = sorted({0, n // 2, n})
            view = study.views[model, example.id]
            models.append(
                {
                    "model": model, "answer": answer.iloc[0],
                    "words": [(layer, by_layer.get(layer, [])) for layer in layers],
                    "view": views[model, example.id], "heat": picture(view.heat), "layer": view.layer, "token": view.token,
                }
            )  # fmt: skip
        shown.append({"id": example.id, "captions": example.captions, "image": picture(image), "models": models})
    return shown


def _flat(settings: dict, prefix: str = "") -> list[tuple[str, str]]:
    rows = []
    for key, value in settings.items():
        if isinstance(value, dict):
            rows += _flat(value, f"{prefix}{key}: " if prefix or key != "measures" else "")
        else:
            shown = ", ".join(map(str, value)) if isinstance(value, list | tuple) else value
            rows.append((prefix + key, "default" if shown is None else str(shown)))
    return rows


def _svg(path: Path) -> str:
    # As an image and not as markup: its ids cannot meet those of another figure, and nothing in it can run or load.
    return "data:image/svg+xml;base64," + base64.b64encode(path.read_bytes()).decode()
