"""Word reading: heats against naive norms of each position, scores and controls by hand."""

from dataclasses import replace

import pytest
import torch

import mechvlm as mv
from helpers.forwards import decoder_calls
from helpers.images import noise_image
from mechvlm.datasets.naming import word_boxes
from mechvlm.datasets.scenes import scenes
from mechvlm.experiments.word_reading import _padded, paired, score
from mechvlm.experiments.word_reading_result import READING_CONDITIONS
from mechvlm.intervals import mean_interval

TEXTS = ["a red circle and an unbelievable circle", "of the", "red"]


@pytest.fixture(scope="module")
def inputs(llava_vlm):
    """Three examples of different prompts, so that two are padded."""
    return llava_vlm.inputs([noise_image(i) for i in range(3)], ["what is this", "a", "describe the scene . a"])


@pytest.fixture(scope="module")
def reading(llava_vlm, inputs):
    return mv.word_reading(llava_vlm, inputs, TEXTS)


def naive_heat(vlm, inputs, answer: str, word: str, occurrence: int, layers) -> torch.Tensor:
    """On the example alone, position by position: norms of the vectors that the patches write."""
    tokens = (alone := inputs.answered(answer)).tokens
    wrote = tokens.wrote(word, occurrence)
    out = vlm.hf(**vlm.encoding(alone), output_hidden_states=True, output_attentions=True)
    heat = torch.zeros(len(tokens.image))
    blocks = vlm.hf.model.language_model.layers
    for layer in layers:
        attention, x = blocks[layer].self_attn, blocks[layer].input_layernorm(out.hidden_states[layer])[0]
        heads, width = attention.config.num_attention_heads, attention.head_dim
        v = attention.v_proj(x[tokens.image]).unflatten(-1, (-1, width)).repeat_interleave(
            heads // attention.config.num_key_value_heads, 1
        )  # fmt: skip
        w_o = attention.o_proj.weight.unflatten(1, (heads, width))
        f = torch.einsum("the,dhe->thd", v, w_o)  # what each head writes of each token at weight 1
        for position in wrote.tolist():
            weight = out.attentions[layer][0, :, position, tokens.image]
            heat += torch.einsum("ht,thd->td", weight, f).norm(dim=-1) / len(wrote) / len(layers)
    return heat


@pytest.mark.parametrize("layers", [None, [1, -1]])
def test_heats_are_the_naive_norms(llava_vlm, inputs, layers):
    eager = mv.load(llava_vlm.hf, llava_vlm.processor)
    implementation = eager.hf.config._attn_implementation
    result = mv.word_reading(eager, inputs, TEXTS, layers=layers)
    assert result.layers == ((0, 1, 2) if layers is None else (1, 2))
    assert result.word == ("red", "circle", "unbelievable", "circle", "red")
    assert result.example.tolist() == [0, 0, 0, 0, 2]
    assert result.occurrence.tolist() == [0, 0, 0, 1, 0]
    eager.hf.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            for number, (example, word) in enumerate(zip(result.example.tolist(), result.word, strict=True)):
                occurrence = int(result.occurrence[number])
                heat = naive_heat(eager, inputs[example], TEXTS[example], word, occurrence, result.layers)
                torch.testing.assert_close(result.map(number).flatten(), heat, rtol=1e-4, atol=1e-6)
    finally:
        eager.hf.set_attn_implementation(implementation)


def test_logprobs_are_those_of_the_words_tokens(llava_vlm, inputs, reading):
    alone = inputs[0].answered(TEXTS[0])
    with torch.no_grad():
        logprobs = llava_vlm.hf(**llava_vlm.encoding(alone)).logits[0].log_softmax(-1)
    held = alone.tokens.holds("unbelievable")
    assert len(held) > 1
    wanted = sum(float(logprobs[p - 1, alone.tokens.ids[p]]) for p in held.tolist())
    assert float(reading.logprob[2]) == pytest.approx(wanted, abs=1e-4)


def test_one_forward_a_batch_reads_all_words(llava_vlm, inputs):
    with decoder_calls(llava_vlm) as calls:
        mv.word_reading(llava_vlm, inputs, TEXTS, boxes=[{"circle": (0, 0, 20, 20)}, {}, {}])
    assert len(calls) == 1


def test_batches_are_one_study_and_words_can_be_chosen(llava_vlm, reading):
    batches = llava_vlm.inputs(
        [noise_image(i) for i in range(3)],
        ["what is this", "a", "describe the scene . a"],
        batch_size=1,
        ids=list("abc"),
    )
    result = mv.word_reading(llava_vlm, batches, TEXTS, words=["circle", "of"])
    assert result.word == ("circle", "circle", "of")
    torch.testing.assert_close(result.heat[:2], reading.heat[[1, 3]], rtol=1e-4, atol=1e-6)
    assert list(result.to_frame()["id"]) == ["a", "a", "b"]
    assert result.answers == tuple(TEXTS)


