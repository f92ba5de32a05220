"""The map of a sequence: what each position holds, and which patch of the image."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from mechvlm.errors import InputError
from mechvlm.inputs.numbers import whole_numbers
from mechvlm.inputs.occurrences import WORD, occurrences, spans
from mechvlm.inputs.placed import Placed
from mechvlm.inputs.views import MEMORY, Layout


class Modality(IntEnum):
    """What a position holds.

    `SPECIAL` are the tokenizer's control tokens such as `<s>`, except image and padding tokens.
    """

    PADDING = 0
    SPECIAL = 1
    TEXT = 2
    IMAGE = 3


POSITION_NAMES = {
    **{group: group for group in ("image", "text", "question", "special", "prompt", "answer", "writing", "all")},
    "last": "all", "last_text": "text", "last_image": "image", "last_prompt": "prompt",
}  # fmt: skip
"""Names of positions, and the group that each is of: a "last" one is the last of its group."""
NO_ANSWER = "No answer was written into these inputs: take vlm.generate(inputs).inputs, or inputs.answered('a text')."


@dataclass(frozen=True, repr=False)
class TokenMap(Placed):
    """What each position of one example's sequence holds.

    Positions count from the start of the padded sequence, so that they index the model's
    activations directly.

    >>> tokens = vlm.inputs(image, "Is there a dog?").tokens
    >>> tokens.image, tokens.last, tokens.pos_of("dog"), tokens.pos_in_box((0, 0, 50, 50))

    Attributes:
        ids: token ids, padding included.
        strings: each token's text, with the space that it begins with; "\\ufffd" stands for a
            part of a character (`mechvlm.inputs.pieces`).
        spelled: the same, with characters whole that are split over several tokens: the first of
            these holds their text, the others "".
        modality: one `Modality` a position.
        layouts: how each image's visual tokens lie on it.
        n_answer: how many of the last positions hold an answer; 0 where none was written.
    """

    ids: Int[Tensor, " pos"]
    strings: tuple[str, ...]
    spelled: tuple[str, ...]
    modality: Int[Tensor, " pos"]
    layouts: tuple[Layout, ...]
    n_answer: int = 0

    def __len__(self) -> int:
        return len(self.strings)

    def __repr__(self) -> str:
        counts = ", ".join(f"{int((self.modality == kind).sum())} {kind.name.lower()}" for kind in Modality)
        return f"TokenMap({len(self)} positions: {counts})"

    def _where(self, *kinds: Modality) -> Int[Tensor, " n"]:
        return torch.isin(self.modality, torch.tensor(kinds)).nonzero().squeeze(-1)

    @cached_property
    def image(self) -> Int[Tensor, " n"]:
        """Positions of the visual tokens of all images, in order.

        Raises:
            InputError: where the image is a memory, and no position holds a visual token.
        """
        if self.is_memory:
            raise InputError(MEMORY)
        return self._where(Modality.IMAGE)

    @cached_property
    def text(self) -> Int[Tensor, " n"]:
        """Positions of text tokens, without special tokens."""
        return self._where(Modality.TEXT)

    @cached_property
    def special(self) -> Int[Tensor, " n"]:
        """Positions of control tokens such as `<s>`."""
        return self._where(Modality.SPECIAL)

    @cached_property
    def all(self) -> Int[Tensor, " n"]:
        """Every position that is not padding."""
        return self._where(Modality.SPECIAL, Modality.TEXT, Modality.IMAGE)

    @cached_property
    def question(self) -> Int[Tensor, " n"]:
        """Positions of the prompt, its template and its control tokens, except the last position.

        `image`, `question` and `last` together are every position once; with an answer it is
        `image`, `question` and `answer`.
        """
        prompt = self.prompt[torch.isin(self.modality[self.prompt], torch.tensor([Modality.SPECIAL, Modality.TEXT]))]
        return prompt[prompt != self.last]

    @cached_property
    def prompt(self) -> Int[Tensor, " n"]:
        """Every position before the answer, image included."""
        return self.all[: len(self.all) - self.n_answer]

    @cached_property
    def answer(self) -> Int[Tensor, " n"]:
        """Positions that hold the answer's tokens; none where no answer was written."""
        return self.all[len(self.all) - self.n_answer :]

    @cached_property
    def writing(self) -> Int[Tensor, " n"]:
        """Positions at which the model wrote the answer's tokens: each is the one before it.

        The first is the prompt's last. The answer's own last position wrote nothing of it.
        """
        return self.answer - 1

    @property
    def last(self) -> int:
        """The last position, where the model goes on writing."""
        return int(self.all[-1])

    @property
    def last_text(self) -> int:
        """Position of the last text token."""
        return int(self.text[-1])

    @property
    def last_image(self) -> int:
        """Position of the last visual token."""
        return int(self.image[-1])

    def select(self, where: str | int | Iterable[int] | Tensor) -> Int[Tensor, " n"]:
        """Positions by name, by a word or by number.

        Args:
            where: one of `POSITION_NAMES`, a word or a phrase of the text (`pos_of`), one of the
                answer as "holds:red" or "wrote:red" (`holds`, `wrote`), or one or several numbers:
                an int, a list, a range, an array, a tensor. Negative ones count from the end.

        Raises:
            ValueError: for a string that is neither a name nor in the text, a number outside the
                sequence or on padding, or an empty selection.
        """
        if isinstance(where, str):
            group, (kind, _, word) = POSITION_NAMES.get(where), where.partition(":")
            if group is None:
                return getattr(self, kind)(word) if kind in ("holds", "wrote") else self._pos_of_word(where)
            positions = getattr(self, group)[-1:] if group != where else getattr(self, group)
            if not len(positions) and group in ("answer", "writing"):
                raise ValueError(NO_ANSWER)
        else:
            numbers = whole_numbers(where, "A selection of positions")
            n, padding = len(self), (self.modality == Modality.PADDING).tolist()
            bad = [p for p in numbers if not -n <= p < n or padding[p]]
            if bad:
                raise ValueError(
                    f"Positions {bad} are not tokens of this example, which has {int(self.all[0])} to {n - 1}."
                )
            positions = torch.tensor([p % n for p in numbers], dtype=torch.long)
        if not len(positions):
            raise ValueError(f"The selection {where!r} is empty: this example has no such position.")
        return positions.clone()  # a caller may change it, but not the map's cached tensors

    def _pos_of_word(self, word: str) -> Int[Tensor, " n"]:
        try:
            return self.pos_of(word)
        except ValueError as error:
            names = ", ".join(POSITION_NAMES)
            raise ValueError(
                f"There are no positions called {word!r} (names: {names}), and no such word. {error}"
            ) from None

    def pos_of(self, word: str) -> Int[Tensor, " n"]:
        """Positions of the tokens that spell a word or a phrase, at every occurrence in the text.

        The text is the prompt's, and the answer's where one was written. Only whole words match,
        and only in the same case.

        Raises:
            ValueError: when the text does not contain it; the message quotes the text.
        """
        spelled = occurrences(word, self._texts)
        if not spelled:
            text = "".join(self._texts).replace(chr(0), "").strip()
            raise ValueError(f"The text holds no {word!r}. It reads: {text!r}.")
        return torch.tensor(sorted({position for positions in spelled for position in positions}))

    def holds(self, word: str, occurrence: int | None = None) -> Int[Tensor, " n"]:
        """Positions of the answer that hold the tokens of a word or a phrase.

        >>> answer = vlm.generate(inputs)[0]    # "a red circle and a red cat"
        >>> tokens = answer.inputs.tokens
        >>> tokens.holds("red"), tokens.wrote("red", occurrence=1)

        Args:
            word: as it stands in the answer; only whole words match, and only in the same case.
            occurrence: which of several, 0 the first; None for all of them.

        Raises:
            ValueError: where no answer was written, or it does not hold the word (the message says
                which words it holds).
            IndexError: for an occurrence that is not there.
        """
        if not self.n_answer:
            raise ValueError(NO_ANSWER)
        start = int(self.answer[0])
        spelled = [own for own in occurrences(word, self._texts) if own[0] >= start]
        if not spelled:
            words = ", ".join(dict.fromkeys(own for own, _ in self.answer_words)) or "no word"
            raise ValueError(f"The answer holds no {word!r}. It holds: {words}.")
        if occurrence is not None and not -len(spelled) <= occurrence < len(spelled):
            raise IndexError(
                f"Occurrence {occurrence} of {word!r} was asked for; the answer has 0 to {len(spelled) - 1}."
            )
        chosen = spelled if occurrence is None else [spelled[occurrence]]
        return torch.tensor(sorted({position for positions in chosen for position in positions}))

    def wrote(self, word: str, occurrence: int | None = None) -> Int[Tensor, " n"]:
        """Positions at which the model wrote the tokens of a word: each is the one before it.

        What the model read there decided the token; see `holds` for the arguments and errors.
        """
        return self.holds(word, occurrence) - 1

    @cached_property
    def answer_words(self) -> tuple[tuple[str, Int[Tensor, " n"]], ...]:
        """The answer's words in order, each with the positions that hold its tokens."""
        if not self.n_answer:
            return ()
        start = int(self.answer[0])
        texts = ("\0",) * start + self._texts[start:]
        return tuple((word, torch.tensor(own)) for word, own in spans(WORD, texts))

    @cached_property
    def _texts(self) -> tuple[str, ...]:
        """Each position's text, or a NUL, which no word or phrase contains."""
        is_text = (self.modality == Modality.TEXT).tolist()
        return tuple(s if t else "\0" for s, t in zip(self.spelled, is_text, strict=True))


def image_mask(maps: Sequence[TokenMap]) -> Bool[Tensor, "example pos"]:
    """Which positions of a batch hold visual tokens.

    Raises:
        InputError: where the image is a memory, and no position holds a visual token.
    """
    mask = torch.zeros(len(maps), len(maps[0]), dtype=torch.bool)
    for row, tokens in enumerate(maps):
        mask[row, tokens.image] = True
    return mask
