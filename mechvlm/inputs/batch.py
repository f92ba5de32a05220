"""Images and prompts become one padded batch, with a `TokenMap` for each example.

1. Pair each image, or list of images, with its prompt.
2. Put the prompt in the family's template.
3. Run the Hugging Face processor on each pair alone.
4. Pad the sequences to one length, and map what each position holds.
"""

import warnings
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
from mechvlm.inputs.pairs import images_and_prompt, pair_examples
from mechvlm.inputs.pieces import spell, token_texts
from mechvlm.inputs.prompts import Prompt, fill_template, is_bare
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
    """

    encoding: dict[str, Tensor] = field(repr=False)
    token_maps: tuple[TokenMap, ...] = field(repr=False)
    images: tuple[tuple[Image.Image, ...], ...] = field(repr=False)
    prompts: tuple[Prompt, ...]
    texts: tuple[str, ...] = field(repr=False)
    model: str = ""

    def __len__(self) -> int:
        return len(self.token_maps)

    def __getitem__(self, example: int) -> "Inputs":
        """One example alone, without its padding.

        Raises:
            IndexError: for an example that does not exist.
        """
        if not -len(self) <= example < len(self):
            raise IndexError(f"Example {example} was asked for; these inputs hold 0 to {len(self) - 1}.")
        row = example % len(self)
        # pixel_values has one row per image: those of earlier examples come first.
        first_image = sum(len(group) for group in self.images[:row])
        encoding = {}
        for key, value in self.encoding.items():
            if key == "pixel_values":
                encoding[key] = value[first_image : first_image + len(self.images[row])]
            else:
                mask = "qformer_attention_mask" if key.startswith("qformer") else "attention_mask"
                encoding[key] = value[row : row + 1, self.encoding[mask][row].bool()]
        padded, keep = self.token_maps[row], self.encoding["attention_mask"][row].bool()
        strings, spelled = (
            tuple(text for text, kept in zip(texts, keep.tolist(), strict=True) if kept)
            for texts in (padded.strings, padded.spelled)
        )
        tokens = TokenMap(padded.ids[keep], strings, spelled, padded.modality[keep], padded.grids, padded.patches)
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
        """The `TokenMap` of a batch of one example.

        Raises:
            ValueError: for a batch of several; use `token_maps[i]` there.
        """
        if len(self) != 1:
            raise ValueError(f"These inputs hold {len(self)} examples: take inputs.token_maps[i] of one of them.")
        return self.token_maps[0]


def build_inputs(
    images: ImageLike | Sequence[ImageLike | Sequence[ImageLike]] | None,
    prompts: Prompt | Sequence[Prompt] | None,
    *,
    record: Architecture,
    config,
    processor,
    model: str = "",
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

    Raises:
        InputError: for an image that cannot be read, numbers of images and prompts that do not
            match, a prompt whose image tokens are more or fewer than its images, or a prompt that
            leaves no room for the image. Of several examples it names the one.
    """
    pairs = pair_examples(images, prompts)
    token = processor.tokenizer.convert_ids_to_tokens(part(config, record.image_token_id))
    examples = []
    for number, (group, prompt) in enumerate(pairs):
        try:
            examples.append(_encode(group, prompt, token, record, config, processor))
        except InputError as error:
            if len(pairs) == 1:
                raise
            raise InputError(f"Example {number}: {error}") from error
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
    return Inputs(batch, maps, opened, given, texts, model)


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


# -- several batches, and their answers --

Answers = str | int | Sequence[str | int] | Tensor | None
"""A word or a token id for all examples, or one per example; None for the model's own answer."""


def as_batches(inputs: Any) -> list[Inputs]:
    """One batch or several, as a list.

    Raises:
        InputError: for anything else, or an empty list.
    """
    batches = [inputs] if isinstance(inputs, Inputs) else list(inputs)
    wrong_types = sorted({type(batch).__name__ for batch in batches if not isinstance(batch, Inputs)})
    if wrong_types or not batches:
        raise InputError(
            "Give a batch that vlm.inputs(images, prompts) returns, or a list of such batches, not "
            f"{wrong_types or 'an empty list'}."
        )
    return batches


def by_batch(batches: Sequence[Inputs], answers: Answers) -> list[Any]:
    """The answers of each batch.

    Args:
        batches: the batches.
        answers: one answer for all examples, None, or one answer for each example of all batches,
            in order.

    Raises:
        InputError: when the number of answers is not that of the examples.
    """
    answers = answers.tolist() if isinstance(answers, Tensor) else answers
    if answers is None or isinstance(answers, str | int):
        return [answers] * len(batches)
    per_example, sizes = list(answers), [len(batch) for batch in batches]
    if len(per_example) != sum(sizes):
        raise InputError(
            f"{len(per_example)} answers were given for {sum(sizes)} examples: give one for all, or one each, over all batches "
            "in order."
        )
    ends = torch.tensor(sizes).cumsum(0).tolist()
    return [per_example[end - size : end] for size, end in zip(sizes, ends, strict=True)]
