"""From the results of one batch to rows of tables: nothing of the size of an activation is kept."""

from collections import Counter

import numpy as np
import pandas as pd

from mechvlm.datasets import Example
from mechvlm.probes.contextualization import PAIRS, ContextualizationResult, merge
from mechvlm.probes.logit_lens import LogitLensResult
from mechvlm.probes.norm_attention import NormAttentionResult
from mechvlm.tokens import Modality, TokenMap
from mechvlm.words import lens_precision_recall, word_of

GALLERY_WORDS = 6
"""Words a layer that the gallery shows of an example."""

Pieces = list[list[list[str]]]


class LensRows:
    """Precision and recall of one model's examples, with the two controls.

    Each example's captions serve once as its own and once as another's: an example is held against the next usable
    one's, the last against the first's. So both conditions see the same captions, and batches change no row.
    """

    def __init__(self, model: str):
        self.model = model
        self.frames: list[pd.DataFrame] = []
        self.first: Example | None = None
        self.waiting: tuple[Example, Pieces] | None = None

    def add(self, example: Example, tokens: TokenMap, lens: LogitLensResult) -> None:
        """`lens` holds this example's points only, at every position."""
        image, text = lens.at(tokens.image).pieces(), lens.at(tokens.text).pieces()
        self._append(example, "image", "own", lens_precision_recall(image, example.captions))
        self._append(example, "text", "own", lens_precision_recall(text, example.captions))
        if self.waiting is not None:
            self._against(self.waiting, example)
        self.first = self.first or example
        self.waiting = example, image

    def frame(self) -> pd.DataFrame:
        """model, example, tokens, captions, measure, layer, value; call once, after the last example."""
        if self.waiting is not None and self.first is not None and self.waiting[0] is not self.first:
            self._against(self.waiting, self.first)
        return pd.concat(self.frames, ignore_index=True)

    def _against(self, waiting: tuple[Example, Pieces], other: Example) -> None:
        example, pieces = waiting
        self._append(example, "image", "other", lens_precision_recall(pieces, other.captions))

    def _append(self, example: Example, tokens: str, captions: str, scores: pd.DataFrame) -> None:
        scores = scores[["measure", "layer", "value"]]
        keys = {"model": self.model, "example": example.id, "tokens": tokens, "captions": captions}
        self.frames.append(scores.assign(**keys)[[*keys, *scores.columns]])


class ContextRows:
    """Contextualization of one model's examples, and the anisotropy baseline of all of them together."""

    def __init__(self, model: str):
        self.model = model
        self.ids: list[str] = []
        self.merged: ContextualizationResult | None = None

    def add(self, examples: list[Example], result: ContextualizationResult) -> None:
        self.ids += [e.id for e in examples]
        self.merged = result if self.merged is None else merge([self.merged, result])

    def frames(self) -> tuple[pd.DataFrame, pd.DataFrame]:
        """(model, example, pair, layer, value) and the baseline (model, pair, layer, value)."""
        assert self.merged is not None, "no example was added"
        curves = self.merged.to_frame()
        curves["example"] = np.asarray(self.ids, dtype=object)[curves["example"]]
        n_layers = self.merged.baseline.shape[1]
        baseline = pd.DataFrame(
            {
                "pair": np.repeat(PAIRS, n_layers),
                "layer": np.tile(np.arange(n_layers), len(PAIRS)),
                "value": self.merged.baseline.numpy().reshape(-1),
            }
        )
        return _of(self.model, curves[["example", "pair", "layer", "value"]]), _of(self.model, baseline)


class NormRows:
    """Mean norm-based attention over one model's examples, by position.

    All examples share the prompt, so their positions hold the same tokens. Where a model's processor makes more visual
    tokens of one image than of another they do not: then only the examples with the most frequent layout are shown, and
    `n` says how many that is.
    """

    def __init__(self, model: str):
        self.model = model
        self.sums: dict[tuple, dict] = {}

    def add(self, maps: tuple[TokenMap, ...], result: NormAttentionResult) -> None:
        for row, tokens in enumerate(maps):
            # Padding stands on the left: without it, equal prompts lie at equal positions in every batch.
            kept = tokens.all
            layout = tuple(tokens.ids[kept].tolist())
            norm = result.norm[:, row][..., kept].double().numpy()
            weight = result.weight[:, row].mean(1)[..., kept].double().numpy()
            if layout not in self.sums:
                self.sums[layout] = {
                    "n": 0, "norm": np.zeros_like(norm), "weight": np.zeros_like(weight), "names": result.names,
                    "dest": (result.dest[row] - int(kept[0])).tolist(), "layers": result.layers,
                    "pieces": [tokens.strings[p] for p in kept.tolist()],
                    "modality": [Modality(int(tokens.modality[p])).name.lower() for p in kept],
                }  # fmt: skip
            total = self.sums[layout]
            total["n"] += 1
            total["norm"] += norm
            total["weight"] += weight

    def frame(self) -> pd.DataFrame:
        """model, dest, dest_position, layer, src, piece, modality, norm, weight, n; up to each destination."""
        best = max(self.sums.values(), key=lambda total: total["n"])
        n_src = len(best["pieces"])
        frames = []
        for column, (name, dest) in enumerate(zip(best["names"], best["dest"], strict=True)):
            for row, layer in enumerate(best["layers"]):
                frame = pd.DataFrame(
                    {
                        "dest": name, "dest_position": dest, "layer": layer, "src": range(n_src),
                        "piece": best["pieces"], "modality": best["modality"],
                        "norm": best["norm"][row, column] / best["n"],
                        "weight": best["weight"][row, column] / best["n"], "n": best["n"],
                    }
                )  # fmt: skip
                frames.append(frame[frame["src"] <= dest])
        return _of(self.model, pd.concat(frames, ignore_index=True))


def frequent_words(example: Example, tokens: TokenMap, lens: LogitLensResult) -> list[dict]:
    """The words that most visual tokens of one example decode to, by layer: example, layer, word, positions."""
    rows = []
    for layer, points in zip(lens.layers, lens.at(tokens.image).pieces(), strict=True):
        found = Counter(word for point in points for word in {word_of(piece) for piece in point} if word)
        ranked = sorted(found.items(), key=lambda item: (-item[1], item[0]))[:GALLERY_WORDS]
        rows += [{"example": example.id, "layer": layer, "word": word, "positions": n} for word, n in ranked]
    return rows


def _of(model: str, frame: pd.DataFrame) -> pd.DataFrame:
    frame = frame.copy()
    frame.insert(0, "model", model)
    return frame
