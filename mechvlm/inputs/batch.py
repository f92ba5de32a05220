"""From images and prompts to one padded batch that knows what each of its positions is."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from mechvlm.errors import InputError
from mechvlm.families.record import Architecture, part
from mechvlm.inputs.grids import check_resize, patch_grid
from mechvlm.inputs.images import ImageLike, open_image
from mechvlm.inputs.tokens import Modality, TokenMap


@dataclass(frozen=True)
class Inputs:
    """A batch for the model, with what is needed to read its activations.

    Attributes:
        encoding: what the Hugging Face model is called with; sequences are padded on the left.
        token_maps: one `TokenMap` per example.
        images: the original images in RGB, per example in the prompt's order.
        prompts: the prompts as they were given.
        texts: the prompts in the family's template, as they were tokenized.
        model: the name of the model that they were made for.
    """

    encoding: dict[str, Tensor] = field(repr=False)
    token_maps: tuple[TokenMap, ...] = field(repr=False)
    images: tuple[tuple[Image.Image, ...], ...] = field(repr=False)
    prompts: tuple[str, ...]
    texts: tuple[str, ...] = field(repr=False)
    model: str = ""

    def __len__(self) -> int:
        return len(self.token_maps)

    def __getitem__(self, example: int) -> "Inputs":
        """One example alone, without its padding.

        Raises:
            IndexError: for an example that is not there.
        """
        if not -len(self) <= example < len(self):
            raise IndexError(f"Example {example} was asked for; these inputs hold 0 to {len(self) - 1}.")
        row = example % len(self)
        # Several images of one prompt lie one after the other in pixel_values.
        first = sum(len(group) for group in self.images[:row])
        encoding = {}
        for key, value in self.encoding.items():
            if key == "pixel_values":
                encoding[key] = value[first : first + len(self.images[row])]
            else:
                mask = "qformer_attention_mask" if key.startswith("qformer") else "attention_mask"
                encoding[key] = value[row : row + 1, self.encoding[mask][row].bool()]
        old, keep = self.token_maps[row], self.encoding["attention_mask"][row].bool()
        strings = tuple(s for s, k in zip(old.strings, keep.tolist(), strict=True) if k)
        tokens = TokenMap(old.ids[keep], strings, old.modality[keep], old.grids, old.patches)
        return Inputs(
            encoding,
            (tokens,),
            self.images[row : row + 1],
            self.prompts[row : row + 1],
            self.texts[row : row + 1],
            self.model,
        )

    @property
    def tokens(self) -> TokenMap:
        """The TokenMap of the only example.

        Raises:
            ValueError: when there are several: take `token_maps[i]`.
        """
        if len(self) != 1:
            raise ValueError(f"These inputs hold {len(self)} examples: take inputs.token_maps[i] of one of them.")
        return self.token_maps[0]


def build_inputs(
    images: ImageLike | Sequence[ImageLike | Sequence[ImageLike]],
    prompts: str | Sequence[str],
    *,
    record: Architecture,
    config,
    processor,
    model: str = "",
) -> Inputs:
    """One image (or a list: one per example, or one list of images per example) and its prompt, as a batch.

    A single image goes with every prompt and a single prompt with every image. A prompt that already holds the image
    token is taken as it is, template and all.

    Raises:
        InputError: for an image that cannot be read, numbers of images and prompts that do not match, a prompt that
            holds another number of image tokens than there are images, or one that leaves no room for the image.
    """
    pairs = _pair(images, prompts)
    token = processor.tokenizer.convert_ids_to_tokens(part(config, record.image_token_id))
    encodings, texts = [], []
    opened: list[tuple[Image.Image, ...]] = []
    for number, (group, prompt) in enumerate(pairs):
        pictures = tuple(open_image(image) for image in group)
        for picture in pictures:
            check_resize(picture.size, processor.image_processor)
        text = _text(prompt, len(pictures), token, record, processor, number)
        # One example at a time and unpadded: InstructBLIP's processor would put the padding between image and text.
        encoding = processor(images=list(pictures), text=[text], return_tensors="pt")
        _check_room(encoding, prompt, record, config, number)
        encodings.append(encoding)
        texts.append(text)
        opened.append(pictures)
    batch = _collate(encodings, record, processor)
    maps = tuple(
        _token_map(batch, row, encodings[row]["pixel_values"], opened[row], record, config, processor)
        for row in range(len(pairs))
    )
    return Inputs(batch, maps, tuple(opened), tuple(p for _, p in pairs), tuple(texts), model)


def _pair(images, prompts) -> list[tuple[tuple[ImageLike, ...], str]]:
    _check_kinds(images, prompts)
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


def _check_kinds(images, prompts) -> None:
    for group in images if isinstance(images, list | tuple) else [images]:
        for image in group if isinstance(group, list | tuple) else [group]:
            if not isinstance(image, ImageLike):
                raise InputError(
                    f"An image is a PIL image or the path of one, not {type(image).__name__}; of an array of 0..255, make one "
                    "with PIL.Image.fromarray(array)."
                )
    for prompt in prompts if isinstance(prompts, list | tuple) else [prompts]:
        if not isinstance(prompt, str):
            raise InputError(f"A prompt is a string, not {type(prompt).__name__}.")


def _text(prompt: str, n_images: int, token: str, record: Architecture, processor, number: int) -> str:
    """The prompt in the family's template."""
    if not n_images:
        raise InputError(f"Example {number} has no image; a vision-language model is read with at least one.")
    if record.images_per_prompt is not None and n_images > record.images_per_prompt:
        raise InputError(f"Example {number} has {n_images} images; {record.hf_class} takes {record.images_per_prompt}.")
    if token in prompt:
        found = prompt.count(token)
        if record.visual_tokens == "queries":
            raise InputError(f"Leave {token} out of the prompt: {record.hf_class} puts its queries before the text.")
        if found != n_images:
            raise InputError(
                f"The prompt {prompt!r} holds {found} {token}, but example {number} has {n_images} images."
            )
        return prompt
    if getattr(processor, "chat_template", None):
        content = [{"type": "image"}] * n_images + [{"type": "text", "text": prompt}]
        return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    return record.template.format(images="\n".join([token] * n_images), prompt=prompt)


