"""`reweight`: attention to some positions made stronger or weaker, or sharper or flatter.

A softmax turns sums of scores into products of weights. So both changes are numbers that are added
to the scores, as a mask is:

    weight^(1/T) * c / sum  =  softmax(score + (1/T - 1) * score + log c)

The layer's mask is replaced by mask / T + (1/T - 1) * score + log c. The model keeps its attention
implementation, and whatever reads the layer's attention afterwards (`vlm.pattern`, probes) sees the
new weights.
"""

import math

import torch
from torch import Tensor

from mechvlm.decoder.attention import Attention, attention_scores, replace_mask
from mechvlm.inputs.numbers import shortened
from mechvlm.tracing.interventions import additive_mask, require_mask
from mechvlm.tracing.selections import Layers, Selection, layer_numbers, rows_of
from mechvlm.vlm.vlm import VLM


def reweight(
    vlm: VLM,
    src: Selection | None,
    dst: Selection,
    layers: Layers,
    heads: Selection | None = None,
    scale: float | int = 1.0,
    temperature: float | int = 1.0,
) -> None:
    """Reweighted attention: at `layers`, `dst` read more or less of `src`, or of all more sharply.

    The new weights of a destination are

        weight^(1 / temperature) * (scale if the source is in `src`, else 1), divided by their sum.

    scale=0 is `knock_out`. A temperature below 1 sharpens the whole row, one above 1 flattens it.
    Sources that a mask closes (later ones, padding, outside of a sliding window) stay closed. A
    sink, where the family has one, keeps its score: with a scale its share follows from the sum.

        with vlm.trace(inputs):
            mv.reweight(vlm, src=tokens.image, dst=tokens.last, layers=range(10, 20), scale=2.0)
            logits = nnsight.save(vlm.logits)

    Differs from AdaptVis (Chen et al. 2025, "Why Is Spatial Reasoning Hard for VLMs?"), which
    multiplies the scores of the image by alpha before the softmax: there the weights become
    proportional to weight^alpha, on the image alone, so that a strong one gains more than a weak
    one. `scale` multiplies all of them alike.
    Tested: equals this formula on the weights, under sdpa and eager, with grouped queries, sliding
    windows and soft caps.

    Args:
        vlm: within its trace.
        src: positions that the scale is on; None where only the temperature changes.
        dst: positions that read.
        layers: one or several.
        heads: default all.
        scale: factor on the weights from `src`, 0 or more.
        temperature: above 0; of the softmax over all sources.

    Raises:
        ValueError: for a scale or a temperature that is no such number; for both 1, or a scale on
            sources that no destination attends to, which have no effect; for `src` without a scale,
            or a scale without `src`; for a scale of 0 that leaves a destination nothing to attend
            to; for a temperature where the attention has sinks; for an empty selection; and under
            attention implementations that take no mask (flash, flex).
        IndexError: for a layer, head or position that is not there.
    """
    require_mask(vlm, "reweight")
    if not (0 <= scale < math.inf and 0 < temperature < math.inf):
        raise ValueError(
            f"reweight takes a scale of 0 or more and a temperature above 0, not {scale} and {temperature}."
        )
    if scale == temperature == 1:
        raise ValueError("reweight with scale=1 and temperature=1 has no effect: change one of them.")
    if (src is None) != (scale == 1):
        raise ValueError(
            f"reweight: `src` is what the scale is on, and scale={scale} came {'without' if src is None else 'with'} it. Give "
            "both; or src=None and a temperature, which acts on all sources."
        )
    for layer in layer_numbers(vlm, layers, "reweight"):
        mask = _reweighted(vlm.attention[layer], src, dst, heads, float(scale), float(temperature))
        replace_mask(vlm.layer_parts[layer].attn, mask)


def _reweighted(parts: Attention, src, dst, heads, scale: float, temperature: float) -> Tensor:
    """The additive mask [batch head dest src] under which the attention has the new weights."""
    (batch, n_heads, n_dest, _), n_src = parts.q.shape, parts.k.shape[2]
    offset, lowest = n_src - n_dest, torch.finfo(parts.q.dtype).min
    if temperature != 1 and parts.sinks is not None:
        raise ValueError(
            "reweight: this attention has sinks, whose scores are the model's own and have no temperature. Give a scale."
        )
    mask = additive_mask(parts).expand(-1, n_heads, -1, -1).clone()
    nothing: list[list[int]] = [[]] * batch
    sources = nothing if src is None else rows_of(src, batch, n_src, "src")
    dests = rows_of(dst, batch, n_src, "dst")
    in_heads = [list(range(n_heads))] * batch if heads is None else rows_of(heads, batch, n_heads, "heads")
    changed = False
    for row, (s, d, h) in enumerate(zip(sources, dests, in_heads, strict=True)):
        if not (d and h) or not (s or src is None):
            continue
        where = f"reweight of example {row}: src {shortened(s)}, dst {shortened(d)}"
        if min(d) < offset:
            raise ValueError(f"{where}: this forward computes positions {offset} to {n_src - 1} only.")
        at = torch.tensor(h)[:, None], torch.tensor(d)[None] - offset
        old = mask[row][at].float()  # [head dst src]
        is_open = old > lowest / 2
        if s and not is_open[..., s].any():
            raise ValueError(f"{where} has no effect: no destination attends to any of these sources.")
        new = old
        if temperature != 1:
            alone = parts._replace(q=parts.q[row : row + 1], k=parts.k[row : row + 1])
            scores = attention_scores(alone, torch.tensor([d]) - offset)[0][h]
            new = old / temperature + (1 / temperature - 1) * scores
        if scale == 0:
            is_open[..., s] = False
        elif s:
            new = new.clone()
            new[..., s] += math.log(scale)
        if not is_open.any(-1).all():
            raise ValueError(f"{where} leaves a destination nothing to attend to: leave it one source.")
        mask[row][at] = new.masked_fill(~is_open, lowest).to(mask.dtype)
        changed = True
    if not changed:
        raise ValueError("reweight: no example has a source, a destination and a head.")
    return mask
