"""From the results of a batch to the rows of a shard's tables; no activations are kept.

Each class gathers the rows of one shard. `mechvlm.study.running.merge` puts the shards together.
"""

from collections import Counter

import numpy as np
import pandas as pd
import pyarrow as pa
import torch

from mechvlm.datasets import Example
from mechvlm.inputs.tokens import Modality, TokenMap
from mechvlm.measures.words import lens_precision_recall, word_of
from mechvlm.probes.contextualization import MODALITY_PAIRS, ContextualizationResult
from mechvlm.probes.logit_lens import LogitLensResult
from mechvlm.probes.norm_attention import NormAttentionResult
from mechvlm.results import concat, long_frame

GALLERY_WORDS = 6
"""Words per state that the gallery shows of an example."""

STRING, INT64, FLOAT32, FLOAT64 = pa.string(), pa.int64(), pa.float32(), pa.float64()
KEYS = [("model", STRING), ("example", STRING)]
SHARD_SCHEMAS = {
    "contextualization": pa.schema([*KEYS, ("pair", STRING), ("state", INT64), ("value", FLOAT32)]),
    "lens": pa.schema(
        [*KEYS, ("tokens", STRING), ("captions", STRING), ("measure", STRING), ("state", INT64), ("value", FLOAT64)]
    ),
    "attention_share": pa.schema([*KEYS, ("dest", STRING), ("measure", STRING), ("layer", INT64), ("value", FLOAT32)]),
    "words": pa.schema([*KEYS, ("state", INT64), ("word", STRING), ("positions", INT64)]),
    "skipped": pa.schema([*KEYS, ("reason", STRING)]),
    "context_sums": pa.schema(
        [("n", INT64), ("state", INT64), *((name, pa.list_(FLOAT32)) for name in ("sum_image", "sum_text", "same"))]
    ),
    "norm_sums": pa.schema(
        {
            "n": INT64,
            "ids": pa.list_(INT64),
            "pieces": pa.list_(STRING),
            "modality": pa.list_(STRING),
            "names": pa.list_(STRING),
            "dest": pa.list_(INT64),
            "layers": pa.list_(INT64),
            "norm": pa.list_(FLOAT64),
            "weight": pa.list_(FLOAT64),
        }
    ),
}
"""The tables of a shard.

The first three are rows of the final tables. `words` holds the first examples that could be read,
for the gallery. `context_sums` has one row per state. `norm_sums` has one row per layout of tokens,
with `norm` and `weight` flat, from [layer dest src].
"""


SINGLE_CAPTION_NAMES = {"own": "single", "other": "other_single"}
"""Names in the column `captions` of the mean over single captions, instead of all together."""


class LensRows:
    """Precision, recall and share of words of one model's examples, with the two controls.

    Each example is compared with its own captions and with those of the data set's next example
    (the last with the first's), whether or not the next one's image can be read. So both conditions
    see the same captions, and no example's row depends on what happened to another.
    """

    def __init__(self, model: str):
        self.model = model
        self.frames: list[pd.DataFrame] = []

    def add(self, example: Example, other: Example, tokens: TokenMap, lens: LogitLensResult) -> None:
        """Add one example.

        Args:
            example: the one that was read.
            other: the data set's next example; `example` itself where there is no other.
            tokens: of the example.
            lens: of this example alone, at every position.
        """
        image, text = lens.at(tokens.image).pieces(), lens.at(tokens.text).pieces()
        single = len(example.captions) > 1
        self._append(example, "image", "own", lens_precision_recall(image, example.captions, single=single))
        self._append(example, "text", "own", lens_precision_recall(text, example.captions))
        if other is not example:
            single = len(other.captions) > 1
            self._append(example, "image", "other", lens_precision_recall(image, other.captions, single=single))

    def frame(self) -> pd.DataFrame:
        """Columns: model, example, tokens, captions, measure, state, value."""
        return pd.concat(self.frames, ignore_index=True) if self.frames else pd.DataFrame()

    def _append(self, example: Example, tokens: str, captions: str, scores: pd.DataFrame) -> None:
        # The union of several captions holds more words than one caption does. So beside the score
        # against the union stands the mean over single captions.
        names = {"captions": captions, "single captions": SINGLE_CAPTION_NAMES[captions]}
        if captions == "other":  # the share of words is the same whatever they are compared with
            scores = scores[scores["measure"] != "word_share"]
        keys = {
            "model": self.model, "example": example.id, "tokens": tokens, "captions": scores["control"].map(names)
        }  # fmt: skip
        scores = scores[["measure", "state", "value"]]
        self.frames.append(scores.assign(**keys)[[*keys, *scores.columns]])


