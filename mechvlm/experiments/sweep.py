"""A forward that starts mid-way: at the first layer and position that an intervention changes.

An experiment runs hundreds of interventions on one example. Most of each forward is the same.

1. `run` records one whole forward of the example: the states that enter each layer, and each
   layer's keys and values.
2. No layer below the first one that changes can differ. `run_from` makes the decoder's own call
   again (`mechvlm.decoder.replay`) and skips those layers, each with what it returned.
3. Under a causal mask no position before the first one that changes can differ. `run_from` computes
   the later positions alone; the recorded keys and values stand for the earlier ones
   (`PrefixLayer`). Where an image's tokens see each other (Gemma 3, PaliGemma), or the decoder is
   given more than embeddings, masks and positions, it computes all positions.
4. An edit of z, or of a later site, leaves the attention of its first layer as it is. `run_from`
   gives that attention what it gave in the recorded forward (`mechvlm.decoder.attended`).
5. Of the last layer only the last position is read. Where no edit changes that layer, its queries
   attend from that position alone, and its MLP computes that position alone.
6. `sweep` sorts many interventions (`Edit`) by where they start. Those that start close to each
   other are the rows of one forward.

Tested: equals one whole forward per intervention.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import nnsight
import torch
from jaxtyping import Float
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from mechvlm.decoder.attended import Projected, attend_from_last, heads_out, keep_projected, projections_of, reuse
from mechvlm.decoder.attention import is_causal
from mechvlm.decoder.layer import first, with_first
from mechvlm.decoder.replay import Call, can_start_late, recorded, repeated
from mechvlm.families.record import part
from mechvlm.inputs.batch import Inputs
from mechvlm.tracing.selections import SITES_AFTER_ATTENTION
from mechvlm.vlm.vlm import VLM

TOKENS_PER_FORWARD, ROWS_PER_FORWARD = 512, 8
"""How many tokens, and how many rows, one forward of a sweep may hold.

