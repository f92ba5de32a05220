"""Interventions inside any `with vlm.trace(inputs):`: `knock_out`, `ablate`, `patch` and `steer`.

`mechvlm.tracing.reweighting` has one more, `reweight`.

**Positions** count from the start of the (padded) sequence, as a `TokenMap` gives them:
`tokens.image`, `tokens.question`, `tokens.last`, `tokens.pos_in_box(box)`, `tokens.pos_of(word)`.
One selection (a number, several, a tensor) is for every example. A list with one selection per
example, `[m.image for m in inputs.token_maps]`, gives each row of a batch an intervention of its
own; None in it leaves that row as it is. What is done to padding has no effect on anything.

**Heads** are selected likewise.

**Layers** are the decoder's, 0 to n_layers - 1, as in `vlm.resid_post[layer]`.

**Order**: a forward goes by once. Several interventions, and readings between them, follow its
order, layer by layer:

    for layer in range(3, 6):
        mv.steer(vlm, direction, tokens.image, layer)
        mlp_outs.append(vlm.mlp_out[layer])
        ...
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mechvlm.decoder.attention import Attention, replace_mask
from mechvlm.errors import ModelError
from mechvlm.inputs.numbers import shortened
from mechvlm.tracing.selections import Layers, Selection, heads_of, layer_numbers, rows_of, site
from mechvlm.vlm.vlm import VLM

MEMORY_SOURCE = "memory"
"""The source of a knockout that is the image's memory, in models whose image is one."""


def knock_out(vlm: VLM, src: Selection | str, dst: Selection, layers: Layers, heads: Selection | None = None) -> None:
    """Attention knockout: at `layers`, the positions `dst` cannot attend to the positions `src`.

    The scores of these pairs are masked before the softmax (Geva et al. 2023): their weights are
    exactly 0, and those of the other sources sum to 1. The model keeps its attention
    implementation, SDPA or eager; its mask is replaced.

        with vlm.trace(inputs):
            mv.knock_out(vlm, src=tokens.image, dst=tokens.last, layers=range(10, 20))
            logits = nnsight.save(vlm.logits)

    The image of a Flamingo (Mllama, Idefics) is a memory and holds no positions: `src="memory"`
    closes it, at layers of `vlm.memory_layers`. All of a head's sources are gone then, so it writes
    nothing at `dst` (z = 0). The layer's MLP goes on.

    Args:
        vlm: within its trace.
        src: positions that are read from, or "memory".
        dst: positions that read.
        layers: one or several.
        heads: default all.

    Raises:
        ValueError: for an empty selection; for a knockout without effect (no source stands before
            a destination, the positions are padding, or all is blocked already); for one that
            leaves a destination nothing to attend to; and under attention implementations that take
            no mask (flash, flex).
        ModelError: for positions at a layer that reads the memory, or the memory at another.
        IndexError: for a layer, head or position that is not there.
    """
    if isinstance(src, str) and src == MEMORY_SOURCE:
        for layer in layer_numbers(vlm, layers, "knock_out"):
            close_memory(vlm, dst, layer, heads)
        return
    require_mask(vlm, "knock_out")
    for layer in layer_numbers(vlm, layers, "knock_out"):
        block_edges(vlm, src, dst, layer, heads)


def require_mask(vlm: VLM, what: str) -> None:
    """Raises ValueError where the model's attention takes no mask; `what` replaces it."""
    kind = vlm.text_config._attn_implementation
    if kind not in ("eager", "sdpa"):
        raise ValueError(
            f"{what} needs an attention that takes a mask, sdpa or eager; {vlm.name} runs {kind}. "
            "Set vlm.hf.set_attn_implementation('sdpa')."
        )


def block_edges(
    vlm: VLM, src: Selection, dst: Selection, layer: int, heads: Selection | None = None, may_be_idle: bool = False
) -> None:
    """`knock_out` at one layer; with `may_be_idle` it may have no effect.

    In a layer with a sliding window a destination may see none of the sources.
    """
    if may_be_idle and vlm.layer_parts[layer].kind.memory:
        return  # it reads no position
    mask = _masked(vlm.attention[layer], src, dst, heads, may_be_idle)
    replace_mask(vlm.layer_parts[layer].attn, mask)


def additive_mask(parts: Attention) -> Tensor:
    """A copy of the mask as numbers that are added to the scores, [batch head or 1 dest src].

    0 at open edges (or a bias of positions), the lowest number at closed ones.
    """
    q, mask = parts.q, parts.mask
    (batch, _, n_dest, _), n_src = q.shape, parts.k.shape[2]
    lowest = torch.finfo(q.dtype).min
    if mask is None:
        offset = n_src - n_dest
        later = torch.ones(n_dest, n_src, dtype=torch.bool, device=q.device).triu(offset + 1) & parts.causal
        return torch.zeros(batch, 1, n_dest, n_src, dtype=q.dtype, device=q.device).masked_fill_(later, lowest)
    mask = mask[..., :n_src].expand(batch, -1, -1, -1)
    if mask.dtype != torch.bool:
        return mask.clone()
    return torch.zeros_like(mask, dtype=q.dtype).masked_fill_(~mask, lowest)


