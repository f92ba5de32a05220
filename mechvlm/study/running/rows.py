"""From the results of a batch to the rows of a shard's tables; no activations are kept.

Each class gathers the rows of one shard. `mechvlm.study.running.merge` puts the shards together.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import pyarrow as pa
import torch
from torch import Tensor

from mechvlm.datasets import Example
from mechvlm.inputs.tokens import Modality, TokenMap
from mechvlm.measures.vocabulary import NO_WORD, LensCurves, VocabularyWords, caption_groups, lens_curves
from mechvlm.probes.contextualization import MODALITY_PAIRS, ContextualizationResult
from mechvlm.probes.logit_lens import LogitLensResult
from mechvlm.probes.norm_attention import NormAttention, NormAttentionResult, NormPlan
from mechvlm.probes.probe import Attended, Row
from mechvlm.results import concat, long_frame
from mechvlm.study.running.answer_rows import AnswerRows
from mechvlm.study.running.plan import GALLERY_EXAMPLES

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

    Tested: equals `lens_precision_recall` on the texts of each example's tokens.
    """

    def __init__(self, model: str, words: VocabularyWords):
        self.model, self.words = model, words
        self.blocks: list[dict[str, np.ndarray]] = []

    def add(self, example: Example, other: Example, tokens: TokenMap, lens: LogitLensResult, row: int) -> None:
        """Add one example.

        Args:
            example: the one that was read.
            other: the data set's next example; `example` itself where there is no other.
            tokens: of the example.
            lens: of the example's batch, at every position.
            row: the example's number in the batch.
        """
        own = caption_groups(tuple(example.captions))
        groups = own if other is example else own + caption_groups(tuple(other.captions))
        image = lens_curves(self.words, ids_at(lens, row, tokens.image), groups)
        text = lens_curves(self.words, ids_at(lens, row, tokens.text), own[:1])
        self._append(example, "image", "own", lens.states, image, range(len(own)))
        self._append(example, "text", "own", lens.states, text, range(1))
        if other is not example:
            self._append(example, "image", "other", lens.states, image, range(len(own), len(groups)))

    def frame(self) -> pd.DataFrame:
        """Columns: model, example, tokens, captions, measure, state, value."""
        if not self.blocks:
            return pd.DataFrame()
        columns = {name: np.concatenate([block[name] for block in self.blocks]) for name in self.blocks[0]}
        return pd.DataFrame({"model": self.model, **columns})

    def _append(
        self, example: Example, tokens: str, captions: str, states: tuple[int, ...], scores: LensCurves, groups: range
    ) -> None:
        # The union of several captions holds more words than one caption does. So beside the score
        # against the union stands the mean over single captions.
        curves: dict[tuple[str, str], np.ndarray] = {}
        for name, group in zip((captions, SINGLE_CAPTION_NAMES[captions]), groups, strict=False):
            curves |= {(name, "precision"): scores.precision[group], (name, "recall"): scores.recall[group]}
            if name == "own":  # the share of words is the same for all captions
                curves[name, "word_share"] = scores.word_share
        n = len(states) * len(curves)
        names, measures = (np.array(labels, object) for labels in zip(*curves, strict=True))
        self.blocks.append(
            {
                "example": np.full(n, example.id, object), "tokens": np.full(n, tokens, object),
                "captions": np.tile(names, len(states)), "measure": np.tile(measures, len(states)),
                "state": np.repeat(states, len(curves)), "value": np.stack(list(curves.values()), 1).reshape(-1),
            }
        )  # fmt: skip


def ids_at(lens: LogitLensResult, row: int, positions: Tensor) -> np.ndarray:
    """The likeliest token at positions of one example, [state point]; every position was read."""
    point_of = torch.full((lens.n_positions or 0,), -1)
    own = (lens.example == row).nonzero()[:, 0]
    point_of[lens.position[own]] = own
    return lens.ids[:, point_of[positions], 0].numpy()


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


@dataclass(frozen=True)
class MeanOfHeads(NormAttention):
    """Norm-based attention with the mean over heads of weights and value norms, as one head.

    A study's tables hold no single head, and 32 heads' weights of every layer are most of what a
    batch would move from a GPU.
    """

    def at_attention(self, plan: NormPlan, attended: Attended) -> Row:
        """As of `NormAttention`, with the axis of heads of length 1."""
        row = NormAttention.at_attention(self, plan, attended)  # super() does not travel to NDIF
        return {**row, **{name: row[name].mean(1, keepdim=True) for name in ("weight", "value_norm")}}