More rows share more work, but start further apart, and each is computed from where the first one
starts. 8 was the quickest of 4 to 64 on a decoder of 32 layers.
"""


@dataclass(frozen=True)
class Run:
    """One example's finished forward, from which others start.

    Attributes:
        inputs: the example's.
        resid: the states that enter each layer, [1 pos d_model] each.
        outputs: what each layer returned, as it was. Not always the next layer's `resid`: some
            families add image features in between (deepstack).
        keys, values: of each layer's attention, [1 kv_head pos d_head] each, keys after the rotary
            embedding. Empty where forwards start at position 0.
        kept: the output of the accessor that `run` was told to keep, by layer.
        logits: of the last position, [d_vocab] in float32.
        call: the decoder's own call; None on NDIF, where whole models are traced.
        projected, heads: what each layer's projections and its heads gave, for edits that leave its
            attention as it is; empty where `run` was told of no such edits.
    """

    inputs: Inputs
    resid: list[Tensor]
    outputs: list[Any]
    keys: list[Tensor]
    values: list[Tensor]
    kept: list[Tensor]
    logits: Tensor
    call: Call | None = None
    projected: Sequence[Projected] = ()
    heads: Sequence[Tensor | None] = ()

    def p(self, token: int) -> float:
        """The probability of a token at the last position."""
        return float(self.logits.softmax(-1)[token])


def run(
    vlm: VLM,
    inputs: Inputs,
    keep: str | None = None,
    embeddings: Float[Tensor, "1 pos d_model"] | None = None,
    edits_at: str | None = None,
) -> Run:
    """One example's forward, from its inputs, or with other embeddings entering the decoder.

    Args:
        vlm: the model.
        inputs: one example.
        keep: an accessor ("mlp_out", say) whose outputs are kept too.
        embeddings: enter the decoder instead of the example's own.
        edits_at: the only site that edits of this run will change. From z on, what each attention
            gave is kept for them: as much memory again as its queries, keys, values and z take.
    """
    spared = edits_at in SITES_AFTER_ATTENTION and vlm.has_weights
    with ExitStack() as hooks:
        projected = keep_projected(vlm.layer_parts if spared else [], hooks)
        return _run(vlm, inputs, keep, embeddings, projected)


def _run(vlm: VLM, inputs: Inputs, keep: str | None, embeddings: Tensor | None, projected: list[Projected]) -> Run:
    with torch.no_grad(), vlm.trace(inputs, logits_to_keep=1):
        given = nnsight.save(part(vlm.model, vlm.record.decoder).inputs)
        if embeddings is not None:
            vlm.resid_pre[0] = embeddings
        resid, outputs, kept = nnsight.save([]), nnsight.save([]), nnsight.save([])
        keys, values, causal = nnsight.save([]), nnsight.save([]), nnsight.save([])
        heads = nnsight.save([])
        for layer in range(vlm.n_layers):
            resid.append(vlm.resid_pre[layer])
            if vlm.record.kind(layer).v_proj is None or vlm.record.kind(layer).memory:
                # No keys and values that a cache would hold stand for earlier positions: there is
                # no attention to them, or it makes them out of what it caches (MLA).
                causal.append(False)
            else:
                attention = vlm.attention[layer]
                causal.append(is_causal(attention))
                keys.append(attention.k)
                values.append(attention.v)
            if projected:
                heads.append(heads_out(vlm.layer_parts[layer]) if projections_of(vlm.layer_parts[layer]) else None)
            if keep is not None:
                kept.append(resid[-1] if keep == "resid_pre" else getattr(vlm, keep)[layer])
            outputs.append(with_first(vlm.layers[layer].output, vlm.resid_post[layer]))
        logits = nnsight.save(vlm.unembed(vlm.final_norm(vlm.resid_post[vlm.n_layers - 1][:, -1])))
    call = recorded(part(vlm.hf, vlm.record.decoder), *given) if vlm.has_weights else None
    late = call is not None and all(causal) and can_start_late(call)
    keys, values = (keys, values) if late else ([], [])
    return Run(inputs, resid, outputs, keys, values, kept, logits[0].float(), call, projected, heads)


class PrefixLayer(DynamicLayer):
    """A layer of a key-value cache that holds the positions before the first computed one.

    All rows of the forward read the same keys and values, [1 kv_head pos d_head].
    """

    def __init__(self, keys: Tensor, values: Tensor):
        DynamicLayer.__init__(self)  # super() without arguments does not travel to NDIF
        self.dtype, self.device = keys.dtype, keys.device
        self.keys, self.values = keys, values
        self.is_initialized = True

    def update(self, key_states, value_states, *args, **kwargs):
        rows = len(key_states)
        return (
            torch.cat([self.keys.expand(rows, -1, -1, -1), key_states], dim=-2),
            torch.cat([self.values.expand(rows, -1, -1, -1), value_states], dim=-2),
        )


def run_from(
    vlm: VLM, base: Run, rows: int, layers: range, pos: int, change: Callable[[int], None]
) -> Float[Tensor, "rows d_vocab"]:
    """Logits of the last position in `rows` copies of a run, computed from a layer and `pos` on.

    Args:
        vlm: the model.
        base: the run to start from.
        rows: how many copies of it.
        layers: those that `change` changes; the first of them is the first that is computed.
        pos: the first position that is computed.
        change: `change(layer)` is called inside the trace, before each layer from the first on, and
            may intervene there. Positions in what the layers hold count from `pos`; those of
            attention (`knock_out`) from 0, as ever.

    Tested: equals whole forwards with the same interventions.
    """
    if base.call is None:
        return _run_all_positions(vlm, base, rows, layers, change)
    call = repeated(base.call, rows, pos)
    if pos:
        prefix = [PrefixLayer(k[:, :, :pos], v[:, :, :pos]) for k, v in zip(base.keys, base.values, strict=True)]
        call["past_key_values"] = Cache(layers=prefix)
    with torch.no_grad(), part(vlm.model, vlm.record.decoder).trace(**call):
        _start(vlm, base, rows, layers.start, pos)
        logits = nnsight.save(_finish(vlm, layers, change))
    return logits.float()


def _run_all_positions(vlm: VLM, base: Run, rows: int, layers: range, change: Callable[[int], None]) -> Tensor:
    """`run_from` position 0, for NDIF's sandbox.

    The sandbox traces whole models only, and passes on no cache of ours.
    """
    encoding = {key: torch.cat([value] * rows) for key, value in base.inputs.encoding.items()}
    with torch.no_grad(), vlm.model.trace(**encoding, logits_to_keep=1):
        _start(vlm, base, rows, layers.start, 0)
        logits = nnsight.save(_finish(vlm, layers, change))
    return logits.float()


def _start(vlm: VLM, base: Run, rows: int, layer: int, pos: int) -> None:
    """Inside a trace: skip the layers below `layer`, each with what it returned in the base run."""
    for below in range(layer):
        out = base.outputs[below]
        vlm.layers[below].skip(with_first(out, first(out)[:, pos:].expand(rows, -1, -1)))
    if layer == 0:
        # Not as the decoder's input: some families multiply that by a factor first.
        vlm.resid_pre[0] = base.resid[0][:, pos:].expand(rows, -1, -1)
    if base.heads and (heads := base.heads[layer]) is not None:
        reuse(vlm.layer_parts[layer], base.projected[layer], heads, rows, pos)


def _finish(vlm: VLM, layers: range, change: Callable[[int], None]) -> Tensor:
    """Inside a trace: the changed layers, those after them, and the last position's logits."""
    last = vlm.n_layers - 1
    for at in range(layers.start, vlm.n_layers):
        change(at)
    path = _norm_of_an_mlp_apart(vlm, last)
    if last not in layers and path is not None:
        if vlm.record.kind(last).attention is not None:
            attend_from_last(vlm.layer_parts[last])
        # The layer adds this row to all positions: a right sum at the last, which alone is read.
        norm = part(vlm.layers[last], path)
        norm.output = norm.output[:, -1:]
    return vlm.unembed(vlm.final_norm(vlm.resid_post[last][:, -1]))


