"""Inputs and their TokenMap: positions, patches, and errors for bad images and prompts."""

import copy

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers.processors import TemplateProcessing

import mechvlm as mv
from helpers.images import noise_image
from helpers.models import LLAVA_TEMPLATE, instructblip, llava
from mechvlm.inputs import images as images_module
from mechvlm.inputs.images import open_image
from mechvlm.inputs.pairs import images_and_prompt


def test_llava_prompt_by_hand(llava_vlm):
    inputs = llava_vlm.inputs(noise_image(0), "what is this")
    tokens = inputs.tokens
    assert inputs.texts == ("USER: <image>\nwhat is this ASSISTANT:",)
    assert tokens.strings[:5] == ("<s>", " US", "ER", ":", " ")
    assert tokens.special.tolist() == [0]
    assert tokens.image.tolist() == list(range(5, 5 + 16))  # 56 / 14 = 4: a grid of 4 x 4
    assert tokens.text.tolist() == [1, 2, 3, 4, *range(21, len(tokens))]
    assert (tokens.last, tokens.last_text, tokens.last_image) == (len(tokens) - 1, len(tokens) - 1, 20)
    assert tokens.strings[tokens.last] == ":"


def test_instructblip_queries_stand_before_bos(blip_vlm):
    tokens = blip_vlm.inputs(noise_image(0), "what is this").tokens
    assert tokens.image.tolist() == [0, 1, 2, 3, 4]
    assert tokens.strings[5:] == ("<s>", " what", " is", " this")
    assert tokens.special.tolist() == [5]
    with pytest.raises(ValueError, match="queries"):
        tokens.position(0, 0)
    with pytest.raises(ValueError, match="queries"):
        tokens.cell(0)


def test_batches_are_padded_on_the_left(vlm, batch):
    lengths = [len(vlm.inputs(g[0], p).tokens) for g, p in zip(batch.images, batch.prompts, strict=True)]
    assert len(set(lengths)) == 3
    for tokens, length in zip(batch.token_maps, lengths, strict=True):
        assert len(tokens) == max(lengths)
        assert tokens.all.tolist() == list(range(max(lengths) - length, max(lengths)))
        assert set(tokens.modality[: max(lengths) - length].tolist()) <= {mv.Modality.PADDING}
    with pytest.raises(ValueError, match=r"3 examples: take inputs\.token_maps\[i\]"):
        _ = batch.tokens


def test_one_prompt_for_all_and_one_image_for_all(llava_vlm):
    assert llava_vlm.inputs([noise_image(0), noise_image(1)], "a").prompts == ("a", "a")
    same = llava_vlm.inputs(noise_image(0), ["a", "what"])
    assert torch.equal(same.encoding["pixel_values"][0], same.encoding["pixel_values"][1])
    with pytest.raises(mv.InputError, match="2 images and 3 prompts"):
        llava_vlm.inputs([noise_image(0), noise_image(1)], ["a", "b", "c"])


def test_two_images_in_one_prompt_equal_the_processors_own(llava_vlm):
    pair = [noise_image(0), noise_image(1, (60, 90))]
    inputs = llava_vlm.inputs([pair], "what")
    tokens = inputs.tokens
    assert len(tokens.grids) == 2
    assert [len(p) for p in tokens.images] == [16, 16]
    assert tokens.cell(int(tokens.images[1][5])) == (1, 1, 1)
    assert tokens.position(1, 1, image=1) == int(tokens.images[1][5])
    reference = llava_vlm.processor(images=pair, text=inputs.texts, return_tensors="pt")
    assert torch.equal(reference["input_ids"], inputs.encoding["input_ids"])
    assert torch.equal(reference["pixel_values"], inputs.encoding["pixel_values"])
    lens = mv.logit_lens(llava_vlm, inputs, k=1)
    assert lens.ids.shape == (4, 32, 1)


def test_a_prompt_with_the_image_token_is_taken_as_it_is(llava_vlm):
    with pytest.warns(UserWarning, match="holds <image> and nothing of the template"):
        assert llava_vlm.inputs(noise_image(0), "look: <image> what").texts == ("look: <image> what",)
    with pytest.raises(mv.InputError, match="holds 2 <image>, but the example has 1 images"):
        llava_vlm.inputs(noise_image(0), "<image> <image> what")


