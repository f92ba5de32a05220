"""Views drawn by CircuitsVis (Nanda and Cooney 2022), whose bundle is taken from the installed package: nothing is fetched."""

import re
from collections.abc import Sequence
from functools import lru_cache
from html import escape
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mechvlm.errors import ViewError
from mechvlm.inputs.batch import Inputs
from mechvlm.inputs.tokens import TokenMap
from mechvlm.probes.logit_lens import LogitLensResult
from mechvlm.probes.norm_attention import NormAttentionResult
from mechvlm.view import previews
from mechvlm.view.match import belongs, example_of
from mechvlm.view.page import View, to_json
from mechvlm.view.pooling import Pool, cell_map, groups, line, pooled, readable, rows_of, shape_of

ATTENTION_LIMIT = 20_000
"""(maps + 1) x tokens² that the attention view may draw: about 0.1 ms each, 2 to 3 s for all."""

POSITIVE, NEGATIVE = "#0072B2", "#D55E00"
ATTENTION_MEASURES = {
    "norm": ("norm written (residual-stream units)", "all heads' vectors summed"),
    "weight": ("attention weight", "the heads' mean"),
}
"""What each measure is called, and what its heads together are: vectors summed before the norm, or weights' mean."""

# Every place names its view and holds its data, so that any number of them can stand on a page.
START = """
document.querySelectorAll("[data-circuitsvis]").forEach((place, i) => {
  const view = document.createElement("div");
  view.id = "circuitsvis-" + i;
  place.append(view);
  const data = JSON.parse(place.querySelector("script").textContent);
  CircuitsVis.render(view.id, CircuitsVis[place.dataset.circuitsvis], data);
});
"""
CIRCUITSVIS_STYLE = """
h2 { font-size: 16px; margin: 0 0 4px; }
p.note { margin: 0 0 10px; color: #555; max-width: 80ch; }
section { margin-bottom: 28px; }
select { font: inherit; }
.side { display: flex; flex-wrap: wrap; gap: 16px; align-items: flex-start; }
.side > [data-circuitsvis] { flex: 1 1 480px; min-width: 0; max-width: 680px; }
[data-circuitsvis] > div > div { max-width: 100% !important; }
figure.cells { margin: 0; width: 240px; }
figure.cells svg { width: 100%; display: block; background: #ddd; }
figure.cells text { fill: #fff; stroke: #000; paint-order: stroke; text-anchor: middle; dominant-baseline: central; }
figcaption { color: #555; font-size: 12px; }
[data-circuitsvis=AttentionHeads] h2 { font-size: 13px; }
[data-circuitsvis=AttentionHeads] h3 { font-size: 13px; margin: 0 0 6px !important; }
[data-circuitsvis=AttentionHeads] h4 { font-size: 10px; font-weight: 600; }
[data-circuitsvis=TopkTokens] td { padding: 1px 8px; }
/* The lens has no lowest tokens: what would show them is left out. */
[data-circuitsvis=TopkTokens] tr:has(> td > div), div:has(> div > #filter-select) { display: none !important; }
/* And what CircuitsVis calls samples are rows of patches in the one, and layers in the other. */
[data-circuitsvis^=Topk] label[for^=sample] { font-size: 0; }
[data-circuitsvis^=Topk] label[for^=sample]::before { font-size: 14px; }
[data-circuitsvis=TopkTokens] label[for=sample-selector]::before { content: "Row:"; }
[data-circuitsvis=TopkSamples] label[for=sample-selector]::before { content: "Lines:"; }
[data-circuitsvis=TopkSamples] label[for=samples-per-page-selector]::before { content: "Lines at once:"; }
"""


