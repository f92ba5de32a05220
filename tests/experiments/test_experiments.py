"""Experiments against one whole forward per intervention, and against facts known by construction.

Also their errors.
"""

from dataclasses import replace

import nnsight
import pytest
import torch
from PIL import Image

import mechvlm as mv
from helpers.images import noise_image
from helpers.models import llava
from mechvlm.experiments.cases import Examples
from mechvlm.experiments.information_flow import FLOWS
from mechvlm.experiments.sweep import Edit, run, sweep

ANSWERS = ["this", "scene", 1234]


def p_of(vlm, inputs, token, change):
    """The token's probability in a whole forward of one example alone, with interventions."""
    with torch.no_grad(), vlm.trace(inputs):
        change()
        logits = nnsight.save(vlm.logits)
    return float(logits[0, -1].float().softmax(-1)[token])


def tokens_of(vlm, inputs):
    return [int(vlm.answer_tokens(inputs[i], a)) for i, a in enumerate(ANSWERS)]


def close(got, want):
    # Probabilities of a random model over 32064 words are around 3e-5: compared to five digits.
    torch.testing.assert_close(got, torch.as_tensor(want, dtype=got.dtype), rtol=2e-5, atol=1e-12)


# -- information flow ------------------------------------------------------------------------------


@pytest.mark.long
def test_information_flow_equals_a_whole_forward_per_window(deep, three):
    flows = (*FLOWS, "image -> question + last")
    result = mv.information_flow(deep, three, ANSWERS, window=2, flows=flows)
    for i, token in enumerate(tokens_of(deep, three)):
        example, t = three[i], three[i].tokens
        after = [p for p in t.question.tolist() if p > t.last_image]
        edges = [
            (t.image, after),
            (t.image, t.last),
            (t.question, t.last),
            (t.last, t.last),
            (t.image, [*after, t.last]),
        ]
        close(result.p[i], p_of(deep, example, token, lambda: None))
        for f, (src, dst) in enumerate(edges):
            for layer, (start, stop) in enumerate(result.windows):

                def change(src=src, dst=dst, start=start, stop=stop):
                    mv.knock_out(deep, src, dst, range(start, stop))

                close(result.p_knocked[f, layer, i], p_of(deep, example, token, change))
    torch.testing.assert_close(result.change, 100 * (result.p_knocked / result.p - 1), rtol=1e-3, atol=1e-3)
    assert result.windows == ((0, 2), (1, 3), (2, 4), (3, 5), (4, 5))
    assert result.answers[:2] == (" this", " scene")
    frame = result.to_frame()
    row = frame[(frame.flow == "image -> last") & (frame.layer == 3) & (frame.example == 2)].iloc[0]
    assert row.p_knocked == pytest.approx(float(result.p_knocked[1, 3, 2]))
    assert row.p == pytest.approx(float(result.p[2]))
    assert row.change == pytest.approx(float(result.change[1, 3, 2]))


def test_the_default_answer_is_the_models_own(deep, three):
    result = mv.information_flow(deep, [three[0], three[2]], window=9, flows=["image -> last"])
    with torch.no_grad():
        for i, row in enumerate((0, 2)):
            logits = deep.hf(**deep.encoding(three[row])).logits[0, -1]
            assert result.answers[i] == deep.to_str_tokens(logits.argmax()[None])[0]
            close(result.p[i], float(logits.softmax(-1).max()))


def test_without_the_image_all_images_answer_alike(deep):
    """By construction: only the text's prior is left."""
    images = [noise_image(i) for i in range(3)]
    inputs = deep.inputs(images, "what is this")
    # Every word stands after the image, or reads nothing of it; the queries read words, but in the
    # Q-Former alone.
    result = mv.information_flow(deep, inputs, "this", window=99, flows=["image -> question + last"])
    assert result.p.std() / result.p.mean() > 1e-3
    close(result.p_knocked[0, :, 1:], result.p_knocked[0, :, :1].expand(-1, 2))


