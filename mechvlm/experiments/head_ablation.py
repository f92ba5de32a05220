"""Ablating attention heads: which of them does the answer need?

1. A clean forward gives the probability and the logit of the answer.
2. Every head in turn, or every set of heads, has its output z replaced: by zero, by its mean over
   all examples, or by what it wrote in another example.
3. The change of probability and logit is the head's effect. A set is held against random sets of as
   many heads in the same layers.
"""

from collections.abc import Iterable, Mapping
from typing import Any, overload

import nnsight
import torch
from torch import Tensor

from mechvlm.errors import InputError
from mechvlm.experiments.cases import Example, Examples, for_each
from mechvlm.experiments.cases import positions as positions_of
from mechvlm.experiments.head_ablation_result import HeadAblationResult, HeadSetsResult
from mechvlm.experiments.sweep import Edit, run, sweep
from mechvlm.inputs.batch import Inputs
from mechvlm.inputs.batches import Answers
from mechvlm.results import float32
from mechvlm.tracing.interventions import ablate, patch
from mechvlm.tracing.reading import Readable
from mechvlm.vlm.vlm import VLM

HEAD_ABLATIONS = ("zero", "mean", "resample")

Sets = Mapping[str, Iterable[tuple[int, int]]]
"""Sets of heads by name, each head as (layer, head)."""

Members = dict[int, list[int]]
"""A set's heads by layer."""


@overload
def head_ablation(
    vlm: VLM, inputs: Readable, answers: Answers = None, how: str = "zero", sets: None = None, positions: str = "all",
    draws: int = 5, seed: int = 0,
) -> HeadAblationResult: ...  # fmt: skip


@overload
def head_ablation(
    vlm: VLM, inputs: Readable, answers: Answers = None, how: str = "zero", *, sets: Sets, positions: str = "all",
    draws: int = 5, seed: int = 0,
) -> HeadSetsResult: ...  # fmt: skip


