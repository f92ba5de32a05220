"""One example with its results, checked to belong together and ordered as the patch view shows it.

1. `match_example` compares inputs and results and picks one example.
2. `ShownExample` orders the example's positions as the page counts them: the visual tokens that
   its pictures show, view by view, then text and special tokens, then the visual tokens without a
   place; no padding. In this order they are the page's sources.
3. It lists what can be picked: positions of the prompt, and the answer's words (written.py).
4. It gives the values, heat maps and images that the page draws, and what the page shows first.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from PIL import Image

from mechvlm.errors import ViewError
from mechvlm.inputs.batch import Inputs
from mechvlm.inputs.tokens import Modality, TokenMap
from mechvlm.probes.logit_lens import LogitLensResult
from mechvlm.probes.norm_attention import NormAttentionResult
from mechvlm.probes.query_reading import QueryReadingResult
from mechvlm.view import packing
from mechvlm.view.drawn import DrawnView, drawn_positions, drawn_views
from mechvlm.view.match import (
    check_example,
    check_lens,
    check_models,
    check_norms,
    load_images,
    query_maps,
)
from mechvlm.view.written import Written, written_words


@dataclass(frozen=True)
class Pick:
    """What can be picked on the page: a position that reads, or a word that was written.

    Attributes:
        positions: whose rows are shown; of several, their mean.
        word: number of the word in `ShownExample.answer`; None for a position.
    """

    positions: tuple[int, ...]
    word: int | None = None


@dataclass(frozen=True)
class ShownExample:
    """One example and the results that were read from it, checked.

    Attributes:
        number: which example of the batch.
        tokens: what each of its positions holds.
        pictures: its original images.
        lens: its logit lens, without the other examples.
        norms: the norm-based attention of the whole batch.
        maps: where each query reads, [query, row, col]; None where visual tokens are patches.
    """

    number: int
    tokens: TokenMap
    pictures: tuple[Image.Image, ...]
    lens: LogitLensResult
    norms: NormAttentionResult
    maps: np.ndarray | None

    @cached_property
    def sources(self) -> np.ndarray:
        """The positions without padding [src], in the order in which the page counts them."""
        rest = (self.tokens.modality != Modality.IMAGE) & (self.tokens.modality != Modality.PADDING)
        drawn = drawn_positions(self.tokens)
        others = np.setdiff1d(self.tokens.image.numpy(), drawn)
        return np.concatenate([drawn, rest.nonzero()[:, 0].numpy(), others])

    @cached_property
    def source_of(self) -> np.ndarray:
        """Each position's number among `sources`, [pos]; -1 for padding."""
        numbers = np.full(len(self.tokens), -1)
        numbers[self.sources] = np.arange(len(self.sources))
        return numbers

    @cached_property
    def n_visual(self) -> int:
        """How many visual tokens the pictures show: the first `n_visual` sources."""
        return len(drawn_positions(self.tokens))

    @cached_property
    def n_words(self) -> int:
        """How many text and special tokens there are: the next `n_words` sources."""
        return len(self.tokens.text) + len(self.tokens.special)

    def piece(self, position: int) -> str:
        """A token's text; "line break" for a visual token without a place."""
        is_word = self.tokens.modality[position] != Modality.IMAGE or self.maps is not None
        return self.tokens.strings[position] if is_word else "line break"

    @property
    def parts(self) -> list[slice]:
        """The sources in two parts, visual tokens and the rest; each is packed with its maximum."""
        return [slice(0, self.n_visual), slice(self.n_visual, len(self.sources))]

    @cached_property
    def groups(self) -> list[np.ndarray]:
        """Each image's sources, then the text's and the special tokens'."""
        kinds = [*self.tokens.images, self.tokens.text, self.tokens.special]
        return [self.source_of[positions.numpy()] for positions in kinds]

    @cached_property
    def dest(self) -> np.ndarray:
        """The positions of the destinations, [dest]."""
        return self.norms.dest[self.number].numpy()

    @cached_property
    def answer(self) -> list[Written]:
        """The answer's words, and what stands between them, in order; empty without an answer."""
        return written_words(self.tokens, set(self.dest.tolist()))

    @cached_property
    def picks(self) -> list[Pick]:
        """What can be picked: the destinations up to the prompt's end, then the answer's words.

        An answer's token is no pick of its own, since what was read at its position wrote the next.
        """
        held = set(self.tokens.answer.tolist())
        dest = {p for p in self.dest.tolist() if self.source_of[p] >= 0}
        words = [Pick(word.wrote, n) for n, word in enumerate(self.answer) if dest.issuperset(word.wrote)]
        return [*(Pick((p,)) for p in sorted(dest - held)), *words]

    @cached_property
    def first_pick(self) -> Pick:
        """What is shown first: the answer's first word.

        Without one it is the last destination outside the image, or else the last one.
        """
        words = range(self.n_visual, self.n_visual + self.n_words)
        of_answer = [pick for pick in self.picks if pick.word is not None]
        if of_answer:
            return of_answer[0]
        return max(self.picks, key=lambda pick: (self.source_of[pick.positions[0]] in words, pick.positions))

    @property
    def first_layer(self) -> int:
        """The layer shown first: the middle one."""
        return (len(self.norms.layers) - 1) // 2

    @cached_property
    def first_source(self) -> int:
        """The source whose words are shown first.

        It is the visual token in the lens that `first_pick` reads most from, at `first_layer`.
        """
        read = self.source_of[self.lens.position.numpy()]
        read = read[read < self.n_visual]
        norms = self.row_values(self.first_pick)[1]
        return int(read[norms[self.first_layer, 0, read].argmax()])

    def row_values(self, pick: Pick) -> tuple[np.ndarray, np.ndarray]:
        """A pick's weights and norms, each [layer, 1 + head, src].

        Index 0 of the heads is all of them together: the mean of the weights, and the norm of the
        summed vectors. Each is the mean over the pick's positions.
        """
        rows = [self.dest.tolist().index(position) for position in pick.positions]
        by_row = self.norms.weight[:, self.number][:, :, rows].double()
        weights = by_row.mean(2).numpy()[..., self.sources]
        norms = self.norms.heads_of(self.number, rows).double().mean(2).numpy()[..., self.sources]
        summed = self.norms.norm[:, self.number][:, rows].double().mean(1).numpy()[..., self.sources]
        return (
            np.concatenate([weights.mean(1, keepdims=True), weights], 1),
            np.concatenate([summed[:, None], norms], 1),
        )

    @cached_property
    def views(self) -> list[DrawnView]:
        """The views of the images, as pictures show them."""
        return drawn_views(self.tokens)

    def heat(self, pick: Pick, layer: int) -> list[np.ndarray]:
        """A pick's norm-based heat, heads summed: [row, col] for each of `views`.

        It is 0 in cells without a token.
        """
        by_source = self.row_values(pick)[1][layer, 0]
        if self.maps is not None:
            return [np.einsum("q,qrc->rc", by_source[: self.n_visual], self.maps)]
        heats = []
        for view in self.views:
            assert view.positions is not None  # only the patches that queries read hold no token
            source = self.source_of[view.positions.numpy()]
            heats.append(np.where(view.positions.numpy() < 0, 0.0, by_source[source]))
        return heats

    def page_images(self) -> list[dict]:
        """The images as the page holds them: data URL and size in pixels."""
        return [{"src": packing.data_url(image), "size": list(image.size)} for image in self.pictures]

    def page_views(self) -> list[dict]:
        """The views as the page holds them: whose, where, and which cells hold no token."""
        return [
            {
                "image": view.image, "sheet": view.sheet, "name": view.name, "rows": view.grid.rows,
                "cols": view.grid.cols, "crop": list(view.grid.crop_box),
                "empty": [] if view.positions is None else (view.positions.flatten() < 0).nonzero()[:, 0].tolist(),
            }
            for view in self.views
        ]  # fmt: skip


