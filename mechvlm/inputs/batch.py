"""`Inputs`: a padded batch for the model, with a `TokenMap` for each example.

`mechvlm.inputs.build` makes one out of images and prompts.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from weakref import WeakMethod

import torch
from PIL import Image
from torch import Tensor

from mechvlm.errors import InputError
from mechvlm.inputs.encodings import Parts, cut, take_rows
from mechvlm.inputs.prompts import Prompt
from mechvlm.inputs.rows import row_numbers
from mechvlm.inputs.tokens import Modality, TokenMap


class WeakLink:
    """A method of an object that may go. Copied or pickled, it is None."""

    def __init__(self, method: Callable):
        self._method = WeakMethod(method)

    def __call__(self) -> Callable | None:
        return self._method()

    def __reduce__(self):
        return type(None), ()


@dataclass(frozen=True, repr=False)
class Inputs:
    """A batch for the model, with the token maps, images and prompts that its activations need.

    >>> inputs = vlm.inputs([first, second], "What is in the image?")
    >>> inputs.token_maps[0].image  # positions of the first example's visual tokens

    Attributes:
        encoding: keyword arguments of the Hugging Face model; sequences are padded on the left, and
            images follow each other (`mechvlm.inputs.encodings`).
        token_maps: one `TokenMap` per example.
        images: the original images in RGB, one tuple per example, in the prompt's order.
        prompts: the prompts as they were given; of conversations, without their images.
        texts: the prompts in the family's template, as they were tokenized.
        model: name of the model that the batch was made for.
        ids: the examples' names, or None; results carry them.
        parts: how the examples share each key of the encoding; a key that is not there has one
            sequence an example.
        equal_lengths: whether examples of a batch must have as many tokens each (the record says).
        write: the way to what `answered` asks of the model; copies and pickles have none.
    """

    encoding: dict[str, Tensor]
    token_maps: tuple[TokenMap, ...]
    images: tuple[tuple[Image.Image, ...], ...]
    prompts: tuple[Prompt, ...]
    texts: tuple[str, ...]
    model: str = ""
    ids: tuple[str, ...] | None = None
    parts: dict[str, Parts] = field(default_factory=dict)
    equal_lengths: bool = False
    write: WeakLink | None = field(default=None, compare=False)

    def __repr__(self) -> str:
        n_images = sum(map(len, self.images))
        return (
            f"Inputs({len(self)} example{'s' * (len(self) != 1)} of {len(self.token_maps[0])} positions, "
            f"{n_images} image{'s' * (n_images != 1)}, model={self.model!r})"
        )

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
        kept = {}
        for key in self.encoding:
            mask = self.encoding["qformer_attention_mask" if key.startswith("qformer") else "attention_mask"][
                rows
            ].bool()
            kept[key] = mask.any(0) if trim else torch.ones_like(mask[0])
        encoding, parts = take_rows(self.encoding, self.parts, rows, kept, trim)
        maps = tuple(_at(self.token_maps[row], kept["input_ids"]) for row in rows)
        names = None if self.ids is None else tuple(self.ids[row] for row in rows)
        images, prompts = tuple(self.images[row] for row in rows), tuple(self.prompts[row] for row in rows)
        texts = tuple(self.texts[row] for row in rows)
        return Inputs(encoding, maps, images, prompts, texts, self.model, names, parts, self.equal_lengths, self.write)

    def answered(self, answers: str | Sequence[str]) -> "Inputs":
        """The inputs with an answer written after each prompt, as if the model had written it.

        What the model reads of the images stays as it was: a Q-Former still gets the prompt alone,
        and where a prompt's tokens see each other, the answer's see what came before.

        >>> answered = inputs.answered("a red circle")
        >>> tokens = answered.tokens
        >>> tokens.answer, tokens.holds("red"), tokens.wrote("red")
        >>> mv.norm_attention(vlm, answered, dst="wrote:red")

        Args:
            answers: a text for all examples, or one for each.

        Raises:
            InputError: for another number of answers than examples, an answer that is empty, of
                control tokens alone or too long, one whose first token the tokenizer joins with the
                prompt, inputs that hold an answer, or a copy of inputs, which knows no model.
        """
        given = [answers] * len(self) if isinstance(answers, str) else list(answers)
        if len(given) != len(self):
            raise InputError(
                f"{len(given)} answers were given for {len(self)} examples: give one for all, or one each."
            )
        return self._written(given)

    def _written(self, answers: Sequence[str | Sequence[int]]) -> "Inputs":
        write = None if self.write is None else self.write()
        if write is None:
            raise InputError(
                f"These inputs are a copy, or their model ({self.model}) is gone, and answers are written by the model's own "
                "rules: make them again by vlm.inputs(images, prompts)."
            )
        return write(self, answers)

    def before(self, word: str | Sequence[str], occurrence: int = 0) -> "Inputs":
        """The inputs up to where a word of the answer was written: what the model read by then.

        The last position is the one that wrote the word's first token. So everything that measures
        at the last position (attribution, ablations, knockouts) measures there.

        >>> at_red = answer.inputs.before("red")
        >>> mv.logit_attribution(vlm, at_red, "red", versus="blue")

        Args:
            word: a word or a phrase of the answers, for all examples or one for each.
            occurrence: which of several, 0 the first.

        Raises:
            ValueError: where no answer was written, or it does not hold the word.
            IndexError: for an occurrence that is not there.
            InputError: for another number of words than examples.
        """
        words = [word] * len(self) if isinstance(word, str) else list(word)
        if len(words) != len(self):
            raise InputError(f"{len(words)} words were given for {len(self)} examples: give one for all, or one each.")
        pairs = list(zip(self.token_maps, words, strict=True))
        stops = [int(tokens.holds(own, occurrence)[0]) for tokens, own in pairs]
        starts = [int(tokens.all[0]) for tokens in self.token_maps]
        check_lengths([stop - start for start, stop in zip(starts, stops, strict=True)], self.equal_lengths)
        keys = text_keys(self)
        # Padding is masked. The word's own id fills it, which is no image's.
        fill = {"input_ids": int(self.token_maps[0].ids[stops[0]])}
        encoding = cut(self.encoding, keys, starts, stops, fill)
        rows = zip(pairs, stops, encoding["input_ids"], strict=True)
        maps = tuple(_until(tokens, stop, ids) for (tokens, _), stop, ids in rows)
        return replace(self, encoding=encoding, token_maps=maps)

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


def _until(tokens: TokenMap, stop: int, ids: Tensor) -> TokenMap:
    """The map of a sequence that ends before `stop` and is padded as `ids` [pos] are."""
    own = torch.arange(len(tokens)) < stop
    own &= tokens.modality != Modality.PADDING
    kept, n = _at(tokens, own), len(ids) - int(own.sum())
    padding = torch.full((n,), int(Modality.PADDING))
    return replace(
        kept, ids=ids, strings=("",) * n + kept.strings, spelled=("",) * n + kept.spelled,
        modality=torch.cat([padding, kept.modality]), n_answer=tokens.n_answer - (len(tokens) - stop),
    )  # fmt: skip


def picture_of(inputs: "Inputs | None", example: int, image: int = 0) -> tuple[Any, Any]:
    """One image of one example, and the (left, top, right, bottom) that its grid covers, in pixels.

    Both are None without inputs.
    """
    if inputs is None:
        return None, None
    return inputs.images[example][image], inputs.token_maps[example].grids[image].crop_box


def check_lengths(lengths: Sequence[int], equal: bool) -> None:
    """Raises InputError for a batch of unequal lengths, where the model would count padding."""
    if equal and len(set(lengths)) > 1:
        raise InputError(
            f"The examples have {', '.join(map(str, lengths))} tokens, and this class of models counts the padding of shorter "
            "ones as positions: its numbers would be others than those of each example alone. Give examples of one length "
            "together, or one at a time (batch_size=1)."
        )


def text_keys(inputs: Inputs) -> list[str]:
    """The encoding's sequences that an answer makes longer: not those of a Q-Former."""
    own = {key for key, shared in inputs.parts.items() if shared.sequence} | {"input_ids", "attention_mask"}
    return [key for key in inputs.encoding if key in own and not key.startswith("qformer")]
