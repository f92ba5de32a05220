"""The tiny families themselves: what later tests stand on."""

import pytest
import torch
import transformers

from helpers import families
from helpers.families.parts import IMAGE
from mechvlm.vlm.processors import load_processor

SIZES = ((60, 44), (44, 60), (100, 30))
WORDS = ("what is this", "hi", "the cup")

PADDED = {
    "mistral_large4": "it counts positions from the padding on, and scales queries by them",
    "emu3": "its vision part norms across the padding of smaller images",
    "blip2_llama": "its processor pads between the queries and the text, which moves them apart",
    "hunyuan_vl": "its first layer gives rows after the first other states, from the same embeddings and mask",
    "instructblip_opt": "its Q-Former's positions are counted from the padding on",
    "instructblip": "its processor pads between the queries and the text, which moves them apart",
}
"""Where Hugging Face's own batch gives other logits than each example alone, and why."""

CODES = {"emu3": 8, "chameleon": 32}
"""Where an image is written in codes, of which two images may share some: how many there are."""

MARKS = {"hunyuan_vl": 3}
"""Where image tokens are more than places and a newline: begin, newline, end."""


@pytest.fixture(scope="module", params=families.cases(refused=True))
def name(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def built(name):
    return families.build(name)


@pytest.fixture(scope="module")
def examples(name, built) -> list[dict[str, torch.Tensor]]:
    """One example of each size, alone."""
    pictures = [families.picture(width, height, seed=i) for i, (width, height) in enumerate(SIZES)]
    return [
        families.alone(name, *built, picture, families.prompt(name, words))
        for picture, words in zip(pictures, WORDS, strict=True)
    ]


@torch.no_grad()
def embeddings(hf, example) -> torch.Tensor:
    """State 0, as Hugging Face gives it: position width."""
    out = hf(**example, output_hidden_states=True)
    states = getattr(out, "hidden_states", None) or out["language_model_outputs"]["hidden_states"]
    return states[0][0]


def skip_without_decoder(name: str) -> None:
    if families.FAMILIES[name].refused:
        pytest.skip("it has no decoder that mechvlm reads")


def test_every_size_gives_finite_logits(name, built, examples):
    for example in examples:
        with torch.no_grad():
            logits = built[0](**example).logits
        assert logits.isfinite().all()
        assert logits.shape[-1] == built[0].config.get_text_config(decoder=True).vocab_size + (
            4 if name == "idefics" else 0
        )
        assert logits.std() > 0.05


def test_the_image_is_where_its_tokens_are(name, built, examples):
    """Another image changes state 0 at the image's tokens; newlines among them stay."""
    skip_without_decoder(name)
    for example, (width, height), words in zip(examples, SIZES, WORDS, strict=True):
        other = families.picture(width, height, seed=99)
        other = families.alone(name, *built, other, families.prompt(name, words))
        assert torch.equal(example["input_ids"], other["input_ids"])
        states, others = embeddings(built[0], example), embeddings(built[0], other)
        changed, image = (states != others).any(-1), example["input_ids"][0] == IMAGE
        if families.FAMILIES[name].memory:  # Idefics' first gated block comes before state 0
            assert name == "idefics" or not changed.any()
            continue
        assert image.any()
        assert not (changed & ~image).any()
        kept = len(states[image & ~changed].unique(dim=0))
        assert kept <= (CODES | MARKS).get(name, 1), "an image token that the vision part does not fill"
        assert changed.sum() >= 0.6 * image.sum() or name in CODES


def test_no_parameter_is_left_as_it_starts(built):
    """A norm of ones or a bias of zeros would make wrong formulas come out right."""
    for path, parameter in built[0].named_parameters():
        if parameter.ndim <= 1:
            assert not ((parameter == 0) | (parameter == 1)).any(), path
        assert parameter.float().abs().max() > 1e-3, path


def test_a_seed_gives_the_same_weights(name, built):
    random = torch.get_rng_state()
    again, other = families.build(name)[0], families.build(name, seed=1)[0]
    assert torch.equal(random, torch.get_rng_state())
    weights, same, others = (hf.state_dict() for hf in (built[0], again, other))
    assert all(torch.equal(weights[path], same[path]) for path in weights)
    moved = [
        path for path in weights if weights[path].is_floating_point() and not torch.equal(weights[path], others[path])
    ]
    assert len(moved) > len(weights) / 2


def test_bfloat16_has_the_same_weights_rounded(name, built, examples):
    hf, processor = families.build(name, dtype=torch.bfloat16)
    assert hf.dtype is torch.bfloat16
    half = dict(hf.named_parameters())
    for path, parameter in built[0].named_parameters():
        assert torch.equal(parameter.to(half[path].dtype), half[path]), path
    example = families.alone(name, hf, processor, families.picture(*SIZES[0], seed=0), families.prompt(name, WORDS[0]))
    with torch.no_grad():
        # Chameleon's logits of images are the lowest number there is.
        logits, precise = hf(**example).logits[..., :IMAGE].float(), built[0](**examples[0]).logits[..., :IMAGE]
    assert (logits - precise).abs().mean() < 0.2 * precise.std()


def test_eager_attention_gives_the_same_logits(name, built, examples):
    hf, _ = families.build(name, attention="eager")
    with torch.no_grad():
        torch.testing.assert_close(hf(**examples[0]).logits, built[0](**examples[0]).logits, rtol=1e-3, atol=1e-4)


def test_both_are_saved_and_loaded(name, built, examples, tmp_path):
    hf, processor = built
    hf.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded, other = type(hf).from_pretrained(tmp_path), load_processor(tmp_path)
    assert type(other).__name__ == type(processor).__name__
    example = families.alone(name, loaded, other, families.picture(*SIZES[0], seed=0), families.prompt(name, WORDS[0]))
    assert example.keys() == examples[0].keys()
    for key, value in example.items():  # torchvision rounds otherwise when it resizes
        torch.testing.assert_close(value, examples[0][key], rtol=0, atol=0.05)
    with torch.no_grad():
        torch.testing.assert_close(loaded(**examples[0]).logits, hf(**examples[0]).logits, rtol=1e-5, atol=1e-5)


def test_a_batch_of_mixed_images_gives_what_each_gives_alone(name, built, examples):
    skip_without_decoder(name)
    hf, processor = built
    if name in PADDED:
        pytest.skip(PADDED[name])
    pictures = [families.picture(width, height, seed=i) for i, (width, height) in enumerate(SIZES)]
    images = pictures if name in ("got_ocr2", "idefics") else [[picture] for picture in pictures]
    texts = [families.prompt(name, words) for words in WORDS]
    batch = processor(images=images, text=texts, return_tensors="pt", padding=True, **families.types(hf))
    batch = {key: value.to(hf.dtype) if value.is_floating_point() else value for key, value in batch.items()}
    with torch.no_grad():
        logits = hf(**batch).logits
        for row, example in enumerate(examples):
            torch.testing.assert_close(logits[row, -1], hf(**example).logits[0, -1], rtol=1e-3, atol=1e-3)


def test_several_images_stand_in_one_prompt(name, built):
    skip_without_decoder(name)
    if families.FAMILIES[name].images == 1 or name in ("got_ocr2", "idefics"):
        pytest.skip("a prompt has one image")
    hf, processor = built
    pictures = [families.picture(width, height, seed=i) for i, (width, height) in enumerate(SIZES[:2])]
    text = families.prompt(name, "which", images=2)
    encoding = processor(images=[pictures], text=[text], return_tensors="pt", **families.types(hf))
    encoding = {key: value.to(hf.dtype) if value.is_floating_point() else value for key, value in encoding.items()}
    with torch.no_grad():
        assert hf(**encoding).logits.isfinite().all()


def test_the_chat_template_writes_the_image_once(name, built, examples):
    _, processor = built
    if processor.chat_template is None:
        assert name in NO_TEMPLATE
        return
    content = [{"type": "image"}, {"type": "text", "text": WORDS[0]}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    assert text.count(families.FAMILIES[name].word) == 1
    assert WORDS[0] in text
    example = families.alone(name, *built, families.picture(*SIZES[0], seed=0), text)
    assert (example["input_ids"] == IMAGE).sum() == (examples[0]["input_ids"] == IMAGE).sum()
    assert example["input_ids"].shape[1] > examples[0]["input_ids"].shape[1]


NO_TEMPLATE = {
    "paligemma", "paligemma2", "blip2_opt", "blip2_llama", "blip2_t5", "instructblip", "instructblip_opt", "instructblip_t5",
    "got_ocr2", "florence2", "idefics", "blip2_post_norm", "chameleon",
}  # fmt: skip


def test_the_tokenizer_fits_the_model(name, built):
    hf, processor = built
    assert len(processor.tokenizer) <= hf.get_input_embeddings().num_embeddings
    if name != "idefics":  # its config names no image token
        assert hf.config.image_token_id == IMAGE


def test_it_is_of_its_class_and_small(name, built):
    config = built[0].config.get_text_config(decoder=True)
    assert config.num_hidden_layers in (3, 4)
    assert config.hidden_size == 64
    assert config.num_attention_heads == 4
    assert type(built[0]) is getattr(transformers, families.FAMILIES[name].hf_class)
