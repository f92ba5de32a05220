"""Words against captions: worked values, and the counts against the sums written out."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mechvlm.measures.words import (
    STOP_WORDS,
    caption_words,
    lens_precision_recall,
    precision_recall,
    word_of,
)


def test_a_caption_in_decomposed_accents_holds_the_same_words():
    assert caption_words("a cafe\u0301 on sand") == caption_words("a café on sand") == {"café", "sand"}


@pytest.mark.parametrize(
    ("piece", "word"),
    [
        (" Cat", "cat"),
        ("cat", "cat"),
        ("▁Cat", "cat"),  # as the vocabularies of SentencePiece write it
        (" Straße", "strasse"),  # case-folded, not only lower case
        (" cafe\u0301", "café"),  # composed, however it is written
        (" कुत्ता", "कुत्ता"),  # vowels that are marks on a letter
        (" кошка", "кошка"),
        (" Ġgant", "ġgant"),  # Maltese, and no mark of a space
        (" caf\ufffd", None),  # a part of a character
        ("\ufffd", None),
        ("\n", None),
        ("  Cat", None),
        ("<s>", None),
        ("</s>", None),
        ("<image>", None),
        ("<|im_end|>", None),
        ("[CLS]", None),
        ("##ing", None),
        (" ", None),
        ("    ", None),
        ("\n\n", None),
        ("", None),
        (" a", None),
        ("42", None),
        (" 2nd", None),
        ("-", None),
        (" snake_case", None),
    ],
)
def test_a_piece_is_a_word_or_not(piece, word):
    assert word_of(piece) == word


def test_caption_words_are_lemmas_without_stop_words():
    assert caption_words("Two geese and a CHILD are standing; the children's t-shirts.") == {
        "two", "goose", "child", "stand", "shirt",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lemmas": False}, {"geese", "swim"}),
        ({"stop_words": True}, {"the", "goose", "do", "not", "swim"}),
        ({"stop_words": True, "lemmas": False}, {"the", "geese", "do", "not", "swim"}),
        ({"stop_words": {"goose"}}, {"the", "do", "not", "swim"}),
        ({"stop_words": {"GEESE"}}, {"the", "do", "not", "swim"}),
    ],
)
def test_caption_word_options(options, words):
    assert caption_words("The geese do not swim", **options) == words


def test_several_captions_give_their_union():
    assert caption_words(["A dog.", "A cat and dogs", ""]) == {"dog", "cat"}


def test_stop_words_leave_words_for_visible_things():
    assert {"the", "and", "with", "don", "doesn"} <= STOP_WORDS
    assert not {"one", "two", "six", "fire", "front", "top", "empty", "red", "left", "right", "man"} & STOP_WORDS
    assert caption_words("It doesn't go, they'll get there, she goes") == set()


def test_other_languages():
    assert caption_words("Die Häuser", lang="de", stop_words={"die"}) == {"haus"}
    with pytest.raises(ValueError, match="lang='en' only, not for 'de'"):
        caption_words("Die Häuser", lang="de")


# Three positions, top-2. Words: dog, dog, run, cat; stop word: the; non-word: a full stop.
DECODED = [[" dogs", " the"], ["Dog", "\n"], [" running", " cat"], ["\n", " ."]]
CAPTIONS = ["A dog runs.", "Two dogs"]  # dog, run; two, dog


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        # Decoded dog run cat, in the captions dog run two: 2 of 3, and 2 of 3.
        ({}, (2 / 3, 2 / 3, 3, 2, 3, 2, 3 / 4, 4)),
        # Decoded dogs dog running cat, in the captions dog runs two dogs: dog and dogs.
        ({"lemmas": False}, (2 / 4, 2 / 4, 4, 2, 4, 2, 3 / 4, 4)),
        # Decoded also "the". The captions' only stop word, "a", is too short to be a word.
        ({"stop_words": True}, (2 / 4, 2 / 3, 4, 2, 3, 2, 3 / 4, 4)),
        # Decoded also "\n" and " .", which are wrong.
        ({"non_words": True}, (2 / 5, 2 / 3, 5, 2, 3, 2, 3 / 4, 4)),
        # Three positions have a word, and each has a caption word. The captions' words are dog run
        # two dog; dog, run and dog are decoded.
        ({"by": "token"}, (1.0, 3 / 4, 3, 3, 4, 3, 3 / 4, 4)),
        ({"by": "token", "non_words": True}, (3 / 4, 3 / 4, 4, 3, 4, 3, 3 / 4, 4)),
        ({"by": "token", "lemmas": False}, (2 / 3, 2 / 4, 3, 2, 4, 2, 3 / 4, 4)),
    ],
)
def test_worked_values(options, expected):
    assert precision_recall(DECODED, CAPTIONS, **options) == pytest.approx(expected)


def test_top_1_is_the_first_piece_of_each_position():
    top_1 = [[pieces[0]] for pieces in DECODED]
    assert precision_recall(top_1, CAPTIONS) == pytest.approx((1.0, 2 / 3, 2, 2, 3, 2, 3 / 4, 4))


@pytest.mark.parametrize("by", ["word", "token"])
def test_nothing_over_nothing_is_nan(by):
    precision, recall, *counts = precision_recall([[" the"], ["<s>"]], "a", by=by)
    assert math.isnan(precision)
    assert math.isnan(recall)
    assert counts == [0, 0, 0, 0, 0.0, 2]  # a stop word is no word either
    precision, recall, *_, word_share, _ = precision_recall([], "a dog", by=by)
    assert math.isnan(precision)
    assert math.isnan(word_share)
    assert recall == 0
    precision, recall, *_ = precision_recall([[" cat"]], "a", by=by)
    assert precision == 0
    assert math.isnan(recall)


pieces = st.sampled_from([" dog", " dogs", "Dog", " cat", " the", "<s>", " .", " geese", " two", " goes"])
texts = st.lists(st.sampled_from(["the dogs", "two cats", "A goose.", "it goes", "dog"]), min_size=1, max_size=4)


@given(st.lists(st.lists(pieces, max_size=3), max_size=6), texts, st.booleans(), st.booleans(), st.booleans())
@settings(deadline=None, max_examples=200)
def test_equals_the_sums_written_out(decoded, captions, lemmas, stop_words, non_words):
    options = {"lemmas": lemmas, "stop_words": stop_words}

    def read(piece):
        """The word, "" for a stop word, None for a non-word."""
        return None if word_of(piece) is None else "".join(caption_words(word_of(piece), **options))

    in_captions = [read(text) for caption in captions for text in caption.replace(".", "").split()]
    in_captions = [word for word in in_captions if word]
    decoded_words = [(piece, read(piece)) for position in decoded for piece in position]
    words = {word for _, word in decoded_words if word}
    counted_non_words = {piece for piece, word in decoded_words if word is None} if non_words else set()
    correct = words & set(in_captions)
    by_word = precision_recall(decoded, captions, by="word", non_words=non_words, **options)
    n_words = len(words) + len(counted_non_words)
    assert by_word[2:6] == (n_words, len(correct), len(set(in_captions)), len(correct))

    n_decoded = n_correct = 0
    for position in decoded:
        n_decoded += any(read(piece) or (non_words and read(piece) is None) for piece in position)
        n_correct += any(read(piece) in correct for piece in position)
    by_token = precision_recall(decoded, captions, by="token", non_words=non_words, **options)
    assert by_token[2:6] == (n_decoded, n_correct, len(in_captions), sum(word in correct for word in in_captions))
    n_with_word = sum(any(read(piece) for piece in position) for position in decoded)
    for result in (by_word, by_token):
        assert result.n_positions == len(decoded)
        if decoded:
            assert result.word_share == n_with_word / len(decoded)
        if result.n_decoded:
            assert result.precision == result.n_correct / result.n_decoded
        if result.n_caption:
            assert result.recall == result.n_found / result.n_caption


def test_a_lens_gives_a_tidy_frame_with_its_control():
    tokens = [[[" tree"], [" ."]], [[" dogs"], [" cat"]]]
    frame = lens_precision_recall(tokens, "a dog", ["a cat", ["a bird", "a tree"]])
    table = frame.set_index(["state", "measure", "control"])["value"]
    assert list(frame.columns) == ["state", "measure", "control", "value"]
    assert len(frame) == 10
    assert (table[0, "word_share", "captions"], table[1, "word_share", "captions"]) == (0.5, 1)
    by_place = {state: dict(enumerate(points)) for state, points in zip((4, 9), tokens, strict=True)}
    keyed = lens_precision_recall(by_place, "a dog", ["a cat", ["a bird", "a tree"]])
    assert keyed.replace({"state": {4: 0, 9: 1}}).equals(frame), "states keep their numbers"
    assert table[1, "precision", "captions"] == 0.5
    assert table[1, "recall", "captions"] == 1
    # Means over the two other images. At state 1: precision 1/2 and 0, recall 1 and 0. At state 0:
    # precision 0 and 1, recall 0 and 1/2.
    assert table[1, "precision", "other captions"] == 0.25
    assert table[1, "recall", "other captions"] == 0.5
    assert table[0, "precision", "other captions"] == 0.5
    assert table[0, "recall", "other captions"] == 0.25


def test_a_lens_without_other_captions_and_without_words():
    frame = lens_precision_recall([[["<s>"]]], "a dog")
    assert set(frame["control"]) == {"captions"}
    assert math.isnan(frame.query("measure == 'precision'")["value"].item())
    assert frame.query("measure == 'recall'")["value"].item() == 0


@pytest.mark.parametrize(
    ("decoded", "captions", "options", "message"),
    [
        ([[" dog"]], "a dog", {"by": "words"}, "by is 'word' or 'token', not 'words'"),
        ([[" dog"]], [], {}, "captions must hold text"),
        ([[" dog"]], "  ", {}, "captions must hold text"),
        ([" dog", " cat"], "a dog", {}, r"\[position\]\[k\]"),
        ([[" dog"], " cat"], "a dog", {}, r"\[position\]\[k\]"),
        ([["ĠcafÃ©"]], "café", {}, r"pieces of a byte-level vocabulary, such as 'ĠcafÃ©'.*lens\.pieces"),
        ([["Ċ"], ["Ċ"], ["cat"]], "a cat", {}, "pieces of a byte-level vocabulary"),
    ],
)
def test_bad_input_is_named(decoded, captions, options, message):
    with pytest.raises(ValueError, match=message):
        precision_recall(decoded, captions, **options)


def test_one_stop_word_must_be_in_a_set():
    with pytest.raises(TypeError, match="True, False or a set"):
        caption_words("a dog", stop_words="the")


def test_single_captions_beside_their_union():
    """Captions one by one and together, of the image and of others, against the plain calls."""
    tokens = [[[" cat"], [" mat"], [" dog"]], [[" tree"], [" cat"], [" 7"]]]
    own = ["a cat on a mat", "a cat", "the mat of a cat", "an animal", "of the"]  # none in the last
    others = [["a dog", "a dog runs"], "trees"]
    plain = lens_precision_recall(tokens, own, others)
    frame = lens_precision_recall(tokens, own, others, single=True)
    assert frame[frame["control"].isin(("captions", "other captions"))].reset_index(drop=True).equals(plain)
    value = frame.set_index(["control", "state", "measure"])["value"]
    for control, captions in (
        ("single captions", own[:4]),
        ("other single captions", ["a dog", "a dog runs", "trees"]),
    ):
        for layer, decoded in enumerate(tokens):
            for measure in ("precision", "recall"):
                values = [getattr(precision_recall(decoded, caption), measure) for caption in captions]
                assert value[control, layer, measure] == pytest.approx(sum(values) / len(values))
    assert value["captions", 0, "recall"] == pytest.approx(2 / 3)  # cat, mat of cat, mat, animal
    assert value["single captions", 0, "recall"] == pytest.approx((1 + 1 + 1 + 0) / 4)
    assert value["single captions", 0, "precision"] == pytest.approx((2 + 1 + 2 + 0) / 3 / 4)


def test_words_of_any_script_are_found():
    decoded = [[" café"], [" 狗狗"], [" l’eau"], [" Ġgant"], [" кошка"]]
    result = precision_recall(decoded, "un café, 狗狗, l’eau", lemmas=False, stop_words={"un"}, lang="fr")
    assert result[:2] == (2 / 4, 2 / 3)  # the apostrophe splits "l’eau" into "l" and "eau"
    assert (result.word_share, result.n_positions) == (4 / 5, 5)
