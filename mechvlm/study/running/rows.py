"""From the results of one batch to rows of a shard's tables: nothing of the size of an activation is kept.

Each class collects the rows of one shard, a run of consecutive examples; `mechvlm.study.running.merge` puts shards together.
"""

from collections import Counter

import numpy as np
import pandas as pd
import pyarrow as pa
import torch

from mechvlm.datasets import Example
from mechvlm.inputs.tokens import Modality, TokenMap
from mechvlm.measures.words import lens_precision_recall, word_of
from mechvlm.probes.contextualization import MODALITY_PAIRS, ContextualizationResult, merge
from mechvlm.probes.logit_lens import LogitLensResult
from mechvlm.probes.norm_attention import NormAttentionResult
from mechvlm.results import long_frame

GALLERY_WORDS = 6
"""Words a layer that the gallery shows of an example."""

TEXT, WHOLE, SINGLE, DOUBLE = pa.string(), pa.int64(), pa.float32(), pa.float64()
KEYS = [("model", TEXT), ("example", TEXT)]
SCHEMAS = {
    "contextualization": pa.schema([*KEYS, ("pair", TEXT), ("layer", WHOLE), ("value", SINGLE)]),
    "lens": pa.schema(
        [*KEYS, ("tokens", TEXT), ("captions", TEXT), ("measure", TEXT), ("layer", WHOLE), ("value", DOUBLE)]
    ),
    "attention_share": pa.schema([*KEYS, ("dest", TEXT), ("measure", TEXT), ("layer", WHOLE), ("value", SINGLE)]),
    "words": pa.schema([*KEYS, ("layer", WHOLE), ("word", TEXT), ("positions", WHOLE)]),
    "skipped": pa.schema([*KEYS, ("reason", TEXT)]),
    "context_sums": pa.schema(
        [("n", WHOLE), ("layer", WHOLE), *((name, pa.list_(SINGLE)) for name in ("sum_image", "sum_text", "same"))]
    ),
    "norm_sums": pa.schema(
        {
            "n": WHOLE,
            "ids": pa.list_(WHOLE),
            "pieces": pa.list_(TEXT),
            "modality": pa.list_(TEXT),
            "names": pa.list_(TEXT),
            "dest": pa.list_(WHOLE),
            "layers": pa.list_(WHOLE),
            "norm": pa.list_(DOUBLE),
            "weight": pa.list_(DOUBLE),
        }
    ),
}
"""A shard's tables. The first three are the final ones' rows as they are; `words` holds the first examples that can be shown; the
sums are one row a layer, and one row a layout of tokens with flat [layer dest src]."""


SINGLE_OF = {"own": "single", "other": "other_single"}
"""What the mean over single captions is called."""


class LensRows:
    """Precision and recall of one model's examples, with the two controls.

    Each example is held against its own captions and against those of the next one in the data set, the last against the
    first's, whether or not that one's image can be read: both conditions see the same captions, and no example's row depends on
    what became of another.
    """

    def __init__(self, model: str):
        self.model = model
        self.frames: list[pd.DataFrame] = []

    def add(self, example: Example, other: Example, tokens: TokenMap, lens: LogitLensResult) -> None:
        """`lens` holds this example's points only, at every position; without an `other` example, `other` is `example`."""
        image, text = lens.at(tokens.image).pieces(), lens.at(tokens.text).pieces()
        single = len(example.captions) > 1
        self._append(example, "image", "own", lens_precision_recall(image, example.captions, single=single))
        self._append(example, "text", "own", lens_precision_recall(text, example.captions))
        if other is not example:
            single = len(other.captions) > 1
            self._append(example, "image", "other", lens_precision_recall(image, other.captions, single=single))

    def frame(self) -> pd.DataFrame:
        """model, example, tokens, captions, measure, layer, value."""
        return pd.concat(self.frames, ignore_index=True) if self.frames else pd.DataFrame()

    def _append(self, example: Example, tokens: str, captions: str, scores: pd.DataFrame) -> None:
        # Taken together, more captions hold more words: beside their union, each alone.
        named = scores["control"].map({"captions": captions, "single captions": SINGLE_OF[captions]})
        keys = {"model": self.model, "example": example.id, "tokens": tokens, "captions": named}
        scores = scores[["measure", "layer", "value"]]
        self.frames.append(scores.assign(**keys)[[*keys, *scores.columns]])