def test_the_models_own_answers_are_read(tmp_path):
    """Written here or given as inputs: the same words, with the scene's boxes."""
    vlm = mv.load("tiny-llava")
    examples = list(scenes(2))
    inputs = vlm.inputs([e.image for e in examples], "Describe the scene.")
    boxes = [word_boxes(e) for e in examples]
    result = mv.word_reading(vlm, inputs, boxes=boxes)
    answers = vlm.generate(inputs)
    assert result.answers == tuple(answers)
    given = mv.word_reading(vlm, answers.inputs, boxes=boxes)
    torch.testing.assert_close(given.heat, result.heat, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(given.inside, result.inside, rtol=1e-3, atol=1e-4, equal_nan=True)
    boxed = [bool(b) for b in result.boxes]
    assert (~result.inside[:, 0].isnan()).tolist() == boxed
    assert 2 <= sum(boxed) < len(boxed), "grounds have no box"
    # The model reads objects, which neither an even heat nor another image's boxes explain.
    mean = result.interval.mean
    assert mean[0, 0] > 1.5 * mean[0, READING_CONDITIONS.index("even")]
    result.save(tmp_path / "r.safetensors")
    loaded = mv.WordReadingResult.load(tmp_path / "r.safetensors")
    assert loaded.boxes == result.boxes
    assert result.plot_word(1, examples[0].image).get_title().endswith(f"{result.word[1]}”")
    assert len(result.plot().patches) == 2 * len(READING_CONDITIONS)


# -- scores by hand --


def test_score_by_hand():
    heat = torch.tensor([[1.0, 3.0], [torch.nan, 4.0]])
    covered = torch.tensor([[1.0, 0.5], [1.0, 0.25]])
    centers = torch.tensor([[True, True], [True, False]])
    assert score(heat, covered, centers) == pytest.approx(((1 + 1.5 + 1) / 8, 0.0))
    assert score(heat, covered, ~centers) == pytest.approx((3.5 / 8, 1.0))
    assert all(x != x for x in score(torch.zeros(2, 2), covered, centers))


@pytest.fixture
def by_hand(llava_vlm, monkeypatch):
    """Answers whose heats are known: on 4 x 4 patches, each word's heat is on one row of them."""
    from mechvlm.experiments import word_reading as experiment

    heats = {"red": 0, "circle": 1, "cat": 3, "a": 2, "and": 3, "sand": 2}

    def known(vlm, inputs, layers, first):
        readings = original(vlm, inputs, layers, first)
        for reading in readings:
            for number, word in enumerate(reading.words):
                heat = torch.zeros(4, 4)
                heat[heats[word.text]] = torch.tensor([1.0, 2.0, 4.0, 1.0])
                reading.words[number] = word._replace(heat=heat)
        return readings

    original = experiment._read_batch
    monkeypatch.setattr(experiment, "_read_batch", known)
    images = [noise_image(0, (56, 56)), noise_image(1, (112, 112))]
    inputs = llava_vlm.inputs(images, ["what is this", "a"])
    boxes = [
        {"circles": (28, 14, 56, 28), "Red": [(28, 14, 56, 28)], "cat": (0, 42, 28, 56)},
        {"sand": (0, 0, 112, 14)},
    ]
    return mv.word_reading(llava_vlm, inputs, ["a red circle and a cat", "red sand"], boxes=boxes)


def test_every_condition_by_hand(by_hand):
    inside, hit = (
        {
            word: dict(zip(READING_CONDITIONS, row.tolist(), strict=True))
            for word, row in zip(by_hand.word, values, strict=True)
        }
        for values in (by_hand.inside, by_hand.hit)
    )
    assert by_hand.word == ("red", "circle", "cat", "red", "sand")
    # "circle" has its heat 1, 2, 4, 1 on row 1, and its box on the last two patches of that row.
    assert inside["circle"]["word"] == pytest.approx(5 / 8)
    assert hit["circle"]["word"] == 1
    # The other image's box is its upper eighth: half of row 0 here, where "circle" has no heat.
    assert inside["circle"]["other image"] == 0
    # "cat" has another box and its heat on row 3; "red" has the same box, so it is no control.
    assert inside["circle"]["other objects"] == 0
    assert inside["cat"]["other objects"] == 0
    assert inside["cat"]["word"] == pytest.approx(3 / 8)
    assert hit["cat"]["word"] == 0
    # "a" (row 2, twice) and "and" (row 3): of three heats one is on the cat's row.
    assert inside["cat"]["words of grammar"] == pytest.approx((3 / 8) / 3)
    assert inside["circle"]["even"] == pytest.approx(2 / 16)
    assert hit["cat"]["even"] == pytest.approx(2 / 16)
    # "sand" reads row 2 of its image. The boxes of the other image: the circle's and red's (row 1)
    # and the cat's (row 3).
    assert inside["sand"]["other image"] == 0
    assert inside["sand"]["word"] == 0
    assert inside["sand"]["other objects"] != inside["sand"]["other objects"], "no other object: NaN"
    assert inside["sand"]["words of grammar"] != inside["sand"]["words of grammar"]
    first = by_hand.inside[:3].nanmean(0)
    torch.testing.assert_close(by_hand.by_example[0, 0], first, equal_nan=True)
    for got, want in zip(by_hand.interval, mean_interval(by_hand.by_example), strict=True):
        torch.testing.assert_close(got, want, equal_nan=True)
    summary = by_hand.summary.set_index(["score", "condition"])
    assert summary.loc[("inside", "word"), "n"] == 2
    assert summary.loc[("inside", "other objects"), "n"] == 1
    assert summary.loc[("hit", "word"), "mean"] == pytest.approx((1 / 3 + 0) / 2)


def test_the_other_images_boxes_lie_at_the_same_place(llava_vlm):
    """An even heat has as much in the other image's box as the box takes of the other image."""
    images = [noise_image(0, (56, 56)), noise_image(1, (112, 112))]
    inputs = llava_vlm.inputs(images, ["a", "a"])
    boxes = [{"red": (0, 0, 28, 56)}, {"red": (0, 0, 112, 28)}]
    result = mv.word_reading(llava_vlm, inputs, "red", boxes=boxes)
    other = READING_CONDITIONS.index("other image")
    for number, rows in enumerate((slice(0, 1), slice(None))):
        cols = (slice(None), slice(0, 2))[number]
        heat = result.map(number)
        assert float(result.inside[number, other]) == pytest.approx(float(heat[rows, cols].sum() / heat.sum()))


def test_pairing_is_a_derangement():
    for n in range(2, 9):
        for seed in range(5):
            order = paired(n, seed)
            assert sorted(order) == list(range(n))
            assert all(a != b for a, b in enumerate(order))
    assert paired(8, 0) == paired(8, 0) != paired(8, 1)


# -- queries, NDIF, refusals --


def test_queries_spread_their_norms_by_where_they_read(blip_vlm):
    inputs = blip_vlm.inputs([noise_image(0), noise_image(1)], ["what is this", "a"])
    result = mv.word_reading(blip_vlm, inputs, ["a red circle", "red"])
    answered = inputs.answered(["a red circle", "red"])
    norms, reading = mv.read(blip_vlm, answered, mv.NormAttention(dst="wrote:red"), mv.QueryReading())
    for number, example in ((0, 0), (2, 1)):
        norm = norms.norm[:, example].mean(1)[:, answered.token_maps[example].image].mean(0)
        wanted = (norm[:, None, None] * reading.map[example]).sum(0)
        torch.testing.assert_close(result.map(number), wanted, rtol=1e-4, atol=1e-6)


def test_on_ndif_the_heats_are_the_same(llava_vlm, inputs, reading):
    there = mv.load(llava_vlm.hf, llava_vlm.processor, remote="local")
    far = mv.word_reading(there, there.inputs([noise_image(0)], ["what is this"]), TEXTS[0])
    torch.testing.assert_close(far.heat, reading.heat[:4], rtol=1e-4, atol=1e-6)


def test_what_does_not_fit_is_refused(llava_vlm, inputs, reading):
    single = inputs[0]
    for arguments, message in (
        ({"answers": ["a", "b"]}, "2 answers were given for 1 examples"),
        ({"answers": "of the"}, "the 1 answers hold words of grammar alone"),
        ({"answers": "red", "words": "blue"}, "hold none of the words blue"),
        ({"answers": "red", "boxes": [{}, {}]}, "2 dicts of boxes were given for 1 examples"),
        ({"answers": "red", "boxes": [{"a cat": (0, 0, 9, 9)}]}, "give a box for a single word"),
        ({"answers": "red", "boxes": [{"red": (9, 0, 0, 9)}]}, "a box is .left, top, right, bottom."),
        ({"answers": "red", "boxes": [{"red": (900, 0, 990, 9)}]}, "is not on the image as the model sees it"),
    ):
        with pytest.raises(mv.InputError, match=message):
            mv.word_reading(llava_vlm, single, **arguments)
    with pytest.raises(IndexError, match=r"layers .7. were asked for"):
        mv.word_reading(llava_vlm, single, "red", layers=7)
    with pytest.raises(mv.InputError, match="holds 2 images"):
        mv.word_reading(llava_vlm, llava_vlm.inputs([[noise_image(0), noise_image(1)]], ["a"]), "red")
    with pytest.raises(mv.InputError, match="Give word_reading all batches at once"):
        mv.concat([reading, reading])
    with pytest.raises(TypeError, match="No word of this result has a box"):
        reading.plot()
    with pytest.raises(mv.InputError, match="knows no objects"):
        word_boxes(replace(next(scenes(1)), meta={}))


def test_a_grid_smaller_than_anothers_is_padded_with_nan():
    heats = [torch.ones(2, 3), torch.ones(3, 2)]
    assert _padded(heats).isnan().sum((1, 2)).tolist() == [3, 3]