class ContextRows:
    """Contextualization of one model's examples, and the sums for the anisotropy baseline."""

    def __init__(self, model: str):
        self.model = model
        self.ids: list[str] = []
        self.merged: ContextualizationResult | None = None

    def add(self, examples: list[Example], result: ContextualizationResult) -> None:
        self.ids += [e.id for e in examples]
        self.merged = result if self.merged is None else concat([self.merged, result])

    def frames(self) -> tuple[pd.DataFrame, pd.DataFrame]:
        """Two tables: the values, example by example, and the sums over examples.

        Their columns: (model, example, pair, state, value) and (n, state, sum_image, sum_text,
        same).
        """
        if self.merged is None:
            return pd.DataFrame(), pd.DataFrame()
        # [example pair state]
        curves = torch.stack([getattr(self.merged, pair) for pair in MODALITY_PAIRS]).permute(2, 0, 1)
        rows = long_frame(curves, example=self.ids, pair=MODALITY_PAIRS, state=range(curves.shape[2]))
        rows.insert(0, "model", self.model)
        sums = pd.DataFrame(
            {
                "n": len(self.ids), "state": range(curves.shape[2]), "sum_image": list(self.merged.sum_image.numpy()),
                "sum_text": list(self.merged.sum_text.numpy()), "same": list(self.merged.same.numpy().T),
            }
        )  # fmt: skip
        return rows, sums


class NormRows:
    """Norm-based attention: per example the image's share, per position the sum over examples.

    All examples share the prompt, so the same positions hold the same tokens. The exception are
    models whose processor makes more visual tokens of one image than of another: sums are kept per
    layout of tokens.
    """

    def __init__(self, model: str) -> None:
        self.model = model
        self.sums: dict[tuple, dict] = {}
        self.shares: list[pd.DataFrame] = []

    def add(self, examples: list[Example], maps: tuple[TokenMap, ...], result: NormAttentionResult) -> None:
        for row, (example, tokens) in enumerate(zip(examples, maps, strict=True)):
            # Padding stands on the left: without it, equal prompts lie at equal positions in every
            # batch.
            kept = tokens.all
            layout = tuple(tokens.ids[kept].tolist())
            norm = result.norm[:, row][..., kept].double().numpy()
            weight = result.weight[:, row].mean(1)[..., kept].double().numpy()
            is_image = np.isin(kept.numpy(), tokens.image.numpy())
            both = np.stack([norm, weight])  # [measure layer dest src]
            # [dest measure layer]
            shares = (both[..., is_image].sum(-1) / both.sum(-1)).transpose(2, 0, 1)
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
        """Columns: model, example, dest, measure, layer, value."""
        return pd.concat(self.shares, ignore_index=True) if self.shares else pd.DataFrame()

    def frame(self) -> pd.DataFrame:
        """One row per layout of tokens.

        Columns: n, ids, pieces, modality, names, dest, layers, and norm and weight, flat from
        [layer dest src].
        """
        flat = [s | {"norm": s["norm"].reshape(-1), "weight": s["weight"].reshape(-1)} for s in self.sums.values()]
        return pd.DataFrame(flat)


def frequent_words(model: str, example: Example, tokens: TokenMap, lens: LogitLensResult) -> list[dict]:
    """The words that most visual tokens of one example decode to, by state.

    Returns:
        Rows with the keys model, example, state, word, positions: the `GALLERY_WORDS` most frequent
        words of each state, with the number of positions that decode to them.
    """
    rows = []
    for state, points in lens.at(tokens.image).pieces().items():
        counts = Counter(word for point in points.values() for word in {word_of(piece) for piece in point} if word)
        ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:GALLERY_WORDS]
        keys = {"model": model, "example": example.id, "state": state}
        rows += [{**keys, "word": word, "positions": n} for word, n in ranked]
    return rows


def as_tables(frames: dict[str, pd.DataFrame]) -> dict[str, pa.Table]:
    """Frames as tables with the schemas of `SHARD_SCHEMAS`, those without a row too."""
    tables = {}
    for name, frame in frames.items():
        schema = SHARD_SCHEMAS[name]
        frame = frame if len(frame) else pd.DataFrame(columns=schema.names)
        tables[name] = pa.Table.from_pandas(frame, schema, preserve_index=False).replace_schema_metadata()
    return tables
