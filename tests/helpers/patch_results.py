"""Inputs and results for the patch view's tests, up to the size of LLaVA-1.5-7B."""

import numpy as np
import torch
from PIL import Image, ImageDraw

import mechvlm as mv
from helpers.models import llava

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


def large_inputs(n: int = 620) -> mv.Inputs:
    """Inputs with 576 patches and `n` tokens in all, in LLaMA's tokenizer."""
    vlm = mv.load(*llava(image=336, layers=2))
    prompt = "what is this"
    while len(vlm.inputs(photo(), prompt).tokens) < n:
        prompt += " a"
    return vlm.inputs(photo(), prompt)
