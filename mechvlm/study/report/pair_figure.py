"""The figure of Winoground's pairs: each measure with the true caption minus with the other one."""

from mechvlm.experiments.winoground_result import LABELS, draw_difference
from mechvlm.figures.style import LAYER, STATE
from mechvlm.intervals import N_RESAMPLES
from mechvlm.study.record import StudyRecord
from mechvlm.study.report.captioned import CaptionedFigure, panels, short_name
from mechvlm.study.report.pairs import pair_counts, pair_results


def pair_figure(study: StudyRecord) -> CaptionedFigure:
    """Matched minus mismatched by state: a block for each model with a panel for each measure."""
    results, seed = pair_results(study), study.settings["seed"]
    figure, blocks = panels(list(results), (1.5,) * len(LABELS))
    for model, block in blocks.items():
        result = results[model]
        interval = result.difference_by(seed)  # mean, low, high: each [measure layer]
        for ax, measure in zip(block, LABELS, strict=True):
            row = result.measures.index(measure)
            draw_difference(ax, measure, *(values[row].numpy() for values in interval))
            ax.set_xlabel("")
        block[-1].set_xlabel(f"{STATE}; of the reading {LAYER}")
        name = f"{short_name(model, list(study.models))}  (n = {len(result.pairs)} pairs)"
        block[0].set_title(f"{name}\n{block[0].get_title(loc='left')}", fontsize=9)
    return CaptionedFigure(figure, (
        "Matched against mismatched captions, by layer: each measure of an image with its own caption minus the same measure "
        "with the other caption of its pair. Above 0, the true caption has the higher value. The measures are precision and "
        "recall of the words on visual tokens against the caption, the mean cosine between image and caption tokens, and how "
        "much the caption's last token reads from the image (norm-based attention, summed over the image). Visual tokens that "
        "stand before the text cannot see it, and the captions of a pair hold the same words: precision and recall are then a "
        "control. Lines are means over pairs; the two images of a pair count as one value. Bands are the 95% bootstrap "
        f"interval of the mean ({N_RESAMPLES:,} resamples of the pairs, seed {seed}). {pair_counts(study)}"
    ))  # fmt: skip
