"""Word reading: where on the image the model read while it wrote each word of its answer.

1. One forward of prompt and answer reads norm-based attention at the positions that wrote each
   word's tokens. The norms written from the visual tokens, mean over these positions and over
   layers, are the word's heat on the image.
2. Where the objects' boxes are known, each heat is scored: the share of it inside its word's box,
   and whether its maximum lies there.
3. Beside each score stand its controls: boxes of another image, other objects' words and words of
   grammar in the same answer, and an even heat.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechvlm.errors import InputError
from mechvlm.experiments.word_reading_result import READING_CONDITIONS, WordReadingResult
from mechvlm.inputs.batch import Inputs
from mechvlm.inputs.batches import as_batches
from mechvlm.inputs.occurrences import WORD
from mechvlm.inputs.tokens import TokenMap
from mechvlm.inputs.views import Box, Grid
from mechvlm.measures.word_groups import is_content
from mechvlm.measures.words import caption_words
from mechvlm.probes.likelihood import Likelihood
from mechvlm.probes.norm_attention import NormAttention, NormPlan, plan_of
from mechvlm.probes.probe import Attended, Model, Row
from mechvlm.probes.query_reading import QueryReading
from mechvlm.progress import track
from mechvlm.results import stack
from mechvlm.tracing.reading import Readable, read
from mechvlm.tracing.selections import Layers, layer_numbers
from mechvlm.vlm.vlm import VLM

Boxes = Sequence[Mapping[str, Any]]
"""For each example {word: a box, or several}."""


def word_reading(
    vlm: VLM,
    inputs: Readable,
    answers: str | Sequence[str] | None = None,
    words: str | Sequence[str] | None = None,
    boxes: Boxes | None = None,
    layers: Layers | None = None,
    seed: int = 0,
) -> WordReadingResult:
    """Where the model read while it wrote each word of its answer, against known boxes.

    heat[word, patch] = mean over layers and over the word's tokens of the norm that attention wrote
    from the patch to the position that wrote the token (`NormAttention`: ‖Σ_h α_h f_h(x)‖).

    >>> examples = list(mechvlm.datasets.scenes.scenes(20))
    >>> inputs = vlm.inputs([e.image for e in examples], "Describe the scene.", batch_size=8)
    >>> reading = mv.word_reading(vlm, inputs, boxes=[word_boxes(e) for e in examples])
    >>> reading.summary                       # rates beside their controls, with intervals
    >>> reading.plot_word(3, examples[0].image)

    Args:
        vlm: the model.
        inputs: one batch or several, one image an example. Answers that they hold already
            (`vlm.generate(inputs).inputs`) are read as they are.
        answers: a text for all examples, or one for each over all batches in order; by default the
            model's own.
        words: which words are read, as they stand in the answers; by default all content words,
            that is all but stop words (`mechvlm.measures.word_groups.is_content`, English).
        boxes: for each example a dict from a word to its object's box, (left, top, right, bottom)
            in pixels of the original image, or to a list of several; words match by their lemma.
            `mechvlm.datasets.naming.word_boxes` gives those of scenes.
        layers: which layers the mean is over, 0 to n_layers - 1; by default all. Late layers write
            larger norms, and weigh more.
        seed: of the pairing with other images, and of nothing else.

    The heat lies on the grid of the image's first view, which shows it whole. Queries have no
    place: their norms are spread over the patches by where each query reads (`query_reading`). What
    a query carries need not be what stands there, so expect blurred maps.

    Source: the pointing game is Zhang et al. 2018, "Top-down Neural Attention by Excitation
    Backprop". Differs: a point is a patch's center, without their tolerance of 15 pixels. Token
    activation maps (Li et al. 2025) are scored by IoU with a threshold; the share needs none.
    Tested: heat against `norm_attention`, scores against values by hand.

    Raises:
        InputError: for answers or boxes that do not fit the examples, several images in one
            example, visual tokens without places, or answers in which there is no word to read.
        ValueError: for a model that never sees the image as a whole, or no layer.
        IndexError: for a layer that is not there.
    """
    numbers = range(vlm.n_layers) if layers is None else layer_numbers(vlm, layers, "word_reading")
    batches = as_batches(inputs)
    if isinstance(answers, Sequence) and not isinstance(answers, str) and len(answers) != batches.n_examples:
        raise InputError(
            f"{len(answers)} answers were given for {batches.n_examples} examples: give one for all, or one each, over all "
            "batches in order."
        )
    if boxes is not None and len(boxes) != batches.n_examples:
        raise InputError(f"{len(boxes)} dicts of boxes were given for {batches.n_examples} examples: give one each.")
    wanted = [words] if isinstance(words, str) else words
    readings: list[_Reading] = []
    for number in track(range(len(batches)), "word reading, batches"):
        batch, first = batches[number], len(readings)
        given = answers if answers is None or isinstance(answers, str) else list(answers)[first : first + len(batch)]
        readings += _read_batch(vlm, _answered(vlm, batch, given), tuple(numbers), first)
    if boxes is not None:
        readings = [r._replace(boxes=_boxes(r, own, n)) for n, (r, own) in enumerate(zip(readings, boxes, strict=True))]
    chosen = [(n, w) for n, r in enumerate(readings) for w in r.words if _is_wanted(w, wanted)]
    if not chosen:
        words_of_grammar = "words of grammar alone" if wanted is None else f"none of the words {', '.join(wanted)}"
        raise InputError(f"There is no word to read: the {len(readings)} answers hold {words_of_grammar}.")
    others = paired(sum(bool(r.boxes) for r in readings), seed)
    boxed = [n for n, r in enumerate(readings) if r.boxes]
    other_of = {n: boxed[others[i]] for i, n in enumerate(boxed)} if len(boxed) > 1 else {}
    scores = [_scores(readings[n], word, readings[other_of[n]] if n in other_of else None) for n, word in chosen]
    inside, hit = torch.tensor(scores, dtype=torch.float32).unbind(1)
    return WordReadingResult(
        heat=_padded([word.heat for _, word in chosen]), inside=inside, hit=hit,
        example=torch.tensor([n for n, _ in chosen]), occurrence=torch.tensor([word.occurrence for _, word in chosen]),
        logprob=torch.tensor([word.logprob for _, word in chosen], dtype=torch.float32),
        shape=torch.tensor([(g.rows, g.cols) for g in (readings[n].grid for n, _ in chosen)]),
        area=torch.tensor([readings[n].grid.crop_box for n, _ in chosen], dtype=torch.float32),
        word=tuple(word.text for _, word in chosen),
        boxes=tuple(tuple(readings[n].boxes.get(_key(word.text), ())) for n, word in chosen),
        answers=tuple(r.answer for r in readings), layers=tuple(numbers), model=vlm.name,
        example_ids=batches.ids,
    )  # fmt: skip


class _Word(NamedTuple):
    """One word of an answer as it was read.

    occurrence: among equal words of the answer, as in `TokenMap.holds`.
    heat: [row col], NaN where a cell holds no token.
    """

    text: str
    occurrence: int
    logprob: float
    heat: Float[Tensor, "row col"]


class _Reading(NamedTuple):
    """All words of one answer, its image's grid, and its boxes by `_key` of the word."""

    answer: str
    words: list[_Word]
    grid: Grid
    boxes: dict[frozenset[str], list[Box]]


