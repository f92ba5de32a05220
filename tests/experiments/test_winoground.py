"""Winoground: scores by hand, likelihoods against Hugging Face's forward, and every measure."""

import pytest
import torch

import mechvlm as mv
from helpers.images import noise_image
from mechvlm.datasets import Pair, load_dataset, pairs_of
from mechvlm.datasets.swaps import attribute_swaps, relation_swaps
from mechvlm.experiments.winoground_result import CHANCE, pair_scores
from mechvlm.measures.words import precision_recall

CAPTIONS = ("a red circle left of a blue square", "a blue square .", "this")


# -- the formula -----------------------------------------------------------------------------------

# [[s(C0, I0), s(C0, I1)], [s(C1, I0), s(C1, I1)]], and which of text, image and group are right.
BY_HAND = [
    ([[2, 1], [1, 2]], (True, True, True)),
    ([[5, 6], [1, 7]], (True, False, False)),  # C0 is likelier for the other image
    ([[5, 1], [6, 7]], (False, True, False)),  # the other caption is likelier for I0
    ([[1, 2], [2, 1]], (False, False, False)),
    ([[1, 1], [1, 1]], (False, False, False)),  # equal values are wrong
    ([[2, 2], [1, 3]], (True, False, False)),
    ([[2, 1], [1, 1]], (False, False, False)),  # one equality of two is enough
]


def test_scores_by_hand():
    scores = pair_scores(torch.tensor([s for s, _ in BY_HAND]).float())
    assert list(zip(*(part.tolist() for part in scores), strict=True)) == [right for _, right in BY_HAND]
    frame = scores.to_frame().set_index("score")
    assert frame["percent"].to_dict() == pytest.approx({"text": 300 / 7, "image": 200 / 7, "group": 100 / 7})
    assert (frame["low"] <= frame["percent"]).all()
    assert (frame["high"] >= frame["percent"]).all()
    assert frame["n"].tolist() == [7, 7, 7]


def test_random_values_give_chance():
    s = torch.rand(200_000, 2, 2, generator=torch.Generator().manual_seed(0))
    percent = {name: 100 * part.float().mean().item() for name, part in pair_scores(s)._asdict().items()}
    assert percent == pytest.approx(CHANCE, abs=0.4)
    assert pytest.approx({"text": 25, "image": 25, "group": 16.7}, abs=0.05) == CHANCE


def test_values_without_a_score_are_refused():
    with pytest.raises(ValueError, match=r"not \[3, 2, 3\]"):
        pair_scores(torch.zeros(3, 2, 3))
    with pytest.raises(ValueError, match=r"NaN in pairs \[1\]"):
        pair_scores(torch.tensor([[[0.0, 0], [0, 0]], [[0, torch.nan], [0, 0]]]))


# -- likelihoods -----------------------------------------------------------------------------------


def naive(vlm, image, caption: str, prompt: str) -> float:
    """One caption's log-likelihood by Hugging Face's own forward: all logits, token by token."""
    inputs = vlm.inputs(image, prompt)
    text = inputs.texts[0]
    gap = "" if text.endswith("\n") else " "
    n = len(vlm.tokenizer(text).input_ids)
    caption_ids = vlm.tokenizer(text + gap + caption).input_ids[n:]
    assert vlm.tokenizer.decode(caption_ids) == caption
    encoding = dict(inputs.encoding)
    start = encoding["input_ids"].shape[1]
    encoding["input_ids"] = torch.cat([encoding["input_ids"], torch.tensor([caption_ids])], 1)
    encoding["attention_mask"] = torch.ones_like(encoding["input_ids"])
    with torch.no_grad():
        logits = vlm.hf(**encoding).logits[0]
    return sum(logits[start + i - 1].double().log_softmax(-1)[t].item() for i, t in enumerate(caption_ids))


def test_likelihoods_equal_one_hugging_face_forward_each(vlm):
    images = [noise_image(i) for i in range(3)]
    prompt = "what is this"
    expected = [naive(vlm, image, caption, prompt) for image, caption in zip(images, CAPTIONS, strict=True)]
    for batch_size in (1, 2, 3):  # captions of different lengths: padded
        got = mv.caption_logprob(vlm, images, CAPTIONS, prompt, batch_size)
        torch.testing.assert_close(got, torch.tensor(expected), atol=1e-4, rtol=1e-5)
    assert len({round(value) for value in expected}) == 3


def test_scores_do_not_know_which_side_is_first():
    """Exchanging both captions and both images changes no score; captions for images, the two."""
    s = torch.randn(200, 2, 2, generator=torch.Generator().manual_seed(0))
    scores = mv.pair_scores(s)
    assert 0 < scores.group.sum() < scores.text.sum() != scores.image.sum()
    for ours, turned in zip(scores, mv.pair_scores(s.flip(1, 2)), strict=True):
        assert torch.equal(ours, turned)
    mirrored = mv.pair_scores(s.mT)
    assert torch.equal(mirrored.text, scores.image)
    assert torch.equal(mirrored.image, scores.text)
    # With the captions alone exchanged, each is false: no pair is right both ways.
    assert not (mv.pair_scores(s.flip(1)).group & scores.group).any()


