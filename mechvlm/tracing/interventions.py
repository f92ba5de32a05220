"""Changing what passes by: `knock_out`, `ablate`, `patch` and `steer`, inside any `with vlm.trace(inputs):`.

Positions count from the start of the (padded) sequence, as a `TokenMap` gives them: `tokens.image`, `tokens.question`,
`tokens.last`, `tokens.pos_in_box(box)`, `tokens.pos_of(word)`. One selection (a number, several, a tensor) is for every example;
a list with one selection per example (or None: leave this one as it is) gives each row of a batch an intervention of its own,
`[m.image for m in inputs.token_maps]`. Heads are given likewise. What is done to padding has no effect on anything.

A forward goes by once. Several interventions, and reading between them, follow its order: layer by layer.

    for layer in range(3, 6):
        mv.steer(vlm, direction, tokens.image, layer)
        seen.append(vlm.mlp_out[layer])
        ...

Layers are the decoder's, 0 to n_layers - 1, as in `vlm.resid_post[layer]`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mechvlm.decoder.attention import read_attention, replace_mask
from mechvlm.tracing.selections import Layers, Selection, _heads, _layers, _rows, _short, _site
from mechvlm.vlm.vlm import VLM


def knock_out(vlm: VLM, src: Selection, dst: Selection, layers: Layers, heads: Selection | None = None) -> None:
    """Attention knockout: at `layers`, the positions `dst` cannot attend to the positions `src`.

    Their scores are masked before the softmax, so that the weights are exactly 0 and those of the other sources sum to 1
    (Geva et al. 2023). The model keeps its attention implementation, SDPA or eager; its mask is replaced.

    `src` are read from, `dst` read; `heads` are all by default.

    Raises:
        ValueError: for an empty selection, for a knockout without effect (no source stands before a destination, padding,
            or all is blocked already), and for one that leaves a destination nothing to attend to. Also under attention
            implementations that take no mask (flash, flex).
        IndexError: for a layer, head or position that is not there.
    """
    kind = vlm.text_config._attn_implementation
    if kind not in ("eager", "sdpa"):
        raise ValueError(
            f"knock_out needs an attention that takes a mask, sdpa or eager; {vlm.name} runs {kind}. "
            "Set vlm.hf.set_attn_implementation('sdpa')."
        )
    for layer in _layers(vlm, layers, "knock_out"):
        module = vlm.attention_module(layer)
        q, k, _, mask, _ = read_attention(module, vlm.record)
        replace_mask(module, vlm.record, _masked(q, k, mask, src, dst, heads))


def _masked(q: Tensor, k: Tensor, mask: Tensor | None, src, dst, heads) -> Tensor:
    """The additive mask with these edges out of it: [batch 1 dest src], or [batch head dest src] where heads are given."""
    (batch, n_heads, n_dest, _), n_src = q.shape, k.shape[2]
    offset = n_src - n_dest  # where a cache holds the first positions, only later ones are destinations
    lowest = torch.finfo(q.dtype).min
    if mask is None:
        later = torch.ones(n_dest, n_src, dtype=torch.bool, device=q.device).triu(offset + 1)
        new = torch.zeros(batch, 1, n_dest, n_src, dtype=q.dtype, device=q.device).masked_fill_(later, lowest)
    else:
        new = mask[..., :n_src].expand(batch, -1, -1, -1)
        new = (
            torch.zeros_like(new, dtype=q.dtype).masked_fill_(~new, lowest) if new.dtype == torch.bool else new.clone()
        )
    sources, dests = _rows(src, batch, n_src, "src"), _rows(dst, batch, n_src, "dst")
    in_row = [list(range(n_heads))] * batch if heads is None else _rows(heads, batch, n_heads, "heads")
    if heads is not None:
        new = new.expand(-1, n_heads, -1, -1).clone() if new.shape[1] == 1 else new
    for row in range(batch):
        s, d = sources[row], dests[row]
        h = in_row[row][: new.shape[1]]  # one mask may serve all heads
        if not (s and d and h):
            continue
        where = f"knock_out of example {row}: src {_short(s)}, dst {_short(d)}"
        if min(d) < offset:
            raise ValueError(f"{where}: this forward computes positions {offset} to {n_src - 1} only.")
        at = torch.tensor(h)[:, None, None], torch.tensor(d)[:, None] - offset, torch.tensor(s)
        # Without a mask all that stands before is open, and nothing has to be fetched from the device to know it.
        if min(s) > max(d) or (mask is not None and not (new[row][at] > lowest / 2).any()):
            raise ValueError(
                f"{where} has no effect: a position attends to itself and those before it, without padding and what was "
                "knocked out already, and none of these sources is among them."
            )
        new[row][at] = lowest
        left = (new[row][at[0], at[1]] > lowest / 2).any(-1).all() if mask is not None else not _covers(s, d)
        if not left:
            raise ValueError(
                f"{where} leaves a destination nothing to attend to: leave it one source, itself for example."
            )
    if not any(s and d and h for s, d, h in zip(sources, dests, in_row, strict=True)):
        raise ValueError("knock_out: no example has a source, a destination and a head.")
    return new


def _covers(src: list[int], dst: list[int]) -> bool:
    """Whether a destination loses every position up to itself."""
    blocked, first = set(src), 0
    while first in blocked:
        first += 1
    return min(dst) < first


def ablate(
    vlm: VLM,
    pos: Selection,
    layers: Layers,
    how: str = "zero",
    source: Tensor | None = None,
    at: str = "resid_pre",
    heads: Selection | None = None,
    seed: int = 0,
) -> None:
    """Replace what `pos` hold at `layers` by nothing, by an average, or by what other examples hold there.

    Args:
        vlm: within its trace.
        pos: positions.
        layers: one or several.
        how: "zero"; "mean", the average of `source`; or "resample", entries of `source` drawn with `seed`.
        source: [n ...] states of the site, to average or draw from, such as the visual tokens of many images. By default
            what the OTHER examples of the batch hold at their `pos` (for "resample" the same number of them in order, of one
            other example, where it has as many).
        at: a site of the layer; `resid_pre` is what enters it, so that layer 0 takes the embeddings.
        heads: at="z" only: of these heads.
        seed: of the draws; every layer draws the same ones.

    Raises:
        ValueError: for an empty selection, an unknown `how` or site, no example to average or draw from, or a source of
            the wrong shape.
        IndexError: for a layer, head or position that is not there.
    """
    if how not in ("zero", "mean", "resample"):
        raise ValueError(f"ablate knows how='zero', 'mean' and 'resample', not {how!r}.")
    for layer in _layers(vlm, layers, "ablate"):
        generator = torch.Generator().manual_seed(seed)
        old = _site(vlm, at)[layer]
        rows = _rows(pos, len(old), old.shape[1], "pos")
        in_heads = _heads(heads, at, old, rows, "ablate")
        new = old.clone()
        for row, positions in enumerate(rows):
            if not positions:
                continue
            if how == "zero":
                value = torch.zeros_like(old[row, positions])
            else:
                pool = _pool(old, rows, row, source, how, generator)
                value = pool.mean(0, keepdim=True) if how == "mean" else _drawn(pool, len(positions), generator)
            new[row, positions] = torch.where(in_heads[row], value.to(old), old[row, positions])
        _site(vlm, at)[layer] = new


def _pool(old: Tensor, rows: list[list[int]], row: int, source, how: str, generator) -> Tensor:
    """[n ...] states to average or to draw from in one row."""
    if source is not None:
        if source.shape[1:] != old.shape[2:] or not len(source):
            raise ValueError(
                f"ablate: source is {list(source.shape)}; expected [n, {', '.join(map(str, old.shape[2:]))}]."
            )
        return source
    others = [other for other in range(len(rows)) if other != row and rows[other]]
    if not others:
        raise ValueError(
            f"ablate(how={how!r}) takes the other examples of the batch, and here is none with such positions: "
            "give `source`, states [n ...] of other images."
        )
    if how == "resample":  # one other example, as it is
        others = [others[int(torch.randint(len(others), (), generator=generator))]]
    return torch.cat([old[other, rows[other]] for other in others])


def _drawn(pool: Tensor, n: int, generator: torch.Generator) -> Tensor:
    return pool if len(pool) == n else pool[torch.randint(len(pool), (n,), generator=generator).to(pool.device)]


def patch(
    vlm: VLM,
    activations: Tensor | Mapping[Any, Tensor] | Sequence[Tensor],
    pos: Selection,
    layers: Layers,
    at: str = "resid_post",
    heads: Selection | None = None,
) -> None:
    """Activation patching: at `layers`, `pos` hold what they held in another forward.

    Args:
        vlm: within its trace.
        activations: of one layer, a tensor as the accessor gives it, [batch pos ...] of the same length, of which `pos` are
            taken; or only the states to put in, [batch n ...] for n positions. A batch of 1 goes to every row. Of several
            layers, such tensors by layer: a list over all layers, or a mapping from layers or from TransformerLens' hook names.
        pos: positions.
        layers: one or several.
        at: a site of the layer.
        heads: at="z" only: of these heads.

    Raises:
        ValueError: for activations of the wrong shape or missing layers, an empty selection or an unknown site.
        IndexError: for a layer, head or position that is not there.
    """
    layers = _layers(vlm, layers, "patch")
    if isinstance(activations, Tensor) and len(layers) > 1:
        raise ValueError(f"patch: one tensor was given for the layers {layers}: give a list or a mapping by layer.")
    for layer in layers:
        old = _site(vlm, at)[layer]
        rows = _rows(pos, len(old), old.shape[1], "pos")
        given = activations if isinstance(activations, Tensor) else _of_layer(activations, layer, at)
        counts = sorted({len(positions) for positions in rows if positions})
        fits = given.ndim == old.ndim and given.shape[0] in (1, len(old)) and given.shape[2:] == old.shape[2:]
        if not fits or (given.shape[1] != old.shape[1] and counts != [given.shape[1]]):
            wanted = f"[{len(old)} or 1, {old.shape[1]} or {counts}, {', '.join(map(str, old.shape[2:]))}]"
            raise ValueError(
                f"patch: the activations are {list(given.shape)}; {at} of layer {layer} takes {wanted}: (batch, all positions "
                "or those patched, ...)."
            )
        in_heads = _heads(heads, at, old, rows, "patch")
        new = old.clone()
        for row, positions in enumerate(rows):
            if positions:
                value = given[row if len(given) > 1 else 0].to(old)
                value = value[positions] if given.shape[1] == old.shape[1] else value
                new[row, positions] = torch.where(in_heads[row], value, old[row, positions])
        _site(vlm, at)[layer] = new


def _of_layer(activations, layer: int, at: str) -> Tensor:
    if not isinstance(activations, Mapping):
        if not 0 <= layer < len(activations):
            raise ValueError(
                f"patch: layer {layer} was asked for; the activations are a list of {len(activations)} layers."
            )
        return activations[layer]
    name = f"blocks.{layer}.attn.hook_z" if at == "z" else f"blocks.{layer}.hook_{at}"
    for key in (name, layer):
        if key in activations:
            return activations[key]
    raise ValueError(f"patch: the activations hold neither {layer} nor {name!r}, but {_short(list(activations))}.")


def steer(
    vlm: VLM,
    direction: Tensor,
    pos: Selection,
    layers: Layers,
    scale: float | int = 1.0,
    at: str = "resid_post",
) -> None:
    """Activation steering: at `layers`, add scale * direction to what `pos` hold.

    `direction` is one vector, [d_model] (at="z": [head d_head]), or one per example, [batch d_model].

    Raises:
        ValueError: for a direction of the wrong shape, an empty selection or an unknown site.
        IndexError: for a layer or position that is not there.
    """
    for layer in _layers(vlm, layers, "steer"):
        old = _site(vlm, at)[layer]
        if direction.shape not in (old.shape[2:], (len(old), *old.shape[2:])):
            width = ", ".join(map(str, old.shape[2:]))
            raise ValueError(
                f"steer: the direction is {list(direction.shape)}; {at} takes [{width}] or [{len(old)}, {width}]."
            )
        step = (scale * direction).to(old)
        new = old.clone()
        for row, positions in enumerate(_rows(pos, len(old), old.shape[1], "pos")):
            new[row, positions] = old[row, positions] + (step[row] if direction.ndim == old.ndim - 1 else step)
        _site(vlm, at)[layer] = new


# -- what was asked, made plain ----------------------------------------------------------------------------------------
