"""One example and the results that are of it, checked to belong together, as a page counts and shows them."""

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
from mechvlm.view.match import _check_lens, _check_models, _check_norms, _maps, _open


@dataclass(frozen=True)
class Seen:
    """One example, and the results that are of it, checked.

    Attributes:
        order: its positions without padding, visual tokens first: the sources as the page counts them.
        maps: where each query reads [query, row, col]; None where visual tokens are patches.
    """

    example: int
    tokens: TokenMap
    pictures: tuple[Image.Image, ...]
    lens: LogitLensResult
    norms: NormAttentionResult
    maps: np.ndarray | None

    @cached_property
    def order(self) -> np.ndarray:
        rest = (self.tokens.modality != Modality.IMAGE) & (self.tokens.modality != Modality.PADDING)
        return np.concatenate([self.tokens.image.numpy(), rest.nonzero()[:, 0].numpy()])

    @cached_property
    def index(self) -> np.ndarray:
        """Of each position, its place in `order`; -1 for padding."""
        found = np.full(len(self.tokens), -1)
        found[self.order] = np.arange(len(self.order))
        return found

    @property
    def n_visual(self) -> int:
        return len(self.tokens.image)

    @property
    def parts(self) -> list[slice]:
        return [slice(0, self.n_visual), slice(self.n_visual, len(self.order))]

    @cached_property
    def groups(self) -> list[np.ndarray]:
        """Each image's sources, then the text's and the special tokens'."""
        kinds = [*self.tokens.images, self.tokens.text, self.tokens.special]
        return [self.index[positions.numpy()] for positions in kinds]

    @cached_property
    def dest(self) -> np.ndarray:
        return self.norms.dest[self.example].numpy()

    @cached_property
    def rows(self) -> list[int]:
        """The destinations that are tokens of this example, in their order, each once."""
        first = {int(p): row for row, p in reversed(list(enumerate(self.dest))) if self.index[p] >= 0}
        return [first[p] for p in sorted(first)]

    @cached_property
    def start(self) -> int:
        """The destination that is shown first: the last one that is not on the image, where there is one."""
        return max(self.rows, key=lambda row: (self.index[self.dest[row]] >= self.n_visual, self.dest[row]))

    @property
    def layer(self) -> int:
        """The layer that is shown first: the middle one."""
        return (len(self.norms.layers) + 1) // 2

    @cached_property
    def point(self) -> int:
        """The source whose words are shown first: the visual token that the first destination reads most from."""
        held = self.index[self.lens.position.numpy()]
        held = held[held < self.n_visual]
        return int(held[self.values(self.start)[1][self.layer - 1, 0, held].argmax()])

    def values(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        """A destination's weights and norms [layer, 1 + head, src], all heads together first: the mean, and the summed norm."""
        raw = self.norms.weight[:, self.example, :, row].double().numpy()[..., self.order]
        heads = raw * self.norms.value_norm[:, self.example].double().numpy()[..., self.order]
        summed = self.norms.norm[:, self.example, row].double().numpy()[..., self.order]
        return np.concatenate([raw.mean(1, keepdims=True), raw], 1), np.concatenate([summed[:, None], heads], 1)

    def heat(self, row: int, layer: int) -> list[np.ndarray]:
        """The norm-based heat of a destination, heads summed, on each image's patches [row, col]."""
        visual = self.values(row)[1][layer - 1, 0, : self.n_visual]
        if self.maps is not None:
            return [np.einsum("q,qrc->rc", visual, self.maps)]
        split = np.split(visual, np.cumsum([g.rows * g.cols for g in self.tokens.grids])[:-1])
        return [v.reshape(g.rows, g.cols) for v, g in zip(split, self.tokens.grids, strict=True)]

    def images(self) -> list[dict]:
        return [
            {
                "src": packing.picture(image), "size": list(image.size), "rows": grid.rows, "cols": grid.cols,
                "crop": list(grid.crop_box),
            }
            for image, grid in zip(self.pictures, self.tokens.grids, strict=True)
        ]  # fmt: skip


def see(inputs, lens, norms, reading, example) -> Seen:
    """The example, after all checks.

    Raises:
        ViewError: when the results are not of these inputs, or an image is gone.
    """
    kinds = {"inputs": (inputs, Inputs), "lens": (lens, LogitLensResult), "norms": (norms, NormAttentionResult)}
    if reading is not None:
        kinds["reading"] = (reading, QueryReadingResult)
    for name, (given, kind) in kinds.items():
        if not isinstance(given, kind):
            raise ViewError(
                f"{name} is a {type(given).__name__}; patches(inputs, lens, norms) takes a {kind.__name__}."
            )
    n = len(inputs)
    if example is None and n != 1:
        raise ViewError(f"These inputs hold {n} examples: say which one to show, example=0 to {n - 1}.")
    example = example or 0
    if not 0 <= example < n:
        raise ViewError(f"Example {example} was asked for; these inputs hold 0 to {n - 1}.")
    tokens = inputs.token_maps[example]
    _check_models(inputs, lens, norms, reading)
    _check_lens(lens, tokens, example, n)
    _check_norms(norms, tokens, example, n)
    if max(lens.layers) > len(norms.layers):
        raise ViewError(
            f"lens goes to state {max(lens.layers)}, norms to layer {len(norms.layers)}: they are of different models."
        )
    pictures = _open(inputs.images[example] if example < len(inputs.images) else (), tokens, example)
    seen = Seen(example, tokens, pictures, lens.of(example), norms, _maps(reading, tokens, example, n))
    values = [lens.probs, norms.norm[:, example], norms.weight[:, example], norms.value_norm[:, example]]
    if not all(bool(x.isfinite().all()) for x in values):
        raise ViewError(
            "The results hold NaN or infinity: there is nothing to draw. Read them again from finite states."
        )
    return seen
