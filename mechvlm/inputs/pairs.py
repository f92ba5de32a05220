"""Which images go with which prompt."""

from collections.abc import Mapping
from typing import Any

from mechvlm.errors import InputError
from mechvlm.inputs.images import ImageLike
from mechvlm.inputs.prompts import Prompt, is_conversation, split_conversation


def pair_examples(images: Any, prompts: Any) -> list[tuple[Any, Any]]:
    """(images, prompt) of each example; the images are a list, or None for those of a conversation.

    Raises:
        InputError: for no example, or numbers of images and prompts that do not match.
    """
    one_prompt = isinstance(prompts, str | Mapping) or is_conversation(prompts) or not hasattr(prompts, "__len__")
    texts = [prompts] if one_prompt else list(prompts)
    if images is None:
        groups: list[Any] = [None] * len(texts)
    else:
        is_one_image = isinstance(images, ImageLike) or not hasattr(images, "__len__")
        groups = [images] if is_one_image else list(images)
        groups = [tuple(group) if isinstance(group, list | tuple) else (group,) for group in groups]
    if not groups or not texts:
        raise InputError(f"There is nothing to run: {len(groups)} images and {len(texts)} prompts were given.")
    if len(groups) == 1:
        groups *= len(texts)
    if one_prompt:
        texts *= len(groups)
    if len(groups) != len(texts):
        raise InputError(
            f"{len(groups)} images and {len(texts)} prompts were given: give one prompt for all, or one per image. "
            "Several images in one prompt are a list within the list: [[first, second]]."
        )
    pairs = list(zip(groups, texts, strict=True))
    for number, pair in enumerate(pairs):
        try:
            images_and_prompt(*pair)
        except InputError as error:
            raise named_by_example(error, number, len(pairs)) from error
    return pairs


def named_by_example(error: InputError, number: int, n_examples: int) -> InputError:
    """The error with the number of its example in front, where there are several."""
    return error if n_examples == 1 else InputError(f"Example {number}: {error}")


def images_and_prompt(group: Any, prompt: Any) -> tuple[list[ImageLike], Prompt]:
    """The images of one example, and its prompt; a conversation without the images in it.

    Raises:
        InputError: for another type than a prompt's or an image's, images both beside and in a
            conversation, or in neither place.
    """
    inside: list[ImageLike | None] = []
    if is_conversation(prompt):
        prompt, inside = split_conversation(prompt)
    elif isinstance(prompt, Mapping):
        raise InputError("A message was given as a prompt: a conversation is a list of messages, [message].")
    elif not isinstance(prompt, str):
        raise InputError(f"A prompt is a string, or a conversation (a list of messages), not {type(prompt).__name__}.")
    held = [image for image in inside if image is not None]
    if group is not None and held:
        raise InputError(
            f"{len(held)} images stand in the conversation, and {len(group)} were given beside it: leave `images` out, or "
            "write {'type': 'image'} alone in the messages."
        )
    if group is None and isinstance(prompt, str):
        raise InputError("No image was given: vlm.inputs(image, prompt). Only a conversation can hold its images.")
    if group is None and len(held) < len(inside):
        raise InputError(
            f"{len(inside) - len(held)} entries {{'type': 'image'}} of the conversation hold no image, and none were given "
            "beside it: write {'type': 'image', 'image': image}, or give images."
        )
    images = held if group is None else list(group)
    for image in images:
        if not isinstance(image, ImageLike):
            raise InputError(
                f"An image is a PIL image, a path, a file or its bytes, an array or a tensor, not {type(image).__name__}."
            )
    return images, prompt
