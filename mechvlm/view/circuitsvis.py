"""Views that CircuitsVis draws: attention patterns, values on tokens, tables of the logit lens."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from mechvlm.errors import ViewError
from mechvlm.inputs.batch import Inputs
from mechvlm.inputs.numbers import whole_numbers
from mechvlm.inputs.tokens import TokenMap
from mechvlm.probes.logit_lens import LogitLensResult
from mechvlm.probes.norm_attention import NormAttentionResult
from mechvlm.view import previews
from mechvlm.view.circuitsvis_page import circuitsvis_view, html_safe, rounded
from mechvlm.view.match import check_example, check_match
from mechvlm.view.page import View
from mechvlm.view.pooling import (
    Pool,
    cell_map,
    cell_names,
    pool_attention,
    pool_shape,
    position_rows,
    readable,
    token_groups,
    token_labels,
)

ATTENTION_LIMIT = 20_000
"""Most (maps + 1) x tokens² that the attention view draws: about 0.1 ms each, 2 to 3 s for all."""

POSITIVE, NEGATIVE = "#0072B2", "#D55E00"
ATTENTION_MEASURES = {
    "norm": ("norm written (residual-stream units)", "all heads' vectors summed"),
    "weight": ("attention weight", "the heads' mean"),
}
"""For each measure, what it is called, and what all heads together are: the norm of their summed
vectors, or the mean of their weights."""


def attention(
    inputs: Inputs,
    norms: NormAttentionResult,
    layers: Any,
    *,
    heads: Any = None,
    pool: Pool = None,
    measure: str = "norm",
    example: int = 0,
) -> View:
    """Attention patterns at chosen layers, head by head, over text tokens and cells of the image.

    A cell's patches are summed as sources and averaged as destinations, so that a row of weights
    still sums to 1. Norms are pooled in the same way: the sum of the norms that the patches wrote
    one by one, not the norm of what they wrote together.

        >>> inputs = vlm.inputs(image, prompt)
        >>> norms = mechvlm.norm_attention(vlm, inputs, dst="all pairs")
        >>> mechvlm.view.attention(inputs, norms, layers=[8, 16], pool=4)

    Args:
        inputs: what the result was read from.
        norms: read with `NormAttention(dst="all pairs")`.
        layers: one or several, 0 to n_layers - 1; negative ones count from the end.
        heads: which heads, one or several; default all. The map of all heads together is always
            shown, and `()` shows only that one.
        pool: cells of an image, (rows, cols), or n for n x n; for InstructBLIP's queries, the
            number of groups. Default: every patch or query by itself.
        measure: "norm", ‖α f‖ and for all heads ‖Σ_h α_h f_h‖; or "weight", α and its mean over
            heads.
        example: which of the batch.

    Raises:
        ViewError: when the result is of other inputs or holds too few destinations, the image is
            gone, or the view would be too large to draw: the error says which pooling fits.
    """
    check_match(inputs, norms)
    token_map = inputs.token_maps[check_example(inputs, example)]
    unit, all_heads = _measure(measure)
    if len(norms.names) != norms.norm.shape[-1]:
        raise ViewError(
            f"Patterns need every destination; these norms hold {list(norms.names)}. Read them with "
            'NormAttention(dst="all pairs"), or look at one destination with view.attention_row.'
        )
    layers = _numbers("layers", layers, norms.layers)
    all_numbers = range(norms.weight.shape[2])
    heads = list(all_numbers) if heads is None else _numbers("heads", heads, all_numbers)
    if not layers:
        raise ViewError("No layer was asked for: give one of 0 to n_layers - 1, or several.")
    pool_shape(token_map, pool)
    _check_cost(token_map, len(layers) * (1 + len(heads)), pool)

    names, member = token_groups(token_map, pool)
    maps, titles = [], []
    for layer in layers:
        together, by_head = _layer_maps(norms, measure, norms.layers.index(layer), example)
        maps += [together, *by_head[heads]]
        titles += [f"{layer} all", *(f"{layer}.{head}" for head in heads)]
    values = pool_attention(torch.stack(maps), member)
    top = float(values.max())
    data = {
        "attention": rounded(values), "tokens": names, "attentionHeadNames": titles, "maskUpperTri": False,
        "minValue": -1, "maxValue": top or 1.0, "positiveColor": POSITIVE, "negativeColor": NEGATIVE,
    }  # fmt: skip
    title = f"{'Norm-based' if measure == 'norm' else 'Raw'} attention, {norms.model}"
    note = (
        f"From each source (across) to each destination (down): {unit}, 0 (white) to {top:.3g} (blue) on every map. Labels are "
        f"layer.head, 'all' is {all_heads}. A cell's patches are summed as sources, averaged as destinations."
    )
    preview = previews.pattern(values[0], names, f"{title}, layer {titles[0]}", unit)
    return circuitsvis_view(
        title, note, [("AttentionHeads", data)], preview, aside=cell_map(inputs, example, pool),
        height=860 + 115 * -(-len(titles) // 6), instead="fewer layers, fewer heads, or a smaller pool",
    )  # fmt: skip


def tokens(inputs: Inputs, values, *, name: str = "value", example: int = 0) -> View:
    """One value per position, as the color of its token; patches stand in rows as on the image.

    Hover over a token to read its value.

        >>> norms = mechvlm.norm_attention(vlm, inputs, dst="last")
        >>> mechvlm.view.tokens(inputs, norms.norm[15, 0, 0], name="norm read at layer 15")

    Args:
        inputs: the tokens, and the model that they are for.
        values: [pos], over the padded sequence, like the model's activations.
        name: what the values are.
        example: which of the batch.

    Raises:
        ViewError: when there are not as many values as positions, or a token's value is NaN or
            infinite.
    """
    token_map = inputs.token_maps[check_example(inputs, example)]
    values = torch.as_tensor(values).detach().cpu().float()
    if values.shape != (len(token_map),):
        raise ViewError(
            f"{name!r} has the shape {list(values.shape)}; example {example} has {len(token_map)} positions, padding "
            "included: give one value for each."
        )
    values = values[token_map.all]
    labels, low, high = token_labels(token_map), float(values.min()), float(values.max())
    data = {
        "tokens": [html_safe(label) for label in labels], "values": rounded(values),
        "minValue": min(low, -1e-9), "maxValue": max(high, 1e-9), "positiveColor": POSITIVE, "negativeColor": NEGATIVE,
    }  # fmt: skip
    title = f"{name}, {inputs.model}" if inputs.model else name
    note = f"From {low:.3g} to {high:.3g}; 0 is white, above it blue, below it orange. Hover over a token to read its value."
    preview = previews.chips(values, labels, title, name)
    return circuitsvis_view(title, note, [("ColoredTokens", data)], preview, height=360)


def attention_row(
    inputs: Inputs,
    norms: NormAttentionResult,
    dest: str | int | None = None,
    *,
    measure: str = "norm",
    example: int = 0,
) -> View:
    """What one destination reads from every token and every patch, by layer and head.

        >>> norms = mechvlm.norm_attention(vlm, inputs, dst="last")
        >>> mechvlm.view.attention_row(inputs, norms, "last")

    Args:
        inputs: what the result was read from.
        norms: of any destinations.
        dest: a destination by its name in `norms.names`, or its position; default: the only one.
        measure: "norm" (the norm of what was written) or "weight" (raw).
        example: which of the batch.

    Raises:
        ViewError: when the result is of other inputs or lacks this destination, or the view would
            exceed 50 MB.
    """
    check_match(inputs, norms)
    token_map = inputs.token_maps[check_example(inputs, example)]
    unit, all_heads = _measure(measure)
    column = _dest_column(norms, dest, example)
    position = int(norms.dest[example, column])
    if position not in token_map.all:
        raise ViewError(
            f"Position {position} is padding in example {example}, whose tokens start at {int(token_map.all[0])}."
        )
    by_layer = []
    for layer in range(len(norms.layers)):
        together, by_head = _layer_maps(norms, measure, layer, example)
        by_layer.append(torch.cat([together[None], by_head])[:, column, token_map.all])
    values = torch.stack(by_layer)  # [layer, all + heads, pos]
    labels = token_labels(token_map)
    data = {
        # A list with one sample: CircuitsVis takes a plain list of strings for a sample or for
        # several, depending on its first entry.
        "tokens": [[html_safe(label) for label in labels]], "activations": [rounded(values.permute(2, 0, 1))],
        "secondDimensionName": "Head", "firstDimensionLabels": [str(layer) for layer in norms.layers],
        "secondDimensionLabels": [all_heads, *map(str, range(values.shape[1] - 1))],
    }  # fmt: skip
    dest_label = f"{readable(token_map.strings[position]).strip()} (position {position})"
    title = f"{'Norm-based' if measure == 'norm' else 'Raw'} attention of {dest_label}, {norms.model}"
    note = f"{unit[0].upper() + unit[1:]} from each token; white is 0, full blue the most of this layer and head."
    preview = previews.by_layer(values[:, 0], norms.layers, title, f"{unit},\n{all_heads}")
    return circuitsvis_view(
        title, note, [("TextNeuronActivations", data)], preview, height=460,
        instead="a shorter prompt, or read the norms with fewer destinations and save those",
    )  # fmt: skip


def topk(inputs: Inputs, lens: LogitLensResult, *, example: int = 0) -> View:
    """The likeliest tokens of the logit lens, in two tables.

    The first holds many positions at one state, the second one position at every state. Patches are
    chosen by row and column of their grid, other positions in groups of eight.

        >>> mechvlm.view.topk(inputs, mechvlm.logit_lens(vlm, inputs, k=5))

    Args:
        inputs: what the result was read from.
        lens: the logit lens, at any positions and states.
        example: which of the batch.

    Raises:
        ViewError: when the result is of other inputs, holds nothing of this example, or the view
            would exceed 50 MB.
    """
    check_match(inputs, lens)
    token_map = inputs.token_maps[check_example(inputs, example)]
    if example not in lens.example.tolist():
        examples = sorted(set(lens.example.tolist()))
        raise ViewError(f"The lens holds no position of example {example}, only of {examples}. Choose one of these.")
    lens = lens.of(example)
    last_first = list(range(len(lens.states)))[::-1]
    states = [str(lens.states[at]) for at in last_first]
    names, rows = position_rows(token_map, lens.position.tolist())
    vocabulary = dict(lens.vocabulary)
    ids = sorted(vocabulary)
    words = [html_safe(readable(vocabulary[i])) for i in ids] + [""]  # the last fills shorter rows
    width = max(5, *map(len, rows))  # CircuitsVis first shows five columns, even of fewer

    def by_row(values: np.ndarray, fill: int) -> np.ndarray:  # [row, state, col, k]
        n_states, _, k = values.shape
        out = np.full((len(rows), n_states, width, k), fill, values.dtype)
        for i, row in enumerate(rows):
            out[i, :, : len(row)] = values[:, row]
        return out

    word_of = by_row(np.searchsorted(ids, lens.ids[last_first].numpy()), len(ids))
    probs = by_row(np.array(rounded(lens.probs[last_first])), 0)
    none: list = [[[]] * len(states)] * len(rows)
    one_state = {
        "tokens": [words] * len(rows), "sampleLabels": names, "firstDimensionName": "State",
        "firstDimensionLabels": states, "thirdDimensionName": "Column",
        "topkIdxs": word_of.transpose(0, 1, 3, 2).tolist(), "topkVals": probs.transpose(0, 1, 3, 2).tolist(),
        "bottomkIdxs": none, "bottomkVals": none,
    }  # fmt: skip
    # Each line starts with its state's number, which has no probability.
    lines = [
        [
            [[f"{state}:", *(" " + words[t].strip() for t in word_of[row, at, col])] for at, state in enumerate(states)]
            for col in range(width)
        ]
        for row in range(len(rows))
    ]
    line_values = [
        [[[0.0, *probs[row, at, col].tolist()] for at in range(len(states))] for col in range(width)]
        for row in range(len(rows))
    ]
    one_position = {
        "tokens": lines, "activations": line_values, "zerothDimensionName": "Row", "zerothDimensionLabels": names,
        "firstDimensionName": "Column",
    }  # fmt: skip
    place = (
        "row and column of the image's patches" if names[0].endswith("row 0") else "row of positions, and column in it"
    )
    title = f"Logit lens, {lens.model}"
    note = f"By {place}. First table: the likeliest tokens at one state; second: one position's at every state, last first. "
    note += "Darker is likelier; hover to read the probability. State 0 is the embeddings."
    return circuitsvis_view(
        title, note, [("TopkTokens", one_state), ("TopkSamples", one_position)], previews.words(lens), height=640,
        instead="fewer positions, fewer states or a smaller k when reading the lens",
    )  # fmt: skip


def _measure(measure: str) -> tuple[str, str]:
    """The measure's name with its unit, and what all heads together are."""
    if measure not in ATTENTION_MEASURES:
        raise ViewError(f"measure={measure!r} was asked for; choose one of {', '.join(map(repr, ATTENTION_MEASURES))}.")
    return ATTENTION_MEASURES[measure]