@pytest.mark.parametrize("family", [llava, instructblip])
def test_a_template_that_writes_bos_gets_no_second_one(family):
    """The ids are those of Hugging Face's own `apply_chat_template(tokenize=True)`."""
    hf, processor = family()
    processor = copy.deepcopy(processor)
    processor.tokenizer.add_bos_token = True
    processor.tokenizer._tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    vlm = mv.load(hf, processor)
    assert vlm.inputs(noise_image(0), "what is this").tokens.ids.tolist().count(1) == 1, "the tokenizer's"
    if family is instructblip:  # its prompts have no template, but may hold BOS
        ids = vlm.inputs(noise_image(0), "<s>what is this").tokens.ids
        assert ids.tolist().count(1) == 1
        return
    processor.chat_template = "{{ bos_token }}" + LLAVA_TEMPLATE
    inputs = vlm.inputs(noise_image(0), "what is this")
    content = [{"type": "image", "image": noise_image(0)}, {"type": "text", "text": "what is this"}]
    own = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True, return_dict=True,
        return_tensors="pt",
    )  # fmt: skip
    assert torch.equal(inputs.encoding["input_ids"], own["input_ids"])
    assert inputs.tokens.ids.tolist().count(1) == 1
    answered, (n,) = vlm.answered(inputs, ["a red circle"])
    assert answered.tokens.ids.tolist().count(1) == 1
    assert torch.equal(answered.tokens.ids[:-n], inputs.tokens.ids)


def test_instructblip_takes_one_image_and_no_token(blip_vlm):
    with pytest.raises(mv.InputError, match="2 images"):
        blip_vlm.inputs([[noise_image(0), noise_image(1)]], "what")
    with pytest.raises(mv.InputError, match="Leave <image> out"):
        blip_vlm.inputs(noise_image(0), "<image> what")


@pytest.mark.parametrize("size", [(80, 60), (60, 80), (56, 56), (200, 61), (33, 47)])
@pytest.mark.parametrize("family", [llava, instructblip])
def test_patch_boxes_hold_the_pixels_that_the_patch_was_made_of(family, size):
    """White pixels in a patch's box on the original lie in that patch of the model's pixels."""
    vlm = mv.load(*family(), check=False)
    grid = vlm.inputs(Image.new("RGB", size), "a").token_maps[0].grids[0]
    assert (grid.rows, grid.cols) == (4, 4)
    for row, col in [(0, 0), (1, 3), (3, 2)]:
        left, top, right, bottom = grid.box(row, col)
        pixels = np.zeros((size[1], size[0], 3), np.uint8)
        y, x = np.mgrid[: size[1], : size[0]] + 0.5
        pixels[(x > left) & (x < right) & (y > top) & (y < bottom)] = 255
        processed = vlm.inputs(Image.fromarray(pixels), "a").encoding["pixel_values"][0].mean(0)
        light = (processed - processed.min()).unflatten(0, (4, 14)).unflatten(2, (4, 14)).sum((1, 3))
        assert int(light.argmax()) == row * 4 + col
        assert light[row, col] > 0.7 * light.sum()


def test_boxes_by_hand():
    """80 x 60 is resized to 74 x 56 (short side 56); the crop of the middle 56 starts at 9."""
    grid = mv.load(*llava(), check=False).inputs(Image.new("RGB", (80, 60)), "a").tokens.grids[0]
    assert (grid.resized, grid.crop) == ((74, 56), (9, 0))
    assert grid.box(0, 0) == pytest.approx((9 * 80 / 74, 0, 23 * 80 / 74, 15))
    assert grid.crop_box == pytest.approx((9 * 80 / 74, 0, 65 * 80 / 74, 60))
    assert torch.equal(grid.boxes()[2, 1], torch.tensor(grid.box(2, 1)))
    with pytest.raises(IndexError, match="4 rows x 4 cols"):
        grid.box(4, 0)


