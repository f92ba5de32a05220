"""An image that a model sees twice: a whole view and a tile over its right half."""

import numpy as np
import torch
from PIL import Image

import mechvlm as mv
from mechvlm.inputs.tokens import Modality, TokenMap
from mechvlm.inputs.views import AreaGrid, Layout, View

SIZE = (60, 40)
KINDS = ".stiiiiiiiiiiiitt"
"""Padding, BOS, a word, 12 visual tokens, two words. The tile comes first, as in InternVL: tokens 0
to 3 are its 2 x 2 with a line break after each row, 6 to 11 the whole image as 2 x 3."""


def tokens_of(whole: bool = True) -> TokenMap:
    tile = View("tile 0,1", AreaGrid(2, 2, SIZE, (30.0, 0.0, 60.0, 40.0)), torch.tensor([[0, 1], [3, 4]]))
    thumbnail = View("thumbnail", AreaGrid(2, 3, SIZE, (0.0, 0.0, 60.0, 40.0)), torch.arange(6, 12).reshape(2, 3))
    other = View("tile 0,0", AreaGrid(2, 3, SIZE, (0.0, 0.0, 30.0, 40.0)), torch.arange(6, 12).reshape(2, 3))
    layout = Layout(12, SIZE, (thumbnail, tile) if whole else (other, tile))
    modality = torch.tensor([".sti".index(kind) for kind in KINDS])
    strings = tuple({".": "<pad>", "s": "<s>", "i": "<image>"}.get(kind, f" w{i}") for i, kind in enumerate(KINDS))
    return TokenMap(torch.arange(len(KINDS)), strings, strings, modality, (layout,))


def results(tokens: TokenMap, dest: tuple[int, ...] = (16, 8)):
    """(inputs, lens, norms) with different values everywhere."""
    n, rng = len(tokens), np.random.default_rng(3)
    weight = rng.uniform(0.1, 1, (2, 1, 2, len(dest), n))
    weight[..., np.arange(n) > np.array(dest)[:, None]] = 0
    weight[..., tokens.modality == Modality.PADDING] = 0
    weight /= weight.sum(-1, keepdims=True)
    norms = mv.NormAttentionResult(
        norm=torch.from_numpy(weight.sum(2) * rng.uniform(0.5, 1, (2, 1, len(dest), n))).float(),
        weight=torch.from_numpy(weight).float(), value_norm=torch.ones(2, 1, 2, n), layers=(0, 1),
        dest=torch.tensor([[*dest]]), names=tuple(map(str, dest)), model="made",
    )  # fmt: skip
    position = tokens.image
    lens = mv.LogitLensResult(
        ids=torch.full((2, len(position), 1), 1000), probs=torch.full((2, len(position), 1), 0.5),
        states=(0, 2), example=torch.zeros(len(position), dtype=torch.long), position=position, final_norm=True,
        model="made", vocabulary=((1000, " word"),),
    )  # fmt: skip
    encoding = {"attention_mask": (tokens.modality != Modality.PADDING).long()[None]}
    pictures = (Image.new("RGB", SIZE, "gray"),)
    return mv.Inputs(encoding, (tokens,), (pictures,), ("made",), ("made",), "made"), lens, norms
