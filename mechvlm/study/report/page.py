"""report.html: one page that contains everything, needs no network and runs no script.

Only the patch views, which need scripts, are pages of their own in `views/`.
"""

import base64
import re
from pathlib import Path

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined

from mechvlm import bundled
from mechvlm.figures.saving import FIGURE_FORMATS
from mechvlm.study.record import StudyRecord
from mechvlm.study.report.findings import facts, findings
from mechvlm.study.report.pairs import pair_section
from mechvlm.study.report.summary import summary
from mechvlm.view.packing import data_url

FIGURE_TITLES = {
    "phases": "The four-phase diagram",
    "lens": "Words on visual tokens",
    "contextualization": "Contextualization",
    "norm_attention": "Norm-based attention",
    "pairs": "Winoground’s pairs",
    "answers": "The models’ own answers",
}
"""The report's sections with a figure, in order; the last two only where a study read them."""
MOST_SKIPPED = 50
"""The most rows of skipped.csv that the page lists."""


def render(
    study: StudyRecord, record: dict, captions: dict[str, str], figures: Path, views: dict[tuple[str, str], str]
) -> str:
    """The page as HTML.

    Text from outside (ids, captions, answers, names of models and files) is escaped.

    Args:
        study: the study.
        record: the content of run.json.
        captions: of the figures, by name.
        figures: the folder that holds each figure as SVG.
        views: the file of each (model, example id), relative to the page.
    """
    environment = Environment(
        loader=PackageLoader("mechvlm.study.report", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters["number"] = format_number
    environment.globals["interval"] = format_interval
    rows, sentences, about = summary(study).to_dict("records"), findings(study), facts(study)

    def figure(name: str) -> dict:
        told = {"caption": captions[name], "finding": sentences.get(name, ""), "facts": about[name]}
        return {"name": name, "title": FIGURE_TITLES[name], **told, **_picture(figures / f"{name}.svg")}

    sections = [name for name in FIGURE_TITLES if name in captions or (name == "pairs" and pair_section(study))]
    return environment.get_template("page.html.j2").render(
        study=study,
        record=record,
        rows=rows,
        has_word_share=any(pd.notna(row["word_share"]) for row in rows),
        sections=[(name, FIGURE_TITLES[name], sentences.get(name, "")) for name in sections],
        figures={name: figure(name) for name in sections if name in captions},
        formats=FIGURE_FORMATS,
        pairs=pair_section(study),
        phases=[_phases(study, model) for model in study.models],
        gallery=_gallery(study, views),
        skipped=study.skipped.head(MOST_SKIPPED).to_dict("records"),
        settings=_flat(record["settings"]),
        notes={model: note for model in study.models if (note := training_note(model))},
    )


def format_number(value, digits: int = 2) -> str:
    """A number with so many digits after the point, and a dash for NaN or None."""
    if value is None or pd.isna(value):
        return "–"
    return f"{value:.{digits}f}" if isinstance(value, float) else str(value)


def format_interval(row: dict, name: str) -> str:
    """The ends of a mean's interval, as text; empty for a mean without interval."""
    low, high = row[f"{name}_low"], row[f"{name}_high"]
    return "" if pd.isna(low) else f"{format_number(low)} to {format_number(high)}"


def training_note(model: str) -> str:
    """What a bundled model's card says on the loss at visual positions and on the logit lens.

    These are the paragraphs of the section "Training" that mention either. They matter because the
    lens reads what training taught a position. Empty for models that are not bundled.
    """
    card = bundled.shipped(model) / "README.md" if model in bundled.ALL else None
    if card is None or not card.is_file():
        return ""
    _, _, training = card.read_text(encoding="utf-8").partition("## Training\n")
    paragraphs = (" ".join(p.split()) for p in training.partition("\n## ")[0].split("\n\n"))
    # The page shows plain text, so Markdown's marks of emphasis go.
    return " ".join(re.sub(r"[*`]+", "", p) for p in paragraphs if re.search(r"\bloss is on\b|\blens reads\b", p))


def _phases(study: StudyRecord, model: str) -> dict:
    """The verdict on one model's curve, and a row for each of its segments."""
    phases, controls = study.phases[model], study.controls.get(model)
    about = (study.models[model].get("controls") or {}).get("left_out", [])
    section = {"model": model, "explanation": "", "rows": [], "controls": "", "left_out": about, "shows": "not"}
    if phases is None:
        return section
    rows = phases.to_frame().to_dict("records")
    shows = "order" if phases.shows_pattern else "not"
    if controls is not None and controls.n_examples > 1:
        section["controls"] = controls.sentence if phases.n_segments else ""
        if phases.shows_pattern:
            shows = "all" if controls.shows_pattern else "shared"
        for row in rows:
            own = controls.frame[controls.frame["first_state"] == row["first_state"]]
            row["least"] = own.nsmallest(1, "excess").to_dict("records")[0]
    return section | {"shows": shows, "explanation": phases.explanation, "rows": rows}


def _gallery(study: StudyRecord, views: dict[tuple[str, str], str]) -> list[dict]:
    """For each example its captions and picture, and for each model its answer, words and view."""
    cards = []
    for example, image in study.gallery:
        models = []
        for model in study.models:
            answer = study.tables["answers"].query("model == @model and example == @example.id")["answer"]
            if answer.empty:
                continue
            words = study.tables["words"].query("model == @model and example == @example.id")
            by_state = {state: part["word"].tolist() for state, part in words.groupby("state")}
            n_layers = study.models[model]["n_layers"]
            states = sorted({0, n_layers // 2, n_layers})
            view = study.views[model, example.id]
            models.append(
                {
                    "model": model, "answer": answer.iloc[0],
                    "words": [(state, by_state.get(state, [])) for state in states],
                    "view": views[model, example.id], "heat": data_url(view.heat), "layer": view.layer, "token": view.token,
                }
            )  # fmt: skip
        cards.append({"id": example.id, "captions": example.captions, "image": data_url(image), "models": models})
    return cards


def _flat(settings: dict, prefix: str = "") -> list[tuple[str, str]]:
    """Nested settings as rows (name, value): "lens: k" for {"lens": {"k": ...}}."""
    rows = []
    for key, value in settings.items():
        if isinstance(value, dict):
            rows += _flat(value, f"{prefix}{key}: " if prefix or key != "measures" else "")
        else:
            text = ", ".join(map(str, value)) if isinstance(value, list | tuple) else value
            rows.append((prefix + key, "default" if text is None else str(text)))
    return rows


def _picture(path: Path) -> dict[str, str | int]:
    """The figure as a page holds it, and its width in pixels where its words are readable."""
    # Embedded as an image, not as markup: so its ids cannot clash with those of another figure, and
    # nothing in it can run or load.
    svg = path.read_bytes()
    points = re.search(rb'<svg[^>]* width="([\d.]+)pt"', svg)
    # Points for pixels: type of 9 points is then 9 pixels high, and a narrower window scrolls.
    width = round(float(points[1])) if points else 0
    return {"source": "data:image/svg+xml;base64," + base64.b64encode(svg).decode(), "width": width}