def _check_room(encoding, prompt: str, record: Architecture, config, number: int) -> None:
    image_token = part(config, record.image_token_id)
    for key, path in record.max_lengths:
        length, limit = encoding[key].shape[-1], part(config, path)
        if length > limit:
            visual = int((encoding["input_ids"] == image_token).sum())
            raise InputError(
                f"The prompt of example {number} ({prompt[:40]!r}...) leaves no room: {length} tokens in {key}, of which "
                f"{visual if key == 'input_ids' else 0} for the image, where the model takes {limit}. Shorten it."
            )
    if not (encoding["input_ids"] == image_token).any():
        raise InputError(f"The prompt of example {number} holds no image token ({image_token}).")


def _collate(encodings: list, record: Architecture, processor) -> dict[str, Tensor]:
    """Sequences padded to the longest, on the left but for the record's `right_padded`; images stacked."""
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
            value = tokenizer.pad_token_id or 0  # masked: any id will do where the tokenizer names none
        longest = max(r.shape[-1] for r in rows)
        pad = [(0, longest - r.shape[-1]) if right else (longest - r.shape[-1], 0) for r in rows]
        batch[key] = torch.cat([torch.nn.functional.pad(r, p, value=value) for r, p in zip(rows, pad, strict=True)])
    return batch


def _token_map(batch, row, pixels, images, record, config, processor) -> TokenMap:
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


# -- several batches, and whose answers are whose --

Answers = str | int | Sequence[str | int] | Tensor | None
"""A word or a token id for all examples, or one per example; None for the model's own."""


def as_batches(inputs: Any) -> list[Inputs]:
    """One batch, or several, as a list.

    Raises:
        InputError: for anything else, or an empty list.
    """
    batches = [inputs] if isinstance(inputs, Inputs) else list(inputs)
    strange = sorted({type(one).__name__ for one in batches if not isinstance(one, Inputs)})
    if strange or not batches:
        raise InputError(
            f"Give what vlm.inputs(images, prompts) gives, or a list of such batches, not {strange or 'an empty list'}."
        )
    return batches


def by_batch(batches: Sequence[Inputs], answers: Answers) -> list[Any]:
    """The answers of each batch, where a sequence holds one for every example of all batches in order.

    Raises:
        InputError: for another number of answers than examples.
    """
    answers = answers.tolist() if isinstance(answers, Tensor) else answers
    if answers is None or isinstance(answers, str | int):
        return [answers] * len(batches)
    given, sizes = list(answers), [len(one) for one in batches]
    if len(given) != sum(sizes):
        raise InputError(
            f"{len(given)} answers were given for {sum(sizes)} examples: give one for all, or one each, over all batches "
            "in order."
        )
    ends = torch.tensor(sizes).cumsum(0).tolist()
    return [given[end - size : end] for size, end in zip(sizes, ends, strict=True)]
