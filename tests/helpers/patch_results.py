"""Inputs and results for the patch view's tests, up to the size of LLaVA-1.5-7B."""

from collections.abc import Sequence
from itertools import cycle

import numpy as np
import torch
from PIL import Image, ImageDraw

import mechvlm as mv
from helpers.models import llava
from helpers.uneven import query_layouts
from mechvlm.inputs.grids import PatchGrid
from mechvlm.inputs.tokens import Modality, TokenMap
from mechvlm.inputs.views import one_grid

WORDS = 4000


def photo(width: int = 640, height: int = 480) -> Image.Image:
    """An image that compresses like a photograph: a smooth ground, a few shapes, a little grain."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[0:height, 0:width] / height
    ground = np.stack([150 + 60 * y, 170 + 20 * np.sin(3 * x), 210 - 90 * y], -1)
    picture = Image.fromarray(ground.clip(0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(picture)
    for _ in range(24):
        left, top, size = rng.integers(0, width), rng.integers(0, height), rng.integers(12, 160)
        draw.ellipse((left, top, left + size, top + size * 0.8), fill=tuple(rng.integers(30, 230, 3).tolist()))
    grain = rng.normal(0, 5, (height, width, 1))
    return Image.fromarray((np.asarray(picture) + grain).clip(0, 255).astype(np.uint8))


def synthetic(
    inputs: mv.Inputs, layers: int = 32, heads: int = 32, dest: tuple[int, ...] = (), spread: float = 2.5, k: int = 5
):
    """(lens, norms) of an invented model.

    Attention logits have the standard deviation `spread`, and the first token is a sink. `dest` are
    destinations besides the last position.
    """
    rng = np.random.default_rng(1)
    tokens, n = inputs.tokens, len(inputs.tokens)
    dest = (*dest, n - 1)
    logits = rng.normal(0, spread, (layers, 1, heads, len(dest), n)).astype(np.float32)
    logits[..., 0] = 3 * spread
    after = np.arange(n) > np.array(dest)[:, None]
    weight = np.exp(np.where(after, -np.inf, logits))
    weight /= weight.sum(-1, keepdims=True)
    size = rng.lognormal(0, 0.4, (layers, 1, heads, 1, n)).astype(np.float32)
    size[..., 0] *= 0.02
    norms = mv.NormAttentionResult(
        norm=torch.from_numpy(np.sqrt(np.square(weight * size).sum(2))), weight=torch.from_numpy(weight),
        value_norm=torch.from_numpy(size[..., 0, :]),
        layers=tuple(range(layers)), dest=torch.tensor([dest]), names=tuple(map(str, dest)), model=inputs.model,
    )  # fmt: skip
    shape = (layers + 1, len(tokens.image), k)
    frequency = 1 / np.arange(1, WORDS + 1)
    sampled = rng.choice(WORDS, shape, p=frequency / frequency.sum())
    probs = -np.sort(-rng.dirichlet(np.full(30, 0.3), shape[:2]), -1)[..., :k]
    lens = mv.LogitLensResult(
        ids=torch.from_numpy(sampled + 40000), probs=torch.from_numpy(probs).float(), states=tuple(range(layers + 1)),
        example=torch.zeros(shape[1], dtype=torch.long), position=tokens.image, final_norm=True, model=inputs.model,
        vocabulary=tuple((i + 40000, f" word{i}") for i in range(WORDS)),
    )  # fmt: skip
    return lens, norms


def large_inputs(n: int = 620, answer: str | None = None) -> mv.Inputs:
    """Inputs with 576 patches and a prompt of `n` tokens in all, in LLaMA's tokenizer."""
    vlm = mv.load(*llava(image=336, layers=2))
    prompt = "what is this"
    while len(vlm.inputs(photo(), prompt).tokens) < n:
        prompt += " a"
    inputs = vlm.inputs(photo(), prompt)
    return inputs if answer is None else inputs.answered(answer)


def gradient(width: int, height: int) -> Image.Image:
    """Red rises to the right and green downwards: every place has a color of its own."""
    y, x = np.mgrid[0:height, 0:width]
    channels = [255 * x / width, 255 * y / height, np.full(x.shape, 90)]
    return Image.fromarray(np.stack(channels, -1).astype(np.uint8))


UNEVEN = ("<s>", " What", *["<image>"] * 6, " or", *["<image>"] * 6, " shape", "</s>", " is", " it")
"""Tokens around two images of 2 x 3 and 3 x 2 patches; two positions of padding come before."""
UNEVEN_DEST = (19, 20, 13, 17)
"""Destinations out of order, a patch among them."""