def paired(n: int, seed: int) -> list[int]:
    """For each of n items another one: one random cycle through all of them.

    >>> paired(3, seed=0)
    [2, 0, 1]
    """
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed)).tolist()
    following = dict(zip(order, [*order[1:], *order[:1]], strict=True))
    return [following[item] for item in range(n)]


def _answered(vlm: VLM, batch: Inputs, answers: str | list[str] | None) -> Inputs:
    for number, tokens in enumerate(batch.token_maps):
        if len(tokens.layouts) != 1:
            raise InputError(
                f"Example {number} of its batch holds {len(tokens.layouts)} images: give one image per example."
            )
        if not tokens.patches and not vlm.cross_attentions:
            raise InputError(f"{vlm.name} cannot be read by word_reading. {tokens.layouts[0].reason}")
    if answers is not None:
        return batch.answered(answers)
    return batch if any(tokens.n_answer for tokens in batch.token_maps) else vlm.generate(batch).inputs


def _is_wanted(word: _Word, wanted: Sequence[str] | None) -> bool:
    return is_content(word.text) if wanted is None else word.text in wanted


def _key(word: str) -> frozenset[str]:
    """By what words match: their lemmas."""
    return frozenset(caption_words(word, stop_words=True)) or frozenset({word.casefold()})


# -- reading --


class HeatPlan(NamedTuple):
    """Which positions wrote each word, as a mean over destinations; and the image's positions.

    norms: the destinations, padded with an example's first.
    mean: the weight of each destination in each word's mean; padded words have 0 everywhere.
    image: the visual tokens, padded with an example's first.
    """

    norms: NormPlan
    mean: Float[Tensor, "batch word dest"]
    image: Int[Tensor, "batch image"]