def attention(
    inputs: Inputs,
    norms: NormAttentionResult,
    layers: int | Sequence[int],
    *,
    heads: Sequence[int] | None = None,
    pool: Pool = None,
    measure: str = "norm",
    example: int = 0,
) -> View:
    """Attention heads and their patterns at chosen layers, over text tokens and cells of the image.

    A cell's patches are summed as sources and averaged as destinations: a row of weights still sums to 1. Norms are
    summed alike, which is what the patches wrote one by one, not the norm of what they wrote together.

    Args:
        inputs: what the result was read from.
        norms: read with `NormAttention(dst="all pairs")`.
        layers: one or several, 1 to n_layers.
        heads: which; default all, and always the map of all of them together. `()` leaves only that one.
        pool: cells of an image, (rows, cols), or n for n x n; of InstructBLIP's queries, the number of groups. Default:
            every patch or query by itself.
        measure: "norm", ‖α f‖ and for all heads ‖Σ_h α_h f_h‖; or "weight", α and its mean over heads.
        example: which of the batch.

    Raises:
        ViewError: when the result is of other inputs or holds too few destinations, the image is gone, or the view would be
            too large to draw: the error says which pooling fits.
    """
    belongs(inputs, norms)
    tokens = inputs.token_maps[example_of(inputs, example)]
    unit, of_all = _measure(measure)
    if len(norms.names) != norms.norm.shape[-1]:
        raise ViewError(
            f"Patterns need every destination; these norms hold {list(norms.names)}. Read them with "
            'NormAttention(dst="all pairs"), or look at one destination with view.attention_row.'
        )
    layers = [layers] if isinstance(layers, int) else list(layers)
    heads = list(range(norms.weight.shape[2])) if heads is None else list(heads)
    _among("layers", layers, norms.layers)
    _among("heads", heads, range(norms.weight.shape[2]))
    if not layers:
        raise ViewError("No layer was asked for: give one of 1 to n_layers, or several.")
    shape_of(tokens, pool)
    _drawable(tokens, len(layers) * (1 + len(heads)), pool)

    names, member = groups(tokens, pool)
    maps, titles = [], []
    for layer in layers:
        whole, single = _of_layer(norms, measure, norms.layers.index(layer), example)
        maps += [whole, *single[heads]]
        titles += [f"{layer} all", *(f"{layer}.{head}" for head in heads)]
    values = pooled(torch.stack(maps), member)
    top = float(values.max())
    data = {
        "attention": _rounded(values), "tokens": names, "attentionHeadNames": titles, "maskUpperTri": False,
        "minValue": -1, "maxValue": top or 1.0, "positiveColor": POSITIVE, "negativeColor": NEGATIVE,
    }  # fmt: skip
    title = f"{'Norm-based' if measure == 'norm' else 'Raw'} attention, {norms.model}"
    note = (
        f"From each source (across) to each destination (down): {unit}, 0 (white) to {top:.3g} (blue) on every map. Labels are "
        f"layer.head, 'all' is {of_all}. A cell's patches are summed as sources, averaged as destinations."
    )
    return _view(
        title, note, [("AttentionHeads", data)], previews.pattern(values[0], names, f"{title}, layer {titles[0]}", unit),
        aside=cell_map(inputs, example, pool), height=860 + 115 * -(-len(titles) // 6),
        instead="fewer layers, fewer heads, or a smaller pool",
    )  # fmt: skip


def tokens(inputs: Inputs, values, *, name: str = "value", example: int = 0) -> View:
    """One value a position, as the color of its token; patches stand in rows as on the image. Hover to read the value.

    Args:
        inputs: the tokens, and the model that they are of.
        values: [pos], over the padded sequence, as the model's activations are.
        name: what the values are.
        example: which of the batch.

    Raises:
        ViewError: when there are not as many values as positions, or one of a token is NaN or infinite.
    """
    found = inputs.token_maps[example_of(inputs, example)]
    values = torch.as_tensor(values).detach().cpu().float()
    if values.shape != (len(found),):
        raise ViewError(
            f"{name!r} has the shape {list(values.shape)}; example {example} has {len(found)} positions, padding included: "
            "give one value for each."
        )
    values = values[found.all]
    labels, low, high = line(found), float(values.min()), float(values.max())
    data = {
        "tokens": [_as_html(label) for label in labels], "values": _rounded(values),
        "minValue": min(low, -1e-9), "maxValue": max(high, 1e-9), "positiveColor": POSITIVE, "negativeColor": NEGATIVE,
    }  # fmt: skip
    title = f"{name}, {inputs.model}" if inputs.model else name
    note = f"From {low:.3g} to {high:.3g}; 0 is white, above it blue, below it orange. Hover over a token to read its value."
    return _view(title, note, [("ColoredTokens", data)], previews.chips(values, labels, title, name), height=360)


def attention_row(
    inputs: Inputs,
    norms: NormAttentionResult,
    dest: str | int | None = None,
    *,
    measure: str = "norm",
    example: int = 0,
) -> View:
    """What one destination reads from every token and every patch, by layer and head.

    Args:
        inputs: what the result was read from.
        norms: of any destinations.
        dest: a destination by its name in `norms.names`, or its position; default the only one that there is.
        measure: "norm" (the norm of what was written) or "weight" (raw).
        example: which of the batch.

    Raises:
        ViewError: when the result is of other inputs or lacks this destination, or the view would exceed 50 MB.
    """
    belongs(inputs, norms)
    found = inputs.token_maps[example_of(inputs, example)]
    unit, together = _measure(measure)
    column = _destination(norms, dest, example)
    position = int(norms.dest[example, column])
    if position not in found.all:
        raise ViewError(
            f"Position {position} is padding in example {example}, whose tokens start at {int(found.all[0])}."
        )
    by_layer = []
    for layer in range(len(norms.layers)):
        whole, single = _of_layer(norms, measure, layer, example)
        by_layer.append(torch.cat([whole[None], single])[:, column, found.all])
    values = torch.stack(by_layer)  # [layer, all + heads, pos]
    labels = line(found)
    data = {
        # One sample among a list: a list of strings alone would do, but is told apart by its first entry.
        "tokens": [[_as_html(label) for label in labels]], "activations": [_rounded(values.permute(2, 0, 1))],
        "secondDimensionName": "Head", "firstDimensionLabels": [str(layer) for layer in norms.layers],
        "secondDimensionLabels": [together, *map(str, range(values.shape[1] - 1))],
    }  # fmt: skip
    of = f"{readable(found.strings[position]).strip()} (position {position})"
    title = f"{'Norm-based' if measure == 'norm' else 'Raw'} attention of {of}, {norms.model}"
    note = f"{unit[0].upper() + unit[1:]} from each token; white is 0, full blue the most of this layer and head."
    still = previews.by_layer(values[:, 0], norms.layers, title, f"{unit},\n{together}")
    return _view(
        title, note, [("TextNeuronActivations", data)], still, height=460,
        instead="a shorter prompt, or read the norms with fewer destinations and save those",
    )  # fmt: skip


def topk(inputs: Inputs, lens: LogitLensResult, *, example: int = 0) -> View:
    """What positions read as: the likeliest tokens of some of them at one layer, and below, those of one at every layer.

    Patches are found by the row and column of their grid, other positions in groups of eight.

    Raises:
        ViewError: when the result is of other inputs, holds nothing of this example, or the view would exceed 50 MB.
    """
    belongs(inputs, lens)
    found = inputs.token_maps[example_of(inputs, example)]
    if example not in lens.example.tolist():
        there = sorted(set(lens.example.tolist()))
        raise ViewError(f"The lens holds no position of example {example}, only of {there}. Choose one of these.")
    lens = lens.of(example)
    last_first = list(range(len(lens.layers)))[::-1]
    layers = [str(lens.layers[at]) for at in last_first]
    names, rows = rows_of(found, lens.position.tolist())
    vocabulary = dict(lens.vocabulary)
    ids = sorted(vocabulary)
    words = [_as_html(readable(vocabulary[i])) for i in ids] + [""]  # the last where a row of positions is shorter
    tokens = np.searchsorted(ids, lens.ids[last_first].numpy())
    probs = np.array(_rounded(lens.probs[last_first]))
    width = max(5, *map(len, rows))  # CircuitsVis first shows five columns, there or not

    def by_row(values: np.ndarray, fill: int) -> np.ndarray:  # [row, layer, col, k]
        n_layers, _, k = values.shape
        out = np.full((len(rows), n_layers, width, k), fill, values.dtype)
        for i, row in enumerate(rows):
            out[i, :, : len(row)] = values[:, row]
        return out

    tokens, probs = by_row(tokens, len(ids)), by_row(probs, 0)
    none: list = [[[]] * len(layers)] * len(rows)
    one_layer = {
        "tokens": [words] * len(rows), "sampleLabels": names, "firstDimensionLabels": layers, "thirdDimensionName": "Column",
        "topkIdxs": tokens.transpose(0, 1, 3, 2).tolist(), "topkVals": probs.transpose(0, 1, 3, 2).tolist(),
        "bottomkIdxs": none, "bottomkVals": none,
    }  # fmt: skip
    # Each line starts with its layer's number, which has no probability.
    spoken = [
        [
            [[f"{layer}:", *(" " + words[t].strip() for t in tokens[row, at, col])] for at, layer in enumerate(layers)]
            for col in range(width)
        ]
        for row in range(len(rows))
    ]
    values = [
        [[[0.0, *probs[row, at, col].tolist()] for at in range(len(layers))] for col in range(width)]
        for row in range(len(rows))
    ]
    one_position = {
        "tokens": spoken, "activations": values, "zerothDimensionName": "Row", "zerothDimensionLabels": names,
        "firstDimensionName": "Column",
    }  # fmt: skip
    place = (
        "row and column of the image's patches" if names[0].endswith("row 0") else "row of positions, and column in it"
    )
    title = f"Logit lens, {lens.model}"
    note = f"By {place}. First table: the likeliest tokens at one layer; second: one position's at every layer, last first. "
    note += "Darker is likelier; hover to read the probability. Layer 0 is the embeddings."
    return _view(
        title, note, [("TopkTokens", one_layer), ("TopkSamples", one_position)], previews.words(lens), height=640,
        instead="fewer positions, fewer layers or a smaller k when reading the lens",
    )  # fmt: skip


def _view(title: str, note: str, places: list[tuple[str, Any]], picture: bytes, aside: str = "", **view) -> View:
    drawn = "".join(
        f'<div data-circuitsvis="{kind}"><script type="application/json">{to_json(data)}</script></div>'
        for kind, data in places
    )
    body = f'<h2>{escape(title)}</h2>\n<p class="note">{escape(note)}</p>\n<div class="side">{drawn}{aside}</div>'
    return View(title, body, (bundle(), START), (CIRCUITSVIS_STYLE,), lambda: picture, **view)


@lru_cache
def bundle() -> str:
    """CircuitsVis, as the installed package carries it, without the pointer to its source map."""
    spec = find_spec("circuitsvis")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError("CircuitsVis is not installed: pip install circuitsvis")
    source = Path(spec.submodule_search_locations[0], "dist", "cdn", "iife.js").read_text(encoding="utf-8")
    return re.sub(r"\n//# sourceMappingURL=.*", "", source)


def _as_html(text: str) -> str:
    """Text that stays text where CircuitsVis takes it for HTML, which is in the line but not in the tooltip.

    A word joiner, which is not seen, after `<` and `&`: neither opens anything then. (Entities would be read in the tooltip.)
    """
    return re.sub("[<&]", lambda found: found[0] + "\u2060", text)


def _measure(measure: str) -> tuple[str, str]:
    if measure not in ATTENTION_MEASURES:
        raise ViewError(f"measure={measure!r} was asked for; there are {', '.join(map(repr, ATTENTION_MEASURES))}.")
    return ATTENTION_MEASURES[measure]


def _of_layer(norms: NormAttentionResult, measure: str, layer: int, example: int) -> tuple[torch.Tensor, torch.Tensor]:
    """All heads together [dest src], and each [head dest src]."""
    if measure == "norm":
        return norms.norm[layer, example], norms.weight[layer, example] * norms.value_norm[layer, example, :, None]
    return norms.weight[layer, example].mean(0), norms.weight[layer, example]


def _among(what: str, asked: Sequence[int], there: Sequence[int]) -> None:
    bad = [n for n in asked if n not in there]
    if bad:
        raise ViewError(f"{what} {bad} were asked for; there are {there[0]} to {there[-1]}.")


def _drawable(tokens: TokenMap, n_maps: int, pool: Pool) -> None:
    """Refuse what a browser would take long to draw, and say which pooling it would not."""

    def parts(pool: Pool) -> int:
        down, across = shape_of(tokens, pool)
        return len(tokens.all) - len(tokens.image) + len(tokens.grids) * down * across

    def cost(pool: Pool) -> int:
        return (n_maps + 1) * parts(pool) ** 2

    if cost(pool) <= ATTENTION_LIMIT:
        return
    most = min(min(g.rows, g.cols) for g in tokens.grids) if tokens.patches else len(tokens.image)
    fits = [n for n in range(most, 0, -1) if cost(n) <= ATTENTION_LIMIT]
    few = min(most, 4)
    maps = ATTENTION_LIMIT // parts(few) ** 2 - 1
    if fits:
        instead = f"Choose pool={fits[0]}" + (f" ({fits[0]} x {fits[0]} cells of an image)." if tokens.patches else ".")
    elif maps > 0:
        instead = f"Choose pool={few} and at most {maps} maps: fewer layers, or heads=[...], or heads=()."
    else:
        instead = "Its text alone is too long: use view.attention_row, which shows one destination at full length."
    raise ViewError(
        f"{n_maps} maps of {parts(pool)} x {parts(pool)} tokens are too many to draw: (maps + 1) x tokens² is {cost(pool):,}, "
        f"at most {ATTENTION_LIMIT:,} is usable. {instead}"
    )


def _destination(norms: NormAttentionResult, dest: str | int | None, example: int) -> int:
    names = list(norms.names)
    if dest is None and len(names) == 1:
        return 0
    if isinstance(dest, str) and dest in names:
        return names.index(dest)
    positions = norms.dest[example].tolist()
    if isinstance(dest, int) and dest in positions:
        return positions.index(dest)
    raise ViewError(
        f"dest={dest!r} was asked for; these norms hold {names[:20]}, positions {positions[:20]}. Choose one."
    )


def _rounded(values: torch.Tensor) -> list:
    """Four significant digits: what a tooltip needs, in half the bytes."""
    x = values.detach().cpu().double().numpy()
    scale = 10.0 ** (3 - np.floor(np.log10(np.where(x == 0, 1, np.abs(x)))))
    return (np.round(x * scale) / scale).tolist()
