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

from mechvlm.errors import ModelError
from mechvlm.families.record import ATTENTION_CALL


class Attention(NamedTuple):
    """The tensors that one layer's attention is computed from.

    Attributes:
        q: queries [batch head dest d_head], after the rotary embedding.
        k: keys [batch kv_head src d_head], after the rotary embedding.
        v: values [batch kv_head src d_head].
        mask: as the implementation takes it: None, the padding [batch src], or boolean or additive
            [batch head dest src], where batch and head may be 1.
        scale: factor on q.k.
        cap: c where scores are c tanh(q.k scale / c), before the mask; None where they are not.
        sinks: one more score for each head, [head], which takes a share of the softmax and has no
            value; None where there are none.
        causal: whether no mask means the causal one, or else none at all.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    scale: float
    cap: float | None = None
    sinks: Tensor | None = None
    causal: bool = True


def attention_call(module: Any) -> Any:
    """nnsight's envoy of the `attention_interface` call in an attention module.

    nnsight rewrites a module's forward when its source is first asked for. Call this before that
    forward runs; afterwards it is too late.
    """
    return getattr(module.source, ATTENTION_CALL)


def read_attention(module: Any) -> Attention:
    """Inside a trace: the tensors that the module's attention is computed from."""
    (attention, q, k, v, mask, *_), options = attention_call(module).inputs
    if options.get("position_bias") is not None:
        raise ModelError("This attention adds a bias of positions to its scores, which mechvlm does not read.")
    if hasattr(mask, "mask_mod"):  # flex attention's BlockMask: a function of the positions
        mask = create_mask(mask.mask_mod, *mask.shape, device=q.device)
    causal = options.get("is_causal")
    causal = getattr(attention, "is_causal", True) if causal is None else causal
    scale = options.get("scaling")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return Attention(q, k, v, mask, scale, options.get("softcap"), options.get("s_aux"), bool(causal))


def replace_mask(module: Any, mask: Tensor) -> None:
    """Inside a trace: run the module's attention with another mask."""
    call = attention_call(module)
    (attention, q, k, v, _, *rest), options = call.inputs
    call.inputs = ((attention, q, k, v, mask, *rest), options)


def attention_scores(parts: Attention, rows: Tensor | None = None) -> Tensor:
    """The scores that the mask is added to, [batch head row src] in float32: q k^T scale, capped.

    Args:
        parts: what the attention is computed from.
        rows: destinations to compute [batch row]; None for all.
    """
    q, k = parts.q, parts.k
    if rows is not None:
        q = q.gather(2, rows.to(q.device)[:, None, :, None].expand(-1, q.shape[1], -1, q.shape[3]))
    # The query heads of a group share a key: as rows of one product, they need no copies of it.
    grouped = rearrange(q, "batch (kv_head group) row d_head -> batch kv_head (group row) d_head", kv_head=k.shape[1])
    scores = grouped @ k.transpose(-1, -2)
    scores = rearrange(scores, "batch kv_head (group row) src -> batch (kv_head group) row src", row=q.shape[2])
    # In place from here on: a copy of all scores costs as much as a layer's smaller products.
    scores = scores.mul_(parts.scale).float()
    return scores if parts.cap is None else scores.div_(parts.cap).tanh_().mul_(parts.cap)


def attention_rows(parts: Attention, rows: Tensor | None = None, dtype=torch.float32) -> Tensor:
    """Attention weights, recomputed: softmax(q k^T scale + mask).

    The softmax is in float32, as in Hugging Face's eager attention, whichever implementation the
    model runs. Where there are sinks, a row sums to less than 1: the sink has the rest.

    Args:
        parts: what the attention is computed from.
        rows: destinations to compute [batch row]; None for all.
        dtype: dtype of the returned weights.

    Returns:
        The weights [batch head row src].
    """
    q, mask = parts.q, parts.mask
    n_dest, n_src = q.shape[2], parts.k.shape[2]
    index = None if rows is None else rows.to(q.device)[:, None, :, None]  # [batch 1 row 1]
    scores = attention_scores(parts, rows)
    lowest = torch.finfo(scores.dtype).min
    if mask is None or mask.ndim == 2:
        if parts.causal:
            dest = torch.arange(n_dest, device=q.device)[:, None] if index is None else index
            allowed = torch.arange(n_src, device=q.device) <= dest + (n_src - n_dest)
            scores.masked_fill_(~allowed, lowest)
        if mask is not None:  # flash attention gets only the padding
            scores.masked_fill_(~mask[:, None, None, :n_src].bool(), lowest)
    else:
        mask = mask[..., :n_src].expand(q.shape[0], -1, -1, -1)
        if index is not None:
            mask = mask.gather(2, index.expand(-1, mask.shape[1], -1, n_src))
        scores = scores.masked_fill_(~mask, lowest) if mask.dtype == torch.bool else scores.add_(mask)
    if parts.sinks is None:
        return scores.softmax(-1).to(dtype)
    sinks = parts.sinks.float().reshape(1, -1, 1, 1).expand(*scores.shape[:3], 1)
    return torch.cat([scores, sinks], dim=-1).softmax(-1)[..., :n_src].to(dtype)


def is_causal(parts: Attention) -> bool:
    """Whether no destination sees a source after it."""
    mask, n_src = parts.mask, parts.k.shape[2]
    if mask is None or mask.ndim == 2:
        return parts.causal
    later = torch.ones(mask.shape[-2], n_src, dtype=torch.bool, device=mask.device).triu(1 + n_src - mask.shape[-2])
    mask = mask[..., :n_src]
    is_open = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    return not bool((is_open & later).any())