# -- causal trace ----------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize("at", ["resid_pre", "attn_out", "mlp_out"])
def test_a_causal_trace_equals_a_whole_forward_per_window(deep, three, at):
    result = mv.causal_trace(deep, three, ANSWERS, corrupt="noise", window=2, at=at, seed=3)
    for i, token in enumerate(tokens_of(deep, three)):
        example, t = three[i], three[i].tokens
        clean = run(deep, example, keep=at)
        old = clean.resid[0][:, t.image]
        noise = torch.randn(old.shape, generator=torch.Generator().manual_seed(3 + i))
        noisy = old + 3 * old.std() * noise
        close(
            result.p_corrupt[i],
            p_of(deep, example, token, lambda v=noisy, t=t: mv.patch(deep, v, t.image, 0, "resid_pre")),
        )
        for g, pos in enumerate((t.image, t.question, t.last)):
            for w, (start, stop) in enumerate(result.windows):

                def change(t=t, pos=pos, noisy=noisy, clean=clean, start=start, stop=stop):
                    mv.patch(deep, noisy, t.image, 0, at="resid_pre")
                    for layer in range(start, stop):
                        mv.patch(deep, clean.kept[layer], pos, layer, at=at)

                close(result.p_restored[w, g, i], p_of(deep, example, token, change))
    assert result.layers == tuple(range(5))
    close(result.total_effect, result.p - result.p_corrupt)


@pytest.mark.parametrize("corrupt", ["noise", "image", "blank", "words"])
def test_a_trace_brings_back_what_it_must(deep, three, corrupt):
    result = mv.causal_trace(
        deep, three, ANSWERS, corrupt=corrupt, groups=("image", "question", "last", "image + question + last")
    )
    assert not torch.allclose(result.p_corrupt, result.p, rtol=1e-3)
    # All positions of a layer bring everything back, whatever the layer.
    close(result.p_restored[:, 3], result.p.expand(5, -1))
    first = result.p_restored[0]
    if corrupt == "words":
        close(first[1], result.p)
        close(first[0], result.p_corrupt)
    else:
        close(first[0], result.p)
        close(first[1:3], result.p_corrupt.expand(2, -1))


def test_the_corrupted_images_are_the_right_ones(deep, three):
    def p(image, i):
        alone = deep.inputs(image, three.prompts[i])
        return p_of(deep, alone, tokens_of(deep, three)[i], lambda: None)

    blank = mv.causal_trace(deep, three, ANSWERS, corrupt="blank", groups=["last"])
    close(blank.p_corrupt, [p(Image.new("RGB", (80, 60), (127, 127, 127)), i) for i in range(3)])
    other = mv.causal_trace(deep, three, ANSWERS, corrupt="image", groups=["last"])
    close(other.p_corrupt, [p(noise_image((i + 1) % 3), i) for i in range(3)])


def test_a_corruption_that_changes_nothing_is_refused(llava_vlm):
    """corrupt="image" takes the next example with a different image, past those with the same."""
    images = [noise_image(0), noise_image(0), noise_image(1)]
    inputs = llava_vlm.inputs(images, ["what is this", "is this a scene", "what is this"])
    answers = ["this", "this", "is"]
    result = mv.causal_trace(llava_vlm, inputs, answers, corrupt="image", groups=["last"])
    for i, other in enumerate((1, 1, 0)):
        alone = llava_vlm.inputs(noise_image(other), inputs.prompts[i])
        token = int(llava_vlm.answer_tokens(alone, answers[i]))
        close(result.p_corrupt[i], p_of(llava_vlm, alone, token, lambda: None))
    with pytest.raises(mv.InputError, match="and there is none: give at least two examples, of different images"):
        mv.causal_trace(llava_vlm, [inputs[0], inputs[1]], "this", corrupt="image")
    grey = llava_vlm.inputs(Image.new("RGB", (80, 60), (127, 127, 127)), "what is this")
    with pytest.raises(mv.InputError, match="corrupt='blank' changes nothing in example 0"):
        mv.causal_trace(llava_vlm, grey, "this", corrupt="blank")
    pair = llava_vlm.inputs([images[2], [images[0], images[2]]], "what is this")
    with pytest.raises(mv.InputError, match=r"Example 0 .* Give examples with the same number of images, of one size"):
        mv.causal_trace(llava_vlm, pair, ["this", "is"], corrupt="image")


def test_another_image_has_another_answer(llava_vlm):
    """An image with the same answer would leave the answer likely, and so corrupt nothing."""
    inputs = llava_vlm.inputs([noise_image(i) for i in range(3)], "what is this")
    result = mv.causal_trace(llava_vlm, inputs, ["red", "red", "cat"], corrupt="image", groups=["last"])
    for i, (other, answer) in enumerate([(2, "red"), (2, "red"), (0, "cat")]):
        alone = llava_vlm.inputs(noise_image(other), "what is this")
        token = int(llava_vlm.answer_tokens(alone, answer))
        close(result.p_corrupt[i], p_of(llava_vlm, alone, token, lambda: None))
    with pytest.raises(mv.InputError, match="all 2 others have the answer of example 0: give examples with different"):
        mv.causal_trace(llava_vlm, inputs, "red", corrupt="image")


