"""Batches of any family's processor, against Hugging Face's own forward of each example alone."""

import copy
from dataclasses import replace

import pytest
import torch

import mechvlm as mv
from helpers import families
from helpers.family_inputs import inputs_of, record_of
from mechvlm.inputs.image_word import ImageWord, image_word
from mechvlm.inputs.tokens import Modality
from mechvlm.vlm.answers import _with_answer

SIZES = ((60, 44), (40, 90), (64, 64))
PROMPTS = ("what is this", "a", "describe the whole scene")
NOISE = {"gemma4": 3e-4}
"""Where rounding alone grows larger than 1e-5 of the largest logit; a fault moves 1e-2 and more."""
NO_BATCH = {
    "hunyuan_vl": "Hugging Face's own forward reads a second image of a batch otherwise than alone, by 0.2 %",
    "mistral_large4": "Hugging Face's own forward counts positions from the padding on, and scales queries by them",
    "minicpm_v": "its processor packs the images of a batch into one row, which is not made here",
}
"""Families whose batches are not their examples alone, whatever is done here."""


@pytest.fixture(scope="module", params=families.cases())
def name(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def built(name):
    return families.build(name)


def groups_of(name: str) -> list[list]:
    """The images of three prompts; the second prompt has two, where the family takes several."""
    family = families.FAMILIES[name]
    # GOT-OCR 2 takes several images as the pages of one.
    several = family.images is None and not family.memory and name != "got_ocr2"
    sizes = SIZES[:1] * 3 if name == "emu3" else SIZES
    first, second, third = (families.picture(*size, seed) for seed, size in enumerate(sizes))
    return [[first], [second, third] if several else [second], [third]]


@pytest.fixture(scope="module")
def batch(name, built) -> mv.Inputs:
    return inputs_of(name, *built, groups_of(name), list(PROMPTS))


def own_encoding(name, built, inputs: mv.Inputs, row: int) -> dict[str, torch.Tensor]:
    """What the processor itself gives for one example."""
    images, (hf, processor) = list(inputs.images[row]), built
    images = images if len(images) == 1 else [images]
    encoding = processor(images=images, text=[inputs.texts[row]], return_tensors="pt", **families.types(hf))
    return {key: value for key, value in encoding.items() if key != "labels"}


def test_each_example_of_a_batch_is_the_example_alone(name, built, batch):
    if name in NO_BATCH:
        pytest.skip(NO_BATCH[name])
    hf = built[0]
    assert len({len(tokens.all) for tokens in batch.token_maps}) > 1, "some are padded"
    with torch.no_grad():
        together = hf(**batch.encoding).logits
        for row in range(len(batch)):
            alone = hf(**own_encoding(name, built, batch, row)).logits[0]
            real = together[row, batch.token_maps[row].all]
            assert real.shape == alone.shape
            assert (real - alone).abs().max() < NOISE.get(name, 1e-5) * alone.abs().max()


def test_a_row_of_a_batch_is_what_the_processor_gives(name, built, batch):
    for row in (1, 0, 2):
        own, item = own_encoding(name, built, batch, row), batch[row]
        assert set(item.encoding) == set(own)
        for key, value in own.items():
            assert torch.equal(item.encoding[key], value), key
    backwards = batch[[2, 0]]
    for row, example in enumerate((2, 0)):
        for key, value in batch[example].encoding.items():
            assert torch.equal(backwards[row].encoding[key], value), key
    whole = batch.take([1], trim=False)
    assert torch.equal(whole.encoding["input_ids"], batch.encoding["input_ids"][1:2])


def test_positions_are_those_of_the_image_token(name, built, batch):
    hf, processor = built
    record = record_of(name, hf)
    for row, tokens in enumerate(batch.token_maps):
        assert tokens.last == len(tokens) - 1, "padding is on the left"
        ids = batch.encoding["input_ids"][row]
        is_image = ids == getattr(hf.config, record.image_token_id, -1)
        if families.FAMILIES[name].memory:
            with pytest.raises(mv.InputError, match="image is a memory"):
                tokens.image  # noqa: B018
            continue
        assert torch.equal(tokens.image, is_image.nonzero()[:, 0])
        assert len(tokens.images) == len(batch.images[row])
        assert torch.equal(torch.cat(tokens.images), tokens.image)
        special = torch.isin(ids, torch.tensor(processor.tokenizer.all_special_ids))
        real = tokens.modality != Modality.PADDING
        assert torch.equal(tokens.special, (special & ~is_image & real).nonzero()[:, 0])


def test_the_word_of_an_image(name, built):
    """Tried on the processor, it is what the family's own prompts hold."""
    hf, processor = built
    family, record = families.FAMILIES[name], record_of(name, hf)
    word = image_word(record, hf.config, processor)
    assert word.inserted == (family.word == "")
    assert word.inserted or family.word.count(word.text) == 1


def test_an_answer_is_written_as_generate_writes_it(name, built):
    """Logits of one forward over prompt and answer are those of `generate`, token by token."""
    hf, processor = built
    inputs = inputs_of(name, hf, processor, families.picture(60, 44, 0), "what is this")
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad():
        out = hf.generate(**inputs.encoding, **options, output_logits=True, return_dict_in_generate=True)
        written = out.sequences[0, -4:].tolist()
        sequences = {key: inputs.encoding[key] for key, shared in inputs.parts.items() if shared.sequence}
        sequences = {key: value for key, value in sequences.items() if not key.startswith("qformer")}
        grown = _with_answer(dict(sequences), written, hf)
        logits = hf(**{**inputs.encoding, **grown}).logits[0, -5:-1]
    expected = torch.stack(out.logits)[:, 0]
    assert (logits - expected).abs().max() < NOISE.get(name, 1e-5) * expected.abs().max()


# -- what the six do not show ----------------------------------------------------------------------


def test_a_word_that_a_record_names():
    hf, processor = families.build("gemma3")
    record = record_of("gemma3", hf)
    named = replace(record, image_word="boi_token")
    assert image_word(named, hf.config, processor) == ImageWord("<start_of_image>", False)
    assert image_word(replace(record, image_word="<other>"), hf.config, processor).text == "<other>"
    with pytest.raises(mv.InputError, match="says that the processor's picture_token stands for an image"):
        image_word(replace(record, image_word="picture_token"), hf.config, processor)


def test_a_processor_that_marks_images_by_another_token():
    hf, processor = families.build("llava")
    record = record_of("llava", hf)
    config = copy.deepcopy(hf.config)
    setattr(config, record.image_token_id, 7)
    with pytest.raises(mv.InputError, match=r"No word makes LlavaProcessor put the image token .* \(7\)"):
        image_word(record, config, processor)


def test_what_a_processor_refuses_is_named():
    hf, processor = families.build("qwen2_5_vl")
    with pytest.raises(mv.InputError, match=r"Example 1: .*cannot encode 1 images \(900 x 3\).*aspect ratio"):
        inputs_of("qwen2_5_vl", hf, processor, [families.picture(60, 44, 0), families.picture(900, 3, 1)], "a")


def test_sizes_that_the_vision_encoder_would_pad():
    hf, processor = families.build("emu3")
    with pytest.raises(mv.InputError, match="would read the padding around the smaller ones"):
        inputs_of("emu3", hf, processor, [families.picture(60, 44, 0), families.picture(40, 90, 1)], "a")


def test_numbers_of_images_that_a_memory_does_not_take():
    hf, processor = families.build("mllama")
    groups = [[families.picture(60, 44, 0)], [families.picture(60, 44, 1)] * 2]
    with pytest.raises(mv.InputError, match="The examples have 1 and 2 images"):
        inputs_of("mllama", hf, processor, groups, "a")