def test_patches_in_a_box(llava_vlm):
    tokens = llava_vlm.inputs(Image.new("RGB", (56, 56)), "a").tokens
    inside = tokens.pos_in_box((14, 14, 42, 28))
    assert inside.tolist() == [tokens.position(1, 1), tokens.position(1, 2)]
    assert tokens.pos_in_box((14, 14, 28, 20)).tolist() == []  # 6 of 14 rows: less than half
    assert tokens.pos_in_box((14, 14, 28, 20), covered=0.4).tolist() == [tokens.position(1, 1)]


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("picture", "no positions called 'picture'"),
        ([99], r"\[99\] are not tokens"),
        ([], "empty"),
        (torch.ones(20, dtype=torch.bool), "whole numbers"),
        (torch.tensor([5.7]), "whole numbers"),
    ],
)
def test_bad_positions(llava_vlm, where, message):
    tokens = llava_vlm.inputs(noise_image(0), "a").tokens
    with pytest.raises(ValueError, match=message):
        tokens.select(where)


def test_selected_positions_are_copies(llava_vlm):
    tokens = llava_vlm.inputs(noise_image(0), "a").tokens
    positions = tokens.select("image")
    positions += 1
    assert tokens.last_image == 20


def test_an_empty_prompt_has_no_last_text_token(blip_vlm):
    with pytest.raises(ValueError, match="'last_text' is empty"):
        blip_vlm.inputs(noise_image(0), "").tokens.select("last_text")


def test_padding_is_no_position(vlm, batch):
    short = batch.token_maps[2]
    with pytest.raises(ValueError, match=r"\[0\] are not tokens"):
        short.select([0])


# -- bad images and prompts --


def test_bad_images(tmp_path, llava_vlm, monkeypatch):
    (tmp_path / "empty.png").write_bytes(b"")
    noise_image(0, (300, 300)).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:2000])
    (tmp_path / "text.png").write_text("not an image")
    for name, message in [
        ("none.png", "there is no such file"), ("empty.png", "is empty"), ("cut.png", "cannot be read"),
        ("text.png", "cannot be read"), (".", "it is a folder"),
    ]:  # fmt: skip
        with pytest.raises(mv.InputError, match=message):
            llava_vlm.inputs(tmp_path / name, "a")
    with pytest.raises(mv.InputError, match="so narrow"):
        llava_vlm.inputs(Image.new("RGB", (1, 60000)), "a")
    monkeypatch.setattr(images_module, "MAX_PIXELS", 89_999)
    with pytest.raises(mv.InputError, match="300 x 300 = 90,000 pixels; at most 89,999"):
        llava_vlm.inputs(tmp_path / "whole.png", "a")


def test_other_types_are_no_image_and_no_prompt(llava_vlm, tmp_path):
    # Called directly: under pytest, jaxtyping checks the types of public functions first.
    with pytest.raises(mv.InputError, match=r"An image is .*not NoneType"):
        images_and_prompt((None,), "a")
    with pytest.raises(mv.InputError, match=r"A prompt is a string, or a conversation .*not NoneType"):
        images_and_prompt((noise_image(0),), None)
    with pytest.raises(mv.InputError, match="fetch it first"):
        llava_vlm.inputs("https://example.org/a.jpg", "a")
    noise_image(0, (300, 300)).save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:2000])
    with pytest.raises(mv.InputError, match="cannot be read"):
        llava_vlm.inputs(Image.open(tmp_path / "cut.png"), "a")


def test_sixteen_bits_are_scaled_and_not_clipped():
    ramp = Image.fromarray(np.linspace(0, 65535, 256).astype(np.uint16)[None].repeat(4, 0))
    grey = np.asarray(open_image(ramp))[0, :, 0]
    assert np.abs(grey.astype(int) - np.arange(256)).max() <= 1
    with pytest.raises(mv.InputError, match="mode F, whose range"):
        open_image(Image.fromarray(np.zeros((4, 4), np.float32)))


def test_a_huge_image_is_refused_before_it_is_decoded(tmp_path):
    Image.new("1", (20_000, 20_000)).save(tmp_path / "huge.png")
    with pytest.raises(mv.InputError, match=r"more than 178,956,970 pixels.*Make it smaller"):
        open_image(tmp_path / "huge.png")


