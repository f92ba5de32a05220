"""Ablating the visual tokens of an object: is it still named, and would as many other tokens have done the same?"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from mechvlm.batches import Answers, as_batches, pieces
from mechvlm.errors import InputError
from mechvlm.experiments.examples import Example, Examples, each
from mechvlm.experiments.rerun import Edit, run, sweep
from mechvlm.experiments.results import ObjectAblationResult
from mechvlm.inputs import Inputs
from mechvlm.interventions import ablate
from mechvlm.probes.query_reading import QueryReading
from mechvlm.reading import read
from mechvlm.vlm import VLM

CONDITIONS = ("own", "random", "highest norm")
QUERY_SHARE = 4
"""Of queries, this part (a quarter) counts as the object's: those that read most of it."""


def object_ablation(
    vlm: VLM,
    inputs: Inputs | Sequence[Inputs],
    boxes: Sequence[Sequence[float | int]],
    answers: Answers,
    margins: Sequence[int] = (0, 1, 2),
    draws: int = 5,
    seed: int = 0,
) -> ObjectAblationResult:
    """Naming accuracy with an object's visual tokens ablated, against random others and those of highest norm.

    Where the tokens enter the decoder they become the mean visual token of all examples (Neo et al. 2024, "Towards
    Interpreting Visual Information Processing in Vision-Language Models"). Both controls are as many tokens of the same image
    from outside of the object (with the same margin). An answer is right when the model's first token is the answer's.

    Args:
        vlm: the model.
        inputs: any number of examples, as one batch or several, of one image each; on NDIF those of one batch are two
            requests.
        boxes: the object of each example, (left, top, right, bottom) in pixels of the original image.
        answers: what the object is rightly named, a word or token id for all examples, or one each.
        margins: how many patches around the object go with it.
        draws: how often random tokens are drawn.
        seed: of the draws.

    An object's tokens are the patches of which it covers at least half, or, where it covers none so far, the one of which it
    covers most. InstructBLIP's queries have no place: its object's tokens are the quarter of the queries whose reading of the
    image (`query_reading`) lies in these patches most.

    Raises:
        InputError: for boxes or answers that do not fit the examples, or an object that the model does not see.
        ValueError: for no margin or no draw.
    """
    if not len(margins) or min(margins) < 0 or draws < 1:
        raise ValueError(
            f"At least one margin of 0 or more patches and one draw are needed; got {margins} and {draws}."
        )
    batches = as_batches(inputs)
    examples = Examples(vlm, batches, answers)
    if len(boxes) != len(examples) or any(len(box) != 4 for box in boxes):
        raise InputError(
            f"{len(boxes)} boxes were given for {len(examples)} examples: give (left, top, right, bottom) for each."
        )
    if answers is None:
        raise InputError("object_ablation needs the right answers: what each object is named.")
    mean, readings = _look(vlm, batches)
    found = each(
        vlm,
        examples,
        _ablated,
        lambda example: (_object(example, boxes[example.number], margins, readings), mean, draws, seed),
        "object ablation",
    )
    tokens, correct, p, n_tokens, by_condition = zip(*found, strict=True)
    correct_ablated, p_ablated = torch.stack(by_condition, -1)
    return ObjectAblationResult(
        correct=torch.tensor(correct), correct_ablated=correct_ablated, p=torch.tensor(p), p_ablated=p_ablated,
        n_tokens=torch.tensor(n_tokens).T, conditions=CONDITIONS, margins=tuple(int(m) for m in margins),
        answers=pieces(vlm, torch.tensor(tokens)), model=vlm.name,
    )  # fmt: skip


