"""Answers of a study: what each token was read from, and when it was decided, as rows of tables.

With `answers=True` a shard's examples are answered first, greedily, by at most `ANSWER_TOKENS`
tokens. Then one forward of prompt and answer reads the prompt's measures and the answer's.
"""

from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import torch

from mechvlm.datasets import Example
from mechvlm.inputs.batch import Inputs
from mechvlm.inputs.tokens import TokenMap
from mechvlm.measures.word_groups import WORD_GROUPS, word_group
from mechvlm.measures.words import caption_words
from mechvlm.probes.answer_reading import AnswerReading, AnswerReadingResult, OnPrompt, prompts_of
from mechvlm.results import long_frame
from mechvlm.tracing.reading import read_batch
from mechvlm.vlm.vlm import VLM

ANSWER_TOKENS = 60
"""Most tokens of an answer; a longer one is cut there."""
ANSWER_SETTINGS: dict[str, Any] = {"max_new_tokens": ANSWER_TOKENS, "decoding": "greedy", "groups": list(WORD_GROUPS)}
"""The settings of a study with answers, beside those of every study."""
_KEYS = [("model", pa.string()), ("example", pa.string()), ("token", pa.int64())]
ANSWER_SCHEMAS = {
    "answer_tokens": pa.schema([*_KEYS, *((name, pa.string()) for name in ("piece", "word", "group"))]),
    "answer_attention": pa.schema([*_KEYS, ("layer", pa.int64()), ("norm", pa.float32()), ("weight", pa.float32())]),
    "answer_lens": pa.schema([*_KEYS, ("state", pa.int64()), ("probability", pa.float32()), ("rank", pa.int64())]),
}


def read_with_answers(
    vlm: VLM, inputs: Inputs, probes: tuple
) -> tuple[tuple[TokenMap, ...], tuple, tuple[tuple[TokenMap, ...], AnswerReadingResult] | None]:
    """Write the answers to a batch of prompts, and read both in one forward.

    Returns:
        The prompts' token maps and the results of `probes`, on the prompts alone; the answers'
        token maps and their reading, None where every answer is empty.
    """
    answered = vlm.generate(inputs, max_new_tokens=ANSWER_TOKENS).inputs
    if not any(tokens.n_answer for tokens in answered.token_maps):
        return inputs.token_maps, read_batch(vlm, inputs, *probes), None
    *results, reading = read_batch(vlm, answered, *map(OnPrompt, probes), AnswerReading())
    return prompts_of(answered).token_maps, tuple(results), (answered.token_maps, reading)


class AnswerRows:
    """Rows of one model's answers."""

    def __init__(self, model: str):
        self.model = model
        self.frames: dict[str, list[pd.DataFrame]] = {name: [] for name in ANSWER_SCHEMAS}

    def add(self, examples: list[Example], maps: tuple[TokenMap, ...], reading: AnswerReadingResult) -> None:
        for row, (example, tokens) in enumerate(zip(examples, maps, strict=True)):
            if n := tokens.n_answer:
                own = _columns(reading, row, n)
                for name, frame in {"answer_tokens": _tokens(example, tokens), **own}.items():
                    self.frames[name].append(frame.assign(model=self.model, example=example.id))

    def tables(self) -> dict[str, pa.Table]:
        """All three tables, those without a row too."""
        tables = {}
        for name, schema in ANSWER_SCHEMAS.items():
            frames = self.frames[name] or [pd.DataFrame(columns=schema.names)]
            frame = pd.concat(frames, ignore_index=True)
            tables[name] = pa.Table.from_pandas(frame, schema, preserve_index=False).replace_schema_metadata()
        return tables


def _tokens(example: Example, tokens: TokenMap) -> pd.DataFrame:
    """Each token with its text, its word and the word's group; None for a token of no word."""
    start, captions = int(tokens.answer[0]), caption_words(example.captions)
    words: list[str | None] = [None] * tokens.n_answer
    groups: list[str | None] = [None] * tokens.n_answer
    for word, held in tokens.answer_words:
        for at in (held - start).tolist():
            words[at], groups[at] = word, word_group(word, captions)
    pieces = [tokens.strings[p] for p in tokens.answer.tolist()]
    return pd.DataFrame({"token": range(tokens.n_answer), "piece": pieces, "word": words, "group": groups})


def _columns(reading: AnswerReadingResult, row: int, n: int) -> dict[str, pd.DataFrame]:
    """Shares by layer and chances by state of one answer of n tokens."""
    shares = {"norm": reading.norm_share, "weight": reading.weight_share}
    lens = {"probability": reading.probability, "rank": reading.rank}
    return {
        "answer_attention": _frame({name: value[:, row, :n] for name, value in shares.items()}, "layer"),
        "answer_lens": _frame({name: value[:, row, :n] for name, value in lens.items()}, "state").astype({"rank": int}),
    }


def _frame(values: dict[str, torch.Tensor], axis: str) -> pd.DataFrame:
    """Tensors [axis token] as columns."""
    first = next(iter(values.values()))
    index = long_frame(first, **{axis: range(len(first)), "token": range(first.shape[1])}).drop(columns="value")
    return index.assign(**{name: np.asarray(value).reshape(-1) for name, value in values.items()})
