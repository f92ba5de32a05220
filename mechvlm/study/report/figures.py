"""The figures of a study, from its tables alone: an opened study draws them again without a model."""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from mechvlm.errors import InputError
from mechvlm.figures.style import LINES, layer_axis, style
from mechvlm.measures.phase_fit import N_BOOTSTRAP
from mechvlm.measures.phases import shade
from mechvlm.probes.contextualization import MODALITY_PAIRS
from mechvlm.study.record import StudyRecord
from mechvlm.study.report.captioned import (
    DOTTED,
    GREY,
    CaptionedFigure,
    bands,
    counts,
    dotted,
    legend,
    line_of,
    panels,
    title,
)
from mechvlm.study.report.norm_figure import norm_figure
from mechvlm.study.report.pair_figure import pair_figure

BASELINE = Line2D([], [], color=GREY, linestyle=DOTTED, linewidth=1.1, label="baseline (different examples)")
CAPTION_LINES = {"own": "", "single": "_single", "other": "_other", "other_single": "_other_single", "prompt": "_text"}


def draw(study: StudyRecord, name: str) -> CaptionedFigure:
    """One of the figures, by name.

    Raises:
        InputError: for a name that is not in `FIGURES`, or "pairs" of a study without Winoground's pairs.
    """
    there = _there(study)
    if name not in there:
        raise InputError(f"There is no figure {name!r}. There are: {', '.join(there)}.")
    with style():
        return there[name](study)


def draw_all(study: StudyRecord) -> dict[str, CaptionedFigure]:
    """Each figure with its caption, by name."""
    return {name: draw(study, name) for name in _there(study)}