def head_ablation(
    vlm: VLM,
    inputs: Readable,
    answers: Answers = None,
    how: str = "zero",
    sets: Sets | None = None,
    positions: str = "all",
    draws: int = 5,
    seed: int = 0,
) -> HeadAblationResult | HeadSetsResult:
    """The answer's probability and logit with every head ablated in turn, or with sets of heads.

    A head's output z (what enters the output projection) is replaced at `positions`, and
    the answer is measured at the last position.

    >>> result = mv.head_ablation(vlm, inputs, answers)
    >>> result.heads(top=10)  # the strongest, with 95 % intervals
    >>> sets = {"looking": [(3, 1), (5, 0)], "naming": [(7, 2)]}
    >>> mv.head_ablation(vlm, inputs, answers, how="mean", sets=sets).interval.mean  # [set]

    Args:
        vlm: the model.
        inputs: any number of examples, as one batch or several. Each is run alone, its heads
            batched; on NDIF those of one batch are one request (with how="mean" one more).
        answers: a word or token id for all examples, or one each; by default the model's own first
            token.
        how: "zero"; "mean", each head's mean over `positions` of all examples, every
            position counted once; or "resample", what the head wrote in another example: as many
            examples further on for every one, a number drawn with `seed`. Positions are taken in
            order where the other example has as many, else drawn from it.
        sets: sets of heads to ablate together, {name: [(layer, head), ...]}. By default every head
            by itself.
        positions: where z is replaced, by a name of `TokenMap.select` or a word; several
            are joined, "question + last".
        draws: of sets: how many random sets each is held against. A random set has as many heads in
            the same layers, none of them in the set; it is the same for all examples.
        seed: of the random sets and of "resample".

    Returns:
        A `HeadAblationResult` [layer head example], or with `sets` a `HeadSetsResult`
        [set example].

    Sources: Michel et al. 2019, "Are Sixteen Heads Really Better than One?" (zero); Wang et al.
    2022, "Interpretability in the Wild" (mean); Chan et al. 2022, "Causal Scrubbing" (resample).
    Every ablation starts from the clean states at its first layer, so that all heads of a decoder
    cost half as much as one whole forward each.
    Tested: equals Hugging Face's own forward with a hook on the output projection; on a model made
    to copy one patch with one head, that head alone has an effect.

    Raises:
        IndexError: for a layer or a head that is not there.
        InputError: for answers that do not fit the examples, or "resample" of one example.
        ValueError: for an unknown `how` or position, an empty set, or no draw.
        ModelError: for a layer without attention heads.
    """
    if how not in HEAD_ABLATIONS:
        raise ValueError(f"head_ablation knows how='zero', 'mean' and 'resample', not {how!r}.")
    examples = Examples(vlm, inputs, answers)
    if how == "resample" and len(examples) < 2:
        raise InputError(
            "how='resample' takes what a head wrote in another example, and one example was given: give several."
        )
    chosen = _each_head(vlm) if sets is None else _checked(vlm, sets)
    random = [] if sets is None else [_random_sets(vlm, members, draws, seed) for members in chosen]
    tried = [*chosen, *(members for by_draw in random for members in by_draw)]
    mean = _mean_z(vlm, examples, positions) if how == "mean" else None
    steps = int(torch.randint(1, len(examples), (), generator=_generator(seed))) if how == "resample" else 0
    by_example = for_each(
        vlm,
        examples,
        _ablate_each,
        lambda example: (
            positions_of(example.inputs.tokens, positions).tolist(),
            tried,
            mean,
            *(_other_example(examples, example, steps, positions, seed) if steps else (None, [])),
        ),
        "head ablation",
    )
    tokens, p, logit, ablated = zip(*by_example, strict=True)
    p_ablated, logit_ablated = float32(ablated).permute(2, 1, 0)  # [tried example]
    shared: dict[str, Any] = {
        "p": float32(p), "logit": float32(logit), "how": how, "positions": positions, "model": vlm.name,
        "answers": vlm.to_str_tokens(torch.tensor(tokens)), "example_ids": examples.ids,
    }  # fmt: skip
    if sets is None:
        by_layer = vlm.n_layers, vlm.n_heads
        return HeadAblationResult(
            p_ablated=p_ablated.unflatten(0, by_layer), logit_ablated=logit_ablated.unflatten(0, by_layer), **shared
        )
    n = len(chosen)
    return HeadSetsResult(
        p_ablated=p_ablated[:n], logit_ablated=logit_ablated[:n], p_control=_by_draw(p_ablated[n:], random, draws),
        logit_control=_by_draw(logit_ablated[n:], random, draws), sets=tuple(sets),
        members=tuple(map(_pairs, chosen)), drawn=tuple(tuple(map(_pairs, by_draw)) for by_draw in random), seed=seed,
        **shared,
    )  # fmt: skip


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _each_head(vlm: VLM) -> list[Members]:
    return [{layer: [head]} for layer in range(vlm.n_layers) for head in range(vlm.n_heads)]


def _checked(vlm: VLM, sets: Sets) -> list[Members]:
    """The sets' heads by layer, each head once.

    Raises:
        ValueError: for no set, an empty one, or what is no (layer, head).
        IndexError: for a head that is not there.
    """
    if not isinstance(sets, Mapping) or not sets:
        raise ValueError(f"head_ablation takes sets={{name: [(layer, head), ...]}}, not {sets!r}.")
    by_set: list[Members] = []
    for name, heads in sets.items():
        members: Members = {}
        for pair in heads:
            try:
                layer, head = (int(i) for i in pair)
            except (TypeError, ValueError):
                raise ValueError(f"The set {name!r} holds {pair!r}; a head is (layer, head), two numbers.") from None
            if not (0 <= layer < vlm.n_layers and 0 <= head < vlm.n_heads):
                raise IndexError(
                    f"The set {name!r} holds head {head} of layer {layer}; {vlm.name} has layers 0 to {vlm.n_layers - 1} "
                    f"with heads 0 to {vlm.n_heads - 1}."
                )
            members.setdefault(layer, [])
            members[layer] += [head] if head not in members[layer] else []
        if not members:
            raise ValueError(f"The set {name!r} is empty: give at least one (layer, head).")
        by_set.append(dict(sorted(members.items())))
    return by_set


