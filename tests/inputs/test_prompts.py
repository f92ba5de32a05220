"""Conversations and templates, held against Hugging Face's own `apply_chat_template`."""

import copy
import io
import warnings

import pytest
import torch

import mechvlm as mv
from helpers.images import noise_image
from helpers.models import LLAVA_TEMPLATE
from mechvlm.inputs.pairs import images_and_prompt
from mechvlm.inputs.prompts import prompt_text, split_conversation


def text(words: str) -> dict:
    return {"type": "text", "text": words}


IMAGE = {"type": "image"}
QUESTION = [{"role": "user", "content": [IMAGE, text("what is this")]}]
TURNS = [
    {"role": "user", "content": [IMAGE, text("what is this")]},
    {"role": "assistant", "content": [text("a red circle")]},
    {"role": "user", "content": [text("and the scene ?")]},
]
SYSTEM = [{"role": "system", "content": [text("describe the scene .")]}, *QUESTION]
BEGUN = [*QUESTION, {"role": "assistant", "content": [text("this is a")]}]
TEXT_ONLY = "{% for m in messages %}{{ '[INST] ' + m['content'] + ' [/INST]' }}{% endfor %}"


def with_images(messages, images) -> list[dict]:
    """The messages, with the images in their entries."""
    rest = iter(images)
    return [
        {**m, "content": [{**e, "image": next(rest)} if e["type"] == "image" else e for e in m["content"]]}
        for m in messages
    ]


def own_encoding(vlm, messages, images):
    is_begun = messages[-1]["role"] == "assistant"
    return vlm.processor.apply_chat_template(
        with_images(messages, images), tokenize=True, return_dict=True, return_tensors="pt",
        add_generation_prompt=not is_begun, continue_final_message=is_begun,
    )  # fmt: skip


@pytest.fixture(scope="module", params=["tiny-llava", "fixture"])
def chat_vlm(request, llava_vlm):
    return llava_vlm if request.param == "fixture" else mv.load(request.param, check=False)


def retemplated(vlm, template):
    """The model with another chat template, or none."""
    processor = copy.copy(vlm.processor)
    processor.chat_template = template
    return mv.load(vlm.hf, processor, check=False)


@pytest.mark.parametrize("messages", [QUESTION, TURNS, SYSTEM, BEGUN], ids=["question", "turns", "system", "begun"])
def test_a_conversation_has_hugging_faces_own_ids(chat_vlm, messages):
    image = noise_image(0)
    own = own_encoding(chat_vlm, messages, [image])
    beside = chat_vlm.inputs(image, messages)
    inside = chat_vlm.inputs(prompts=with_images(messages, [image]))
    for inputs in (beside, inside):
        assert torch.equal(inputs.encoding["input_ids"], own["input_ids"])
        assert torch.equal(inputs.encoding["pixel_values"], own["pixel_values"])
        assert inputs.prompts == (messages,), "the images are taken out"
        assert len(inputs.tokens.images) == 1
    words = "".join(beside.tokens.strings)
    assert words.endswith(" this is a") if messages is BEGUN else words.endswith("ANT:")


def test_a_string_is_a_conversation_of_one_question(chat_vlm):
    image = noise_image(0)
    inputs = chat_vlm.inputs(image, "what is this")
    assert torch.equal(inputs.encoding["input_ids"], chat_vlm.inputs(image, QUESTION).encoding["input_ids"])
    assert torch.equal(inputs.encoding["input_ids"], own_encoding(chat_vlm, QUESTION, [image])["input_ids"])


def test_content_as_a_string_is_not_lost(chat_vlm):
    """tiny-llava's own template would drop it."""
    plain = [
        QUESTION[0],
        {"role": "assistant", "content": "a red circle"},
        {"role": "user", "content": "and the scene ?"},
    ]
    assert chat_vlm.inputs(noise_image(0), plain).texts == chat_vlm.inputs(noise_image(0), TURNS).texts


def test_conversations_and_strings_in_one_batch(llava_vlm):
    images = [noise_image(i) for i in range(3)]
    batch = llava_vlm.inputs(images, [TURNS, "what is this", QUESTION])
    assert batch.prompts == (TURNS, "what is this", QUESTION)
    for row, messages in enumerate([TURNS, QUESTION, QUESTION]):
        own = own_encoding(llava_vlm, messages, [images[row]])
        assert torch.equal(batch[row].encoding["input_ids"], own["input_ids"])
    for_all = llava_vlm.inputs(images, QUESTION)
    assert len(for_all) == 3
    assert for_all.texts == batch.texts[1:2] * 3
    assert llava_vlm.inputs(images[0], [QUESTION, TURNS]).prompts == (QUESTION, TURNS)