def close_memory(
    vlm: VLM, dst: Selection, layer: int, heads: Selection | None = None, may_be_idle: bool = False
) -> None:
    """`knock_out` of the memory at one layer; with `may_be_idle` it may have no effect."""
    block = vlm.layer_parts[layer]
    if not block.kind.memory:
        there = f"its layers {', '.join(map(str, vlm.memory_layers))} do" if vlm.memory_layers else "no layer does"
        raise ModelError(f"knock_out: layer {layer} of {vlm.name} reads no memory of an image; {there}.")
    z = vlm.z[layer]
    is_open = block.is_open("attn_out")
    rows = rows_of(dst, len(z), z.shape[1], "dst")
    in_heads = heads_of(heads, "z", z, rows, "knock_out")
    new = z.clone()
    for row, positions in enumerate(rows):
        if not positions:
            continue
        if not may_be_idle and is_open is not None and not is_open[row, positions].any():
            raise ValueError(
                f"knock_out of example {row}: the memory is closed to dst {shortened(positions)} as it is, since no image stands "
                "before them."
            )
        new[row, positions] = z[row, positions].masked_fill(in_heads[row], 0)
    vlm.z[layer] = new


def _masked(parts: Attention, src, dst, heads, may_be_idle: bool) -> Tensor:
    """The additive mask with these edges blocked.

    [batch head dest src] where heads are given or the mask has them, else [batch 1 dest src].
    """
    # Without a mask all earlier positions are open: nothing is fetched from the device to know.
    is_open = parts.mask is None and parts.causal
    (batch, n_heads, n_dest, _), n_src = parts.q.shape, parts.k.shape[2]
    offset = n_src - n_dest  # a cache holds the first positions: destinations begin after them
    lowest = torch.finfo(parts.q.dtype).min
    new = additive_mask(parts)
    sources, dests = rows_of(src, batch, n_src, "src"), rows_of(dst, batch, n_src, "dst")
    in_heads = [list(range(n_heads))] * batch if heads is None else rows_of(heads, batch, n_heads, "heads")
    if heads is not None:
        new = new.expand(-1, n_heads, -1, -1).clone() if new.shape[1] == 1 else new
    for row in range(batch):
        s, d = sources[row], dests[row]
        h = in_heads[row][: new.shape[1]]  # one mask may serve all heads
        if not (s and d and h):
            continue
        where = f"knock_out of example {row}: src {shortened(s)}, dst {shortened(d)}"
        if min(d) < offset:
            raise ValueError(f"{where}: this forward computes positions {offset} to {n_src - 1} only.")
        edges = torch.tensor(h)[:, None, None], torch.tensor(d)[:, None] - offset, torch.tensor(s)
        if not may_be_idle and (min(s) > max(d) if is_open else not (new[row][edges] > lowest / 2).any()):
            raise ValueError(
                f"{where} has no effect: a position attends to itself and those before it, without padding and what "
                "was knocked out already, and none of these sources is among them."
            )
        new[row][edges] = lowest
        sources_left = not _covers(s, d) if is_open else (new[row][edges[:2]] > lowest / 2).any(-1).all()
        if not sources_left:
            raise ValueError(
                f"{where} leaves a destination nothing to attend to: leave it one source, itself for example."
            )
    if not any(s and d and h for s, d, h in zip(sources, dests, in_heads, strict=True)):
        raise ValueError("knock_out: no example has a source, a destination and a head.")
    return new


def _covers(src: list[int], dst: list[int]) -> bool:
    """Whether the sources hold every position that one of the destinations attends to."""
    blocked, first_open = set(src), 0
    while first_open in blocked:
        first_open += 1
    return min(dst) < first_open


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
    """Ablation: at `layers`, replace the states of `pos` by zero, by a mean or by other examples'.

        with vlm.trace(inputs):
            mv.ablate(vlm, [m.image for m in inputs.token_maps], layers=0, how="mean")
            logits = nnsight.save(vlm.logits)

    Args:
        vlm: within its trace.
        pos: positions.
        layers: one or several.
        how: "zero"; "mean", the average of `source`; or "resample", entries of `source` drawn with
            `seed`.
        source: [n ...] states of the site, to average or draw from, such as the visual tokens of
            many images. Default: the states of the OTHER examples of the batch at their `pos`. Of
            these "resample" takes one other example's, in order where it has as many as are
            replaced, else drawn from them.
        at: a site of the layer: `mechvlm.tracing.selections.SITES`. `resid_pre` is what enters the
            layer, so that layer 0 takes the embeddings.
        heads: at="z" only: the heads to replace; default all.
        seed: of the draws; every layer draws the same ones.

    Raises:
        ValueError: for an empty selection, an unknown `how` or site, no example to average or draw
            from, or a source of the wrong shape.
        IndexError: for a layer, head or position that is not there.
    """
    if how not in ("zero", "mean", "resample"):
        raise ValueError(f"ablate knows how='zero', 'mean' and 'resample', not {how!r}.")
    for layer in layer_numbers(vlm, layers, "ablate"):
        generator = torch.Generator().manual_seed(seed)
        old = site(vlm, at)[layer]
        rows = rows_of(pos, len(old), old.shape[1], "pos")
        in_heads = heads_of(heads, at, old, rows, "ablate")
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
        site(vlm, at)[layer] = new


