"""An answer's first token is the token that the model itself would write."""

import pytest
import torch

import mechvlm as mv
from helpers import families
from helpers.images import noise_image
from mechvlm.datasets.scenes import scenes


@pytest.mark.parametrize("name", ["tiny-llava", "tiny-instructblip"])
def test_the_token_is_the_models_own_first_one(name):
    vlm = mv.load(name)
    image = next(scenes(1)).image
    inputs = vlm.inputs(image, "What color is the circle?")
    word = vlm.generate(inputs)[0]
    with torch.no_grad():
        best = vlm.hf(**vlm.encoding(inputs)).logits[0, -1].argmax()
    assert vlm.answer_tokens(inputs, word).tolist() == [int(best)]
    assert vlm.answer_tokens(inputs, int(best)).tolist() == [int(best)]


def test_one_answer_for_all_or_one_each(batch, vlm):
    same = vlm.answer_tokens(batch, "red")
    each = vlm.answer_tokens(batch, ["red", "a cat", 7])
    assert vlm.tokenizer.convert_ids_to_tokens(same.tolist()) == ["▁red"] * 3
    assert vlm.tokenizer.convert_ids_to_tokens(each[:2].tolist()) == ["▁red", "▁a"]
    assert each[2] == 7


def test_bad_answers_are_refused(batch, vlm):
    with pytest.raises(mv.InputError, match="2 answers were given for 3 examples"):
        vlm.answer_tokens(batch, ["a", "b"])
    with pytest.raises(mv.InputError, match="not ''"):
        vlm.answer_tokens(batch, ["a", "", "b"])
    with pytest.raises(mv.InputError, match="a word or a token id, not True"):
        vlm.answer_tokens(batch, True)
    with pytest.raises(mv.InputError, match="99999999 is no token id: the vocabulary has 0 to 32063"):
        vlm.answer_tokens(batch, 99999999)
    with pytest.raises(mv.InputError, match="32064 is no token id"):
        vlm.answer_tokens(batch, vlm.d_vocab)
    assert vlm.answer_tokens(batch, vlm.d_vocab - 1).tolist() == [32063] * 3


def test_after_a_line_break_an_answer_has_no_space(llava_vlm):
    """Chat templates may end in one. The answer is then tokenized as in the whole text."""
    inputs = llava_vlm.inputs(noise_image(0), "USER: <image>\nWhat is it? ASSISTANT:\n")
    whole = llava_vlm.tokenizer(inputs.texts[0] + "red").input_ids
    assert whole[:-1] == llava_vlm.tokenizer(inputs.texts[0]).input_ids
    assert llava_vlm.answer_tokens(inputs, " red").tolist() == whole[-1:]
    assert llava_vlm.tokenizer.convert_ids_to_tokens(whole[-1]) == "red"


def test_ids_as_tensors_and_lists(batch, vlm):
    ids = torch.tensor([5, 6, 7])
    assert torch.equal(vlm.answer_tokens(batch, ids), ids)
    assert torch.equal(vlm.answer_tokens(batch, ids.tolist()), ids)
    result = mv.information_flow(vlm, batch, ids, window=1, flows=["image -> last"])
    assert result.answers == vlm.to_str_tokens(torch.tensor([5, 6, 7]))


def test_after_a_space_an_answer_brings_none(llava_vlm):
    """Where the tokenizer leaves the space alone (bytes); not where it joins them (LLaMA's)."""
    inputs = llava_vlm.inputs(noise_image(0), "<image> what is this ")
    with pytest.raises(
        mv.InputError, match=r"joins 'red' with the end of the prompt .*: end the prompt without its space"
    ):
        llava_vlm.answer_tokens(inputs, "red")
    vlm = mv.load(*families.build("llava"))
    inputs = vlm.inputs(noise_image(0), "USER: <image>what? ASSISTANT: ")
    grown, (length,) = vlm.answered(inputs, ["red"])
    assert vlm.tokenizer.decode(grown.encoding["input_ids"][0, -length - 2 :]) == ": red"
    ids = grown.encoding["input_ids"][0]
    assert torch.equal(ids[:-length], inputs.encoding["input_ids"][0])
    assert vlm.answer_tokens(inputs, " red").tolist() == [int(ids[-3])]


def test_answers_of_different_lengths_end_together(vlm):
    """Row by row the ids are the prompt's and the answer's, behind padding that is masked."""
    prompts, answers = ["what is this", "a"], ["red", "a red circle and a cat"]
    batch = vlm.inputs([noise_image(0), noise_image(1)], prompts)
    written, lengths = vlm.answered(batch, answers)
    ids, mask = written.encoding["input_ids"], written.encoding["attention_mask"].bool()
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        alone, (n,) = vlm.answered(vlm.inputs(noise_image(row), prompt), [answer])
        assert lengths[row] == n
        assert torch.equal(ids[row][mask[row]], alone.encoding["input_ids"][0])
        assert mask[row].tolist() == sorted(mask[row].tolist()), "padding comes first"
        assert torch.equal(ids[row, -n:], alone.encoding["input_ids"][0, -n:])
