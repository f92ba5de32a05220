"""Attention rows against a naive loop: with a cache, with flash's padding, with grouped keys."""

import math

import pytest
import torch

from mechvlm.decoder.attention import Attention, attention_rows

SCALE = 0.37


def randn(*shape, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rows_of(q, k, mask, rows=None, **more) -> torch.Tensor:
    return attention_rows(Attention(q, k, k, mask, SCALE, **more), rows)


def naive(q, k, open_: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """One weight at a time; `open_` [batch head dest src] says which sources can be seen."""
    batch, n_heads, n_dest, _ = q.shape
    group = n_heads // k.shape[1]
    weights = torch.zeros(batch, n_heads, n_dest, k.shape[2])
    for b in range(batch):
        for h in range(n_heads):
            for d in range(n_dest):
                scores = {}
                for s in range(k.shape[2]):
                    if open_[b, h, d, s]:
                        added = 0.0 if bias is None else float(bias[b, h, d, s])
                        scores[s] = SCALE * float(q[b, h, d] @ k[b, h // group, s]) + added
                top = max(scores.values())
                total = sum(math.exp(score - top) for score in scores.values())
                for s, score in scores.items():
                    weights[b, h, d, s] = math.exp(score - top) / total
    return weights


BATCH, HEADS, KV, SRC, WIDTH = 2, 4, 2, 7, 6


def tensors(n_dest: int) -> tuple[torch.Tensor, torch.Tensor]:
    return randn(BATCH, HEADS, n_dest, WIDTH, seed=0), randn(BATCH, KV, SRC, WIDTH, seed=1)


def causal(n_dest: int) -> torch.Tensor:
    """Destination d is position SRC - n_dest + d."""
    past = SRC - n_dest
    open_ = torch.zeros(BATCH, HEADS, n_dest, SRC, dtype=torch.bool)
    for d in range(n_dest):
        open_[:, :, d, : past + d + 1] = True
    return open_


@pytest.mark.parametrize("n_dest", [7, 3, 1])
def test_behind_a_cache_destinations_are_the_last_positions(n_dest):
    q, k = tensors(n_dest)
    torch.testing.assert_close(rows_of(q, k, None), naive(q, k, causal(n_dest)), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("n_dest", [7, 3])
def test_flashs_padding_is_added_to_the_causal_mask(n_dest):
    q, k = tensors(n_dest)
    padding = torch.ones(BATCH, SRC, dtype=torch.long)
    padding[1, :3] = 0
    open_ = causal(n_dest)
    open_[1, :, :, :3] = False
    first = 0 if n_dest == 3 else 3  # rows of padding mean nothing
    got, want = rows_of(q, k, padding), naive(q, k, open_ | ~open_.any(-1, keepdim=True))
    torch.testing.assert_close(got[0], want[0], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(got[1, :, first:], want[1, :, first:], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("heads", [1, HEADS])
def test_masks_of_four_axes(heads):
    q, k = tensors(5)
    open_ = randn(BATCH, heads, 5, SRC, seed=2) > -0.5
    open_[..., 0] = True
    want = naive(q, k, open_.expand(-1, HEADS, -1, -1))
    torch.testing.assert_close(rows_of(q, k, open_), want, rtol=1e-4, atol=1e-6)
    bias = randn(BATCH, heads, 5, SRC, seed=3)
    want = naive(q, k, torch.ones(BATCH, HEADS, 5, SRC, dtype=torch.bool), bias.expand(-1, HEADS, -1, -1))
    torch.testing.assert_close(rows_of(q, k, bias), want, rtol=1e-4, atol=1e-6)
    # A static cache's mask is longer than its keys.
    longer = torch.cat([bias, bias + 1 + bias.flip(-1)], dim=-1)
    torch.testing.assert_close(rows_of(q, k, longer), want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("n_dest", [7, 4])
@pytest.mark.parametrize("kind", ["none", "padding", "bias"])
def test_chosen_rows_are_those_of_all_rows(n_dest, kind):
    q, k = tensors(n_dest)
    padding = torch.ones(BATCH, SRC, dtype=torch.long)
    padding[1, :2] = 0
    mask = {"none": None, "padding": padding, "bias": randn(BATCH, 1, n_dest, SRC, seed=4)}[kind]
    rows = torch.tensor([[3, 2, 3], [2, 3, 2]])
    every = rows_of(q, k, mask)
    want = torch.stack([every[b][:, rows[b]] for b in range(BATCH)])
    torch.testing.assert_close(rows_of(q, k, mask, rows), want)


@pytest.mark.parametrize(("dtype", "rounding"), [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
def test_weights_of_half_precision_are_off_by_two_roundings_of_a_score(dtype, rounding):
    """Scores are rounded as products and once scaled; the softmax is in float32.

    Against float64 of the same queries and keys, where scores reach about 15.
    """
    q, k = (2 * randn(1, 4, 64, 16, seed=seed).to(dtype) for seed in (0, 1))
    got = attention_rows(Attention(q, k, k, None, 0.25))
    open_ = torch.ones(64, 64).tril().bool()
    scores = 0.25 * q.double() @ k.double().mT
    wanted = scores.masked_fill(~open_, -torch.inf).softmax(-1)
    # An error e of each score changes a weight by a factor between exp(-2 e) and exp(2 e).
    error = (got.double().log() - wanted.log())[..., open_].abs()
    bound = 2 * rounding * scores.masked_fill(~open_, 0).abs().amax(-1, keepdim=True).expand_as(scores)[..., open_]
    assert got.dtype == torch.float32
    assert (error <= bound).all()
    assert error.max() > rounding / 8, "the scores were rounded"
