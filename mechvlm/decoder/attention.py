"""Attention weights, recomputed from q and k: the model keeps its own implementation, SDPA or eager.

Every Hugging Face attention ends in one call, `attention_interface(module, q, k, v, mask, ...)`.
nnsight gives its arguments inside a trace; this file alone knows how they are laid out.
"""

from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from mechvlm.families.record import Architecture


class Attention(NamedTuple):
    """What one layer's attention is computed from.

    q: [batch head dest d_head] and k: [batch kv_head src d_head], after the rotary embedding;
    v: [batch kv_head src d_head]; mask: as the implementation takes it (None, boolean or additive);
    scale: of q.k.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    scale: float


def attention_call(module: Any, record: Architecture) -> Any:
    """nnsight's envoy of the call in an attention module.

    nnsight rewrites a module's forward when its source is first asked for. Once that forward runs it
    is too late, so ask before.
    """
    return getattr(module.source, record.attention_call)


def read_attention(module: Any, record: Architecture) -> Attention:
    """Inside a trace: what the module's attention is computed from."""
    (_, q, k, v, mask, *_), options = attention_call(module, record).inputs
    return Attention(q, k, v, mask, options["scaling"])


def replace_mask(module: Any, record: Architecture, mask: Tensor) -> None:
    """Inside a trace: let the module attend under another mask."""
    call = attention_call(module, record)
    (attention, q, k, v, _, *rest), options = call.inputs
    call.inputs = ((attention, q, k, v, mask, *rest), options)


def attention_rows(
    q: Tensor, k: Tensor, mask: Tensor | None, scale: float, rows: Tensor | None = None, dtype=torch.float32
) -> Tensor:
    """Attention weights [batch head row src] of the destinations `rows` [batch row] (default: all), from q and k.

    softmax(q k^T scale + mask), in float32 as Hugging Face's eager attention does, whatever the model itself runs.
    A mask of None is the causal one.
    """
    n_dest, n_src = q.shape[2], k.shape[2]
    at = None if rows is None else rows.to(q.device)[:, None, :, None]
    if at is not None:
        q = q.gather(2, at.expand(-1, q.shape[1], -1, q.shape[3]))
    # Grouped queries share a key: they are rows of one product, so that no key is copied.
    grouped = rearrange(q, "batch (kv_head group) row d_head -> batch kv_head (group row) d_head", kv_head=k.shape[1])
    scores = grouped @ k.transpose(-1, -2)
    scores = rearrange(scores, "batch kv_head (group row) src -> batch (kv_head group) row src", row=q.shape[2])
    # In place from here on: of all pairs, each copy of the scores costs as much as a layer's smaller products.
    scores = scores.mul_(scale).float()
    lowest = torch.finfo(scores.dtype).min
    if mask is None or mask.ndim == 2:
        dest = torch.arange(n_dest, device=q.device)[:, None] if at is None else at
        allowed = torch.arange(n_src, device=q.device) <= dest + (n_src - n_dest)
        if mask is not None:  # flash attention is given the padding alone
            allowed = allowed & mask[:, None, None, :n_src].bool()
        scores.masked_fill_(~allowed, lowest)
    else:
        mask = mask[..., :n_src].expand(q.shape[0], -1, -1, -1)
        if at is not None:
            mask = mask.gather(2, at.expand(-1, mask.shape[1], -1, n_src))
        scores = scores.masked_fill_(~mask, lowest) if mask.dtype == torch.bool else scores.add_(mask)
    return scores.softmax(-1).to(dtype)
