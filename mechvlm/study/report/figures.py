"""The figures of a study. They need only its tables, so an opened study can draw them too."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from mechvlm.errors import InputError
from mechvlm.experiments.contextualization_controls_result import CONTROL_LINES, CONTROL_NAMES
from mechvlm.figures.saving import save_each
from mechvlm.figures.style import LINES, state_axis, style
from mechvlm.measures.control_excess import ControlExcess
from mechvlm.measures.phase_fit import N_BOOTSTRAP
from mechvlm.measures.phases import shade
from mechvlm.probes.contextualization import MODALITY_PAIRS
from mechvlm.study.record import StudyRecord
from mechvlm.study.report.answer_figure import answer_figure, has_answers
from mechvlm.study.report.captioned import (
    DOTTED,
    GREY,
    CaptionedFigure,
    describe_bands,
    describe_counts,
    draw_baseline,
    draw_curve,
    legend,
    panel_title,
    panels,
)
from mechvlm.study.report.norm_figure import norm_figure
from mechvlm.study.report.pair_figure import pair_figure

BASELINE = Line2D([], [], color=GREY, linestyle=DOTTED, linewidth=1.1, label="baseline (different examples)")
LENS_MEASURES = {"own": "", "single": "_single", "other": "_other", "other_single": "_other_single", "prompt": "_text"}
"""{line of the lens figure: ending of its measure}."""

LARGEST = "norm_attention"
"""The figure that takes longest to save."""


def draw(study: StudyRecord, name: str) -> CaptionedFigure:
    """Draw one figure.

    Raises:
        InputError: for a name that is not in `FIGURES`, or "pairs" or "answers" of a study without.
    """
    figures = _figures_of(study)
    if name not in figures:
        raise InputError(f"There is no figure {name!r}. There are: {', '.join(figures)}.")
    with style():
        return figures[name](study)


def draw_all(study: StudyRecord) -> dict[str, CaptionedFigure]:
    """Draw every figure: {name: figure with its caption}."""
    return {name: draw(study, name) for name in _figures_of(study)}


def save_all(study: StudyRecord, folder: Path) -> dict[str, str]:
    """Draw every figure and save it as PNG (200 dpi), SVG and PDF: {name: its caption}.

    A missing folder is made.
    """
    captions: dict[str, str] = {}

    def drawn() -> Iterator[tuple[str, Figure]]:
        for name in sorted(_figures_of(study), key=lambda name: name != LARGEST):
            figure, captions[name] = draw(study, name)
            yield name, figure

    save_each(drawn(), folder)
    return {name: captions[name] for name in _figures_of(study)}


def phase_figure(study: StudyRecord) -> CaptionedFigure:
    """Figure 1: the inter-modal curves with fitted segments; intra-modal curves beneath."""
    curves, models = study.curves(), list(study.models)
    figure, blocks = panels(models, (3.2, 1.2))
    for model, (top, bottom) in blocks.items():
        rows, n_layers, phases = curves[curves["model"] == model], study.models[model]["n_layers"], study.phases[model]
        controls = study.controls.get(model)
        _draw_similarity(top, rows, "inter")
        _draw_controls(top, controls)
        _make_headroom(top, 0.26)
        if phases is not None:
            layers, dash = range(n_layers + 1), (0, (4, 2))
            top.plot(layers, phases.fit.numpy(), color="#222222", linestyle=dash, linewidth=1, label="fitted segments")
            shade(top, phases)
            shade(bottom, phases, names=False, heads=False)
            note = "" if phases.shows_pattern else "does not show the paper's four phases"
            if phases.shows_pattern and controls is not None and not controls.shows_pattern:
                note = "not every phase exceeds the controls"
            _write_note(top, note)
        else:
            _write_note(top, "too few layers for phases")
        for pair in ("image", "text"):
            _draw_similarity(bottom, rows, pair, thin=True)
        state_axis(bottom, n_layers)
        top.set_title(panel_title(study, model))
        top.set_ylabel("image – text similarity\n(mean cosine)")
        bottom.set_ylabel("similarity within\n(mean cosine)")
    with_fit = next((m for m in models if study.phases[m] is not None), models[0])
    legend(figure, *blocks[with_fit], extra=[BASELINE])
    level = next((f"{phases.confidence:.0%}" for phases in study.phases.values() if phases is not None), "95%")
    return CaptionedFigure(figure, (
        "The four-phase diagram: the mean cosine between image and text tokens by state, eq. (1) of Wei et al. 2024. The "
        "dashed line has the fewest rising and falling segments that predict held-out examples well. The segments are named "
        f"I to IV where their order fits that of the paper's phases. The bars at the bottom are {level} bootstrap intervals "
        f"of the states where it turns ({N_BOOTSTRAP:,} resamples of the examples, seed {study.settings['seed']}). "
        f"{_describe_controls(study)}The lower panels show the similarity within each modality. The dotted lines are anisotropy "
        f"baselines: the same mean over tokens of different examples. {_describe(study)}"
    ))  # fmt: skip


def lens_figure(study: StudyRecord) -> CaptionedFigure:
    """Figure 2: precision, recall and share of the words on visual tokens, with two controls."""
    curves, models = study.curves(), list(study.models)
    has_share = bool((curves["measure"] == "word_share").any())
    measures = ("precision", "recall", "word_share") if has_share else ("precision", "recall")
    figure, blocks = panels(models, (2.4, 2.4, 1.2) if has_share else (2.4, 2.4))
    for model, block in blocks.items():
        model_curves = curves[curves["model"] == model]
        for ax, measure in zip(block, measures, strict=True):
            for line, ending in LENS_MEASURES.items():
                rows = model_curves[model_curves["measure"] == measure + ending]
                if len(rows):
                    draw_curve(ax, rows, LINES[line], spread=False)
            ax.set_ylim(-0.03, 1.03)
            ax.set_ylabel("share that decode\nto a word" if measure == "word_share" else f"{measure} of decoded words")
        state_axis(block[-1], study.models[model]["n_layers"])
        block[0].set_title(panel_title(study, model))
    legend(figure, blocks[models[0]][0], spread=False)
    share = (
        "Lowest panels: the share of the positions that decode to a word at all; precision is of these alone."
        if has_share
        else "This study was made by an earlier version, which did not keep the share of positions that decode to a word."
    )
    return CaptionedFigure(figure, (
        "Words decoded from visual tokens (logit lens, the likeliest token at each position), compared with the captions, by "
        "state. Precision is the share of the decoded words that the captions contain; recall is the share of the captions' "
        "words that are decoded. Words are unique and lemmatised, without stop words. An example has no precision where no "
        "word is decoded. The captions of an image count together; where it has several, the mean over each caption alone is "
        "drawn too. Controls: the same words against another image's captions, together and each alone, and the words "
        f"decoded from the text positions of the prompt, template included. {share} {_describe(study, spread=False)}"
    ))  # fmt: skip


def context_figure(study: StudyRecord) -> CaptionedFigure:
    """Figure 3: inter-modal and intra-modal similarities, with their anisotropy baselines."""
    curves, models = study.curves(), list(study.models)
    figure, blocks = panels(models, (2.9,), same_y=True)
    for model, (ax,) in blocks.items():
        for pair in MODALITY_PAIRS:
            _draw_similarity(ax, curves[curves["model"] == model], pair, spread=False)
        state_axis(ax, study.models[model]["n_layers"])
        ax.set_title(panel_title(study, model))
        ax.set_ylabel("mean cosine")
    legend(figure, blocks[models[0]][0], spread=False, extra=[BASELINE])
    return CaptionedFigure(figure, (
        "Contextualization by state: the mean pairwise cosine between image and text tokens, within image tokens, and within "
        "text tokens. The cosine of each vector with itself is included, as in the paper. The dotted lines are anisotropy "
        "baselines: the same mean over tokens of different examples, computed from all examples together. "
        f"{_describe(study, spread=False)}"
    ))  # fmt: skip


FIGURES = {
    "phases": phase_figure,
    "lens": lens_figure,
    "contextualization": context_figure,
    "norm_attention": norm_figure,
}


def _figures_of(study: StudyRecord) -> Mapping[str, Callable[[StudyRecord], CaptionedFigure]]:
    """`FIGURES`, "pairs" for a study that read pairs, and "answers" for one that read answers."""
    further: dict[str, Callable[[StudyRecord], CaptionedFigure]] = {}
    if len(study.tables.get("pairs", ())):
        further["pairs"] = pair_figure
    if has_answers(study):
        further["answers"] = answer_figure
    return FIGURES | further


def _draw_similarity(ax: Axes, curves: pd.DataFrame, pair: str, thin: bool = False, spread: bool = True) -> None:
    """Draw one similarity ("inter", "image" or "text") and its baseline."""
    draw_curve(ax, curves[curves["measure"] == f"cosine_{pair}"], LINES[pair], thin=thin, spread=spread)
    draw_baseline(ax, curves[curves["measure"] == f"cosine_{pair}_baseline"], LINES[pair].color)


def _describe(study: StudyRecord, spread: bool = True) -> str:
    """The last sentences of a caption: bands and counts."""
    return f"{describe_bands(study.settings['seed'], spread=spread)} {describe_counts(study)}"


def _draw_controls(ax: Axes, controls: ControlExcess | None) -> None:
    """Draw the mean curve of each control."""
    for kind, values in ({} if controls is None else controls.controls).items():
        color, dash = CONTROL_LINES[kind]
        ax.plot(values.mean(-1).numpy(), color=color, linestyle=dash, linewidth=1.2, label=f"control: {kind}")


def _describe_controls(study: StudyRecord) -> str:
    """What the controls of the phases are; empty for a study without."""
    read = [controls for controls in study.controls.values() if controls is not None]
    if not read:
        return ""
    counts = " or ".join(map(str, sorted({controls.n_examples for controls in read})))
    kinds = ", ".join(name for kind, name in CONTROL_NAMES.items() if any(kind in c.controls for c in read))
    return (
        f"Controls: the mean curves of the first {counts} examples with something else at the image's positions where it "
        f"enters the decoder: {kinds}. What they do too is no phase of an image. "
    )


def _make_headroom(ax: Axes, share: float) -> None:
    """Make room above the curves for the phases' names, and below them for the boundaries' bars."""
    low, high = ax.get_ylim()
    ax.set_ylim(low - 0.08 * (high - low), high + share * (high - low))


def _write_note(ax: Axes, note: str) -> None:
    if not note:
        return
    ax.annotate(
        note, (0.5, 0), xycoords="axes fraction", xytext=(0, 14), textcoords="offset points", ha="center", fontsize=8,
        style="italic", color="#8A1C1C", bbox={"facecolor": "white", "alpha": 0.8, "linewidth": 0, "pad": 1.5},
    )  # fmt: skip
