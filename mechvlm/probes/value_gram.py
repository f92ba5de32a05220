"""The formula of norm-based attention: norms of sums over heads, out of the heads' dot products.

Head h writes α_h[dest, src] f_h(x_src) of a source to a destination, with f_h(x_j) = v_hj W_O^h.

1. `value_gram` gives the dot products of the f_h of every source, [src head head].
2. `norm_attention_sum` makes the norm of Σ_h α_h f_h out of them and the weights.
"""

import math

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from mechvlm.probes.probe import Attended

NUMBERS_IN_CACHE, NUMBERS_IN_MEMORY = 2**19, 2**26
"""Numbers of an intermediate that exist at once.

On the CPU as many as its cache holds (2 MB), elsewhere enough for full kernels (256 MB).
"""
COLUMNS_AT_ONCE = 512
"""Columns of d_model that the CPU works on at once: narrower products cost more than the cache
saves."""


def value_gram(
    v: Float[Tensor, "batch kv_head src d_head"], w_o: Float[Tensor, "d_model head_d_head"]
) -> Float[Tensor, "batch src head head"]:
    """G_src[h, g] = f_h(x_src) · f_g(x_src), the dot products of what the heads would write.

    f_h(x_j) = v_hj W_O^h is what head h would write of source j at weight 1. v includes W_V's bias;
    W_O's bias is left out, since it belongs to no source (Kobayashi et al. 2020, eq. 2-4). Grouped
    queries share their value. The sum over d_model is taken in chunks, so that f
    [batch src head d_model] never exists as a whole.

    Where there are more points than d_model, the product of the weights is taken once instead:
    f_h · f_g = v_h (W_O^h W_O^gᵀ) v_gᵀ, which halves the work of each point. Both ways work in
    float32, on weights and values of any precision.

    Tested: equals f @ fᵀ, with f formed whole.
    """
    batch, _, n_src, d_head = v.shape
    n_heads = w_o.shape[1] // d_head
    by_weights = batch * n_src > len(w_o)
    if not by_weights and len(v) > 1 and v.device.type == "cpu":
        # One example at a time: chunks of all of them would be too narrow for the matrix product.
        return torch.cat([value_gram(example[None], w_o) for example in v])
    points = rearrange(v, "batch kv_head src d_head -> kv_head (batch src) d_head").float()
    heads = rearrange(w_o, "d_model (head d_head) -> head d_head d_model", head=n_heads)
    gram = _gram_by_weights(points, heads) if by_weights else _gram_by_vectors(points, heads)
    return rearrange(gram, "(batch src) h g -> batch src h g", batch=batch)


def _gram_by_vectors(
    v: Float[Tensor, "kv_head point d_head"], heads: Float[Tensor, "head d_head d_model"]
) -> Float[Tensor, "point head head"]:
    """f @ fᵀ, summed over chunks of d_model."""
    (kv_heads, n_points, _), n_heads = v.shape, len(heads)
    gram = v.new_zeros(n_points, n_heads, n_heads)
    width = COLUMNS_AT_ONCE if v.device.type == "cpu" else items_per_chunk(n_points * n_heads, v.device)
    chunks = heads.split(width, dim=-1)
    # Where no gradient needs f, every chunk is written into the same memory: new memory would cost
    # as much as the product of f with itself.
    buffer = None if torch.is_grad_enabled() else v.new_empty(n_heads * n_points * chunks[0].shape[-1])
    for chunk in chunks:
        # The heads of a group read the same values: as columns of one product, they need no copies.
        columns = rearrange(chunk.float(), "(kv_head group) d_head d -> kv_head d_head (group d)", kv_head=kv_heads)
        shape = kv_heads, n_points, columns.shape[-1]
        f = torch.bmm(v, columns, out=None if buffer is None else buffer[: math.prod(shape)].view(shape))
        f = rearrange(f, "kv_head point (group d) -> point (kv_head group) d", d=chunk.shape[-1])
        gram.baddbmm_(f, f.transpose(-1, -2))
    return gram


def _gram_by_weights(
    v: Float[Tensor, "kv_head point d_head"], heads: Float[Tensor, "head d_head d_model"]
) -> Float[Tensor, "point head head"]:
    """v_h (W_O^h W_O^gᵀ) v_gᵀ for every head h and the heads g from h on; the rest by symmetry."""
    n_heads, d_head, d_model = heads.shape
    group = n_heads // len(v)
    heads = heads.float()
    values = rearrange(v, "kv_head point d_head -> point kv_head d_head").repeat_interleave(group, dim=1)
    gram = v.new_zeros(v.shape[1], n_heads, n_heads)
    size = items_per_chunk(d_model, v.device)
    blocks = [slice(start, start + size) for start in range(0, v.shape[1], size)]
    for h in range(n_heads):
        weights = heads[h] @ heads[h:].flatten(0, 1).T  # [d_head, (heads from h on) d_head]
        for own in blocks:
            gram[own, h, h:] = (v[h // group, own] @ weights).unflatten(-1, (-1, d_head)).mul_(values[own, h:]).sum(-1)
    return gram.triu() + gram.triu(1).mT


def norm_attention_sum(
    alpha: Float[Tensor, "batch head dest src"], gram: Float[Tensor, "batch src head head"]
) -> Float[Tensor, "batch dest src"]:
    """Norm of what each source wrote to each destination, summed over heads.

    ‖Σ_h α_h[dest, src] f_h[src]‖ = sqrt(αᵀ G α), with G_src[h, g] = f_h[src] · f_g[src]
    (`value_gram`), in residual-stream units: exact, and without a tensor of [dest, src, d_model].

    Source: Kobayashi et al. 2020, eq. 5. Differs: x is the RMS-normed input of a pre-norm decoder.
    Tested: equals the norm of the explicitly summed vectors.
    """
    # Laid out by source once: both products then run over memory as it lies.
    a = rearrange(alpha, "batch head dest src -> batch src head dest").contiguous()
    return rearrange((gram @ a).mul_(a).sum(2).clamp_(min=0).sqrt_(), "batch src dest -> batch dest src")


def shared_gram(attended: Attended) -> Float[Tensor, "batch src head head"]:
    """`value_gram` of a layer, computed once for all probes that read it."""
    if "gram" not in attended.shared:
        attended.shared["gram"] = value_gram(attended.parts.v, attended.w_o)
    return attended.shared["gram"]


def items_per_chunk(size: int, device: torch.device) -> int:
    """How many items of `size` numbers are worked on at once.

    At least 32, because matrix products need some width.
    """
    return max(32, (NUMBERS_IN_CACHE if device.type == "cpu" else NUMBERS_IN_MEMORY) // size)
