"""The map of a sequence: what each position holds, and which patch of the image."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property
from itertools import accumulate

import torch
from jaxtyping import Int
from torch import Tensor

from mechvlm.inputs.grids import PatchGrid
from mechvlm.inputs.numbers import whole_numbers


class Modality(IntEnum):
    """What a position holds.

    `SPECIAL` are the tokenizer's control tokens such as `<s>`, except image and padding tokens.
    """

    PADDING = 0
    SPECIAL = 1
    TEXT = 2
    IMAGE = 3


POSITION_NAMES = {
    **{group: group for group in ("image", "text", "question", "special", "all")},
    "last": "all", "last_text": "text", "last_image": "image",
}  # fmt: skip
"""Names of positions, and the group that each is of: a "last" one is the last of its group."""


@dataclass(frozen=True, repr=False)
class TokenMap:
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
        grids: the vision encoder's patch grid, one per image.
        patches: True if each visual token is one patch of its grid, False if it is a query that
            reads the whole image.
    """

    ids: Int[Tensor, " pos"]
    strings: tuple[str, ...]
    spelled: tuple[str, ...]
    modality: Int[Tensor, " pos"]
    grids: tuple[PatchGrid, ...]
    patches: bool

    def __len__(self) -> int:
        return len(self.strings)

    def __repr__(self) -> str:
        counts = ", ".join(f"{int((self.modality == kind).sum())} {kind.name.lower()}" for kind in Modality)
        return f"TokenMap({len(self)} positions: {counts})"

    def _where(self, *kinds: Modality) -> Int[Tensor, " n"]:
        return torch.isin(self.modality, torch.tensor(kinds)).nonzero().squeeze(-1)

    @cached_property
    def image(self) -> Int[Tensor, " n"]:
        """Positions of the visual tokens of all images, in order."""
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

        `image`, `question` and `last` together are every position once.
        """
        prompt = self._where(Modality.SPECIAL, Modality.TEXT)
        return prompt[prompt != self.last]

    @property
    def last(self) -> int:
        """The last position, where the model answers."""
        return int(self.all[-1])

    @property
    def last_text(self) -> int:
        """Position of the last text token."""
        return int(self.text[-1])

    @property
    def last_image(self) -> int:
        """Position of the last visual token."""
        return int(self.image[-1])

    @property
    def images(self) -> tuple[Int[Tensor, " n"], ...]:
        """Positions of the visual tokens, one tensor per image."""
        return self.image.chunk(len(self.grids))

    def select(self, where: str | int | Iterable[int] | Tensor) -> Int[Tensor, " n"]:
        """Positions by name, by a word or by number.

        Args:
            where: one of `POSITION_NAMES`, a word or a phrase of the text (`pos_of`), or one or
                several numbers: an int, a list, a range, an array, a tensor. Negative ones count
                from the end.

        Raises:
            ValueError: for a string that is neither a name nor in the text, a number outside the
                sequence or on padding, or an empty selection.
        """
        if isinstance(where, str):
            group = POSITION_NAMES.get(where)
            if group is None:
                return self._pos_of_word(where)
            positions = getattr(self, group)[-1:] if group != where else getattr(self, group)
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

    def position(self, row: int, col: int, image: int = 0) -> int:
        """The position of one patch's visual token.

        Raises:
            ValueError: when visual tokens are queries, which have no place on the image.
            IndexError: for an image that does not exist, or a row or column outside the grid.
        """
        grid = self._grid(image)
        grid.box(row, col)  # refuses a cell outside the grid
        return int(self.images[image][row * grid.cols + col])

    def cell(self, position: int) -> tuple[int, int, int]:
        """(image, row, col) of the patch at a position.

        Raises:
            ValueError: when visual tokens are queries, or the position holds no visual token.
        """
        for image, positions in enumerate(self.images):
            matches = (positions == position).nonzero()
            if len(matches):
                row, col = divmod(int(matches[0, 0]), self._grid(image).cols)
                return image, row, col
        raise ValueError(f"Position {position} holds no visual token; they are at {self.image.tolist()}.")

    def pos_in_box(
        self, box: Sequence[float | int], image: int = 0, covered: float = 0.5, margin: int = 0
    ) -> Int[Tensor, " n"]:
        """Positions of the patches that lie in a box.

        Args:
            box: (left, top, right, bottom) in pixels of the original image.
            image: which image of the prompt.
            covered: share of a patch's area that must lie in the box.
            margin: neighbours of these patches, up to so many patches away (diagonals as well), are
                included too.

        Raises:
            ValueError: when visual tokens are queries, which have no place on the image.
            IndexError: for an image that does not exist.
        """
        return self.images[image][self._grid(image).inside(box, covered, margin).flatten()]

    def pos_of(self, word: str) -> Int[Tensor, " n"]:
        """Positions of the tokens that spell a word or a phrase, at every occurrence in the text.

        Only whole words match, and only in the same case.

        Raises:
            ValueError: when the text does not contain it; the message quotes the text.
        """
        # Positions without text become a NUL, which no word or phrase contains.
        is_text = (self.modality == Modality.TEXT).tolist()
        texts = [s if t else "\0" for s, t in zip(self.spelled, is_text, strict=True)]
        text = "".join(texts)
        # Tokens that share a character have one span, which begins at their first letter.
        stretches: list[tuple[int, int]] = []
        for piece, end in zip(texts, accumulate(map(len, texts)), strict=True):
            stretches.append((end - len(piece.lstrip()), end) if piece else stretches[-1])
        spans = (
            [m.span() for m in re.finditer(rf"(?<!\w){re.escape(word.strip())}(?!\w)", text)] if word.strip() else []
        )
        if not spans:
            raise ValueError(f"The text holds no {word!r}. It reads: {text.replace(chr(0), '').strip()!r}.")
        positions = [
            i
            for i, (start, end) in enumerate(stretches)
            if is_text[i] and any(first < end and start < stop for first, stop in spans)
        ]
        return torch.tensor(positions)

    def _grid(self, image: int) -> PatchGrid:
        """The grid of one image, if its visual tokens are patches."""
        if not self.patches:
            raise ValueError(
                "This model's visual tokens are queries: each reads the whole image and has no place on it. "
                "mechvlm.query_reading gives a map [query, row, col] of where each one reads."
            )
        if not 0 <= image < len(self.grids):
            raise IndexError(f"Image {image} was asked for; the prompt holds {len(self.grids)}.")
        return self.grids[image]
