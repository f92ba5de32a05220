"""A forward that starts in the middle: from the state of an earlier one, at the first layer and position that differ.

What an intervention cannot reach is not computed again. Below the first layer that it changes, every state is the earlier
run's; and no position before the first one that it changes can differ, so that its keys and values stand for it.
"""

from collections.abc import Callable
from dataclasses import dataclass

import nnsight
import torch
from jaxtyping import Float
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from mechvlm.families.record import part
from mechvlm.inputs.batch import Inputs
from mechvlm.vlm.vlm import VLM

TOKENS_PER_FORWARD, ROWS_PER_FORWARD = 512, 8
"""How many tokens, and how many rows, one forward of a sweep may hold. More rows share more work, but start further apart,
and each is computed from where the first one starts: 8 was the quickest of 4 to 64 on a decoder of 32 layers."""


@dataclass(frozen=True)
class Run:
    """One example's finished forward, from which others start.

    Attributes:
        inputs: of the example.
        resid: what entered each layer, [1 pos d_model] each.
        keys, values: of each layer's attention, [1 kv_head pos d_head] each, keys after the rotary embedding.
        kept: what `keep` asked for, by layer.
        logits: of the last position, [d_vocab] in float32.
    """

    inputs: Inputs
    resid: list[Tensor]
    keys: list[Tensor]
    values: list[Tensor]
    kept: list[Tensor]
    logits: Tensor

    def p(self, token: int) -> float:
        """The probability of a token at the last position."""
        return float(self.logits.softmax(-1)[token])


def run(
    vlm: VLM, inputs: Inputs, keep: str | None = None, embeddings: Float[Tensor, "1 pos d_model"] | None = None
) -> Run:
    """One example's forward, from its inputs, or with other embeddings entering the decoder.

    `keep` names an accessor ("mlp_out", say) that is kept too.
    """
    if embeddings is None or not vlm.has_weights:
        forward = vlm.trace(inputs, logits_to_keep=1)
    else:
        forward = part(vlm.model, vlm.record.decoder).trace(inputs_embeds=embeddings)
    with torch.no_grad(), forward:
        if embeddings is not None and not vlm.has_weights:
            vlm.resid_pre[0] = embeddings
        resid, keys, values, kept = nnsight.save([]), nnsight.save([]), nnsight.save([]), nnsight.save([])
        for layer in range(vlm.n_layers):
            resid.append(vlm.resid_pre[layer])
            attention = vlm.attention[layer]
            keys.append(attention.k)
            values.append(attention.v)
            if keep is not None:
                kept.append(resid[-1] if keep == "resid_pre" else getattr(vlm, keep)[layer])
        logits = nnsight.save(vlm.unembed(vlm.final_norm(vlm.resid_post[vlm.n_layers - 1][:, -1])))
    return Run(inputs, resid, keys, values, kept, logits[0].float())


class _Prefix(DynamicLayer):
    """Keys and values of the positions before the first one that is computed: all rows read the same ones."""

    def __init__(self, keys: Tensor, values: Tensor):
        DynamicLayer.__init__(self)  # not super(): this class travels
        self.dtype, self.device = keys.dtype, keys.device
        self.keys, self.values = keys, values
        self.is_initialized = True

    def update(self, key_states, value_states, *args, **kwargs):
        rows = len(key_states)
        return (
            torch.cat([self.keys.expand(rows, -1, -1, -1), key_states], dim=-2),
            torch.cat([self.values.expand(rows, -1, -1, -1), value_states], dim=-2),
        )


def rerun(
    vlm: VLM, run: Run, rows: int, layer: int, pos: int, change: Callable[[int], None]
) -> Float[Tensor, "rows d_vocab"]:
    """Logits of the last position in `rows` copies of a run, computed again from `layer` and from position `pos` on.

    `change(layer)` is called inside the trace, before each layer from `layer` on, and may intervene there. Positions of
    what the layers hold count from `pos`; those of attention (`knock_out`) from 0 as ever.

    Tested: equals whole forwards with the same interventions.
    """
    if not vlm.has_weights:
        return _whole(vlm, run, rows, layer, change)
    first = run.resid[layer][:, pos:].expand(rows, -1, -1)
    past = Cache(layers=[_Prefix(k[:, :, :pos], v[:, :, :pos]) for k, v in zip(run.keys, run.values, strict=True)])
    with torch.no_grad(), part(vlm.model, vlm.record.decoder).trace(inputs_embeds=first, past_key_values=past):
        for below in range(layer):
            vlm.layers[below].skip(first)
        for at in range(layer, vlm.n_layers):
            change(at)
        logits = nnsight.save(vlm.unembed(vlm.final_norm(vlm.resid_post[vlm.n_layers - 1][:, -1])))
    return logits.float()


def _whole(vlm: VLM, run: Run, rows: int, layer: int, change: Callable[[int], None]) -> Tensor:
    """The same over all positions, for NDIF's sandbox: it traces whole models only, and passes on no cache of ours."""
    first = run.resid[layer].expand(rows, -1, -1)
    encoding = {key: torch.cat([value] * rows) for key, value in run.inputs.encoding.items()}
    with torch.no_grad(), vlm.model.trace(**encoding, logits_to_keep=1):
        for below in range(layer):
            vlm.layers[below].skip(first)
        if layer == 0:
            vlm.resid_pre[0] = first
        for at in range(layer, vlm.n_layers):
            change(at)
        logits = nnsight.save(vlm.unembed(vlm.final_norm(vlm.resid_post[vlm.n_layers - 1][:, -1])))
    return logits.float()


@dataclass(frozen=True)
class Edit:
    """One row of a sweep: what it does to `pos` at `layers`; `key` is for whoever asked for it."""

    key: tuple
    layers: range
    pos: int
    """The first position that it changes."""


def sweep(
    vlm: VLM, run: Run, edits: list[Edit], change: Callable[[int, list[Edit]], None]
) -> dict[tuple, Float[Tensor, " d_vocab"]]:
    """Logits of the last position for each edit of a run, by its key; edits that share a forward are its rows.

    `change(layer, rows)` intervenes at a layer: what row i does there is up to `rows[i]`.
    """
    if not vlm.has_weights:
        edits = [Edit(edit.key, edit.layers, 0) for edit in edits]
    found: dict[tuple, Tensor] = {}
    length = run.resid[0].shape[1]
    for pos in sorted({edit.pos for edit in edits}):
        # By their first layers, so that rows of one forward start close to each other.
        left = sorted((edit for edit in edits if edit.pos == pos), key=lambda edit: edit.layers.start)
        size = min(ROWS_PER_FORWARD, max(1, TOKENS_PER_FORWARD // (length - pos)))
        for start in range(0, len(left), size):
            rows = left[start : start + size]
            logits = rerun(vlm, run, len(rows), rows[0].layers.start, pos, lambda layer, rows=rows: change(layer, rows))
            found |= {edit.key: row for edit, row in zip(rows, logits, strict=True)}
    return found


def windows(n_layers: int, width: int) -> list[range]:
    """For each layer the window of `width` layers around it, cut off at the first and the last layer."""
    if width < 1:
        raise ValueError(f"A window of {width} layers was asked for; it has at least 1.")
    starts = (layer - (width - 1) // 2 for layer in range(n_layers))
    return [range(max(0, start), min(n_layers, start + width)) for start in starts]