def _ablated(
    vlm: VLM, example: Example, owned: list[list[int]], mean: Tensor, draws: int, seed: int
) -> tuple[int, bool, float, list[int], Float[Tensor, "2 condition margin"]]:
    """The answer's token, whether the model gives it, its probability, how many tokens are ablated with each margin, and the
    share of right answers and the probability under each condition (NaN where there is nothing to compare with)."""
    clean = run(vlm, example.inputs)
    token = example.token(clean.logits)
    image = example.inputs.tokens.image
    norms = clean.resid[0][0, image].float().norm(dim=-1).cpu()
    generator = torch.Generator().manual_seed(seed + example.number)
    chosen: dict[tuple, list[int]] = {}
    for m, own in enumerate(owned):
        chosen[0, m, 0] = own
        outside = torch.isin(image, torch.tensor(own), invert=True)
        others, norm = image[outside], norms[outside]
        if len(others) >= len(own):
            for draw in range(draws):
                chosen[1, m, draw] = others[torch.randperm(len(others), generator=generator)[: len(own)]].tolist()
            chosen[2, m, 0] = others[norm.topk(len(own)).indices].tolist()

    def change(layer: int, rows: list[Edit]) -> None:
        if layer == 0:
            first = rows[0].pos
            ablate(vlm, [[i - first for i in chosen[edit.key]] for edit in rows], 0, how="mean", source=mean)

    logits = sweep(vlm, clean, [Edit(key, range(1), int(image[0])) for key in chosen], change)
    found = torch.full((2, len(CONDITIONS), len(owned)), torch.nan)
    for condition, m in {key[:2] for key in chosen}:
        same = torch.stack([row for key, row in logits.items() if key[:2] == (condition, m)])
        found[0, condition, m] = (same.argmax(-1) == token).float().mean()
        found[1, condition, m] = same.softmax(-1)[:, token].mean()
    return token, int(clean.logits.argmax()) == token, clean.p(token), [len(own) for own in owned], found


@dataclass(frozen=True)
class _Entering:
    """Probe: the sum over all visual tokens of what enters the decoder [d_model], and their number."""

    reads: ClassVar[frozenset[str]] = frozenset({"states"})

    def prepare(self, vlm, inputs):
        return [(row, m.image) for row, m in enumerate(inputs.token_maps)]

    def at_state(self, plan, state):
        return None if state.layer else {"sum": sum(state.resid[row, pos].double().sum(0) for row, pos in plan)}

    def result(self, plan, rows, vlm, inputs):
        return rows[0]["sum"].cpu(), sum(len(pos) for _, pos in plan)


def _look(vlm: VLM, batches: Sequence[Inputs]) -> tuple[Float[Tensor, "1 d_model"], list[Tensor]]:
    """The mean visual token as it enters the decoder, and of queries where each example's read the image [query row col]."""
    total, count, readings = torch.zeros(vlm.d_model, dtype=torch.float64), 0, []
    probes = (_Entering(), *([QueryReading()] if vlm.cross_attentions else []))
    for batch in batches:
        (entering, n), *reading = read(vlm, batch, *probes)
        total, count = total + entering, count + n
        readings += [one for found in reading for one in found.map]
    return (total / count).float()[None], readings


def _object(
    example: Example, box: Sequence[float | int], margins: Sequence[int], readings: list[Tensor]
) -> list[list[int]]:
    """Positions of the object's tokens, for each margin."""
    tokens = example.inputs.tokens
    if len(tokens.grids) != 1:
        raise InputError(f"Example {example.number} holds {len(tokens.grids)} images; a box is of one.")
    grid = tokens.grids[0]
    covered = grid.covered(box)
    if not covered.max() > 0:
        seen = tuple(round(x) for x in grid.crop_box)
        raise InputError(
            f"Box {tuple(box)} of example {example.number} is not on the image as the model sees it, {seen}."
        )
    least = min(0.5, float(covered.max()))
    grown = [grid.inside(box, least, margin) for margin in margins]
    if tokens.patches:
        return [tokens.image[patches.flatten()].tolist() for patches in grown]
    reads = readings[example.number]
    n = max(1, len(tokens.image) // QUERY_SHARE)
    return [tokens.image[(reads * patches).sum((1, 2)).topk(n).indices].tolist() for patches in grown]