def _layer_maps(
    norms: NormAttentionResult, measure: str, layer: int, example: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """All heads together [dest, src], and each head [head, dest, src].

    `layer` is its place in `norms.layers`.
    """
    if measure == "norm":
        return norms.norm[layer, example], norms.heads_of(example)[layer]
    return norms.weight[layer, example].mean(0), norms.weight[layer, example]


def _numbers(name: str, chosen: Any, available: Sequence[int]) -> list[int]:
    """The chosen layers or heads as numbers; negative ones count from the end."""
    numbers = whole_numbers(chosen, name)
    wrong = [n for n in numbers if n not in available and not -len(available) <= n < 0]
    if wrong:
        raise ViewError(f"{name} {wrong} were asked for; there are {available[0]} to {available[-1]}.")
    return [available[n] if n < 0 else n for n in numbers]


def _check_cost(token_map: TokenMap, n_maps: int, pool: Pool) -> None:
    """Refuse patterns that a browser would take long to draw, and say which pooling fits."""

    def n_tokens(pool: Pool) -> int:
        return len(token_map.all) - len(token_map.image) + len(set(cell_names(token_map, pool).values()))

    def cost(pool: Pool) -> int:
        return (n_maps + 1) * n_tokens(pool) ** 2

    if cost(pool) <= ATTENTION_LIMIT:
        return
    most = min(min(g.rows, g.cols) for g in token_map.grids) if token_map.patches else len(token_map.image)
    fitting = [n for n in range(most, 0, -1) if cost(n) <= ATTENTION_LIMIT]
    few = min(most, 4)
    maps = ATTENTION_LIMIT // n_tokens(few) ** 2 - 1
    if fitting:
        n = fitting[0]
        instead = f"Choose pool={n}" + (f" ({n} x {n} cells of an image)." if token_map.patches else ".")
    elif maps > 0:
        instead = f"Choose pool={few} and at most {maps} maps: fewer layers, or heads=[...], or heads=()."
    else:
        instead = "Its text alone is too long: use view.attention_row, which shows one destination at full length."
    size = n_tokens(pool)
    raise ViewError(
        f"{n_maps} maps of {size} x {size} tokens are too many to draw: (maps + 1) x tokens² is {cost(pool):,}, "
        f"at most {ATTENTION_LIMIT:,} is usable. {instead}"
    )


def _dest_column(norms: NormAttentionResult, dest: str | int | None, example: int) -> int:
    """The index of a destination among those that `norms` holds."""
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