def test_prompts_of_different_lengths_and_their_token_maps(vlm, batch):
    captioned, n_tokens = vlm.answered(batch, CAPTIONS)
    alone = [vlm.answered(batch[i], CAPTIONS[i : i + 1])[0] for i in range(3)]
    lengths = [len(inputs.tokens) for inputs in alone]
    assert len(set(lengths)) > 1
    for row, (tokens, n) in enumerate(zip(captioned.token_maps, n_tokens, strict=True)):
        assert len(tokens.all) == lengths[row]
        assert tokens.strings[-lengths[row] :] == alone[row].tokens.strings
        assert torch.equal(captioned.encoding["attention_mask"][row].bool(), tokens.modality != mv.Modality.PADDING)
        assert vlm.tokenizer.decode(tokens.ids[-n:]) == CAPTIONS[row]
        assert tokens.last == len(tokens) - 1
        assert torch.equal(tokens.ids[tokens.image], alone[row].tokens.ids[alone[row].tokens.image])
        assert {"qformer_input_ids"} & set(captioned.encoding) == {"qformer_input_ids"} & set(batch.encoding)
    together = mv.read(vlm, captioned, mv.Likelihood(n_tokens))[0].total
    each = [mv.read(vlm, alone[i], mv.Likelihood(n_tokens[i : i + 1]))[0].total for i in range(3)]
    torch.testing.assert_close(together, torch.cat(each), atol=1e-4, rtol=1e-5)


def test_only_the_captions_positions_are_unembedded(llava_vlm):
    lengths = []
    hook = llava_vlm.hf.lm_head.register_forward_hook(lambda m, args, out: lengths.append(out.shape[1]))
    try:
        mv.caption_logprob(llava_vlm, [noise_image(0)] * 2, CAPTIONS[:2], "what is this")
    finally:
        hook.remove()
    n = [len(llava_vlm.tokenizer(f"a: {c}").input_ids) - len(llava_vlm.tokenizer("a:").input_ids) for c in CAPTIONS[:2]]
    assert sorted(lengths) == [1, max(n)]  # the model's own last position, and the captions'


@pytest.mark.parametrize(
    ("images", "captions", "message"),
    [(2, ("a",), "2 images and 1 captions"), (1, (" ",), "a word or a token id, not ' '"), (0, (), "0 images"),
     (1, ("word " * 3000,), "leaves no room"), (1, ("see <image>",), "holds the image token")],
)  # fmt: skip
def test_bad_captions_are_refused(llava_vlm, images, captions, message):
    with pytest.raises(mv.InputError, match=message):
        mv.caption_logprob(llava_vlm, [noise_image(0)] * images, captions)


def test_likelihood_asks_for_fitting_numbers(llava_vlm):
    inputs = llava_vlm.inputs(noise_image(0), "a")
    for n, message in [((1, 2), "2 numbers for 1 examples"), ((0,), "0 tokens"), ((999,), "999 tokens")]:
        with pytest.raises(ValueError, match=message):
            mv.read(llava_vlm, inputs, mv.Likelihood(n))


# -- pairs -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pairs() -> list[Pair]:
    captions = [("a dog on a mat", "a mat on a dog"), ("some grass", "this grass"), ("a b c", "c b a d")]
    return [Pair(f"p{i}", (noise_image(2 * i), noise_image(2 * i + 1)), c) for i, c in enumerate(captions)]


@pytest.fixture(scope="module")
def result(vlm, pairs):
    return mv.winoground(vlm, pairs, "what is this", batch_size=8)


def test_every_measure_equals_its_own_reading(vlm, pairs, result):
    combinations = [(pair, c, i) for pair in enumerate(pairs) for c in (0, 1) for i in (0, 1)]
    for (p, pair), caption, image in combinations:
        text, picture = pair.captions[caption], pair.images[image]
        values = dict(zip(result.measures, result.values[:, :, p, caption, image], strict=True))
        inputs, (n,) = vlm.answered(vlm.inputs(picture, "what is this"), [text])
        tokens = inputs.tokens
        assert values["log-likelihood"][-1].item() == pytest.approx(naive(vlm, picture, text, "what is this"), abs=1e-3)
        pieces = mv.logit_lens(vlm, inputs, k=1).pieces()
        norm = mv.norm_attention(vlm, inputs, dst="last").norm[:, 0, 0]
        _, cache = vlm.run_with_cache(inputs)
        for layer in range(vlm.n_layers + 1):
            expected = precision_recall(pieces[layer], text)
            for measure in ("precision", "recall"):
                assert values[measure][layer].item() == pytest.approx(getattr(expected, measure), nan_ok=True)
            name = f"blocks.{layer}.hook_resid_pre" if layer < vlm.n_layers else f"blocks.{layer - 1}.hook_resid_post"
            state = torch.nn.functional.normalize(cache[name][0].float(), dim=-1)
            cosine = (state[tokens.image] @ state[-n:].T).mean()
            assert values["contextualization"][layer].item() == pytest.approx(cosine.item(), abs=1e-5)
            if layer < vlm.n_layers:
                assert values["norm attention"][layer].item() == pytest.approx(
                    norm[layer, tokens.image].sum().item(), 1e-4
                )