def _random_sets(vlm: VLM, members: Members, draws: int, seed: int) -> list[Members]:
    """As many other heads of the same layers, drawn several times; none if a layer has too few."""
    if draws < 1:
        raise ValueError(f"draws={draws} was asked for; a set is held against at least 1 random set.")
    generator = _generator(seed)
    others = {layer: [h for h in range(vlm.n_heads) if h not in heads] for layer, heads in members.items()}
    if any(len(others[layer]) < len(heads) for layer, heads in members.items()):
        return []
    return [
        {
            layer: [others[layer][i] for i in torch.randperm(len(others[layer]), generator=generator)[: len(heads)]]
            for layer, heads in members.items()
        }
        for _ in range(draws)
    ]


def _pairs(members: Members) -> tuple[tuple[int, int], ...]:
    return tuple((layer, head) for layer, heads in members.items() for head in heads)


def _by_draw(values: Tensor, random: list[list[Members]], draws: int) -> Tensor:
    """Values of the random sets [drawn example] as [set draw example], NaN where none was drawn."""
    by_set = values.new_full((len(random), draws, values.shape[1]), torch.nan)
    by_set[[bool(by_draw) for by_draw in random]] = values.unflatten(0, (-1, draws))
    return by_set


def _mean_z(vlm: VLM, examples: Examples, positions: str) -> list[Tensor]:
    """Each layer's mean z [head d_head] over these positions of all examples."""
    sums = for_each(
        vlm,
        examples,
        _sum_z,
        lambda example: (positions_of(example.inputs.tokens, positions).tolist(),),
        "mean of the heads",
    )
    count = sum(n for _, n in sums)
    return [
        torch.stack([by_layer[layer].cpu() for by_layer, _ in sums]).sum(0) / count for layer in range(vlm.n_layers)
    ]


def _sum_z(vlm: VLM, example: Example, pos: list[int]) -> tuple[list[Tensor], int]:
    """The sum of z over some positions at every layer, [head d_head] each, and their number."""
    with torch.no_grad(), vlm.trace(example.inputs, logits_to_keep=1):
        sums = nnsight.save([])
        for layer in range(vlm.n_layers):
            sums.append(vlm.z[layer][0, pos].double().sum(0))
    return sums, len(pos)


def _other_example(
    examples: Examples, example: Example, steps: int, positions: str, seed: int
) -> tuple[Inputs, list[int]]:
    """The example `steps` further on, and the positions of it to take z from."""
    other = examples[(example.number + steps) % len(examples)].inputs
    pos, n = positions_of(other.tokens, positions), len(positions_of(example.inputs.tokens, positions))
    if len(pos) != n:
        pos = pos[torch.randint(len(pos), (n,), generator=_generator(seed + example.number))]
    return other, pos.tolist()


def _ablate_each(
    vlm: VLM, example: Example, pos: list[int], tried: list[Members], mean: list[Tensor] | None, other: Inputs | None,
    taken: list[int],
) -> tuple[int, float, float, list[tuple[float, float]]]:  # fmt: skip
    """The answer's token, its probability and logit, and both with each set of heads ablated.

    z becomes `mean`, or that of the example `other` at the positions `taken`, or else zero.
    """
    clean = run(vlm, example.inputs, edits_at="z")
    token = example.token(clean.logits)
    states = None if other is None else [z[:, taken] for z in run(vlm, other, keep="z").kept]
    if mean is not None:
        states = [z[None, None].expand(1, len(pos), -1, -1) for z in mean]

    def change(layer: int, rows: list[Edit]) -> None:
        heads = [tried[edit.key[0]].get(layer) for edit in rows]
        if any(heads):
            here = [[i - rows[0].pos for i in pos] if row else None for row in heads]
            if states is None:
                ablate(vlm, here, layer, at="z", heads=heads)
            else:
                patch(vlm, states[layer], here, layer, at="z", heads=heads)

    edits = [Edit((i,), range(min(members), max(members) + 1), pos[0]) for i, members in enumerate(tried)]
    logits = sweep(vlm, clean, edits, change)
    ablated = [(float(logits[i,].softmax(-1)[token]), float(logits[i,][token])) for i in range(len(tried))]
    return token, clean.p(token), float(clean.logits[token]), ablated
