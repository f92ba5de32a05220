"""Rows of a shard against the plain formulas on the texts of each example's tokens."""

from collections import Counter

import pandas as pd
import pytest
import torch

from helpers.images import noise_image
from helpers.uneven import token_map
from mechvlm.datasets import Example
from mechvlm.measures.vocabulary import VocabularyWords
from mechvlm.measures.words import lens_precision_recall, word_of
from mechvlm.probes.logit_lens import LogitLensResult
from mechvlm.probes.norm_attention import NormAttention
from mechvlm.study.running.rows import GALLERY_WORDS, LensRows, MeanOfHeads, frequent_words

WORDS = ("dog", "cat", "mat", "red", "blue", "tree", "car", "sky", "sea", "cup", "the")
TEXTS = (*(f" {word}" for word in WORDS), "\n", " 7", "</s>")
KINDS = ("siitts", ".sittt", "siiiit")
CAPTIONS = (("a dog and a cat", "the red mat", "of the"), ("a tree",), ("blue sky", "blue sea"))


@pytest.fixture(scope="module")
def read() -> tuple[list[Example], tuple, LogitLensResult]:
    """Three examples, padded to one length, with a lens of two states at every position."""
    maps = tuple(map(token_map, KINDS))
    example = torch.cat([torch.full((len(tokens.all),), row) for row, tokens in enumerate(maps)])
    position = torch.cat([tokens.all for tokens in maps])
    ids = torch.randint(0, len(TEXTS), (2, len(example), 1), generator=torch.Generator().manual_seed(0))
    vocabulary = tuple(enumerate(TEXTS))
    lens = LogitLensResult(
        ids, torch.rand(ids.shape), (0, 5), example, position, vocabulary, True, "m", None, True, len(maps[0])
    )
    examples = [Example(f"e{row}", noise_image(0), captions) for row, captions in enumerate(CAPTIONS)]
    return examples, maps, lens


def words() -> VocabularyWords:
    return VocabularyWords(lambda ids: [TEXTS[id] for id in ids.tolist()])


def plain(example: Example, captions: tuple[str, ...], tokens: str, name: str, pieces: dict) -> pd.DataFrame:
    frame = lens_precision_recall(pieces, captions, single=len(captions) > 1 and tokens == "image")
    single = {"own": "single", "other": "other_single"}[name]
    frame = frame[(frame["measure"] != "word_share") | (name == "own")]
    named = frame["control"].map({"captions": name, "single captions": single})
    frame = frame.assign(model="m", example=example.id, tokens=tokens, captions=named)
    return frame[["model", "example", "tokens", "captions", "measure", "state", "value"]]


def test_lens_rows_are_those_of_the_texts(read):
    examples, maps, lens = read
    rows, expected = LensRows("m", words()), []
    for row, (example, tokens) in enumerate(zip(examples, maps, strict=True)):
        other = examples[(row + 1) % 3]
        rows.add(example, other, tokens, lens, row)
        image, text = (lens.of(row).at(positions).pieces() for positions in (tokens.image, tokens.text))
        expected += [
            plain(example, example.captions, "image", "own", image),
            plain(example, example.captions, "text", "own", text),
            plain(example, other.captions, "image", "other", image),
        ]
    pd.testing.assert_frame_equal(rows.frame(), pd.concat(expected, ignore_index=True), check_dtype=False, rtol=0)


def test_an_only_example_has_no_other(read):
    examples, maps, lens = read
    rows = LensRows("m", words())
    rows.add(examples[0], examples[0], maps[0], lens, 0)
    assert set(rows.frame()["captions"]) == {"own", "single"}


def test_frequent_words_are_counted_by_position(read):
    examples, maps, lens = read
    for row, (example, tokens) in enumerate(zip(examples, maps, strict=True)):
        got = frequent_words("m", example, tokens, lens, row, words())
        expected = []
        for state, points in lens.of(row).at(tokens.image).pieces().items():
            counts = Counter(word for (piece,) in points.values() if (word := word_of(piece)))
            for word, n in sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:GALLERY_WORDS]:
                expected.append({"model": "m", "example": example.id, "state": state, "word": word, "positions": n})
        assert got == expected


def test_only_the_most_frequent_words_are_kept_and_equals_follow_the_alphabet():
    tokens = token_map("s" + "i" * 13 + "t")
    ids = torch.tensor([[13, 0, 0, 1, 1, 2, 2, 8, 7, 6, 5, 4, 3, 11, 12]])[..., None]
    lens = LogitLensResult(
        ids, torch.ones(ids.shape), (0,), torch.zeros(15, dtype=torch.long), torch.arange(15),
        tuple(enumerate(TEXTS)), True, "m", None, True, 15,
    )  # fmt: skip
    got = frequent_words("m", Example("e", noise_image(0), ("a",)), tokens, lens, 0, words())
    assert [(row["word"], row["positions"]) for row in got] == [
        ("cat", 2), ("dog", 2), ("mat", 2), ("blue", 1), ("car", 1), ("red", 1),
    ]  # fmt: skip


def test_the_mean_of_heads_is_that_of_all_heads(llava_vlm):
    import mechvlm as mv

    inputs = llava_vlm.inputs([noise_image(0), noise_image(1)], "what is this")
    dst = ("last_text", "last_image")
    mean, whole = mv.read(llava_vlm, inputs, MeanOfHeads(dst), NormAttention(dst))
    torch.testing.assert_close(mean.norm, whole.norm, rtol=0, atol=0)
    torch.testing.assert_close(mean.weight, whole.weight.mean(2, keepdim=True))
    assert whole.weight.shape[2] > 1
    assert mean.weight.shape[2] == mean.value_norm.shape[2] == 1
