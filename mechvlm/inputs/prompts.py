"""Prompts: strings and conversations, written in the template of the model's family.

A string without the image token is put in the template. A string that holds the image token is
taken as it is. A conversation, a list of messages as Hugging Face takes it, is written by the
processor's chat template.
"""

import base64
import re
from collections.abc import Mapping, Sequence
from typing import Any

from mechvlm.errors import InputError
from mechvlm.families.record import Architecture
from mechvlm.inputs.image_word import ImageWord
from mechvlm.inputs.images import ImageLike

Conversation = Sequence[Mapping[str, Any]]
"""Messages, {"role": "user", "content": ...}. Content is a string, or a list of entries such as
{"type": "image"} and {"type": "text", "text": "What is it?"}."""

Prompt = str | Conversation

IMAGE_KEYS = ("image", "url", "path", "base64")
"""Where an entry of type "image" may hold its image; Hugging Face's names."""


# -- conversations ---------------------------------------------------------------------------------


def is_conversation(prompt: Any) -> bool:
    """Whether it is a list of messages, and not a list of prompts."""
    return isinstance(prompt, list | tuple) and bool(prompt) and all(isinstance(m, Mapping) for m in prompt)


def split_conversation(messages: Conversation) -> tuple[list[dict[str, Any]], list[ImageLike | None]]:
    """A conversation in one form, and the images that its messages hold.

    Returns:
        (messages, images): every message has a list of entries, {"type": "image"} without the image
        and {"type": "text", "text": ...}; there is one image per image entry, None for an entry
        that holds none.

    Raises:
        InputError: for a message without role and content, or an entry that is no text or image.
    """
    plain, images = [], []
    for number, message in enumerate(messages):
        role, content = message.get("role"), message.get("content")
        if not isinstance(role, str) or not isinstance(content, str | list | tuple):
            raise InputError(
                f"Message {number} is no message: it needs a role, such as 'user', and content, a string or a list of entries; "
                f"its keys are {sorted(map(str, message))}."
            )
        # A template that walks through entries would walk through a string's letters.
        entries = [{"type": "text", "text": content}] if isinstance(content, str) else content
        written = []
        for entry in entries:
            kind = entry.get("type") if isinstance(entry, Mapping) else type(entry).__name__
            if kind == "text" and isinstance(entry.get("text"), str):
                written.append({"type": "text", "text": entry["text"]})
            elif kind in ("image", "image_url"):
                images.append(_image_in(entry))
                written.append({"type": "image"})
            else:
                raise InputError(
                    f"Message {number} holds an entry of type {kind!r}: entries are {{'type': 'image'}} and "
                    "{'type': 'text', 'text': '...'}."
                    + (" Of a video give frames, as images." if kind == "video" else "")
                )
        plain.append({"role": role, "content": written})
    return plain, images


def _image_in(entry: Mapping[str, Any]) -> ImageLike | None:
    """The image that an entry of a message holds, or None."""
    if "image_url" in entry:  # OpenAI's form
        url = entry["image_url"]
        entry = {"url": url.get("url") if isinstance(url, Mapping) else url}
    given = [(key, entry[key]) for key in IMAGE_KEYS if entry.get(key) is not None]
    if not given:
        return None
    key, image = given[0]
    if isinstance(image, str) and (key == "base64" or image.startswith("data:")):
        return base64.b64decode(image.split(",")[-1])
    return image


def prompt_text(prompt: Prompt) -> str:
    """The prompt as a title shows it: of a conversation, the text of its last message."""
    if isinstance(prompt, str):
        return prompt
    messages, _ = split_conversation(prompt)
    return " ".join(entry["text"] for entry in messages[-1]["content"] if entry["type"] == "text")


# -- templates -------------------------------------------------------------------------------------


def fill_template(prompt: Prompt, n_images: int, word: ImageWord, record: Architecture, processor) -> str:
    """The text that is tokenized: the prompt in the processor's chat template, or the record's.

    Args:
        prompt: a string, or a conversation as `split_conversation` returns it.
        n_images: how many images the example has.
        word: what stands for an image.
        record: record of the model's class.
        processor: the Hugging Face processor.

    Raises:
        InputError: for no image or too many, a prompt that does not fit them, or a chat template
            that cannot write it.
    """
    if not n_images:
        raise InputError("The example has no image; a vision-language model is read with at least one.")
    if record.images_per_prompt is not None and n_images > record.images_per_prompt:
        raise InputError(f"The example has {n_images} images; {record.hf_class} takes {record.images_per_prompt}.")
    if not isinstance(prompt, str):
        text = _write_conversation(prompt, n_images, word, record, processor)
    elif word.text in prompt:
        text = _check_as_it_is(prompt, n_images, word, record)
    else:
        text = _wrap(prompt, n_images, word, record, processor)
        if marks := [mark for mark in template_marks(word, record, processor) if _holds(prompt, mark)]:
            raise InputError(
                f"The prompt {prompt[:60]!r} holds {marks[0]!r}, which the template writes, and no {word.text}: write "
                f"{word.text} where the image belongs, or give the question alone. Words that only look like the template's can "
                "be given in a conversation, [{'role': 'user', 'content': [{'type': 'image'}, {'type': 'text', 'text': '...'}]}]."
            )
    check_characters(text, "prompt")
    return text


