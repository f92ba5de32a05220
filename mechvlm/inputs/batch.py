"""Images and prompts become one padded batch, with a `TokenMap` for each example.

1. Pair each image, or list of images, with its prompt.
2. Put the prompt in the family's template.
3. Run the Hugging Face processor on each pair alone.
4. Pad the sequences to one length, and map what each position holds.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from numbers import Integral
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from mechvlm.errors import InputError
from mechvlm.families.record import Architecture, part
from mechvlm.inputs.grids import check_resize, patch_grid
from mechvlm.inputs.images import ImageLike, open_image
from mechvlm.inputs.rows import row_numbers
from mechvlm.inputs.tokens import Modality, TokenMap


@dataclass(frozen=True)
class Inputs:
    """A batch for the model, with the token maps, images and prompts that its activations need.

    >>> inputs = vlm.inputs([first, second], "What is in the image?")
    >>> inputs.token_maps[0].image  # positions of the first example's visual tokens

    Attributes:
        encoding: keyword arguments of the Hugging Face model; sequences are padded on the left.
        token_maps: one `TokenMap` per example.
        images: the original images in RGB, one tuple per example, in the prompt's order.
        prompts: the prompts as they were given.
        texts: the prompts in the family's template, as they were tokenized.
        model: name of the model that the batch was made for.
        ids: the examples' names, or None; results carry them.
    """

    encoding: dict[str, Tensor] = field(repr=False)
    token_maps: tuple[TokenMap, ...] = field(repr=False)
    images: tuple[tuple[Image.Image, ...], ...] = field(repr=False)
    prompts: tuple[str, ...]
    texts: tuple[str, ...] = field(repr=False)
    model: str = ""
    ids: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return len(self.token_maps)

    def __getitem__(self, examples: Any) -> "Inputs":
        """Some of the examples as a batch, padded no further than they need.

        >>> inputs[3], inputs[:10], inputs[[1, 5]], inputs[[True, False, True]], inputs[-1]

        Args:
            examples: a number, a slice, several numbers, or a mask with one bool per example.

        Raises:
            IndexError: for an example that does not exist, or a mask of another length.
            InputError: for no example, or an index of another type.
        """
        return self.take(row_numbers(examples, len(self)))

    def take(self, rows: Sequence[int], trim: bool = True) -> "Inputs":
        """The examples of these numbers; with trim=False they keep the whole batch's padding.

        Their positions are then those of the whole batch.
        """
        rows = list(rows)
        masks = {key: self.encoding[key][rows].bool() for key in self.encoding if key.endswith("attention_mask")}
        kept = {key: mask.any(0) if trim else torch.ones_like(mask[0]) for key, mask in masks.items()}
        # pixel_values has one row per image: those of an example follow each other.
        ends = list(accumulate(len(group) for group in self.images))
        image_rows = [image for row in rows for image in range(ends[row] - len(self.images[row]), ends[row])]
        encoding = {}
        for key, value in self.encoding.items():
            mask = "qformer_attention_mask" if key.startswith("qformer") else "attention_mask"
            encoding[key] = value[image_rows] if key == "pixel_values" else value[rows][:, kept[mask]]
        maps = tuple(_at(self.token_maps[row], kept["attention_mask"]) for row in rows)
        names = None if self.ids is None else tuple(self.ids[row] for row in rows)
        images, prompts = tuple(self.images[row] for row in rows), tuple(self.prompts[row] for row in rows)
        texts = tuple(self.texts[row] for row in rows)
        return Inputs(encoding, maps, images, prompts, texts, self.model, names)

    @property
    def tokens(self) -> TokenMap:
        """The `TokenMap` of a batch of one example.

        Raises:
            ValueError: for a batch of several; use `token_maps[i]` there.
        """
        if len(self) != 1:
            raise ValueError(f"These inputs hold {len(self)} examples: take inputs.token_maps[i] of one of them.")
        return self.token_maps[0]


def _at(tokens: TokenMap, kept: Tensor) -> TokenMap:
    """The map of the positions that are kept [pos]."""
    strings = tuple(piece for piece, keep in zip(tokens.strings, kept.tolist(), strict=True) if keep)
    return replace(tokens, ids=tokens.ids[kept], strings=strings, modality=tokens.modality[kept])


def build_inputs(
    images: ImageLike | Sequence[ImageLike | Sequence[ImageLike]],
    prompts: str | Sequence[str],
    *,
    record: Architecture,
    config,
    processor,
    model: str = "",
    ids: tuple[str, ...] | None = None,
    first: int = 0,
) -> Inputs:
    """Images and their prompts as a batch.

    A single image goes with every prompt, and a single prompt with every image. A prompt that
    already contains the image token is taken as it is: the template is not added.

    Args:
        images: one image for all examples, one per example, or one list of images per example.
        prompts: one prompt for all examples, or one per example.
        record: record of the model's class.
        config: config of the model.
        processor: the Hugging Face processor.
        model: name of the model.
        ids: the examples' names.
        first: the number by which errors call the first example.

    Raises:
        InputError: for an image that cannot be read, numbers of images and prompts that do not
            match, a prompt whose image tokens are more or fewer than its images, or a prompt that
            leaves no room for the image.
    """
    pairs = pair_up(images, prompts)
    token = processor.tokenizer.convert_ids_to_tokens(part(config, record.image_token_id))
    encodings, texts = [], []
    opened: list[tuple[Image.Image, ...]] = []
    for example, (group, prompt) in enumerate(pairs, first):
        pictures = tuple(open_image(image) for image in group)
        for picture in pictures:
            check_resize(picture.size, processor.image_processor)
        text = _fill_template(prompt, len(pictures), token, record, processor, example)
        # One example at a time: in a batch, InstructBLIP's processor pads between image and text.
        encoding = processor(images=list(pictures), text=[text], return_tensors="pt", **_bos(text, processor))
        _check_room(encoding, prompt, record, config, example)
        encodings.append(encoding)
        texts.append(text)
        opened.append(pictures)
    batch = _collate(encodings, record, processor)
    maps = tuple(
        _token_map(batch, row, encodings[row]["pixel_values"], opened[row], record, config, processor)
        for row in range(len(pairs))
    )
    return Inputs(batch, maps, tuple(opened), tuple(p for _, p in pairs), tuple(texts), model, ids)


def _bos(text: str, processor) -> dict[str, bool]:
    """Options of the processor: a template that writes BOS itself must not get a second one.

    The rule is that of Hugging Face's `apply_chat_template(tokenize=True)`.
    """
    bos = processor.tokenizer.bos_token
    return {"add_special_tokens": False} if bos and text.startswith(bos) else {}


def pair_up(images, prompts) -> list[tuple[tuple[ImageLike, ...], str]]:
    """(images, prompt) of each example."""
    _check_types(images, prompts)
    one_image = isinstance(images, ImageLike)
    groups = [images] if one_image else list(images)
    groups = [(g,) if isinstance(g, ImageLike) else tuple(g) for g in groups]
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    if not groups or not texts:
        raise InputError(f"There is nothing to run: {len(groups)} images and {len(texts)} prompts were given.")
    if len(groups) == 1:
        groups *= len(texts)
    if isinstance(prompts, str):
        texts *= len(groups)
    if len(groups) != len(texts):
        raise InputError(
            f"{len(groups)} images and {len(texts)} prompts were given: give one prompt for all, or one per image. "
            "Several images in one prompt are a list within the list: [[first, second]]."
        )
    return list(zip(groups, texts, strict=True))


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


def _check_types(images, prompts) -> None:
    for group in images if isinstance(images, list | tuple) else [images]:
        for image in group if isinstance(group, list | tuple) else [group]:
            if not isinstance(image, ImageLike):
                raise InputError(
                    f"An image is a PIL image or the path of one, not {type(image).__name__}. Turn an array of 0..255 "
                    "into one with PIL.Image.fromarray(array)."
                )
    for prompt in prompts if isinstance(prompts, list | tuple) else [prompts]:
        if not isinstance(prompt, str):
            raise InputError(f"A prompt is a string, not {type(prompt).__name__}.")


def _fill_template(prompt: str, n_images: int, token: str, record: Architecture, processor, example: int) -> str:
    """The prompt in the chat template of the processor, or else in the record's template."""
    if not n_images:
        raise InputError(f"Example {example} has no image; a vision-language model is read with at least one.")
    if record.images_per_prompt is not None and n_images > record.images_per_prompt:
        raise InputError(
            f"Example {example} has {n_images} images; {record.hf_class} takes {record.images_per_prompt}."
        )
    if token in prompt:
        n_tokens = prompt.count(token)
        if record.visual_tokens == "queries":
            raise InputError(f"Leave {token} out of the prompt: {record.hf_class} puts its queries before the text.")
        if n_tokens != n_images:
            raise InputError(
                f"The prompt {prompt!r} holds {n_tokens} {token}, but example {example} has {n_images} images."
            )
        return prompt
    if getattr(processor, "chat_template", None):
        content = [{"type": "image"}] * n_images + [{"type": "text", "text": prompt}]
        return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    return record.template.format(images="\n".join([token] * n_images), prompt=prompt)


