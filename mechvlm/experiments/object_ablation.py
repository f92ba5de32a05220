"""Ablating the visual tokens of an object: is it still named, and would as many other tokens have done the same?"""

from collections.abc import Sequence

import nnsight
import torch
from jaxtyping import Float
from torch import Tensor

from mechvlm.batches import Answers, as_batches, pieces
from mechvlm.errors import InputError
from mechvlm.experiments.examples import Example, Examples
from mechvlm.experiments.rerun import Edit, run, sweep
from mechvlm.experiments.results import ObjectAblationResult
from mechvlm.inputs import Inputs
from mechvlm.interventions import ablate
from mechvlm.progress import track
from mechvlm.reading import query_reading
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
        inputs: any number of examples, as one batch or several, of one image each.
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
    mean = _mean_token(vlm, batches)
    shape = (len(CONDITIONS), len(margins), len(examples))
    correct_ablated, p_ablated = torch.full(shape, torch.nan), torch.full(shape, torch.nan)
    correct, p, n_tokens, tokens = [], [], torch.zeros(shape[1:], dtype=torch.long), []
    for example in track(examples, "object ablation"):
        clean = run(vlm, example.inputs)
        token = example.token(clean.logits)
        image = example.inputs.tokens.image
        norms = clean.resid[0][0, image].float().norm(dim=-1).cpu()
        generator = torch.Generator().manual_seed(seed + example.number)
        chosen: dict[tuple, list[int]] = {}
        for m, own in enumerate(_object(vlm, example, boxes[example.number], margins)):
            n_tokens[m, example.number] = len(own)
            chosen[0, m, 0] = own.tolist()
            outside = torch.isin(image, own, invert=True)
            others, norm = image[outside], norms[outside]
            if len(others) >= len(own):  # else there is nothing to compare with
                for draw in range(draws):
                    chosen[1, m, draw] = others[torch.randperm(len(others), generator=generator)[: len(own)]].tolist()
                chosen[2, m, 0] = others[norm.topk(len(own)).indices].tolist()

        def change(layer: int, rows: list[Edit], chosen=chosen) -> None:
            if layer == 0:
                first = rows[0].pos
                ablate(vlm, [[i - first for i in chosen[edit.key]] for edit in rows], 0, how="mean", source=mean)

        logits = sweep(vlm, clean, [Edit(key, range(1), int(image[0])) for key in chosen], change)
        for condition, m in {key[:2] for key in chosen}:
            same = torch.stack([row for key, row in logits.items() if key[:2] == (condition, m)])
            correct_ablated[condition, m, example.number] = (same.argmax(-1) == token).float().mean()
            p_ablated[condition, m, example.number] = same.softmax(-1)[:, token].mean()
        correct.append(int(clean.logits.argmax()) == token)
        p.append(clean.p(token))
        tokens.append(token)
    return ObjectAblationResult(
        correct=torch.tensor(correct), correct_ablated=correct_ablated, p=torch.tensor(p), p_ablated=p_ablated,
        n_tokens=n_tokens, conditions=CONDITIONS, margins=tuple(int(m) for m in margins),
        answers=pieces(vlm, torch.tensor(tokens)), model=vlm.name,
    )  # fmt: skip


def _mean_token(vlm: VLM, batches: Sequence[Inputs]) -> Float[Tensor, "1 d_model"]:
    """The mean over all visual tokens of what enters the decoder; only the image is read for it, not the decoder."""
    total, count = torch.zeros(vlm.d_model, dtype=torch.float64), 0
    for batch in batches:
        rows = [(row, m.image) for row, m in enumerate(batch.token_maps)]
        with torch.no_grad(), vlm.trace(batch) as tracer:
            sums = nnsight.save(sum(vlm.resid_pre[0][row, pos].double().sum(0) for row, pos in rows))
            tracer.stop()
        total += sums.cpu()
        count += sum(len(pos) for _, pos in rows)
    return (total / count).float()[None]


def _object(vlm: VLM, example: Example, box: Sequence[float | int], margins: Sequence[int]) -> list[Tensor]:
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
        return [tokens.image[patches.flatten()] for patches in grown]
    reads = query_reading(vlm, example.inputs).map[0]  # query row col
    n = max(1, len(tokens.image) // QUERY_SHARE)
    return [tokens.image[(reads * patches).sum((1, 2)).topk(n).indices] for patches in grown]