class NormRows:
    """Norm-based attention: per example the image's share, per position the sum over examples.

    All examples share the prompt, so the same positions hold the same tokens. The exception are
    models whose processor makes more visual tokens of one image than of another: sums are kept per
    layout of tokens.
    """

    def __init__(self, model: str) -> None:
        self.model = model
        self.sums: dict[tuple, dict] = {}
        self.ids: list[str] = []
        self.shares: list[np.ndarray] = []
        self.axes: dict[str, tuple] = {}

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
            self.shares.append(shares.astype(np.float32))
            self.ids.append(example.id)
            self.axes = {"dest": result.names, "measure": ("norm", "weight"), "layer": result.layers}
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
        if not self.ids:
            return pd.DataFrame()
        frame = long_frame(torch.from_numpy(np.stack(self.shares)), example=self.ids, **self.axes)
        frame.insert(0, "model", self.model)
        return frame

    def frame(self) -> pd.DataFrame:
        """One row per layout of tokens.

        Columns: n, ids, pieces, modality, names, dest, layers, and norm and weight, flat from
        [layer dest src].
        """
        flat = [s | {"norm": s["norm"].reshape(-1), "weight": s["weight"].reshape(-1)} for s in self.sums.values()]
        return pd.DataFrame(flat)


def frequent_words(
    model: str, example: Example, tokens: TokenMap, lens: LogitLensResult, row: int, words: VocabularyWords
) -> list[dict]:
    """The words that most visual tokens of one example decode to, by state.

    Returns:
        Rows with the keys model, example, state, word, positions: the `GALLERY_WORDS` most frequent
        words of each state, with the number of positions that decode to them.
    """
    rows, by_state = [], words.form_numbers(ids_at(lens, row, tokens.image))
    names = list(words.forms)
    for state, own in zip(lens.states, by_state, strict=True):
        numbers, counts = np.unique(own, return_counts=True)
        numbers, counts = numbers[numbers != NO_WORD], counts[numbers != NO_WORD]
        # Only words as frequent as the last one shown need sorting.
        least = np.sort(counts)[-GALLERY_WORDS:].min(initial=len(own))
        often = zip(counts[counts >= least].tolist(), numbers[counts >= least].tolist(), strict=True)
        ranked = sorted(((names[number], n) for n, number in often), key=lambda item: (-item[1], item[0]))
        keys = {"model": model, "example": example.id, "state": state}
        rows += [{**keys, "word": word, "positions": n} for word, n in ranked[:GALLERY_WORDS]]
    return rows


class ShardRows:
    """All rows of one shard, out of the results of its batches.

    Args:
        model: the model's name.
        examples: of the whole data set.
        words: of the model's vocabulary.
    """

    def __init__(self, model: str, examples: Sequence[Example], words: VocabularyWords):
        self.model, self.examples, self.words = model, examples, words
        self.lens, self.context = LensRows(model, words), ContextRows(model)
        self.norms, self.answers = NormRows(model), AnswerRows(model)
        self.frequent: list[dict] = []
        self.n_with_words = 0

    def add(self, part: range, maps: tuple[TokenMap, ...], results: tuple, answers: tuple | None) -> None:
        """Add the examples with these indices.

        Args:
            part: their indices in the data set.
            maps: of each.
            results: of the study's three probes.
            answers: the answers' token maps and their reading, or None.
        """
        lens, context, norms = results
        examples = [self.examples[index] for index in part]
        for row, (index, example, tokens) in enumerate(zip(part, examples, maps, strict=True)):
            self.lens.add(example, self.examples[(index + 1) % len(self.examples)], tokens, lens, row)
            # The gallery shows the first examples that could be read. Which shards they come from
            # is not known here, so each shard keeps as many as it might need.
            if self.n_with_words < GALLERY_EXAMPLES:
                self.frequent += frequent_words(self.model, example, tokens, lens, row, self.words)
                self.n_with_words += 1
        self.context.add(examples, context)
        self.norms.add(examples, maps, norms)
        if answers is not None:
            self.answers.add(examples, *answers)

    def frames(self, set_aside: list[dict]) -> dict[str, pd.DataFrame]:
        """The tables of `SHARD_SCHEMAS`, by name."""
        curves, sums = self.context.frames()
        return {
            "contextualization": curves, "context_sums": sums, "lens": self.lens.frame(),
            "norm_sums": self.norms.frame(), "attention_share": self.norms.share(),
            "words": pd.DataFrame(self.frequent),
            "skipped": pd.DataFrame([{"model": self.model, **row} for row in set_aside]),
        }  # fmt: skip


def as_tables(frames: dict[str, pd.DataFrame]) -> dict[str, pa.Table]:
    """Frames as tables with the schemas of `SHARD_SCHEMAS`, those without a row too."""
    tables = {}
    for name, frame in frames.items():
        schema = SHARD_SCHEMAS[name]
        frame = frame if len(frame) else pd.DataFrame(columns=schema.names)
        tables[name] = pa.Table.from_pandas(frame, schema, preserve_index=False).replace_schema_metadata()
    return tables