def _check_room(encoding, prompt: str, record: Architecture, config, example: int) -> None:
    """Refuse an encoding that is longer than the model takes, or that holds no image token."""
    image_token = part(config, record.image_token_id)
    for key, path in record.max_lengths:
        length, limit = encoding[key].shape[-1], part(config, path)
        if length > limit:
            visual = int((encoding["input_ids"] == image_token).sum())
            raise InputError(
                f"The prompt of example {example} ({prompt[:40]!r}...) leaves no room: {length} tokens in {key}, "
                f"{visual if key == 'input_ids' else 0} of them for the image. The model takes {limit}. "
                "Shorten the prompt."
            )
    if not (encoding["input_ids"] == image_token).any():
        raise InputError(f"The prompt of example {example} holds no image token ({image_token}).")


def _collate(encodings: list, record: Architecture, processor) -> dict[str, Tensor]:
    """The encodings of all examples as one batch.

    Sequences are padded to the longest: on the right if the record lists them in `right_padded`,
    else on the left. Images are concatenated.
    """
    batch = {}
    for key in encodings[0]:
        rows = [e[key] for e in encodings]
        if key == "pixel_values":
            batch[key] = torch.cat(rows)
            continue
        right = key in record.right_padded
        value = 0
        if key.endswith("input_ids"):
            tokenizer = processor.qformer_tokenizer if right else processor.tokenizer
            value = tokenizer.pad_token_id or 0  # padding is masked: any id will do
        longest = max(r.shape[-1] for r in rows)
        pad = [(0, longest - r.shape[-1]) if right else (longest - r.shape[-1], 0) for r in rows]
        batch[key] = torch.cat([torch.nn.functional.pad(r, p, value=value) for r, p in zip(rows, pad, strict=True)])
    return batch


def _token_map(batch, row, pixels, images, record, config, processor) -> TokenMap:
    """The map of one row; `pixels` [image channel height width] are its pixel values."""
    ids = batch["input_ids"][row]
    tokenizer = processor.tokenizer
    modality = torch.full_like(ids, Modality.TEXT)
    modality[torch.isin(ids, torch.tensor(tokenizer.all_special_ids))] = Modality.SPECIAL
    modality[ids == part(config, record.image_token_id)] = Modality.IMAGE
    modality[batch["attention_mask"][row] == 0] = Modality.PADDING
    size = (int(pixels.shape[-2]), int(pixels.shape[-1]))
    grids = tuple(patch_grid(i.size, processor.image_processor, size, part(config, record.patch_size)) for i in images)
    tokens = TokenMap(
        ids, tuple(tokenizer.convert_ids_to_tokens(ids.tolist())), modality, grids, record.visual_tokens == "patches"
    )
    expected = sum(g.rows * g.cols for g in grids)
    if tokens.patches and len(tokens.image) != expected:
        raise InputError(
            f"The processor made {len(tokens.image)} image tokens where the grid has {expected} patches: its patch_size, "
            "num_additional_image_tokens and vision_feature_select_strategy do not fit the model."
        )
    return tokens