def match_example(inputs, lens, norms, reading, example) -> ShownExample:
    """One example of the inputs with its results, after all checks.

    Raises:
        ViewError: when the results were not read from these inputs, hold NaN or infinity, or an
            image is gone.
    """
    # Checked here and not by annotations: results in the wrong order are an easy mistake.
    arguments = {"inputs": (inputs, Inputs), "lens": (lens, LogitLensResult), "norms": (norms, NormAttentionResult)}
    if reading is not None:
        arguments["reading"] = (reading, QueryReadingResult)
    for name, (value, kind) in arguments.items():
        if not isinstance(value, kind):
            raise ViewError(
                f"{name} is a {type(value).__name__}; patches(inputs, lens, norms) takes a {kind.__name__}."
            )
    n_examples = len(inputs)
    if example is None and n_examples != 1:
        raise ViewError(
            f"These inputs hold {n_examples} examples: say which one to show, example=0 to {n_examples - 1}."
        )
    example = check_example(inputs, example or 0)
    tokens = inputs.token_maps[example]
    check_models(inputs, lens, norms, reading)
    check_lens(lens, tokens, example, n_examples)
    check_norms(norms, tokens, example, n_examples)
    if max(lens.states) > len(norms.layers):
        raise ViewError(
            f"lens goes to state {max(lens.states)}, norms to layer {len(norms.layers) - 1}: they are of different models. "
            "Read them together, mechvlm.read(vlm, inputs, ...)."
        )
    pictures = load_images(inputs.images[example] if example < len(inputs.images) else (), tokens, example)
    maps = query_maps(reading, tokens, example, n_examples)
    values = [lens.of(example).probs, norms.norm[:, example], norms.weight[:, example], norms.value_norm[:, example]]
    if not all(bool(x.isfinite().all()) for x in values):
        raise ViewError(
            "The results hold NaN or infinity: there is nothing to draw. Read them again from finite states."
        )
    return ShownExample(example, tokens, pictures, lens.of(example), norms, maps)
