"""Views whose tokens and maps CircuitsVis draws: attention patterns, values on tokens, the lens.

They stand in the package's own page: title, prompt, the image beside the tokens, legends and keys.
"""

from collections.abc import Sequence
from typing import Any

import torch

from mechvlm.errors import ViewError
from mechvlm.inputs.answer import Answer
from mechvlm.inputs.batch import Inputs
from mechvlm.inputs.numbers import whole_numbers
from mechvlm.inputs.tokens import TokenMap
from mechvlm.probes.logit_lens import LogitLensResult
from mechvlm.probes.norm_attention import NormAttentionResult
from mechvlm.view import packing, previews
from mechvlm.view.circuitsvis_page import rounded, token_page
from mechvlm.view.match import check_example, check_match
from mechvlm.view.page import View
from mechvlm.view.pooling import (
    PATCH_SIGN,
    Pool,
    cell_names,
    pool_attention,
    pool_shape,
    position_rows,
    readable,
)
from mechvlm.view.units import cell_units, token_units

ATTENTION_LIMIT = 20_000
"""Most (maps + 1) x tokens² that the attention view draws: about 0.1 ms each, 2 to 3 s for all."""

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

    units, names, member = cell_units(inputs, example, pool)
    maps, titles = [], []
    for layer in layers:
        together, by_head = _layer_maps(norms, measure, norms.layers.index(layer), example)
        maps += [together, *by_head[heads]]
        titles += [f"{layer} all", *(f"{layer}.{head}" for head in heads)]
    values = pool_attention(torch.stack(maps), member)
    top = float(values.max())
    kind = "Norm-based" if measure == "norm" else "Raw"
    title = f"{kind} attention, {norms.model}, layer {titles[0]}"
    return token_page(
        units, f"{kind} attention, map by map",
        f"Pick a token or a cell of the image: colors and frames show what it reads from each other one. "
        f"“All” is {all_heads}. A cell's patches are summed as sources and averaged as destinations.",
        lambda: previews.pattern(values[0], names, title, unit), 700 + 115 * -(-len(titles) // 6),
        "fewer layers, fewer heads, or a smaller pool", unit=unit, step="Layer",
        steps=layers, heads=["all", *map(str, heads)], patterns=rounded(values),
        labels=[name.removeprefix(PATCH_SIGN) for name in names], maps=titles, top=top,
        whyImage="The stronger a cell's frame, the more was read from it; inside, the image is as it is.",
    )  # fmt: skip


def tokens(inputs: Inputs | Answer, values, *, name: str = "value", example: int = 0) -> View:
    """One value per position: the color of its token, or the frame of its patch on the image.

    Frames and colors go from 0 to the largest value of the image and of the words, each with its
    legend. The answer's words stand before the prompt's. Point at a token to read its value.

        >>> norms = mechvlm.norm_attention(vlm, inputs, dst="last")
        >>> mechvlm.view.tokens(inputs, norms.norm[15, 0, 0], name="norm read at layer 15")

        >>> answer = vlm.generate(inputs)[0]
        >>> mechvlm.view.tokens(answer, answer.logprobs.exp(), name="probability when written")

    Args:
        inputs: the tokens, and the model that they are for; or an answer, with its prompt.
        values: [pos], over the padded sequence, like the model's activations. Of inputs that hold
            an answer also [token], one for each of the answer's tokens.
        name: what the values are.
        example: which of the batch.

    Raises:
        ViewError: when there are not as many values as positions, a token's value is NaN or
            infinite, or the image is gone.
    """
    inputs = inputs.inputs if isinstance(inputs, Answer) else inputs
    token_map = inputs.token_maps[check_example(inputs, example)]
    values = torch.as_tensor(values).detach().cpu().float()
    of_answer = token_map.n_answer > 0 and values.shape == (token_map.n_answer,)
    if values.shape != (len(token_map),) and not of_answer:
        answer = f", or one for each of the answer's {token_map.n_answer} tokens" if token_map.n_answer else ""
        raise ViewError(
            f"{name!r} has the shape {list(values.shape)}; example {example} has {len(token_map)} positions, padding "
            f"included: give one value for each{answer}."
        )
    has_value = token_map.answer if of_answer else token_map.all
    values = values if of_answer else values[token_map.all]
    shown = dict(zip(has_value.tolist(), rounded(values), strict=True))
    units = token_units(inputs, example)
    by_unit = [shown.get(position) for (position,) in units.positions]
    title = f"{name}, {inputs.model}" if inputs.model else name
    return token_page(
        units, name, "Each token has the color of its value, and each patch of the image a frame of it.",
        lambda: previews.tokens(units, by_unit, title, name), 0, unit=name, values=[[by_unit]],
    )  # fmt: skip


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
    word, kind = readable(token_map.strings[position]).strip(), "Norm-based" if measure == "norm" else "Raw"
    return token_page(
        token_units(inputs, example), f"What “{word}” looked at, from position {position}",
        f"{kind} attention: how much it read from each token and patch at a layer. “All” is {all_heads}.",
        lambda: previews.by_layer(values[:, 0], norms.layers, f"{kind} attention of {word}", f"{unit},\n{all_heads}"),
        60, "a shorter prompt, or read the norms with fewer destinations and save those", unit=unit, step="Layer",
        steps=list(norms.layers), first=(len(norms.layers) - 1) // 2, heads=["all", *map(str, range(values.shape[1] - 1))],
        values=rounded(values),
    )  # fmt: skip


def topk(inputs: Inputs, lens: LogitLensResult, *, example: int = 0) -> View:
    """The likeliest tokens of the logit lens: of one position at every state, of many at one state.

    Colors and frames show how likely each position's first word is at the state. Patches are picked
    on the image, other positions among the tokens; the words can be written over the patches.

        >>> mechvlm.view.topk(inputs, mechvlm.logit_lens(vlm, inputs, k=5))

    Probabilities on the page are off by at most 0.4 %.

    Args:
        inputs: what the result was read from.
        lens: the logit lens, at any positions and states.
        example: which of the batch.

    Raises:
        ViewError: when the result is of other inputs, holds nothing of this example, the image is
            gone, or the view would exceed 50 MB.
    """
    check_match(inputs, lens)
    token_map = inputs.token_maps[check_example(inputs, example)]
    if example not in lens.example.tolist():
        examples = sorted(set(lens.example.tolist()))
        raise ViewError(f"The lens holds no position of example {example}, only of {examples}. Choose one of these.")
    lens, positions = lens.of(example), token_map.all.tolist()
    held = [positions.index(p) for p in lens.position.tolist()]
    names, rows = position_rows(token_map, lens.position.tolist())
    return token_page(
        token_units(inputs, example), "What each position reads as",
        "Colors and frames show how likely a position's first word is at the state: pick a patch or a token for all its words.",
        lambda: previews.words(lens), 160 + 26 * len(lens.states) + 40 * max(map(len, rows)),
        "fewer positions, fewer states or a smaller k when reading the lens", unit="chance of the likeliest word",
        step="State", steps=list(lens.states), first=len(lens.states) - 1, start=held[0],
        rows=[{"name": name, "units": [held[i] for i in row]} for name, row in zip(names, rows, strict=True)],
        lens={
            "states": list(lens.states), "k": lens.ids.shape[2], "sources": held,
            "data": packing.pack_words(lens.ids.numpy(), lens.probs.numpy(), dict(lens.vocabulary)),
        },
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
