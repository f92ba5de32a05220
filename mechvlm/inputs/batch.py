"""Images and prompts become one padded batch, with a `TokenMap` for each example.

1. Pair each image, or list of images, with its prompt.
2. Put the prompt in the family's template.
3. Run the Hugging Face processor on each pair alone.
4. Pad the sequences to one length, and map what each position holds.
"""

import warnings
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
from mechvlm.inputs.pairs import images_and_prompt, named_by_example, pair_examples
from mechvlm.inputs.pieces import spell, token_texts
from mechvlm.inputs.prompts import Prompt, fill_template, is_bare
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
        prompts: the prompts as they were given; of conversations, without their images.
        texts: the prompts in the family's template, as they were tokenized.
        model: name of the model that the batch was made for.
        ids: the examples' names, or None; results carry them.
    """

    encoding: dict[str, Tensor] = field(repr=False)
    token_maps: tuple[TokenMap, ...] = field(repr=False)
    images: tuple[tuple[Image.Image, ...], ...] = field(repr=False)
    prompts: tuple[Prompt, ...]
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
    strings, spelled = (
        tuple(text for text, keep in zip(texts, kept.tolist(), strict=True) if keep)
        for texts in (tokens.strings, tokens.spelled)
    )
    return replace(tokens, ids=tokens.ids[kept], strings=strings, spelled=spelled, modality=tokens.modality[kept])


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
        processor: the Hugging Face processor.
        model: name of the model.
        ids: the examples' names.
        first: the number by which errors call the first example.

    Raises:
        InputError: for an image that cannot be read, numbers of images and prompts that do not
            match, a prompt whose image tokens are more or fewer than its images, or a prompt that
            leaves no room for the image. Of several examples it names the one.
    """
    pairs = pair_examples(images, prompts)
    token = processor.tokenizer.convert_ids_to_tokens(part(config, record.image_token_id))
    examples = []
    for number, (group, prompt) in enumerate(pairs, first):
        try:
            examples.append(_encode(group, prompt, token, record, config, processor))
        except InputError as error:
            raise named_by_example(error, number, first + len(pairs)) from error
    if any(is_bare(prompt, token, record, processor) for _, prompt, _, _ in examples):
        warnings.warn(
            f"The prompt holds {token} and nothing of the template, and is tokenized as it is (inputs.texts shows it). Leave "
            f"{token} out to have the template put around it, or write the template as well.",
            stacklevel=3,
        )
    opened, given, texts, encodings = zip(*examples, strict=True)
    batch = _collate(list(encodings), record, processor, part(config, record.image_token_id))
    maps = tuple(
        _token_map(batch, row, encodings[row]["pixel_values"], opened[row], record, config, processor)
        for row in range(len(pairs))
    )
    return Inputs(batch, maps, opened, given, texts, model, ids)


def _encode(
    group, prompt, token: str, record: Architecture, config, processor
) -> tuple[tuple[Image.Image, ...], Prompt, str, Any]:
    """One example: its images, its prompt, the text that is tokenized, and its encoding."""
    group, prompt = images_and_prompt(group, prompt)
    pictures = tuple(open_image(image) for image in group)
    for picture in pictures:
        check_resize(picture.size, processor.image_processor)
    text = fill_template(prompt, len(pictures), token, record, processor)
    # One example at a time: in a batch, InstructBLIP's processor pads between image and text.
    encoding = processor(images=list(pictures), text=[text], return_tensors="pt", **_bos(text, processor))
    _check_room(encoding, text, record, config)
    _check_end(encoding, text, processor.tokenizer)
    return pictures, prompt, text, encoding


def _bos(text: str, processor) -> dict[str, bool]:
    """Options of the processor: a template that writes BOS itself must not get a second one.

    The rule is that of Hugging Face's `apply_chat_template(tokenize=True)`.
    """
    bos = processor.tokenizer.bos_token
    return {"add_special_tokens": False} if bos and text.startswith(bos) else {}


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


def _check_room(encoding, text: str, record: Architecture, config) -> None:
    """Refuse an encoding that is longer than the model takes, or that holds no image token."""
    image_token = part(config, record.image_token_id)
    for key, path in record.max_lengths:
        length, limit = encoding[key].shape[-1], part(config, path)
        if length > limit:
            visual = int((encoding["input_ids"] == image_token).sum())
            raise InputError(
                f"The prompt {text[:60]!r}... leaves no room: {length} tokens in {key}, "
                f"{visual if key == 'input_ids' else 0} of them for the image. The model takes {limit}. "
                "Shorten the prompt."
            )
    if not (encoding["input_ids"] == image_token).any():
        raise InputError(f"The prompt {text[:60]!r} holds no image token ({image_token}).")


def _check_end(encoding, text: str, tokenizer) -> None:
    """Refuse a tokenizer that ends the prompt with EOS: no answer follows its last position."""
    eos = tokenizer.eos_token
    if eos and int(encoding["input_ids"][0, -1]) == tokenizer.eos_token_id and not text.endswith(eos):
        raise InputError(
            f"The tokenizer adds {eos} after the prompt, where the model would answer (add_eos_token is for training). Load the "
            "processor with add_eos_token=False."
        )


def padding_id(tokenizer, image_token: int) -> int:
    """The id that fills padding. Padding is masked, so any id will do but the image's: features
    would go there."""
    ids = (tokenizer.pad_token_id or 0, 0, 1)
    return next(id for id in ids if id != image_token)


def _collate(encodings: list, record: Architecture, processor, image_token: int) -> dict[str, Tensor]:
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
            value = padding_id(tokenizer, image_token)
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
    strings = token_texts(ids.tolist(), tokenizer)
    spelled = spell(ids.tolist(), strings, tokenizer)
    tokens = TokenMap(ids, strings, spelled, modality, grids, record.visual_tokens == "patches")
    expected = sum(g.rows * g.cols for g in grids)
    if tokens.patches and len(tokens.image) != expected:
        raise InputError(
            f"The processor made {len(tokens.image)} image tokens where the grid has {expected} patches. Either its patch_size, "
            "num_additional_image_tokens or vision_feature_select_strategy does not fit the model, or the decoder sees more than "
            "patches (the CLS token, with 'full'): that has no place on the image, and mechvlm cannot read it."
        )
    return tokens