def _pool(old: Tensor, rows: list[list[int]], row: int, source, how: str, generator) -> Tensor:
    """States [n ...] to average or to draw from for one row."""
    if source is not None:
        if source.shape[1:] != old.shape[2:] or not len(source):
            raise ValueError(
                f"ablate: source is {list(source.shape)}; expected [n, {', '.join(map(str, old.shape[2:]))}]."
            )
        return source
    others = [other for other in range(len(rows)) if other != row and rows[other]]
    if not others:
        raise ValueError(
            f"ablate(how={how!r}) takes the other examples of the batch, and none of them has such positions: "
            "give `source`, states [n ...] of other images."
        )
    if how == "resample":  # the states of one other example stay together
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
    """Activation patching: at `layers`, give `pos` the states that they had in another forward.

        _, cache = vlm.run_with_cache(other_inputs)
        with vlm.trace(inputs):
            mv.patch(vlm, cache, tokens.last, layers=[5, 6])
            logits = nnsight.save(vlm.logits)

    Args:
        vlm: within its trace.
        activations: for one layer, a tensor as the accessor gives it, [batch pos ...] of the same
            length, from which `pos` are taken; or only the states to put in, [batch n ...] for n
            positions. A batch of 1 goes to every row. For several layers, such tensors by layer: a
            list over all layers, or a mapping from layers or from TransformerLens' hook names.
        pos: positions.
        layers: one or several.
        at: a site of the layer: `mechvlm.tracing.selections.SITES`.
        heads: at="z" only: the heads to patch; default all.

    Raises:
        ValueError: for activations of the wrong shape or missing layers, an empty selection or an
            unknown site.
        IndexError: for a layer, head or position that is not there.
    """
    layers = layer_numbers(vlm, layers, "patch")
    if isinstance(activations, Tensor) and len(layers) > 1:
        raise ValueError(f"patch: one tensor was given for the layers {layers}: give a list or a mapping by layer.")
    for layer in layers:
        old = site(vlm, at)[layer]
        rows = rows_of(pos, len(old), old.shape[1], "pos")
        states = activations if isinstance(activations, Tensor) else _of_layer(activations, layer, at)
        counts = sorted({len(positions) for positions in rows if positions})
        fits = states.ndim == old.ndim and states.shape[0] in (1, len(old)) and states.shape[2:] == old.shape[2:]
        if not fits or (states.shape[1] != old.shape[1] and counts != [states.shape[1]]):
            wanted = f"[{len(old)} or 1, {old.shape[1]} or {counts}, {', '.join(map(str, old.shape[2:]))}]"
            raise ValueError(
                f"patch: the activations are {list(states.shape)}; {at} of layer {layer} takes {wanted}: (batch, all "
                "positions or those patched, ...)."
            )
        in_heads = heads_of(heads, at, old, rows, "patch")
        new = old.clone()
        for row, positions in enumerate(rows):
            if positions:
                value = states[row if len(states) > 1 else 0].to(old)
                value = value[positions] if states.shape[1] == old.shape[1] else value
                new[row, positions] = torch.where(in_heads[row], value, old[row, positions])
        site(vlm, at)[layer] = new


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
    raise ValueError(f"patch: the activations hold neither {layer} nor {name!r}, but {shortened(list(activations))}.")


def steer(
    vlm: VLM,
    direction: Tensor,
    pos: Selection,
    layers: Layers,
    scale: float | int = 1.0,
    at: str = "resid_post",
) -> None:
    """Activation steering: at `layers`, add scale * direction to the states of `pos`.

        with vlm.trace(inputs):
            mv.steer(vlm, vlm.W_U[:, 7], tokens.last, layers=2, scale=0.5)
            logits = nnsight.save(vlm.logits)

    Args:
        vlm: within its trace.
        direction: one vector, [d_model] (at="z": [head d_head]), or one per example,
            [batch d_model] (at="z": [batch head d_head]).
        pos: positions.
        layers: one or several.
        scale: of the direction.
        at: a site of the layer: `mechvlm.tracing.selections.SITES`.

    Raises:
        ValueError: for a direction of the wrong shape, an empty selection or an unknown site.
        IndexError: for a layer or position that is not there.
    """
    for layer in layer_numbers(vlm, layers, "steer"):
        old = site(vlm, at)[layer]
        if direction.shape not in (old.shape[2:], (len(old), *old.shape[2:])):
            width = ", ".join(map(str, old.shape[2:]))
            raise ValueError(
                f"steer: the direction is {list(direction.shape)}; {at} takes [{width}] or [{len(old)}, {width}]."
            )
        step = (scale * direction).to(old)
        new = old.clone()
        for row, positions in enumerate(rows_of(pos, len(old), old.shape[1], "pos")):
            new[row, positions] = old[row, positions] + (step[row] if direction.ndim == old.ndim - 1 else step)
        site(vlm, at)[layer] = new