@dataclass(frozen=True)
class WordHeat:
    """Probe: norms written from each visual token to the positions that wrote each word.

    Means over a word's positions, inside of the forward, and over layers.

    Args:
        words: for each example, the positions that wrote each word.
        layers: which layers the mean is over.
    """

    words: Sequence[Sequence[Int[Tensor, " _"]]]
    layers: tuple[int, ...]

    def part_of(self, numbers: range, n_examples: int) -> "WordHeat":
        """The probe for some of the examples."""
        return WordHeat(self.words[numbers.start : numbers.stop], self.layers)

    def join(self, results: list[list[Tensor]]) -> list[Tensor]:
        """The heats of all parts, in order."""
        return [heat for part in results for heat in part]

    def prepare(self, vlm: Model, inputs: Inputs) -> HeatPlan:
        """Lay the words' positions and the image's side by side."""
        dest = [torch.cat(list(words)) for words in self.words]
        mean = torch.zeros(len(dest), max(map(len, self.words)), max(map(len, dest)), dtype=torch.float32)
        for row, words in enumerate(self.words):
            start = 0
            for number, positions in enumerate(words):
                mean[row, number, start : start + len(positions)] = 1 / len(positions)
                start += len(positions)
        return HeatPlan(
            plan_of(_side_by_side(dest)), mean, _side_by_side([tokens.image for tokens in inputs.token_maps])
        )

    def at_attention(self, plan: HeatPlan, attended: Attended) -> Row | None:
        """The words' heat on the visual tokens, [batch word image]."""
        if attended.layer not in self.layers:
            return None
        norm = NormAttention().at_attention(plan.norms, attended)["norm"]
        image = plan.image.to(norm.device)[:, None].expand(-1, norm.shape[1], -1)
        return {"heat": plan.mean.to(norm.device) @ norm.gather(2, image)}

    def result(self, plan: HeatPlan, rows: list[Row], vlm: Model, inputs: Inputs) -> list[Tensor]:
        """Each example's heat, [word image]."""
        heat = stack([row["heat"] for row in rows]).mean(0)
        sizes = [(len(words), len(tokens.image)) for words, tokens in zip(self.words, inputs.token_maps, strict=True)]
        return [own[:n_words, :n_image] for own, (n_words, n_image) in zip(heat, sizes, strict=True)]


def _side_by_side(rows: list[Tensor]) -> Int[Tensor, "row longest"]:
    longest = max(map(len, rows))
    return torch.stack([torch.cat([row, row[:1].expand(longest - len(row))]) for row in rows])


def _read_batch(vlm: VLM, inputs: Inputs, layers: tuple[int, ...], first: int) -> list[_Reading]:
    """All words of each example's answer; none of an answer without a word."""
    texts = ["".join(tokens.spelled[p] for p in tokens.answer.tolist()).strip() for tokens in inputs.token_maps]
    readings = [_Reading(text, [], tokens.grids[0], {}) for text, tokens in zip(texts, inputs.token_maps, strict=True)]
    rows = [row for row, tokens in enumerate(inputs.token_maps) if tokens.answer_words]
    if not rows:
        return readings
    some = inputs if len(rows) == len(inputs) else inputs[rows]
    written = [[held - 1 for _, held in tokens.answer_words] for tokens in some.token_maps]
    probes = WordHeat(written, layers), Likelihood(), *([QueryReading()] if vlm.cross_attentions else [])
    heats, likelihood, *queries = read(vlm, some, *probes)
    for at, (row, tokens, heat) in enumerate(zip(rows, some.token_maps, heats, strict=True)):
        on_grid = _on_view(heat, tokens) if not queries else torch.einsum("wq,qrc->wrc", heat, queries[0].map[at])
        for (text, held), own in zip(tokens.answer_words, on_grid, strict=True):
            logprob = float(likelihood.logprob[at, held - len(tokens)].sum())
            readings[row].words.append(_Word(text, _occurrence(tokens, text, int(held[0])), logprob, own))
    return readings


def _on_view(heat: Float[Tensor, "word image"], tokens: TokenMap) -> Float[Tensor, "word row col"]:
    """The heat on the first view's cells, NaN where a cell holds no token."""
    positions = tokens.views[0][0].positions
    at = torch.searchsorted(tokens.image, positions.clamp(min=int(tokens.image[0])))
    return heat[:, at].masked_fill(positions < 0, torch.nan)


def _occurrence(tokens: TokenMap, word: str, start: int) -> int:
    return next(number for number in count() if int(tokens.holds(word, number)[0]) == start)


def _padded(heats: list[Tensor]) -> Float[Tensor, "word row col"]:
    rows, cols = (max(heat.shape[axis] for heat in heats) for axis in (0, 1))
    whole = torch.full((len(heats), rows, cols), torch.nan, dtype=torch.float32)
    for heat, own in zip(whole, heats, strict=True):
        heat[: own.shape[0], : own.shape[1]] = own
    return whole


