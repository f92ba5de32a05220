"""Reading an answer: against whole forwards of Hugging Face's model, token by token."""

import pytest
import torch

import mechvlm as mv
from helpers import families
from helpers.forwards import decoder_calls
from helpers.images import noise_image
from mechvlm.probes.answer_reading import AnswerReading, OnPrompt, prompts_of
from mechvlm.probes.likeliest import chances

TEXTS = ["a red circle and an unbelievable cat", "red", "this is a cat"]
MEASURES = (mv.LogitLens(k=1, positions="all"), mv.Contextualization(), mv.NormAttention())


@pytest.fixture(scope="module", params=["llava", "instructblip"])
def read(request, llava_vlm, blip_vlm):
    """A model, prompts of different lengths, the same with answers, and the reading of these."""
    vlm = {"llava": llava_vlm, "instructblip": blip_vlm}[request.param]
    inputs = vlm.inputs([noise_image(i) for i in range(3)], ["what is this", "a", "describe the scene . a"])
    answered = inputs.answered(TEXTS)
    return vlm, inputs, answered, mv.read(vlm, answered, AnswerReading())[0]


def test_shares_are_those_of_norm_attention(read):
    vlm, inputs, _, reading = read
    for row, text in enumerate(TEXTS):
        alone = inputs[row].answered(text)
        tokens = alone.tokens
        (norms,) = mv.read(vlm, alone, mv.NormAttention(dst="writing"))
        for share, values in (
            (reading.norm_share, norms.norm[:, 0]),
            (reading.weight_share, norms.weight[:, 0].mean(1)),
        ):
            n = tokens.n_answer
            wanted = values[..., tokens.image].sum(-1) / values.sum(-1)
            torch.testing.assert_close(share[:, row, :n], wanted, rtol=1e-4, atol=1e-6)
            assert share[:, row, n:].isnan().all()


def test_the_last_state_is_the_models_own_and_earlier_ones_the_lens(read):
    vlm, _, answered, reading = read
    writing = [tokens.writing for tokens in answered.token_maps]
    likelihood, lens = mv.read(vlm, answered, mv.Likelihood(), mv.LogitLens(k=vlm.d_vocab, positions=writing))
    for row, tokens in enumerate(answered.token_maps):
        n = tokens.n_answer
        own = likelihood.logprob[row, -n:].exp()
        torch.testing.assert_close(reading.probability[-1, row, :n], own, rtol=1e-3, atol=1e-6)
        points = lens.of(row)
        for number, id in enumerate(tokens.ids[tokens.answer].tolist()):
            rank = (points.ids[:, number] == id).nonzero()[:, 1]
            torch.testing.assert_close(
                reading.probability[:, row, number], points.probs[range(len(rank)), number, rank], rtol=1e-3, atol=1e-7
            )
            assert (reading.rank[:, row, number] - rank - 1).abs().max() <= 1, "up to a tie"


def test_chances_by_hand():
    unembed = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]).T
    states = torch.tensor([[2.0, 1.0], [0.0, 0.0]])  # logits 2, 1, 3 and three times 0
    probability, rank = chances(states, lambda x: x @ unembed, torch.tensor([1, 2]))
    e = torch.tensor([2.0, 1.0, 3.0]).exp()
    assert probability.tolist() == pytest.approx([float(e[1] / e.sum()), 1 / 3])
    assert rank.tolist() == [3, 1]


def test_the_prompts_measures_are_those_of_the_prompt(read):
    """One forward of prompt and answer gives what a forward of the prompt alone gives."""
    vlm, inputs, answered, _ = read
    alone = mv.read(vlm, inputs, *MEASURES)
    with decoder_calls(vlm) as calls:
        *beside, _ = mv.read(vlm, answered, *map(OnPrompt, MEASURES), AnswerReading())
    assert calls == [answered.encoding["input_ids"].shape[1]], "one forward, whatever is read"
    maps = zip(inputs.token_maps, prompts_of(answered).token_maps, strict=True)
    (lens, context, norms), (lens2, context2, norms2) = alone, beside
    torch.testing.assert_close(context2.inter, context.inter, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(context2.text, context.text, rtol=1e-4, atol=1e-6)
    assert torch.equal(lens2.ids, lens.ids)
    for row, (own, longer) in enumerate(maps):
        assert own.strings[own.last] == longer.strings[longer.last]
        assert len(own.text) == len(longer.text)
        a, b = norms.norm[:, row][..., own.all], norms2.norm[:, row][..., longer.all]
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["gemma3", pytest.param("paligemma", marks=pytest.mark.families)])
def test_prompts_whose_tokens_see_each_other_do_not_see_the_answer(name):
    vlm = mv.load(*families.build(name))
    inputs = vlm.inputs(families.picture(60, 44, seed=0), families.prompt(name, "what"))
    answered = inputs.answered("ab so")
    (context,) = mv.read(vlm, inputs, mv.Contextualization())
    (beside,) = mv.read(vlm, answered, OnPrompt(mv.Contextualization()))
    torch.testing.assert_close(beside.inter, context.inter, rtol=1e-4, atol=1e-5)


def test_batches_are_joined_and_inputs_without_an_answer_refused(read):
    vlm, inputs, answered, reading = read
    parts = [mv.read(vlm, answered[[row]], AnswerReading())[0] for row in range(3)]
    joined = mv.concat(parts)
    for name in ("norm_share", "weight_share", "probability"):
        torch.testing.assert_close(getattr(joined, name), getattr(reading, name), rtol=1e-3, atol=1e-6, equal_nan=True)
    with pytest.raises(ValueError, match="No answer was written"):
        mv.read(vlm, inputs, AnswerReading())


def test_on_ndif_the_reading_is_the_same(llava_vlm):
    there = mv.load(llava_vlm.hf, llava_vlm.processor, remote="local")
    results = []
    for vlm in (llava_vlm, there):
        answered = vlm.inputs(noise_image(0), "a").answered("a red cat")
        results.append(mv.read(vlm, answered, OnPrompt(mv.Contextualization()), AnswerReading()))
    (here, reading), (far, far_reading) = results
    torch.testing.assert_close(far.inter, here.inter)
    torch.testing.assert_close(far_reading.norm_share, reading.norm_share)