def _norm_of_an_mlp_apart(vlm: VLM, layer: int) -> str | None:
    """The path of the norm that one MLP alone reads, [batch pos d_model]; None where there is none.

    A mixture of experts may be told more of each position than its state (Ernie's are told which
    positions hold images).
    """
    kind = vlm.record.kind(layer)
    is_apart = kind.down_proj is not None and not (kind.flat or kind.memory or vlm.record.adds_between)
    return kind.mid_norm if is_apart else None


@dataclass(frozen=True)
class Edit:
    """One intervention, a row of a sweep.

    Attributes:
        key: the caller's name for it.
        layers: the layers that it changes.
        pos: the first position that it changes.
    """

    key: tuple
    layers: range
    pos: int


def sweep(
    vlm: VLM, base: Run, edits: list[Edit], change: Callable[[int, list[Edit]], None]
) -> dict[tuple, Float[Tensor, " d_vocab"]]:
    """Logits of the last position for each edit of a run, by its key.

    Args:
        vlm: the model.
        base: the run that is edited.
        edits: the interventions; those that share a forward are its rows.
        change: `change(layer, rows)` intervenes at a layer: in row i as `rows[i]` says.
    """
    if not base.keys:
        edits = [Edit(edit.key, edit.layers, 0) for edit in edits]
    logits_of: dict[tuple, Tensor] = {}
    length = base.resid[0].shape[1]
    for pos in sorted({edit.pos for edit in edits}):
        # Sorted by first layer, so that the rows of one forward start close to each other.
        queue = sorted((edit for edit in edits if edit.pos == pos), key=lambda edit: edit.layers.start)
        size = min(ROWS_PER_FORWARD, max(1, TOKENS_PER_FORWARD // (length - pos)))
        for start in range(0, len(queue), size):
            rows = queue[start : start + size]
            layers = range(rows[0].layers.start, max(edit.layers.stop for edit in rows))
            logits = run_from(vlm, base, len(rows), layers, pos, lambda layer, rows=rows: change(layer, rows))
            logits_of |= {edit.key: row for edit, row in zip(rows, logits, strict=True)}
    return logits_of


def windows(n_layers: int, width: int) -> list[range]:
    """For each layer the window of `width` layers around it, cut off at the first and the last."""
    if width < 1:
        raise ValueError(f"A window of {width} layers was asked for; it has at least 1.")
    starts = (layer - (width - 1) // 2 for layer in range(n_layers))
    return [range(max(0, start), min(n_layers, start + width)) for start in starts]