def check_characters(text: str, what: str) -> None:
    """Refuse text that no tokenizer reads; `what` names it.

    Raises:
        InputError: for a lone surrogate.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"The {what} holds {text[error.start]!r} at {error.start}, half of a character (a lone surrogate), which no "
            "tokenizer reads: its text was decoded or cut wrongly."
        ) from error


def is_bare(prompt: Prompt, word: ImageWord, record: Architecture, processor) -> bool:
    """Whether a prompt holds the image token and nothing of the template."""
    if not isinstance(prompt, str) or word.text not in prompt:
        return False
    try:
        marks = template_marks(word, record, processor)
    except InputError:  # a template that cannot be used was not needed either
        return False
    return bool(marks) and not any(_holds(prompt, mark) for mark in marks)


def template_marks(word: ImageWord, record: Architecture, processor) -> tuple[str, ...]:
    """What the template writes before and after a prompt, such as "USER:" and "ASSISTANT:"."""
    before, _, after = _wrap("\0", 1, word, record, processor).partition("\0")
    ends = [part.split()[-1:] for part in (before.split(word.text)[0], after)]
    # Any prompt holds words and punctuation: a mark is both in one piece.
    return tuple(mark for end in ends for mark in end if re.search(r"\w", mark) and re.search(r"\W", mark))


def _holds(prompt: str, mark: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(mark)}", prompt) is not None


def _check_as_it_is(prompt: str, n_images: int, word: ImageWord, record: Architecture) -> str:
    """The prompt itself, if it holds the image token once per image."""
    if word.inserted:
        raise InputError(
            f"Leave {word.text} out of the prompt: the processor of {record.hf_class} puts the image before the text."
        )
    if (n_words := prompt.count(word.text)) != n_images:
        raise InputError(f"The prompt {prompt!r} holds {n_words} {word.text}, but the example has {n_images} images.")
    return prompt


def _wrap(prompt: str, n_images: int, word: ImageWord, record: Architecture, processor) -> str:
    """A string in the chat template of the processor, or else in the record's template."""
    if not getattr(processor, "chat_template", None):
        template = re.sub(r"{images}\s*", "", record.template) if word.inserted else record.template
        return template.format(images="\n".join([word.text] * n_images), prompt=prompt)
    content = [{"type": "image"}] * n_images + [{"type": "text", "text": prompt}]
    return _write([{"role": "user", "content": content}], n_images, word, record, processor)


def _write_conversation(messages: Conversation, n_images: int, word: ImageWord, record: Architecture, processor) -> str:
    """A conversation in the chat template of the processor."""
    if not getattr(processor, "chat_template", None):
        raise InputError(
            f"A conversation was given, and this {type(processor).__name__} has no chat template to write it with: give the "
            "prompt as a string, or set processor.chat_template."
        )
    n_entries = sum(entry["type"] == "image" for message in messages for entry in message["content"])
    if n_entries != n_images:
        raise InputError(
            f"The conversation holds {n_entries} entries {{'type': 'image'}}, but the example has {n_images} images: write "
            "one where each image belongs. Several images of one example are a list within the list: [[first, second]]."
        )
    return _write(messages, n_images, word, record, processor)


def _write(messages: Conversation, n_images: int, word: ImageWord, record: Architecture, processor) -> str:
    """The messages as the chat template writes them, checked for what it may have left out.

    A last message of the assistant is left open, for the model to go on with; after any other the
    model's answer begins. So do Hugging Face's pipelines.
    """
    is_begun = messages[-1]["role"] == "assistant"
    advice = (
        "It may be a language model's, for text alone. Set processor.chat_template to the vision-language model's own, or to "
        f"None for the plain template {record.template!r}."
    )
    try:
        text = processor.apply_chat_template(
            list(messages), add_generation_prompt=not is_begun, continue_final_message=is_begun
        )
    except Exception as error:  # a template can raise anything
        raise InputError(f"The processor's chat template cannot write the messages ({error}). {advice}") from error
    expected = 0 if word.inserted else n_images
    texts = [entry["text"] for message in messages for entry in message["content"] if entry["type"] == "text"]
    if (n_words := text.count(word.text)) != expected:
        in_texts = " Leave it out of the text." if any(word.text in part for part in texts) else f" {advice}"
        raise InputError(
            f"The processor's chat template wrote {word.text} {n_words} times where {expected} were expected.{in_texts}"
        )
    if lost := [part for part in texts if part.strip() not in text]:
        raise InputError(f"The processor's chat template leaves out the text {lost[0][:60]!r}. {advice}")
    if re.search(r"""\{['"]type['"]""", text) and not any("type" in part for part in texts):
        raise InputError(f"The processor's chat template writes entries as Python shows them: {text[:80]!r}. {advice}")
    return text