def test_groups_of_each_example(deep, three):
    """By number, as positions of the example alone, without padding."""
    own = [{"first": three[i].tokens.image[:1], "word": three[i].tokens.pos_of("this")} for i in range(3)]
    result = mv.causal_trace(deep, three, ANSWERS, groups=own)
    assert result.groups == ("first", "word")
    by_name = mv.causal_trace(deep, three, ANSWERS, groups=["last"])
    close(result.p, by_name.p)
    close(result.p_corrupt, by_name.p_corrupt)
    close(result.p_restored[0, 1], result.p_corrupt)  # the words were not corrupted


# -- object ablation -------------------------------------------------------------------------------


def test_object_ablation_equals_whole_forwards(deep, three):
    boxes = [(5, 5, 30, 25), (40, 20, 70, 55), (10, 10, 12, 12)]
    result = mv.object_ablation(deep, three, boxes, ANSWERS, margins=(0, 1), draws=2)
    states = []
    for i in range(3):
        clean = run(deep, three[i])
        states.append(clean.resid[0][0, three[i].tokens.image])
    mean = torch.cat(states).mean(0)
    for i, token in enumerate(tokens_of(deep, three)):
        example, t = three[i], three[i].tokens
        if t.patches:
            patches = t.grids[0].covered(boxes[i]) >= min(0.5, float(t.grids[0].covered(boxes[i]).max()))
            own = t.image[patches.flatten()]
            assert int(result.n_tokens[0, i]) == len(own)
        else:
            share = mv.query_reading(deep, example).map[0] * (t.grids[0].covered(boxes[i]) >= 0.5)
            own = t.image[share.sum((1, 2)).argmax()][None]
            if i == 2:
                continue  # half a patch
        change = lambda own=own: mv.patch(deep, mean.expand(1, len(own), -1), own, 0, at="resid_pre")  # noqa: E731
        close(result.p_ablated[0, 0, i], p_of(deep, example, token, change))
        outside = torch.tensor([p for p in t.image.tolist() if p not in own.tolist()])
        norms = states[i].norm(dim=-1)[torch.isin(t.image, outside)]
        highest = outside[norms.argsort(descending=True)[: len(own)]]
        change = lambda own=highest: mv.patch(deep, mean.expand(1, len(own), -1), own, 0, at="resid_pre")  # noqa: E731
        close(result.p_ablated[2, 0, i], p_of(deep, example, token, change))
    again = mv.object_ablation(deep, three, boxes, ANSWERS, margins=(0, 1), draws=2)
    assert torch.equal(again.p_ablated.nan_to_num(-1), result.p_ablated.nan_to_num(-1))
    other = mv.object_ablation(deep, three, boxes, ANSWERS, margins=(0, 1), draws=2, seed=9)
    assert not torch.equal(other.p_ablated[1].nan_to_num(-1), result.p_ablated[1].nan_to_num(-1))


def test_an_object_larger_than_the_rest_has_no_controls(llava_vlm):
    inputs = llava_vlm.inputs(noise_image(0, (56, 56)), "what is this")
    result = mv.object_ablation(llava_vlm, inputs, [(0, 0, 56, 42)], "this", margins=(0,))
    assert result.n_tokens.tolist() == [[12]]  # of 16
    assert torch.isnan(result.p_ablated[1:]).all()
    assert not torch.isnan(result.p_ablated[0]).any()


def test_the_words_alone_are_corrupted(deep, three):
    """Noise on the text before the last position: not on control tokens, not on the image."""
    example, t = three[1], three[1].tokens
    result = mv.causal_trace(deep, example, "scene", corrupt="words", groups=["last"], seed=2)
    words = [p for p in t.text.tolist() if p != t.last]
    assert set(words).isdisjoint(t.special.tolist())
    state = run(deep, example).resid[0]
    old = state[:, words]
    noisy = old + 3 * old.std() * torch.randn(old.shape, generator=torch.Generator().manual_seed(2))
    token = int(deep.answer_tokens(example, "scene"))
    close(result.p_corrupt[0], p_of(deep, example, token, lambda: mv.patch(deep, noisy, words, 0, "resid_pre")))


def test_probabilities_are_float32_in_any_model():
    model, processor = llava.__wrapped__()
    vlm = mv.load(model.to(torch.bfloat16), processor)
    inputs = vlm.inputs(noise_image(0), "what is this")
    clean = run(vlm, inputs)
    swept = sweep(vlm, clean, [Edit((), range(0, 1), inputs.tokens.last)], lambda layer, rows: None)
    assert clean.logits.dtype == swept[()].dtype == torch.float32
    result = mv.information_flow(vlm, inputs, 7, window=1, flows=["image -> last"])
    want = p_of(vlm, inputs, 7, lambda: mv.knock_out(vlm, inputs.tokens.image, inputs.tokens.last, 1))
    assert float(result.p_knocked[0, 1, 0]) == pytest.approx(want, rel=2e-2)