# -- scores --


def _boxes(reading: _Reading, given: Mapping[str, Any], number: int) -> dict[frozenset[str], list[Box]]:
    """The boxes of the answer's words, by their lemmas."""
    boxes: dict[frozenset[str], list[Box]] = {}
    for word, own in given.items():
        if not WORD.fullmatch(word.strip()):
            raise InputError(f"Example {number} has boxes for {word!r}: give a box for a single word.")
        numbers = torch.as_tensor(own, dtype=torch.float64)
        several = (numbers[None] if numbers.ndim == 1 else numbers).tolist()
        for box in several:
            if len(box) != 4 or not (box[0] < box[2] and box[1] < box[3]):
                raise InputError(
                    f"Example {number} has {box!r} for {word!r}: a box is (left, top, right, bottom) in pixels of the original "
                    "image."
                )
            if not float(reading.grid.covered(box).max()) > 0:
                raise InputError(
                    f"Box {tuple(box)} of {word!r} in example {number} is not on the image as the model sees it, "
                    f"{tuple(map(round, reading.grid.visible_box))}."
                )
        boxes.setdefault(_key(word), []).extend(map(tuple, several))
    spoken = {_key(word.text) for word in reading.words}
    return {key: own for key, own in boxes.items() if key in spoken}


def _scores(reading: _Reading, word: _Word, other: _Reading | None) -> list[list[float]]:
    """[inside, hit] of the word, each under all `READING_CONDITIONS`; NaN without a box."""
    own = reading.boxes.get(_key(word.text))
    if not own:
        return [[torch.nan] * len(READING_CONDITIONS)] * 2
    grammar = [w.heat for w in reading.words if not is_content(w.text)]
    apart = [w.heat for w in reading.words if (there := reading.boxes.get(_key(w.text))) and not set(there) & set(own)]
    elsewhere = [] if other is None else [_moved(boxes, other.grid, reading.grid) for boxes in other.boxes.values()]
    by_condition = [
        [score(word.heat, *_cells_in(own, reading.grid))],
        [score(word.heat, *_cells_in(boxes, reading.grid)) for boxes in elsewhere],
        [score(heat, *_cells_in(own, reading.grid)) for heat in apart],
        [score(heat, *_cells_in(own, reading.grid)) for heat in grammar],
        [_even(word.heat, *_cells_in(own, reading.grid))],
    ]
    means = [torch.tensor(rows).nanmean(0).tolist() if rows else [torch.nan] * 2 for rows in by_condition]
    return [list(row) for row in zip(*means, strict=True)]


def score(
    heat: Float[Tensor, "row col"], covered: Float[Tensor, "row col"], centers: Bool[Tensor, "row col"]
) -> tuple[float, float]:
    """The share of a heat inside a box, and whether its maximum lies there (1 or 0).

    Args:
        heat: 0 or more; NaN where a cell holds no token.
        covered: share of each cell's area that lies in the box.
        centers: whether the cell's center lies in it.

    Returns:
        (inside, hit), NaN where there is no heat at all.
    """
    known = heat.nan_to_num(0)
    total = float(known.sum())
    if not total > 0:
        return torch.nan, torch.nan
    return float((known * covered).sum()) / total, float(centers.flatten()[known.argmax()])


def _even(heat: Tensor, covered: Tensor, centers: Tensor) -> tuple[float, float]:
    """What an even heat has inside, and how often a random cell's center is in the box."""
    cells = ~heat.isnan()
    return float(covered[cells].mean()), float(centers[cells].float().mean())


def _cells_in(boxes: Sequence[Box], grid: Grid) -> tuple[Float[Tensor, "row col"], Bool[Tensor, "row col"]]:
    """Share of each cell's area that lies in one of the boxes, and whether its center does."""
    cells = grid.boxes()
    x, y = (cells[..., 0] + cells[..., 2]) / 2, (cells[..., 1] + cells[..., 3]) / 2
    covered = torch.stack([grid.covered(box) for box in boxes]).amax(0)
    centers = torch.stack([(x >= b[0]) & (x < b[2]) & (y >= b[1]) & (y < b[3]) for b in boxes]).any(0)
    return covered, centers


def _moved(boxes: Sequence[Box], source: Grid, target: Grid) -> list[Box]:
    """Boxes at the same place of another image, by shares of width and height."""
    x, y = (new / old for new, old in zip(target.image_size, source.image_size, strict=True))
    return [(left * x, top * y, right * x, bottom * y) for left, top, right, bottom in boxes]