def test_batches_change_nothing(vlm, pairs, result):
    again = mv.winoground(vlm, pairs, "what is this", batch_size=1)
    torch.testing.assert_close(again.values, result.values, atol=1e-4, rtol=1e-4, equal_nan=True)


def test_the_table_and_the_file(result, tmp_path):
    frame = result.to_frame()
    assert list(frame) == ["pair", "image", "measure", "layer", "condition", "value"]
    n_layers = result.values.shape[1] - 1
    counts = frame.groupby("measure").size().to_dict()
    per_layer = 3 * 2 * 2  # pairs, images, conditions
    all_layers = dict.fromkeys(("precision", "recall", "contextualization"), per_layer * (n_layers + 1))
    assert counts == {**all_layers, "norm attention": per_layer * n_layers, "log-likelihood": per_layer}
    rows = frame[(frame["pair"] == "p1") & (frame["measure"] == "log-likelihood")]
    logprob = rows.set_index(["image", "condition"])["value"]
    for image in (0, 1):
        assert logprob[image, "matched"] == pytest.approx(result.logprob[1, image, image].item())
        assert logprob[image, "mismatched"] == pytest.approx(result.logprob[1, 1 - image, image].item())
    result.save(tmp_path / "w.safetensors")
    loaded = mv.WinogroundResult.load(tmp_path / "w.safetensors")
    assert loaded.pairs == result.pairs
    assert torch.equal(loaded.values.nan_to_num(9), result.values.nan_to_num(9))
    row = result.measures.index("log-likelihood")
    by_pair = [(result.logprob[p].trace() - result.logprob[p].flip(0).trace()).item() / 2 for p in range(3)]
    assert result.difference.mean[row, -1].item() == pytest.approx(sum(by_pair) / 3, abs=1e-4)


def test_a_pair_that_cannot_be_read_is_set_aside(llava_vlm, pairs, tmp_path):
    bad = Pair("bad", (noise_image(0), tmp_path / "gone.png"), ("a", "b"))
    result = mv.winoground(llava_vlm, [pairs[0], bad, pairs[1]], "what", batch_size=12)
    assert result.pairs == ("p0", "p1")
    assert [(name, "there is no such file" in reason) for name, reason in result.set_aside] == [("bad", True)]
    with pytest.raises(
        mv.InputError, match=r"None of the 1 pairs could be read. The first, bad: Example 1: No image at"
    ):
        mv.winoground(llava_vlm, [bad])
    with pytest.raises(mv.InputError, match="There is no pair"):
        mv.winoground(llava_vlm, [])


def test_from_winogrounds_files(llava_vlm, tmp_path):
    from helpers.datasets import winoground, write_winoground

    data = load_dataset(f"winoground:{write_winoground(tmp_path / 'w', winoground(3))}")
    result = mv.winoground(llava_vlm, pairs_of(data.examples))
    assert sorted(result.pairs) == ["0", "1", "2"]
    assert len(result.scores.to_frame()) == 3


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "swaps", "prompt", "low", "high"),
    [
        ("tiny-llava", attribute_swaps, "Describe the scene.", 95, 100),
        ("tiny-llava", relation_swaps, "Where are the objects?", 85, 100),
        ("tiny-instructblip", relation_swaps, "Where are the objects?", 0, 25),
    ],
)
def test_the_bundled_models_score_as_their_cards_say(name, swaps, prompt, low, high):
    """The cards say 100, 95.5 and 7.0 % on 200 pairs, with the end of the sentence counted."""
    vlm = mv.load(name)
    pairs = [Pair(p.id, p.images(), p.captions) for p in swaps(40, 100)]
    result = mv.winoground(vlm, pairs, prompt, batch_size=32)
    percent = result.scores.to_frame().set_index("score")["percent"]
    assert low <= percent["group"] <= high
    if name == "tiny-llava":
        # The same words, read off tokens that see no text.
        matched, mismatched = (result.by_condition[i, result.measures.index("precision")] for i in (0, 1))
        torch.testing.assert_close(matched, mismatched, equal_nan=True)


def test_the_picture(result, tmp_path):
    import matplotlib.pyplot as plt

    scores = result.scores.to_frame()
    ax = result.plot()
    assert [bar.get_height() for bar in ax.patches] == pytest.approx(scores["percent"].tolist())
    assert "n = 3 pairs" in ax.get_title()
    panels = {panel.get_title(): panel for panel in ax.figure.axes if panel is not ax}
    assert len(panels) == 4
    line = panels["cosine of image and caption"].get_lines()[-1]
    matched, mismatched = result.by_condition[:, result.measures.index("contextualization")].mean((-1, -2))
    assert line.get_ydata() == pytest.approx((matched - mismatched).numpy(), abs=1e-6)
    ax.figure.savefig(tmp_path / "w.png")
    plt.close(ax.figure)
    figure, own_axes = plt.subplots()
    assert result.plot(own_axes) is own_axes
    assert figure.axes == [own_axes]
    plt.close(figure)