def uneven(patches: bool = True, turned: bool = False, dest: Sequence[int] = UNEVEN_DEST, answer: Sequence[str] = ()):
    """(inputs, lens, norms) by hand, so that no two axes, parts or rows can be exchanged unseen.

    Grids are not square: image 0 is padded above and below, image 1 is cut at the left and right;
    `turned` exchanges the two. Layers, heads, destinations and kinds of tokens have values of
    different sizes. The lens holds the visual tokens and " or", at every other state. With
    patches=False the visual tokens are queries of image 0 alone, and a fourth value is `reading`.
    `answer` are the tokens of an answer, from position 21 on.
    """
    rng, n_layers, n_heads = np.random.default_rng(5), 11, 3
    grids = (
        PatchGrid(2, 3, 20, (300, 150), (60, 30), (0, -5)),
        PatchGrid(3, 2, 20, (250, 300), (50, 60), (5, 0)),
    )[:: -1 if turned else 1]
    strings = ("<pad>",) * 2 + UNEVEN + tuple(answer)
    kinds = {"<pad>": Modality.PADDING, "<s>": Modality.SPECIAL, "</s>": Modality.SPECIAL, "<image>": Modality.IMAGE}
    modality = torch.tensor([kinds.get(piece, Modality.TEXT) for piece in strings])
    if not patches:
        grids, modality[11:17] = grids[:1], Modality.TEXT
        strings = tuple(piece if i < 11 else piece.replace("<image>", f" w{i}") for i, piece in enumerate(strings))
    n = len(strings)
    layouts = tuple(map(one_grid, grids)) if patches else query_layouts(6, grids)
    tokens = TokenMap(torch.arange(n) + 500, strings, strings, modality, layouts, len(answer))
    pictures = tuple(gradient(*grid.image_size) for grid in grids)
    encoding = {"attention_mask": (modality != Modality.PADDING).long()[None]}
    inputs = mv.Inputs(encoding, (tokens,), (pictures,), ("made",), ("made",), "made")

    size = np.ones((len(dest), n))
    for row, (image, text) in zip(range(len(dest)), cycle([(2, 1), (0.5, 3), (3, 1), (1, 0.4)]), strict=False):
        size[row, modality == Modality.IMAGE] = image
        size[row, modality == Modality.TEXT] = text
    size[:, 11:17] *= 0.4  # image 1
    weight = rng.gamma(0.7, 1, (n_layers, 1, n_heads, len(dest), n)) * size
    weight[..., np.arange(n) > np.array(dest)[:, None]] = 0
    weight[..., modality == Modality.PADDING] = 0
    weight /= np.maximum(weight.sum(-1, keepdims=True), 1e-9)  # a row of padding stays 0
    layer, head = 1.3 ** np.arange(n_layers), np.array([1, 2, 5.0])
    value_norm = rng.uniform(0.5, 2, (n_layers, 1, n_heads, n)) * layer[:, None, None, None] * head[:, None]
    norm = (weight * value_norm[..., None, :]).sum(2) * rng.uniform(0.3, 0.9, (n_layers, 1, len(dest), n))
    norms = mv.NormAttentionResult(
        norm=torch.from_numpy(norm).float(), weight=torch.from_numpy(weight).float(),
        value_norm=torch.from_numpy(value_norm).float(), layers=tuple(range(n_layers)),
        dest=torch.tensor([[*dest]]), names=tuple(map(str, dest)), model="made",
    )  # fmt: skip
    position = torch.cat([tokens.image, torch.tensor([10])])
    states = tuple(range(1, n_layers + 1, 2))
    shape = (len(states), len(position), 3)
    lens = mv.LogitLensResult(
        ids=torch.arange(np.prod(shape)).reshape(shape) + 40_000,
        probs=torch.from_numpy(-np.sort(-rng.dirichlet(np.ones(4), shape[:2]), -1)[..., :3]).float(),
        states=states, example=torch.zeros(len(position), dtype=torch.long), position=position, final_norm=True,
        model="made", vocabulary=tuple((int(i) + 40_000, f" w{i}") for i in range(np.prod(shape))),
    )  # fmt: skip
    if patches:
        return inputs, lens, norms
    reads = rng.gamma(0.5, 1, (2, 1, 6, 2, 3)) * np.arange(1, 7)[:, None, None]
    return inputs, lens, norms, mv.QueryReadingResult(torch.from_numpy(reads / 60).float(), model="made")
