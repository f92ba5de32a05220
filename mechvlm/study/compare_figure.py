"""The figure of a comparison: a panel a measure, the controls of each beneath it."""

from itertools import cycle
from typing import TYPE_CHECKING

from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D

from mechvlm.study.drawn import DOTTED, GREY, Drawn, bands, legend, line_of
from mechvlm.view.plots import Line, style

if TYPE_CHECKING:
    from mechvlm.study.compare import Comparison

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#333333")
DASHES: tuple[str | tuple, ...] = ("-", "--", "-.", (0, (5, 1, 1, 1, 1, 1)))
MARKERS = ("o", "s", "^", "D", "v")
TITLES = {
    "cosine_inter": "image – text similarity", "cosine_image": "similarity within image",
    "cosine_text": "similarity within text", "precision": "precision of decoded words", "recall": "recall of decoded words",
}  # fmt: skip
CONTROLS = {
    "_baseline": ("baseline (different examples)", DOTTED),
    "_other": ("another image's captions", (0, (4, 1.5))),
    "_text": ("text tokens", (0, (4, 1.5, 1, 1.5))),
}


def compare_figure(found: "Comparison", measures: list[str]) -> Drawn:
    """The curves on one axis of relative depth."""
    frame, labels = found.frame, list(found.frame["label"].unique())
    looks = zip(labels, cycle(COLORS), cycle(DASHES), cycle(MARKERS), strict=False)
    lines = {label: Line(label, color, dash, marker) for label, color, dash, marker in looks}
    with style():
        figure = Figure(
            (0.6 + 4.2 * len(measures), 5.4 + 0.2 * (len(labels) // 4)), layout=ConstrainedLayoutEngine(w_pad=0.09)
        )
        grid = figure.subplots(2, len(measures), squeeze=False, sharex=True, gridspec_kw={"height_ratios": [2.4, 1.5]})
        used = set()
        for (top, low), measure in zip(grid.T, measures, strict=True):
            for label, line in lines.items():
                mine = frame[frame["label"] == label]
                line_of(top, mine[mine["measure"] == measure], line, x="depth")
                for ending, (_, dash) in CONTROLS.items():
                    rows = mine[mine["measure"] == _control(measure, ending)]
                    if rows["mean"].notna().any():
                        used.add(ending)
                        line_of(
                            low, rows, line._replace(dash=dash, marker="", label=""), x="depth", thin=True, bands=False
                        )
            if measure.startswith("cosine"):
                top.set_ylabel("mean cosine")
            else:
                top.set_ylabel("image tokens' share" if "_share_" in measure else "share of words")
                top.set_ylim(-0.03, 1.03)
            low.set_ylim(top.set_ylim(_span(top, low)))
            low.set_ylabel("its controls")
            low.set_xlabel("relative depth (layer / layers of the model)")
            low.set_xlim(-0.02, 1.02)
            top.set_title(TITLES.get(measure, measure))
        controls = [
            Line2D([], [], color=GREY, linestyle=dash, linewidth=1.1, label=name)
            for ending, (name, dash) in CONTROLS.items()
            if ending in used
        ]
        legend(figure, grid[0, 0], extra=controls)
    seeds = sorted(set(found.seeds))
    return Drawn(figure, " ".join([
        "Several models by relative depth, 0 what enters the decoder and 1 what the model itself unembeds: each model's own "
        "layers at layer / n_layers, joined by lines and not interpolated. Beneath each measure its controls, without bands: "
        "for similarities the anisotropy baseline, the same mean over tokens of different examples; for words decoded from "
        "image tokens another image's captions, and the words decoded from text tokens.",
        bands(*seeds), *found.counts, *found.notes,
    ]))  # fmt: skip


def _control(measure: str, ending: str) -> str:
    """A measure's control: of `precision_single` it is called `precision_other_single`."""
    name, single, _ = measure.partition("_single")
    return name + ending + single


def _span(*axes) -> tuple[float, float]:
    """The limits that hold all axes: a control is read on its measure's scale."""
    low, high = zip(*(ax.get_ylim() for ax in axes), strict=True)
    return min(low), max(high)