def test_odd_modes_become_rgb(tmp_path):
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    assert open_image(clear).getpixel((0, 0)) == (255, 255, 255)
    for mode in ("L", "P", "CMYK", "1", "I;16", "LA"):
        assert open_image(Image.new(mode, (4, 4))).mode == "RGB"
    turned = Image.new("RGB", (4, 8))
    exif = turned.getexif()
    exif[0x0112] = 6  # rotate by 90 degrees to view
    turned.save(tmp_path / "turned.jpg", exif=exif)
    assert open_image(tmp_path / "turned.jpg").size == (8, 4)


def test_a_prompt_without_room_for_the_image(vlm):
    with pytest.raises(mv.InputError, match=r"leaves no room: \d+ tokens"):
        vlm.inputs(noise_image(0), "what is this " * 1000)


def test_nothing_to_run(llava_vlm):
    with pytest.raises(mv.InputError, match="nothing to run"):
        llava_vlm.inputs([], "a")
    with pytest.raises(mv.InputError, match="has no image"):
        llava_vlm.inputs([[]], "a")


def test_one_example_of_a_batch_equals_the_example_alone(vlm):
    """Its encoding and its token map, without the batch's padding."""
    images, prompts = [noise_image(i) for i in range(3)], ["what is this", "describe the scene . a what is this", "a"]
    several = vlm.inputs(images, prompts)
    for i in range(3):
        alone, item = vlm.inputs(images[i], prompts[i]), several[i]
        assert list(item.encoding) == list(alone.encoding)
        assert all(torch.equal(item.encoding[key], alone.encoding[key]) for key in alone.encoding)
        for name in ("ids", "modality", "image", "question"):
            assert torch.equal(getattr(item.tokens, name), getattr(alone.tokens, name))
        assert (item.tokens.strings, item.prompts, item.texts) == (alone.tokens.strings, alone.prompts, alone.texts)
        assert item.model == alone.model == vlm.name
        assert torch.equal(several[i - 3].tokens.ids, alone.tokens.ids)
    with pytest.raises(IndexError, match="Example 3 was asked for; these inputs hold 0 to 2"):
        several[3]


def test_several_images_of_one_prompt_stay_with_it(llava_vlm):
    inputs = llava_vlm.inputs([[noise_image(0)], [noise_image(1), noise_image(2)], [noise_image(3)]], "what is this")
    alone = llava_vlm.inputs([[noise_image(1), noise_image(2)]], "what is this")
    assert torch.equal(inputs[1].encoding["pixel_values"], alone.encoding["pixel_values"])
    assert len(inputs[1].images[0]) == 2
    assert len(inputs[1].tokens.images) == 2


def test_the_question_is_all_but_the_image_and_the_last_position(vlm, batch):
    for tokens in batch.token_maps:
        together = torch.cat([tokens.image, tokens.question, torch.tensor([tokens.last])]).sort().values
        assert torch.equal(together, tokens.all)


def test_positions_of_a_word(vlm):
    tokens = vlm.inputs(noise_image(0), "what is this thing ? is this it").tokens

    def strings_of(word):
        return [tokens.strings[i].strip() for i in tokens.pos_of(word)]

    assert strings_of("is") == ["is", "is"]  # and not the end of "this"
    assert "".join(strings_of("this thing")) == "thisthing"
    assert [tokens.strings[i] for i in tokens.pos_of("is this it")] == [" is", " this", " it"]
    with pytest.raises(ValueError, match=r"The text holds no 'his'. It reads: .*what is this thing"):
        tokens.pos_of("his")
    with pytest.raises(ValueError, match="The text holds no ''"):
        tokens.pos_of("")


def test_positions_of_a_box_with_its_neighbours(llava_vlm):
    tokens = llava_vlm.inputs(noise_image(0, (56, 56)), "a").tokens  # 4 x 4 patches of 14 pixels
    assert tokens.pos_in_box((14, 14, 28, 28)).tolist() == [tokens.position(1, 1)]
    with_neighbours = {tokens.position(r, c) for r in range(3) for c in range(3)}
    assert set(tokens.pos_in_box((14, 14, 28, 28), margin=1).tolist()) == with_neighbours
    assert tokens.pos_in_box((0, 0, 14, 14), margin=3).tolist() == tokens.image.tolist()