def save_all(figures: dict[str, CaptionedFigure], folder: Path) -> None:
    """Each figure as PNG (200 dpi) and SVG."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, drawn in figures.items():
        drawn.save(folder / f"{name}.png")
        drawn.save(folder / f"{name}.svg")


def phase_figure(study: StudyRecord) -> CaptionedFigure:
    """(1) The inter-modal curve of each model with the segments that its data support; intra-modal curves beneath."""
    curves, models = study.curves(), list(study.models)
    figure, blocks = panels(models, (3.2, 1.2))
    for model, (top, low) in blocks.items():
        mine, n, found = curves[curves["model"] == model], study.models[model]["n_layers"], study.phases[model]
        _pair(top, mine, "inter")
        _headroom(top, 0.26)
        if found is not None:
            fit = found.fit.numpy()
            top.plot(range(n + 1), fit, color="#222222", linestyle=(0, (4, 2)), linewidth=1, label="fitted segments")
            shade(top, found)
            shade(low, found, names=False, heads=False)
            if not found.shows_pattern:
                _note(top, "does not show the paper's four phases")
        else:
            _note(top, "too few layers for phases")
        for pair in ("image", "text"):
            _pair(low, mine, pair, thin=True)
        layer_axis(low, n)
        top.set_title(title(study, model))
        top.set_ylabel("image – text similarity\n(mean cosine)")
        low.set_ylabel("similarity within\n(mean cosine)")
    with_fit = next((m for m in models if study.phases[m] is not None), models[0])
    legend(figure, *blocks[with_fit], extra=[BASELINE])
    level = next((f"{found.confidence:.0%}" for found in study.phases.values() if found is not None), "95%")
    return CaptionedFigure(figure, (
        "The four-phase diagram: mean cosine between image and text tokens by layer, eq. (1) of Wei et al. 2024, with "
        "the fewest rising and falling segments that predict held-out examples well. They are named I to IV where their "
        f"order fits the paper's. Bars at the bottom are {level} bootstrap intervals of the turning layers "
        f"({N_BOOTSTRAP:,} resamples of the examples, seed {study.settings['seed']}). Beneath, the similarity within each "
        f"modality. Dotted, the anisotropy baseline of each: the same mean over tokens of different examples. {_ends(study)}"
    ))  # fmt: skip


def lens_figure(study: StudyRecord) -> CaptionedFigure:
    """(2) Precision and recall of the words that visual tokens decode to, with the two controls."""
    curves, models = study.curves(), list(study.models)
    figure, blocks = panels(models, (2.4, 2.4))
    for model, block in blocks.items():
        mine = curves[curves["model"] == model]
        for ax, measure in zip(block, ("precision", "recall"), strict=True):
            for line, ending in CAPTION_LINES.items():
                rows = mine[mine["measure"] == measure + ending]
                if len(rows):
                    line_of(ax, rows, LINES[line])
            ax.set_ylim(-0.03, 1.03)
            ax.set_ylabel(f"{measure} of decoded words")
        layer_axis(block[1], study.models[model]["n_layers"])
        block[0].set_title(title(study, model))
    legend(figure, blocks[models[0]][0])
    return CaptionedFigure(figure, (
        "Words decoded from visual tokens (logit lens, likeliest token of each position) against the captions, by "
        "layer: precision, the share of decoded words that the captions hold, and recall, the share of the captions' "
        "words that are decoded. Unique words, lemmatised, without stop words; where an example decodes no word at all it "
        "has no precision. An image's captions count together; where it has several, also the mean over each of them "
        "alone. Controls: the same words against another image's captions, together and alone, and the words decoded from the "
        f"text positions of the prompt, template included. {_ends(study)}"
    ))  # fmt: skip


def context_figure(study: StudyRecord) -> CaptionedFigure:
    """(3) Inter-modal and both intra-modal similarities by layer, with the anisotropy baselines."""
    curves, models = study.curves(), list(study.models)
    figure, blocks = panels(models, (2.9,), same_y=True)
    for model, (ax,) in blocks.items():
        for pair in MODALITY_PAIRS:
            _pair(ax, curves[curves["model"] == model], pair)
        layer_axis(ax, study.models[model]["n_layers"])
        ax.set_title(title(study, model))
        ax.set_ylabel("mean cosine")
    legend(figure, blocks[models[0]][0], extra=[BASELINE])
    return CaptionedFigure(figure, (
        "Contextualization by layer: mean pairwise cosine between image and text tokens, within image tokens, and "
        "within text tokens, each vector's cosine to itself included as in the paper. Dotted, the anisotropy baseline of "
        f"each: the same mean over tokens of different examples, all together. {_ends(study)}"
    ))  # fmt: skip


FIGURES = {
    "phases": phase_figure,
    "lens": lens_figure,
    "contextualization": context_figure,
    "norm_attention": norm_figure,
}


def _there(study: StudyRecord) -> dict:
    """`FIGURES`, and where pairs could be read, theirs."""
    return FIGURES | ({"pairs": pair_figure} if len(study.tables.get("pairs", ())) else {})


def _pair(ax: Axes, curves, pair: str, thin: bool = False) -> None:
    """One similarity and its baseline."""
    line_of(ax, curves[curves["measure"] == f"cosine_{pair}"], LINES[pair], thin=thin)
    dotted(ax, curves[curves["measure"] == f"cosine_{pair}_baseline"], LINES[pair].color)


def _ends(study: StudyRecord) -> str:
    return f"{bands(study.settings['seed'])} {counts(study)}"


def _headroom(ax: Axes, share: float) -> None:
    """Room above the curves for the phases' names, and a little below for the boundaries' bars."""
    low, high = ax.get_ylim()
    ax.set_ylim(low - 0.08 * (high - low), high + share * (high - low))


def _note(ax: Axes, words: str) -> None:
    ax.annotate(
        words, (0.5, 0), xycoords="axes fraction", xytext=(0, 14), textcoords="offset points", ha="center", fontsize=8,
        style="italic", color="#8A1C1C", bbox={"facecolor": "white", "alpha": 0.8, "linewidth": 0, "pad": 1.5},
    )  # fmt: skip
