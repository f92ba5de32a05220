"""One example with its results, checked to belong together and ordered as the patch view shows it.

1. `match_example` compares inputs and results and picks one example.
2. `ShownExample` orders the example's positions as the page counts them: visual tokens first, then
   text and special tokens, without padding. In this order they are the page's sources.
3. It gives the values, heat maps and images that the page draws, and what the page shows first.
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
from mechvlm.view.match import check_example, check_lens, check_models, check_norms, load_images, query_maps


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
        """The positions without padding [src], visual tokens first, as the page counts them."""
        rest = (self.tokens.modality != Modality.IMAGE) & (self.tokens.modality != Modality.PADDING)
        return np.concatenate([self.tokens.image.numpy(), rest.nonzero()[:, 0].numpy()])

    @cached_property
    def source_of(self) -> np.ndarray:
        """Each position's number among `sources`, [pos]; -1 for padding."""
        numbers = np.full(len(self.tokens), -1)
        numbers[self.sources] = np.arange(len(self.sources))
        return numbers

    @property
    def n_visual(self) -> int:
        """How many visual tokens there are: the first `n_visual` sources."""
        return len(self.tokens.image)

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
    def rows(self) -> list[int]:
        """Indices into `dest` of the tokens of this example, ordered by position, each once."""
        first = {int(p): row for row, p in reversed(list(enumerate(self.dest))) if self.source_of[p] >= 0}
        return [first[p] for p in sorted(first)]

    @cached_property
    def first_row(self) -> int:
        """The destination shown first: the last one outside the image, or else the last one."""
        return max(self.rows, key=lambda row: (self.source_of[self.dest[row]] >= self.n_visual, self.dest[row]))

    @property
    def first_layer(self) -> int:
        """The layer shown first: the middle one."""
        return (len(self.norms.layers) - 1) // 2

    @cached_property
    def first_source(self) -> int:
        """The source whose words are shown first.

        It is the visual token in the lens that `first_row` reads most from, at `first_layer`.
        """
        read = self.source_of[self.lens.position.numpy()]
        read = read[read < self.n_visual]
        norms = self.row_values(self.first_row)[1]
        return int(read[norms[self.first_layer, 0, read].argmax()])

    def row_values(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        """A destination's weights and norms, each [layer, 1 + head, src].

        Index 0 of the heads is all of them together: the mean of the weights, and the norm of the
        summed vectors.
        """
        weights = self.norms.weight[:, self.number, :, row].double().numpy()[..., self.sources]
        norms = weights * self.norms.value_norm[:, self.number].double().numpy()[..., self.sources]
        summed = self.norms.norm[:, self.number, row].double().numpy()[..., self.sources]
        return (
            np.concatenate([weights.mean(1, keepdims=True), weights], 1),
            np.concatenate([summed[:, None], norms], 1),
        )

    def heat(self, row: int, layer: int) -> list[np.ndarray]:
        """A destination's norm-based heat, heads summed: [row, col] of patches for each image."""
        visual = self.row_values(row)[1][layer, 0, : self.n_visual]
        if self.maps is not None:
            return [np.einsum("q,qrc->rc", visual, self.maps)]
        split = np.split(visual, np.cumsum([g.rows * g.cols for g in self.tokens.grids])[:-1])
        return [v.reshape(g.rows, g.cols) for v, g in zip(split, self.tokens.grids, strict=True)]

    def page_images(self) -> list[dict]:
        """The images as the page holds them: data URL, size in pixels, place of the patch grid."""
        return [
            {
                "src": packing.data_url(image), "size": list(image.size), "rows": grid.rows, "cols": grid.cols,
                "crop": list(grid.crop_box),
            }
            for image, grid in zip(self.pictures, self.tokens.grids, strict=True)
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
