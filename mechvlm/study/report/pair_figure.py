"""The figure of Winoground's pairs: every measure with an image's own caption against the other one of its pair."""

from mechvlm.experiments.winoground_result import LABELS, by_layer
from mechvlm.intervals import N_RESAMPLES
from mechvlm.study.record import StudyRecord
from mechvlm.study.report.captioned import CaptionedFigure, panels, short
from mechvlm.study.report.pairs import pair_counts, pair_results


def pair_figure(study: StudyRecord) -> CaptionedFigure:
    """Matched less mismatched by layer, a panel a measure and a block a model."""
    results, seed = pair_results(study), study.settings["seed"]
    figure, blocks = panels(list(results), (1.5,) * len(LABELS))
    for model, block in blocks.items():
        result = results[model]
        difference = result.difference_by(seed)
        for ax, measure in zip(block, LABELS, strict=True):
            row = result.measures.index(measure)
            by_layer(ax, measure, *(part[row].numpy() for part in difference))
            if ax is not block[-1]:
                ax.set_xlabel("")
        name = f"{short(model, list(study.models))}  (n = {len(result.pairs)} pairs)"
        block[0].set_title(f"{name}\n{block[0].get_title(loc='left')}", fontsize=9)
    return CaptionedFigure(figure, (
        "Matched against mismatched captions: each measure of an image with its own caption less the same with the other "
        "caption of its pair, by layer; above 0, the caption that is true has the more. Precision and recall of the words on "
        "visual tokens against the caption; mean cosine of image and caption tokens; what the caption's last token reads from "
        "the image (norm-based attention, summed over it). Where visual tokens stand before the text they cannot see it, and a "
        "pair's captions hold the same words: precision and recall are then a control. Lines are means over pairs, whose two "
        f"images count as one value; bands the 95% bootstrap interval of the mean ({N_RESAMPLES:,} resamples of the pairs, seed "
        f"{seed}). {pair_counts(study)}"
    ))  # fmt: skip