class ContextRows:
    """Contextualization of one model's examples, and the sums that the anisotropy baseline is made of."""

    def __init__(self, model: str):
        self.model = model
        self.ids: list[str] = []
        self.merged: ContextualizationResult | None = None

    def add(self, examples: list[Example], result: ContextualizationResult) -> None:
        self.ids += [e.id for e in examples]
        self.merged = result if self.merged is None else merge([self.merged, result])

    def frames(self) -> tuple[pd.DataFrame, pd.DataFrame]:
        """(model, example, pair, layer, value), example by example, and the sums (n, layer, sum_image, sum_text, same)."""
        if self.merged is None:
            return pd.DataFrame(), pd.DataFrame()
        # [example pair layer]
        curves = torch.stack([getattr(self.merged, pair) for pair in MODALITY_PAIRS]).permute(2, 0, 1)
        rows = long_frame(curves, example=self.ids, pair=MODALITY_PAIRS, layer=range(curves.shape[2]))
        rows.insert(0, "model", self.model)
        sums = pd.DataFrame(
            {
                "n": len(self.ids), "layer": range(curves.shape[2]), "sum_image": list(self.merged.sum_image.numpy()),
                "sum_text": list(self.merged.sum_text.numpy()), "same": list(self.merged.same.numpy().T),
            }
        )  # fmt: skip
        return rows, sums


class NormRows:
    """Norm-based attention: each example's share of the image, and by position the sum over examples.

    All examples share the prompt, so their positions hold the same tokens. Where a model's processor makes more visual
    tokens of one image than of another they do not: sums are kept by layout.
    """

    def __init__(self, model: str) -> None:
        self.model = model
        self.sums: dict[tuple, dict] = {}
        self.shares: list[pd.DataFrame] = []

    def add(self, examples: list[Example], maps: tuple[TokenMap, ...], result: NormAttentionResult) -> None:
        for row, (example, tokens) in enumerate(zip(examples, maps, strict=True)):
            # Padding stands on the left: without it, equal prompts lie at equal positions in every batch.
            kept = tokens.all
            layout = tuple(tokens.ids[kept].tolist())
            norm = result.norm[:, row][..., kept].double().numpy()
            weight = result.weight[:, row].mean(1)[..., kept].double().numpy()
            image = np.isin(kept.numpy(), tokens.image.numpy())
            both = np.stack([norm, weight])  # [measure layer dest src]
            shares = (both[..., image].sum(-1) / both.sum(-1)).transpose(2, 0, 1)
            axes = {"dest": result.names, "measure": ("norm", "weight"), "layer": result.layers}
            rows = long_frame(torch.from_numpy(shares), **axes)
            self.shares.append(rows.assign(model=self.model, example=example.id))
            if layout not in self.sums:
                self.sums[layout] = {
                    "n": 0, "ids": list(layout), "norm": np.zeros_like(norm), "weight": np.zeros_like(weight),
                    "names": list(result.names), "dest": (result.dest[row] - int(kept[0])).tolist(),
                    "layers": list(result.layers), "pieces": [tokens.strings[p] for p in kept.tolist()],
                    "modality": [Modality(int(tokens.modality[p])).name.lower() for p in kept],
                }  # fmt: skip
            total = self.sums[layout]
            total["n"] += 1
            total["norm"] += norm
            total["weight"] += weight

    def share(self) -> pd.DataFrame:
        """model, example, dest, measure, layer, value."""
        return pd.concat(self.shares, ignore_index=True) if self.shares else pd.DataFrame()

    def frame(self) -> pd.DataFrame:
        """One row a layout of tokens: n, ids, pieces, modality, names, dest, layers, norm, weight (flat)."""
        flat = [s | {"norm": s["norm"].reshape(-1), "weight": s["weight"].reshape(-1)} for s in self.sums.values()]
        return pd.DataFrame(flat)


def frequent_words(model: str, example: Example, tokens: TokenMap, lens: LogitLensResult) -> list[dict]:
    """The words that most visual tokens of one example decode to, by layer: model, example, layer, word, positions."""
    rows = []
    for layer, points in zip(lens.layers, lens.at(tokens.image).pieces(), strict=True):
        found = Counter(word for point in points for word in {word_of(piece) for piece in point} if word)
        ranked = sorted(found.items(), key=lambda item: (-item[1], item[0]))[:GALLERY_WORDS]
        keys = {"model": model, "example": example.id, "layer": layer}
        rows += [{**keys, "word": word, "positions": n} for word, n in ranked]
    return rows


def as_tables(frames: dict[str, pd.DataFrame]) -> dict[str, pa.Table]:
    """Frames with the schemas above, also those without a row."""
    tables = {}
    for name, frame in frames.items():
        schema = SCHEMAS[name]
        frame = frame if len(frame) else pd.DataFrame(columns=schema.names)
        tables[name] = pa.Table.from_pandas(frame, schema, preserve_index=False).replace_schema_metadata()
    return tables