def test_two_images_in_two_turns(llava_vlm):
    images = [noise_image(0), noise_image(1, (60, 90))]
    messages = [*TURNS[:2], {"role": "user", "content": [text("and this"), IMAGE]}]
    own = own_encoding(llava_vlm, messages, images)
    for inputs in (llava_vlm.inputs([images], messages), llava_vlm.inputs(prompts=with_images(messages, images))):
        assert torch.equal(inputs.encoding["input_ids"], own["input_ids"])
        assert torch.equal(inputs.encoding["pixel_values"], own["pixel_values"])
        assert [g.image_size for g in inputs.tokens.grids] == [(80, 60), (60, 90)]


def test_images_in_messages_by_path_bytes_and_base64(llava_vlm, tmp_path):
    import base64

    file = io.BytesIO()
    noise_image(0).save(file, "PNG")
    (tmp_path / "a.png").write_bytes(file.getvalue())
    encoded, path = base64.b64encode(file.getvalue()).decode(), str(tmp_path / "a.png")
    forms = [
        {"type": "image", "path": path}, {"type": "image", "url": path}, {"type": "image", "image": file.getvalue()},
        {"type": "image", "base64": encoded}, {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{encoded}"}},
    ]  # fmt: skip
    expected = llava_vlm.inputs(noise_image(0), QUESTION).encoding["pixel_values"]
    inputs = llava_vlm.inputs(prompts=[[{"role": "user", "content": [entry, text("a")]}] for entry in forms])
    assert all(torch.equal(pixels, expected[0]) for pixels in inputs.encoding["pixel_values"])


def test_conversations_work_in_every_later_step(llava_vlm):
    """Answers after it, a forward, the view's title, an intervention's second inputs."""
    inputs = llava_vlm.inputs(noise_image(0), TURNS)
    answered, (n,) = llava_vlm.answered(inputs, ["a red circle"])
    assert torch.equal(answered.tokens.ids[:-n], inputs.tokens.ids)
    assert len(llava_vlm.generate(inputs, 2)) == 1
    assert prompt_text(inputs.prompts[0]) == "and the scene ?"
    page = mv.view.patches(inputs, *mv.read(llava_vlm, inputs, mv.LogitLens(), mv.NormAttention(dst="last")))
    assert page.title.endswith(": and the scene ?")
    assert llava_vlm.inputs(noise_image(1), inputs.prompts[0]).texts == inputs.texts


@pytest.mark.parametrize(
    ("images", "messages", "message"),
    [
        (None, QUESTION, "1 entries .* hold no image, and none were given beside it"),
        (noise_image(0), with_images(QUESTION, [noise_image(0)]), "1 images stand in the conversation, and 1 were given"),
        (noise_image(0), [{"role": "user", "content": "what"}], "holds 0 entries .* but the example has 1 images"),
        ([[noise_image(0)] * 2], QUESTION, "holds 1 entries .* but the example has 2 images"),
        (noise_image(0), [{"role": "user"}], "Message 0 is no message: it needs a role"),
        (noise_image(0), [{"role": "user", "content": [{"type": "video"}]}], "an entry of type 'video'"),
        (noise_image(0), [{"role": "user", "content": [IMAGE, text("<image> a")]}], "wrote <image> 2 times where 1"),
        (None, "what is this", "No image was given"),
    ],
)  # fmt: skip
def test_conversations_that_do_not_fit(llava_vlm, images, messages, message):
    with pytest.raises(mv.InputError, match=message):
        llava_vlm.inputs(images, messages)


def test_an_entry_without_an_image_is_named_where_others_hold_one(llava_vlm):
    messages = [{"role": "user", "content": [IMAGE | {"image": noise_image(0)}, IMAGE, text("what is this")]}]
    with pytest.raises(mv.InputError, match=r"^1 entries \{'type': 'image'\} of the conversation hold no image"):
        llava_vlm.inputs(prompts=messages)


def test_one_message_is_no_conversation():
    with pytest.raises(mv.InputError, match=r"a conversation is a list of messages, \[message\]"):
        images_and_prompt((noise_image(0),), QUESTION[0])


def test_a_conversation_without_a_chat_template_is_refused(blip_vlm, llava_vlm):
    for vlm in (blip_vlm, retemplated(llava_vlm, None)):
        with pytest.raises(mv.InputError, match="has no chat template to write it with: give the prompt as a string"):
            vlm.inputs(noise_image(0), QUESTION)
    assert retemplated(llava_vlm, None).inputs(noise_image(0), "a").texts == ("USER: <image>\na ASSISTANT:",)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (TEXT_ONLY, r"cannot write the messages \(can only concatenate str"),
        ("{% for m in messages %}{{ m['content'] }}{% endfor %}", "wrote <image> 0 times where 1 were expected"),
        ("{% for m in messages %}<image>{% endfor %}", "leaves out the text 'what is this'"),
        ("{{ raise_exception('no') }}", r"cannot write the messages \(no\)"),
    ],
)
def test_a_chat_template_for_text_alone_is_named(llava_vlm, template, reason):
    vlm = retemplated(llava_vlm, template)
    for prompt in ("what is this", QUESTION):
        with pytest.raises(mv.InputError, match=f"The processor's chat template {reason}.*Set processor.chat_template"):
            vlm.inputs(noise_image(0), prompt)
    with pytest.raises(mv.ModelError, match="chat template"):
        mv.load(vlm.hf, vlm.processor)


