"""The answer's words on the patch view: which there are, what their rows hold, and bad input."""

import dataclasses
import json
import re

import numpy as np
import pytest
import torch

import mechvlm as mv
from helpers.images import noise_image
from helpers.patch_page import row_of, word_row
from helpers.patch_results import uneven
from mechvlm import explore
from mechvlm.errors import ViewError
from mechvlm.inputs.tokens import Modality, TokenMap
from mechvlm.view import packing
from mechvlm.view.example import Pick, match_example
from mechvlm.view.written import Written, written_words

ANSWER = (" red", " squ", "irrel", ",", " red")
"""Tokens of an answer at the positions 21 to 25: a word twice, a word of two tokens, a comma."""
DEST = (22, 17, 20, 25, 21, 13, 23, 24)
WROTE = [[20], [21, 22], [23], [24], [25]]
"""Which positions wrote each of its words, by hand; the last is what came after it."""


def tokens_of(*answer: str, spelled: tuple[str, ...] = ()) -> TokenMap:
    """A prompt of the positions 0 and 1, with an answer."""
    strings = ("<s>", " Say", *answer)
    texts = ("<s>", " Say", *(spelled or answer))
    modality = torch.tensor([Modality.SPECIAL, *[Modality.TEXT] * (len(strings) - 1)])
    return TokenMap(torch.arange(len(strings)), strings, texts, modality, (), len(answer))


def test_words_with_the_positions_that_wrote_them_by_hand():
    tokens = tokens_of(" a", " squ", "irrel", "'s", ",", " a", " \u2744", ".")
    words = written_words(tokens, {1, 2, 3, 4, 5, 6, 7, 8})
    assert [(word.text, word.wrote) for word in words] == [
        (" a", (1,)), (" squirrel's", (2, 3, 4)), (",", (5,)), (" a", (6,)), (" \u2744", (7,)), (".", (8,)),
    ]  # fmt: skip
    assert [word.holds for word in words] == [tuple(p + 1 for p in word.wrote) for word in words]
    assert written_words(tokens, set()) == words, "words that were not read are shown too"
    assert written_words(tokens, {1, 9}) == [*words, Written("", (), (9,))], "what came after the answer"
    partly = written_words(tokens, {1, 3, 4, 5})
    assert [(word.text, word.wrote) for word in partly[:4]] == [
        (" a", (1,)), (" squ", (2,)), ("irrel", (3,)), ("'s", (4,)),
    ], "a mean over some of its tokens is none of the word"  # fmt: skip
    split = tokens_of(" a", "\ufffd", "\ufffd", " b", spelled=(" a", " \u2744", "", " b"))
    assert [(word.text, word.wrote) for word in written_words(split, {1})] == [
        (" a", (1,)), (" \u2744", (2, 3)), (" b", (4,)),
    ]  # fmt: skip
    assert written_words(tokens_of(), {1}) == []


def data_of(view) -> dict:
    return json.loads(re.search(r'<script type="application/json">(.*?)</script>', view.body, re.S)[1])


def test_a_words_row_is_the_mean_of_those_that_wrote_it(monkeypatch):
    packed = []
    pack_rows = packing.pack_rows
    monkeypatch.setattr(
        packing, "pack_rows", lambda raw, norm, *a: packed.append((raw, norm)) or pack_rows(raw, norm, *a)
    )
    inputs, lens, norms = uneven(dest=DEST, answer=ANSWER)
    view = mv.view.patches(inputs, lens, norms)
    data, positions = data_of(view), np.array(data_of(view)["positions"])
    assert [word["wrote"] for word in data["answer"]] == WROTE
    assert [positions[word["sources"]].tolist() for word in data["answer"]] == [[21], [22, 23], [24], [25], []]
    assert [word["text"] for word in data["answer"]] == [" red", " squirrel", ",", " red", ""]
    named = [row.get("word", ("position", int(positions[row.get("source", 0)]))) for row in data["rows"]]
    assert named == [("position", 13), ("position", 17), ("position", 20), 0, 1, 2, 3, 4]
    assert [row.get("like") for row in data["rows"]] == [None, None, None, 2, None, None, None, None]
    assert data["start"]["row"] == 3, "the answer's first word"
    assert view.title == "Patches, made: made → red squirrel, red"
    wrote = [[13], [17], [20], *WROTE[1:]]
    assert len(packed) == len(wrote), "one row for each of them, and none twice"
    for (raw, norm), own in zip(packed, wrote, strict=True):
        for layer, head in ((0, 0), (4, 3), (10, 0), (10, 2)):
            assert raw[layer, head] == pytest.approx(word_row(norms, own, layer, head, 0)[positions], rel=1e-5)
            assert norm[layer, head] == pytest.approx(word_row(norms, own, layer, head, 1)[positions], rel=1e-5)
    apart = [row_of(norms, p, 10, 2, 1) for p in (21, 22)]
    assert np.abs(apart[0] - apart[1]).max() > 0.1 * apart[0].max(), "the test tells a mean from its parts"


