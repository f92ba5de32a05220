"""Images and prompts become one padded batch, with a `TokenMap` for each example.

1. Pair each image, or list of images, with its prompt.
2. Put the prompt in the family's template.
3. Run the Hugging Face processor on each pair alone.
4. Pad the sequences to one length, and map what each position holds.
"""

import warnings
from collections.abc import Iterable, Sequence
from numbers import Integral
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from mechvlm.errors import InputError
from mechvlm.families.record import Architecture, part
from mechvlm.inputs.batch import Inputs, WeakLink, check_lengths
from mechvlm.inputs.encodings import Parts, collate, forward_keys, is_sequence, kept_keys
from mechvlm.inputs.grids import check_resize, is_known
from mechvlm.inputs.image_word import ImageWord, image_word
from mechvlm.inputs.images import ImageLike, open_image
from mechvlm.inputs.pairs import images_and_prompt, named_by_example, pair_examples
from mechvlm.inputs.pieces import TOKENIZING, spell, token_texts
from mechvlm.inputs.places import image_layouts
from mechvlm.inputs.prompts import Prompt, fill_template, is_bare
from mechvlm.inputs.tokens import Modality, TokenMap
from mechvlm.inputs.views import MEMORY, Layout


def build_inputs(
    images: ImageLike | Sequence[ImageLike | Sequence[ImageLike]] | None,
    prompts: Prompt | Sequence[Prompt] | None,
    *,
    record: Architecture,
    config,
    processor,
    model: str = "",
    ids: tuple[str, ...] | None = None,
    first: int = 0,
    write: WeakLink | None = None,
) -> Inputs:
    """Images and their prompts as a batch.

    A single image goes with every prompt, and a single prompt with every image. A prompt that
    already contains the image token is taken as it is: the template is not added.

    Args:
        images: one image for all examples, one per example, or one list of images per example; None
            where conversations hold their images.
        prompts: one prompt for all examples, or one per example: strings or conversations.
        record: record of the model's class.
        config: config of the model.
        processor: the Hugging Face processor. Of what it returns, the batch holds what the model's
            forward takes.
        model: name of the model.
        ids: the examples' names.
        first: the number by which errors call the first example.
        write: gives the function that writes answers, as long as the model is there.

    Raises:
        InputError: for an image that cannot be read, numbers of images and prompts that do not
            match, a prompt whose image tokens are more or fewer than its images, or a prompt that
            leaves no room for the image. Of several examples it names the one.
    """
    pairs = pair_examples(images, prompts)
    word = image_word(record, config, processor)
    examples = []
    for number, (group, prompt) in enumerate(pairs, first):
        try:
            examples.append(encode_example(group, prompt, record, config, processor))
        except InputError as error:
            raise named_by_example(error, number, first + len(pairs)) from error
    if any(is_bare(prompt, word, record, processor) for _, prompt, *_ in examples):
        warnings.warn(
            f"The prompt holds {word.text} and nothing of the template, and is tokenized as it is (inputs.texts shows it). "
            f"Leave {word.text} out to have the template put around it, or write the template as well.",
            stacklevel=3,
        )
    opened, given, texts, encodings, layouts = zip(*examples, strict=True)
    _check_alike(encodings, opened, record)
    batch, parts = _collate(encodings, record, config, processor)
    rows = zip(batch["input_ids"], batch["attention_mask"], layouts, strict=True)
    maps = tuple(_token_map(*row, record, config, processor.tokenizer) for row in rows)
    return Inputs(batch, maps, opened, given, texts, model, ids, parts, record.equal_lengths, write)


def encode_example(
    group, prompt: Prompt, record: Architecture, config, processor
) -> tuple[tuple[Image.Image, ...], Prompt, str, dict[str, Tensor], tuple[Layout, ...]]:
    """One example: its images, its prompt, the text that is tokenized, its encoding and layouts."""
    word = image_word(record, config, processor)
    group, prompt = images_and_prompt((group,) if isinstance(group, Image.Image) else group, prompt)
    pictures = tuple(open_image(image) for image in group)
    if is_known(processor.image_processor):
        for picture in pictures:
            check_resize(picture.size, processor.image_processor)
    text = fill_template(prompt, len(pictures), word, record, processor)
    # One example at a time: in a batch, InstructBLIP's processor pads between image and text.
    # A nested list says that one text holds them all.
    group = list(pictures) if len(pictures) == 1 else [list(pictures)]
    try:
        options = {**_bos(text, processor), **_types(record, processor)}
        with TOKENIZING:
            encoding = processor(images=group, text=[text], return_tensors="pt", **options)
    except Exception as error:  # a processor can raise anything
        sizes = ", ".join(f"{width} x {height}" for width, height in (picture.size for picture in pictures))
        raise InputError(
            f"{type(processor).__name__} cannot encode {len(pictures)} images ({sizes}) with the prompt {text[:60]!r}: {error}"
        ) from error
    encoding = kept_keys(encoding, record)
    _check_room(encoding, text, record, config)
    _check_end(encoding, text, processor.tokenizer)
    return pictures, prompt, text, encoding, _layouts(encoding, pictures, word, record, config, processor)


def _bos(text: str, processor) -> dict[str, bool]:
    """Options of the processor: a template that writes BOS itself must not get a second one.

    The rule is that of Hugging Face's `apply_chat_template(tokenize=True)`.
    """
    bos = processor.tokenizer.bos_token
    return {"add_special_tokens": False} if bos and text.startswith(bos) else {}


def _types(record: Architecture, processor) -> dict[str, bool]:
    """Options of a processor that gives the tokens' types only when asked, as a forward needs."""
    asked = "mm_token_type_ids" in forward_keys(record)
    given = getattr(type(processor), "return_mm_token_type_ids", True)
    return {"return_mm_token_type_ids": True} if asked and not given else {}


