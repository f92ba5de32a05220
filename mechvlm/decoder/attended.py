"""An attention that was computed before: what it gave in one forward is given to another.

Some interventions change nothing that a layer's attention reads: those on z, and on what comes
after it. Then its projections and its weights need not be computed again.
"""

from collections.abc import Sequence
from contextlib import ExitStack

from jaxtyping import Float
from torch import Tensor

from mechvlm.decoder.attention import attention_call
from mechvlm.decoder.layer import Layer, first, with_first
from mechvlm.families.record import part

Projected = dict[str, Tensor]
"""Outputs of an attention's projections [1 pos ...] by their paths, in the order of the calls."""


def keep_projected(layers: Sequence[Layer], stack: ExitStack) -> list[Projected]:
    """Keep what the projections of queries, keys and values give in a forward of one example.

    Hooks see them in the order in which the attention calls them, which families differ in. They
    are taken off when `stack` closes. A layer without attention, or with one that reads an image's
    memory, keeps nothing.
    """
    kept: list[Projected] = [{} for _ in layers]
    for layer, own in zip(layers, kept, strict=True):
        for path in projections_of(layer):

            def keep(_, args, out, own=own, path=path):
                own[path] = out

            stack.callback(part(layer.attn, path)._module.register_forward_hook(keep).remove)
    return kept


def projections_of(layer: Layer) -> set[str]:
    """The paths of an attention's projections, each once where they are fused."""
    kind = layer.kind
    if kind.attention is None or kind.memory:
        return set()
    return {path for path in (kind.q_proj, kind.k_proj, kind.v_proj) if path is not None}


def heads_out(layer: Layer) -> Float[Tensor, "batch pos head d_head"]:
    """Inside a trace: what the attention's heads give, as its own call returns it."""
    return first(attention_call(layer.attn).output)


def reuse(layer: Layer, projected: Projected, heads: Float[Tensor, "1 pos head d_head"], rows: int, pos: int) -> None:
    """Inside a trace: the attention projects and attends to nothing; it gives what was kept.

    Args:
        layer: the layer.
        projected: what `keep_projected` kept of it.
        heads: what `heads_out` was.
        rows: how many copies of the example the forward computes.
        pos: the first position that it computes.
    """
    # The kept outputs and no zeros: a family may read more out of them (a gate of its heads).
    for path, out in projected.items():
        part(layer.attn, path).skip(_copies(out, rows, pos))
    attention_call(layer.attn).skip((_copies(heads, rows, pos), None))


def _copies(x: Tensor, rows: int, pos: int) -> Tensor:
    return x[:, pos:].expand(rows, *[-1] * (x.ndim - 1))


def attend_from_last(layer: Layer) -> None:
    """Inside a trace: the attention writes what the last position reads, [batch 1 d_model].

    A layer adds that row to all positions: a right sum at the last one alone.
    """
    call = attention_call(layer.attn)
    (attention, q, k, v, mask, *rest), options = call.inputs
    by_row = isinstance(mask, Tensor) and mask.ndim == 4
    if (mask is None or by_row) and options.get("position_bias") is None:
        row = mask[..., -1:, :] if by_row else None
        call.inputs = ((attention, q[:, :, -1:], k, v, row, *rest), options)
        out = call.output
        # The module gives its heads' outputs the shape of all positions.
        call.output = with_first(out, first(out).expand(-1, q.shape[2], -1, -1))
    projection = layer.proj("o")
    projection.input = projection.input[:, -1:]
