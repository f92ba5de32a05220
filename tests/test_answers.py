"""The token that an answer begins with is the one that the model itself would have to write."""

import pytest
import torch
from conftest import noise_image

import mechvlm as mv
from mechvlm.answers import answer_tokens
from mechvlm.datasets.scenes import scenes


@pytest.mark.parametrize("name", ["tiny-llava", "tiny-instructblip"])
def test_the_token_is_the_one_that_the_model_answers_with(name):
    vlm = mv.load(name)
    image = next(scenes(1)).image
    inputs = vlm.inputs(image, "What color is the circle?")
    word = vlm.generate(inputs)[0]
    with torch.no_grad():
        best = vlm.hf(**vlm.encoding(inputs)).logits[0, -1].argmax()
    assert answer_tokens(vlm, inputs, word).tolist() == [int(best)]
    assert answer_tokens(vlm, inputs, int(best)).tolist() == [int(best)]


def test_one_answer_for_all_or_one_each(batch, vlm):
    one = answer_tokens(vlm, batch, "red")
    each = answer_tokens(vlm, batch, ["red", "a cat", 7])
    assert vlm.tokenizer.convert_ids_to_tokens(one.tolist()) == ["▁red"] * 3
    assert vlm.tokenizer.convert_ids_to_tokens(each[:2].tolist()) == ["▁red", "▁a"]
    assert each[2] == 7


def test_bad_answers_are_refused(batch, vlm):
    with pytest.raises(mv.InputError, match="2 answers were given for 3 examples"):
        answer_tokens(vlm, batch, ["a", "b"])
    with pytest.raises(mv.InputError, match="not ''"):
        answer_tokens(vlm, batch, ["a", "", "b"])
    with pytest.raises(mv.InputError, match="99999999 is no token id: the vocabulary has 0 to 32063"):
        answer_tokens(vlm, batch, 99999999)


def test_after_a_line_break_an_answer_has_no_space(llava_vlm):
    """Chat templates may end in one; what the model then writes is what the tokenizer makes of the whole text."""
    inputs = llava_vlm.inputs(noise_image(0), "USER: <image>\nWhat is it? ASSISTANT:\n")
    whole = llava_vlm.tokenizer(inputs.texts[0] + "red").input_ids
    assert whole[:-1] == llava_vlm.tokenizer(inputs.texts[0]).input_ids
    assert answer_tokens(llava_vlm, inputs, " red").tolist() == whole[-1:]
    assert llava_vlm.tokenizer.convert_ids_to_tokens(whole[-1]) == "red"


def test_ids_as_they_come_from_logits(batch, vlm):
    ids = torch.tensor([5, 6, 7])
    assert torch.equal(answer_tokens(vlm, batch, ids), ids)
    assert torch.equal(answer_tokens(vlm, batch, ids.tolist()), ids)
    result = mv.information_flow(vlm, batch, ids, window=1, flows=["image -> last"])
    assert result.answers == tuple(vlm.tokenizer.convert_ids_to_tokens([5, 6, 7]))


def test_a_prompt_that_ends_in_a_space_is_refused(llava_vlm):
    inputs = llava_vlm.inputs(noise_image(0), "<image> what is this ")
    with pytest.raises(mv.InputError, match="ends in a space, where no answer begins: leave it out"):
        answer_tokens(llava_vlm, inputs, "red")