def example_names(ids: Any, n_examples: int) -> tuple[str, ...] | None:
    """The examples' ids as strings, or None where none are given.

    Raises:
        InputError: for another number of ids than examples, or ids that are no names or numbers.
    """
    if ids is None:
        return None
    names = [] if isinstance(ids, str) or not isinstance(ids, Iterable) else list(ids)
    if not names or not all(isinstance(name, str | Integral) for name in names):
        raise InputError(f"ids is a list with one name per example, not {ids!r}.")
    if len(names) != n_examples:
        raise InputError(f"{len(names)} ids were given for {n_examples} examples: give one each.")
    return tuple(map(str, names))


def longest_sequences(record: Architecture, config) -> dict[str, int]:
    """The most positions that the model has for each sequence of an encoding."""
    own = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    limits = {} if own is None else {"input_ids": int(own)}
    return {**limits, **{key: part(config, path) for key, path in record.max_lengths}}


def _check_room(encoding, text: str, record: Architecture, config) -> None:
    """Refuse an encoding that is longer than the model takes, or that holds no image token."""
    image_token = image_token_of(record, config)
    for key, limit in longest_sequences(record, config).items():
        length = encoding[key].shape[-1]
        if length > limit:
            visual = int((encoding["input_ids"] == image_token).sum())
            raise InputError(
                f"The prompt {text[:60]!r}... leaves no room: {length} tokens in {key}, "
                f"{visual if key == 'input_ids' else 0} of them for the image. The model takes {limit}. "
                "Shorten the prompt."
            )
    if image_token is not None and not (encoding["input_ids"] == image_token).any():
        raise InputError(f"The prompt {text[:60]!r} holds no image token ({image_token}).")


def _check_end(encoding, text: str, tokenizer) -> None:
    """Refuse a tokenizer that ends the prompt with EOS: no answer follows its last position."""
    eos = tokenizer.eos_token
    if eos and int(encoding["input_ids"][0, -1]) == tokenizer.eos_token_id and not text.endswith(eos):
        raise InputError(
            f"The tokenizer adds {eos} after the prompt, where the model would answer (add_eos_token is for training). Load the "
            "processor with add_eos_token=False."
        )


def image_token_of(record: Architecture, config) -> int | None:
    """The id of the image token; None for a model of memories that has none in its config."""
    return part(config, record.image_token_id) if record.image_token_id else None


def _check_alike(encodings, opened, record: Architecture) -> None:
    """Refuse examples that the model would not read in one batch as it reads each alone."""
    counts = sorted({len(pictures) for pictures in opened})
    if record.visual_tokens == "memory" and len(counts) > 1:
        raise InputError(
            f"The examples have {' and '.join(map(str, counts))} images, and {record.hf_class} reads a batch rightly only where "
            "all have equally many: give those of one number together."
        )
    sizes = {tuple(encoding["pixel_values"].shape[-2:]) for encoding in encodings} if record.equal_sizes else set()
    if len(sizes) > 1:
        shapes = sorted(f"{width} x {height}" for height, width in sizes)
        raise InputError(
            f"The images become {' and '.join(shapes)} pixels, and the vision encoder of {record.hf_class} would read the "
            "padding around the smaller ones: give images of one size together, or one at a time."
        )
    check_lengths([encoding["input_ids"].shape[1] for encoding in encodings], record.equal_lengths)


def padding_id(tokenizer, image_token: int | None) -> int:
    """The id that fills padding. Padding is masked, so any id will do but the image's: features
    would go there."""
    ids = (tokenizer.pad_token_id or 0, 0, 1)
    return next(id for id in ids if id != image_token)


def _collate(
    encodings: Sequence[dict[str, Tensor]], record: Architecture, config, processor
) -> tuple[dict[str, Tensor], dict[str, Parts]]:
    """The encodings of all examples as one batch, and how they share it."""
    right, image_token = record.right_padded, image_token_of(record, config)
    sequences = {key for key in encodings[0] if is_sequence(key, encodings[0], processor, right)}
    fill = {
        key: padding_id(processor.qformer_tokenizer if key in right else processor.tokenizer, image_token)
        for key in sequences
        if key.endswith("input_ids")
    }
    return collate(encodings, sequences, right, fill)


def _layouts(
    encoding: dict[str, Tensor], pictures, word: ImageWord, record: Architecture, config, processor
) -> tuple[Layout, ...]:
    """How the visual tokens of each image of one example lie on it."""
    sizes = [picture.size for picture in pictures]
    if record.visual_tokens == "memory":
        return tuple(Layout(0, size, reason=MEMORY) for size in sizes)
    n_tokens = int((encoding["input_ids"] == part(config, record.image_token_id)).sum())
    pixels = tuple(encoding["pixel_values"].shape) if "pixel_values" in encoding else ()
    return image_layouts(sizes, n_tokens, pixels, word, record, config, processor)


def _token_map(
    ids: Tensor, mask: Tensor, layouts: tuple[Layout, ...], record: Architecture, config, tokenizer
) -> TokenMap:
    """The map of one row of the batch."""
    modality = torch.full_like(ids, Modality.TEXT)
    modality[torch.isin(ids, torch.tensor(tokenizer.all_special_ids))] = Modality.SPECIAL
    if record.visual_tokens != "memory":
        modality[ids == image_token_of(record, config)] = Modality.IMAGE
    modality[mask == 0] = Modality.PADDING
    strings = token_texts(ids.tolist(), tokenizer)
    spelled = spell(ids.tolist(), strings, tokenizer)
    return TokenMap(ids, strings, spelled, modality, layouts)