def test_the_first_pick_and_the_picture_are_of_the_answer():
    inputs, lens, norms = uneven(dest=DEST, answer=ANSWER)
    shown = match_example(inputs, lens, norms, None, None)
    assert shown.first_pick == Pick((20,), word=0)
    heats = shown.heat(Pick((21, 22), word=1), 4)
    expected = word_row(norms, [21, 22], 4, 0, 1)
    for heat, own in zip(heats, inputs.tokens.images, strict=True):
        assert heat.flatten() == pytest.approx(expected[own], rel=1e-5)
    few = uneven(dest=(25, 21), answer=ANSWER)
    assert match_example(*few, None, None).picks == [Pick((21,), word=1), Pick((25,), word=5)], "a word in two"


def test_the_answer_is_written_and_read_in_one_forward(vlm, monkeypatch):
    prompt = vlm.inputs(noise_image(0), "what is this")
    inputs = explore.with_answer(vlm, prompt)
    (answer,) = vlm.generate(prompt)
    assert torch.equal(inputs.encoding["input_ids"], answer.inputs.encoding["input_ids"])
    given = explore.with_answer(vlm, prompt, "a red cat")
    assert torch.equal(given.encoding["input_ids"], prompt.answered("a red cat").encoding["input_ids"])
    for own in (inputs, given):
        dest, tokens = explore.destinations(vlm, own.tokens), own.tokens
        assert set(tokens.writing.tolist()) <= set(dest.tolist())
        assert tokens.last not in dest
        assert set(dest.tolist()) - set(tokens.writing.tolist()) <= set(
            explore.destinations(vlm, prompt.tokens).tolist()
        )
        assert set(explore.destinations(vlm, prompt.tokens).tolist()) <= set(dest.tolist())
    calls = []
    read = explore.read
    monkeypatch.setattr(explore, "read", lambda *a: calls.append(a[1:]) or read(*a))
    page = explore.patch_view(vlm, given, dest, k=2)
    assert len(calls) == 1
    assert [word["text"].strip() for word in data_of(page)["answer"]] == ["a", "red", "cat"]


def test_without_room_the_answer_comes_before_the_prompt(llava_vlm):
    tokens = llava_vlm.inputs(noise_image(0), "what is this").answered("a red cat a red cat").tokens
    row = 4 * llava_vlm.n_layers * llava_vlm.n_heads * len(tokens)
    wrote, after = tokens.writing.tolist(), torch.arange(int(tokens.image[-1]) + 1, len(tokens.prompt)).tolist()
    assert explore.destinations(llava_vlm, tokens).tolist() == sorted({*after, *wrote})
    assert explore.destinations(llava_vlm, tokens, 3 * row).tolist() == wrote[:3], "its first words"
    assert explore.destinations(llava_vlm, tokens, (len(wrote) + 2) * row).tolist() == [*after[-3:-1], *wrote]


def test_results_of_other_inputs_and_empty_answers(llava_vlm):
    prompt = llava_vlm.inputs(noise_image(0), "what is this")
    answered, other = prompt.answered("a red cat on a"), prompt.answered("a cat red on a")
    lens, norms = mv.read(llava_vlm, answered, mv.LogitLens(k=1), mv.NormAttention(dst=["wrote:red", "last_prompt"]))
    assert norms.names == ("wrote:red", "last_prompt")
    mv.view.patches(answered, lens, norms)
    with pytest.raises(ViewError, match=r"norms was not read from these inputs: it holds 1 example\(s\) of \d+ tokens"):
        mv.view.patches(prompt, lens, norms)
    with pytest.raises(
        ViewError, match=r"norms was not read from these inputs: 'wrote:red' is position \d+ there and \d+ here"
    ):
        mv.view.patches(other, lens, norms)
    with pytest.raises(ViewError, match=r"'wrote:red' is position \d+ there and none here"):
        mv.view.patches(prompt.answered("a cat cat on a"), lens, norms)
    with pytest.raises(ViewError, match="'last_prompt' is position"):
        mv.view.patches(answered, lens, dataclasses.replace(norms, dest=norms.dest - torch.tensor([0, 1])))
    twice = mv.norm_attention(llava_vlm, prompt.answered("red a red"), dst="writing")
    assert twice.names[:2] == ("writing 0", "writing 1")
    with pytest.raises(ViewError, match="'writing 0' is position"):
        mv.view.patches(prompt.answered("red a red"), lens, dataclasses.replace(twice, dest=twice.dest.flip(1)))
    plain, norms = mv.read(llava_vlm, prompt, mv.LogitLens(k=1), mv.NormAttention(dst="last"))
    with pytest.raises(ViewError, match="norms was not read from these inputs"):
        mv.view.patches(answered, plain, norms)
    (empty,) = llava_vlm.generate(prompt, eos_token_id=int(llava_vlm.next_tokens(prompt)[0]))
    assert empty == ""
    page = mv.view.patches(empty.inputs, plain, norms)
    assert data_of(page)["answer"] == []
    assert page.html() == mv.view.patches(prompt, plain, norms).html()