# -- results and refusals --------------------------------------------------------------------------


def test_results_are_saved_and_loaded(deep, three, tmp_path):
    for result in (
        mv.information_flow(deep, three[0], window=1),
        mv.causal_trace(deep, three[0]),
        mv.object_ablation(deep, three[0], [(5, 5, 30, 25)], "this"),
    ):
        result.save(tmp_path / "r.safetensors")
        loaded = type(result).load(tmp_path / "r.safetensors")
        assert loaded.to_frame().equals(result.to_frame())
        assert loaded.units == result.units
        measured = next(getattr(loaded, name) for name in ("change", "effect", "drop") if hasattr(loaded, name))
        assert torch.equal(loaded.interval.mean.nan_to_num(9), measured[..., 0].nan_to_num(9))
        assert len(repr(loaded)) < 600


def test_results_have_intervals_over_their_examples(deep, three):
    flow = mv.information_flow(deep, three, ANSWERS, window=1)
    trace = mv.causal_trace(deep, three, ANSWERS)
    ablation = mv.object_ablation(deep, three, [(5, 5, 30, 25)] * 3, ANSWERS, margins=(0, 1))
    for result, values in ((flow, flow.change), (trace, trace.effect), (ablation, ablation.drop)):
        torch.testing.assert_close(result.interval.mean, values.nanmean(-1), equal_nan=True)
        assert result.interval.low.shape == values.shape[:-1]
        assert (result.interval.low <= result.interval.mean + 1e-4).all()
    impossible = replace(flow, p=flow.p * 0)
    assert torch.isnan(impossible.change).all()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda v, x: mv.information_flow(v, x, ["a", "b"]), mv.InputError, "2 answers were given for 3 examples"),
        (lambda v, x: mv.information_flow(v, [], "a"), mv.InputError, "not an empty list"),
        (lambda v, x: Examples(v, ["x"], "a"), mv.InputError, r"not str"),
        (lambda v, x: mv.information_flow(v, x, flows=["image"]), ValueError, "A flow reads 'source -> destination'"),
        (lambda v, x: mv.information_flow(v, x, flows=[]), ValueError, "A flow reads"),
        (lambda v, x: mv.information_flow(v, x, flows=["image -> sky"]), ValueError, "no positions called 'sky'"),
        (
            lambda v, x: mv.information_flow(v, x, flows=["last -> image"]),
            mv.InputError,
            "Example 0 has no flow 'last -> image'",
        ),
        (lambda v, x: mv.information_flow(v, x, window=0), ValueError, "A window of 0 layers"),
        (
            lambda v, x: mv.causal_trace(v, x, corrupt="rain"),
            ValueError,
            "no corruption 'rain'. Known: noise, image, blank, words",
        ),
        (lambda v, x: mv.causal_trace(v, x, at="z"), ValueError, "no site to restore 'z'. Known: resid_pre"),
        (lambda v, x: mv.causal_trace(v, x, groups=[]), ValueError, "No group of positions was given"),
        (lambda v, x: mv.causal_trace(v, x, groups=[{"a": [1]}]), mv.InputError, r"one mapping per example \(3\)"),
        (lambda v, x: mv.causal_trace(v, x[0], corrupt="image"), mv.InputError, "give at least two examples"),
        (
            lambda v, x: mv.object_ablation(v, x, [(0, 0, 9, 9)], "a"),
            mv.InputError,
            "1 boxes were given for 3 examples",
        ),
        (
            lambda v, x: mv.object_ablation(v, x, [(0, 0, 9)] * 3, "a"),
            mv.InputError,
            r"give \(left, top, right, bottom\)",
        ),
        (
            lambda v, x: mv.object_ablation(v, x, [(500, 0, 900, 9)] * 3, "a"),
            mv.InputError,
            "is not on the image as the model sees",
        ),
        (lambda v, x: mv.object_ablation(v, x, [(0, 0, 9, 9)] * 3, None), mv.InputError, "needs the right answers"),
        (lambda v, x: mv.object_ablation(v, x, [(0, 0, 9, 9)] * 3, "a", margins=()), ValueError, "At least one margin"),
    ],
)
def test_bad_experiments_are_refused(deep, three, call, error, message):
    with pytest.raises(error, match=message):
        call(deep, three)