def test_a_text_template_on_a_model_of_queries(blip_vlm):
    for template in (TEXT_ONLY, "{% for m in messages %}{{ m['content'] }}{% endfor %}"):
        with pytest.raises(mv.InputError, match="The processor's chat template"):
            retemplated(blip_vlm, template).inputs(noise_image(0), "what is this")


# -- strings that hold a template already --


def test_a_prompt_in_its_template_is_not_wrapped_twice(chat_vlm):
    whole = "USER: <image>\nwhat is this ASSISTANT:"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert chat_vlm.inputs(noise_image(0), whole).texts == (whole,)
        assert chat_vlm.inputs(noise_image(0), f"<s>Be brief. {whole}").texts == (f"<s>Be brief. {whole}",)
        half = "USER: <image>\nwhat is this"
        assert chat_vlm.inputs(noise_image(0), half).texts == (half,)


@pytest.mark.parametrize(
    "prompt", ["USER: what is this ASSISTANT:", "USER: what is this", "what is this ASSISTANT:", "A chat. USER: what?"]
)
def test_a_template_without_the_image_is_refused(chat_vlm, prompt):
    with pytest.raises(mv.InputError, match="which the template writes, and no <image>: write <image> where"):
        chat_vlm.inputs(noise_image(0), prompt)
    quoted = [{"role": "user", "content": [IMAGE, text(prompt)]}]
    assert prompt in chat_vlm.inputs(noise_image(0), quoted).texts[0], "a conversation says what is meant"
    assert chat_vlm.inputs(noise_image(0), "what does the SUPERUSER: do").tokens.last


def test_an_image_token_without_a_template_warns_once(llava_vlm):
    with pytest.warns(UserWarning, match="nothing of the template") as caught:
        inputs = llava_vlm.inputs([noise_image(i) for i in range(3)], "<image> what is this")
    assert inputs.texts == ("<image> what is this",) * 3
    assert len(caught) == 1


def test_marks_are_those_of_the_models_own_template(llava_vlm):
    vlm = retemplated(llava_vlm, LLAVA_TEMPLATE.replace("USER: ", "<|user|>").replace("ASSISTANT:", "<|model|>"))
    with pytest.raises(mv.InputError, match=r"holds '<\|user\|>'"):
        vlm.inputs(noise_image(0), "<|user|>what")
    assert vlm.inputs(noise_image(0), "USER: what").texts[0].count("USER:") == 1


# -- unusable prompts in a batch --


def test_half_a_character_is_named(vlm):
    with pytest.raises(mv.InputError, match=r"Example 1: The prompt holds '\\ud83d' at \d+, half of a character"):
        vlm.inputs(noise_image(0), ["a", "what is \ud83d this"])
    with pytest.raises(mv.InputError, match=r"The answer holds '\\ude00' at 2, half of a character"):
        vlm.answer_tokens(vlm.inputs(noise_image(0), "a"), "a \ude00")


def test_the_unusable_example_is_named(llava_vlm, tmp_path):
    groups = [[noise_image(0), noise_image(1)], [noise_image(2)], [noise_image(3)]]
    with pytest.raises(mv.InputError, match=r"Example 2: The prompt 'USER:.*leaves no room: \d+ tokens in input_ids"):
        llava_vlm.inputs(groups, ["a", "a", "what is this " * 1000])
    with pytest.raises(mv.InputError, match=r"Example 1: The prompt .* holds 2 <image>, but the example has 1 images"):
        llava_vlm.inputs(groups, ["a", "<image> USER: <image>", "a"])
    with pytest.raises(mv.InputError, match=r"Example 2: No image at .*none.png"):
        llava_vlm.inputs([*groups[:2], [tmp_path / "none.png"]], "a")
    with pytest.raises(mv.InputError, match="Example 1: The example has no image"):
        llava_vlm.inputs([groups[0], []], "a")
    with pytest.raises(mv.InputError, match=r"^No image at"):
        llava_vlm.inputs(tmp_path / "none.png", "a")


def test_a_conversation_in_one_form():
    messages, images = split_conversation(({"role": "user", "content": "a"}, *with_images(QUESTION, ["x.png"])))
    assert messages == [{"role": "user", "content": [text("a")]}, *QUESTION]
    assert images == ["x.png"]
