"""Recomputes attention weights from q and k, so that the model keeps its own implementation.

Every Hugging Face attention, SDPA or eager, makes one call,
`attention_interface(module, q, k, v, mask, ...)`. nnsight gives its arguments inside a trace. Only
this file knows how they are laid out.
"""

from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor
from torch.nn.attention.flex_attention import create_mask

from mechvlm.families.record import Architecture


class Attention(NamedTuple):
    """The tensors that one layer's attention is computed from.

    Attributes:
        q: queries [batch head dest d_head], after the rotary embedding.
        k: keys [batch kv_head src d_head], after the rotary embedding.
        v: values [batch kv_head src d_head].
        mask: as the implementation takes it: None, the padding [batch src], or boolean or additive
            [batch head dest src], where batch and head may be 1.
        scale: factor on q.k.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    scale: float


def attention_call(module: Any, record: Architecture) -> Any:
    """nnsight's envoy of the `attention_interface` call in an attention module.

    nnsight rewrites a module's forward when its source is first asked for. Call this before that
    forward runs; afterwards it is too late.
    """
    return getattr(module.source, record.attention_call)


def read_attention(module: Any, record: Architecture) -> Attention:
    """Inside a trace: the tensors that the module's attention is computed from."""
    (_, q, k, v, mask, *_), options = attention_call(module, record).inputs
    if hasattr(mask, "mask_mod"):  # flex attention's BlockMask: a function of the positions
        mask = create_mask(mask.mask_mod, *mask.shape, device=q.device)
    return Attention(q, k, v, mask, options["scaling"])


def replace_mask(module: Any, record: Architecture, mask: Tensor) -> None:
    """Inside a trace: run the module's attention with another mask."""
    call = attention_call(module, record)
    (attention, q, k, v, _, *rest), options = call.inputs
    call.inputs = ((attention, q, k, v, mask, *rest), options)


def attention_rows(
    q: Tensor, k: Tensor, mask: Tensor | None, scale: float, rows: Tensor | None = None, dtype=torch.float32
) -> Tensor:
    """Attention weights, recomputed: softmax(q k^T scale + mask).

    The softmax is in float32, as in Hugging Face's eager attention, whichever implementation the
    model runs.

    Args:
        q: queries [batch head dest d_head].
        k: keys [batch kv_head src d_head].
        mask: None for the causal mask, the padding [batch src] to add to the causal mask, or a
            boolean or additive mask [batch head dest src], where batch and head may be 1.
        scale: factor on q k^T.
        rows: destinations to compute [batch row]; None for all.
        dtype: dtype of the returned weights.

    Returns:
        The weights [batch head row src].
    """
    n_dest, n_src = q.shape[2], k.shape[2]
    index = None if rows is None else rows.to(q.device)[:, None, :, None]  # [batch 1 row 1]
    if index is not None:
        q = q.gather(2, index.expand(-1, q.shape[1], -1, q.shape[3]))
    # The query heads of a group share a key: as rows of one product, they need no copies of it.
    grouped = rearrange(q, "batch (kv_head group) row d_head -> batch kv_head (group row) d_head", kv_head=k.shape[1])
    scores = grouped @ k.transpose(-1, -2)
    scores = rearrange(scores, "batch kv_head (group row) src -> batch (kv_head group) row src", row=q.shape[2])
    # In place from here on: a copy of all scores costs as much as a layer's smaller products.
    scores = scores.mul_(scale).float()
    lowest = torch.finfo(scores.dtype).min
    if mask is None or mask.ndim == 2:
        dest = torch.arange(n_dest, device=q.device)[:, None] if index is None else index
        allowed = torch.arange(n_src, device=q.device) <= dest + (n_src - n_dest)
        if mask is not None:  # flash attention gets only the padding
            allowed = allowed & mask[:, None, None, :n_src].bool()
        scores.masked_fill_(~allowed, lowest)
    else:
        mask = mask[..., :n_src].expand(q.shape[0], -1, -1, -1)
        if index is not None:
            mask = mask.gather(2, index.expand(-1, mask.shape[1], -1, n_src))
        scores = scores.masked_fill_(~mask, lowest) if mask.dtype == torch.bool else scores.add_(mask)
    return scores.softmax(-1).to(dtype)
