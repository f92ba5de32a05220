"""Which position of a sequence is what, and where on the image a patch lies. No model here, only tensors and numbers."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property
from itertools import accumulate

import torch
from jaxtyping import Int
from torch import Tensor

from mechvlm.inputs.grids import PatchGrid


class Modality(IntEnum):
    """What a position holds. `SPECIAL` are the tokenizer's control tokens (`<s>`), other than image and padding."""

    PADDING = 0
    SPECIAL = 1
    TEXT = 2
    IMAGE = 3


@dataclass(frozen=True, repr=False)
class TokenMap:
    """What each position of one example's sequence is.

    Positions count from the start of the padded sequence, so that they index the model's activations directly.

    Attributes:
        ids: token ids, padding included.
        strings: the tokenizer's pieces, with the `▁` that marks the start of a word.
        modality: one `Modality` a position.
        grids: the vision encoder's grid, one per image.
        patches: whether each visual token is one patch of its grid (else it is a query that reads all of them).
    """

    ids: Int[Tensor, " pos"]
    strings: tuple[str, ...]
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
        """Positions of the visual tokens, of all images in their order."""
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
        """Positions of all that is neither image nor the last position: the prompt, its template and its control tokens.

        `image`, `question` and `last` are every position once.
        """
        words = self._where(Modality.SPECIAL, Modality.TEXT)
        return words[words != self.last]

    @property
    def last(self) -> int:
        """The last position, where the model answers."""
        return int(self.all[-1])

    @property
    def last_text(self) -> int:
        """The last text token."""
        return int(self.text[-1])

    @property
    def last_image(self) -> int:
        """The last visual token."""
        return int(self.image[-1])

    @property
    def images(self) -> tuple[Int[Tensor, " n"], ...]:
        """Positions of the visual tokens, image by image."""
        return self.image.chunk(len(self.grids))

    def select(self, where: str | int | Sequence[int] | Tensor) -> Int[Tensor, " n"]:
        """Positions by name ("image", "text", "question", "special", "all", "last", "last_text", "last_image") or by number.

        Raises:
            ValueError: for an unknown name, a number outside the sequence or on padding, or an empty selection.
        """
        groups = ("image", "text", "question", "special", "all")
        lasts = {"last": "all", "last_text": "text", "last_image": "image"}
        if isinstance(where, str):
            if where not in groups and where not in lasts:
                names = ", ".join((*groups, *lasts))
                raise ValueError(f"There are no positions called {where!r}. Names: {names}; or give numbers.")
            found = getattr(self, lasts[where])[-1:] if where in lasts else getattr(self, where)
        else:
            found = torch.as_tensor(where)
            if found.dtype == torch.bool or (found.is_floating_point() and found.numel()):
                raise ValueError(
                    f"Positions are whole numbers, not {found.dtype}; of a mask, give mask.nonzero()[:, 0]."
                )
            found = found.reshape(-1).long()
            bad = [int(p) for p in found if not 0 <= int(p) < len(self) or self.modality[int(p)] == Modality.PADDING]
            if bad:
                first = int(self.all[0])
                raise ValueError(
                    f"Positions {bad} are not tokens of this example, which has {first} to {len(self) - 1}."
                )
        if not len(found):
            raise ValueError(f"The selection {where!r} is empty: this example has no such position.")
        return found.clone()  # the map's own tensors are cached

    def position(self, row: int, col: int, image: int = 0) -> int:
        """The position of one patch's visual token.

        Raises:
            ValueError: where visual tokens are queries, which have no place.
            IndexError: for a cell outside the grid.
        """
        grid = self._grid(image)
        grid.box(row, col)
        return int(self.images[image][row * grid.cols + col])

    def cell(self, position: int) -> tuple[int, int, int]:
        """(image, row, col) of a visual token that is a patch.

        Raises:
            ValueError: where visual tokens are queries, or the position holds no visual token.
        """
        for image, positions in enumerate(self.images):
            hit = (positions == position).nonzero()
            if len(hit):
                row, col = divmod(int(hit[0, 0]), self._grid(image).cols)
                return image, row, col
        raise ValueError(f"Position {position} holds no visual token; they are at {self.image.tolist()}.")

    def pos_in_box(
        self, box: Sequence[float | int], image: int = 0, covered: float = 0.5, margin: int = 0
    ) -> Int[Tensor, " n"]:
        """Positions of the patches of which at least the share `covered` lies in a box given in original pixels.

        With `margin`, their neighbours too, up to so many patches away (diagonals as well).

        Raises:
            ValueError: where visual tokens are queries, which have no place.
            IndexError: for an image that is not there.
        """
        return self.images[image][self._grid(image).inside(box, covered, margin).flatten()]

    def pos_of(self, word: str) -> Int[Tensor, " n"]:
        """Positions of the tokens that spell a word or a phrase, wherever it stands in the text (whole words, this case).

        Raises:
            ValueError: when the text does not hold it; the message quotes the text.
        """
        # Pieces as they read, with a character that no word holds for everything that is not text.
        is_text = (self.modality == Modality.TEXT).tolist()
        pieces = [_spelled(s) if t else "\0" for s, t in zip(self.strings, is_text, strict=True)]
        ends = list(accumulate(len(piece) for piece in pieces))
        text = "".join(pieces)
        spans = (
            [m.span() for m in re.finditer(rf"(?<!\w){re.escape(word.strip())}(?!\w)", text)] if word.strip() else []
        )
        if not spans:
            raise ValueError(f"The text holds no {word!r}. It reads: {text.replace(chr(0), '').strip()!r}.")
        found = [
            i
            for i, (piece, end) in enumerate(zip(pieces, ends, strict=True))
            if is_text[i] and any(a < end and end - len(piece.lstrip()) < b for a, b in spans)
        ]
        return torch.tensor(found)

    def _grid(self, image: int) -> PatchGrid:
        if not self.patches:
            raise ValueError(
                "This model's visual tokens are queries: each reads the whole image and has no place on it. "
                "mechvlm.query_reading gives the map [query, row, col] of where each one reads."
            )
        if not 0 <= image < len(self.grids):
            raise IndexError(f"Image {image} was asked for; the prompt holds {len(self.grids)}.")
        return self.grids[image]


def _spelled(piece: str) -> str:
    """A tokenizer's piece as it stands in the text: spaces and line breaks for their marks."""
    return piece.replace("▁", " ").replace("Ġ", " ").replace("Ċ", "\n").replace("<0x0A>", "\n")
