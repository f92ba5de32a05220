"""Ablating an object's visual tokens: is it still named, and do other tokens matter as much?

1. The object's visual tokens are those whose patches lie in its box; `margins` adds patches around.
2. Where they enter the decoder, they become the mean visual token.
3. The same is done to as many other tokens of the image, random ones and those of highest norm.
4. Each condition's drop in naming accuracy says whether the object's own tokens carry its name.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from matplotlib.axes import Axes
from torch import Tensor

from mechvlm.errors import InputError
from mechvlm.experiments.cases import Example, Examples, for_each
from mechvlm.experiments.sweep import Edit, run, sweep
from mechvlm.figures.canvas import Canvas, plots
from mechvlm.figures.fitted import name_places
from mechvlm.figures.headings import ALONE, INTERVAL, number, short_name
from mechvlm.figures.legends import legend_above
from mechvlm.figures.settings import pen
from mechvlm.figures.style import hue
from mechvlm.inputs.batch import Inputs
from mechvlm.inputs.batches import Answers, as_batches
from mechvlm.intervals import Interval, mean_interval
from mechvlm.probes.probe import Model, Row, State
from mechvlm.probes.query_reading import QueryReading
from mechvlm.results import Result, float32, long_frame
from mechvlm.tracing.interventions import ablate
from mechvlm.tracing.reading import Readable, read
from mechvlm.vlm.vlm import VLM

ABLATION_CONDITIONS = ("own", "random", "highest norm")
QUERY_SHARE = 4
"""One in so many queries counts as the object's: the quarter that reads most of it."""
BARS = {
    "own": ("the object's own tokens", "#0072B2", ""),
    "random": ("random others", "#E69F00", "///"),
    "highest norm": ("others of highest norm", "#999999", "..."),
}
"""Label, color and hatch of each condition."""


@dataclass(frozen=True, repr=False)
class ObjectAblationResult(Result):
    """Whether an object is still named when its visual tokens are gone, against as many others.

    Attributes:
        correct: whether the model's first token is the answer's, undisturbed.
        correct_ablated: the same with tokens ablated (0 or 1; of "random" the mean over its draws).
            NaN where the picture holds too few tokens outside of the object to compare with.
        p, p_ablated: the answer's probability, likewise.
        n_tokens: how many tokens were ablated.
        conditions: "own" (the object's), "random" and "highest norm" (others, as many).
        margins: patches around the object that were ablated with it.
        answers: the tokens that count as right, as text.
        model: the model's name.
    """

    units: ClassVar[str] = "drop in naming accuracy (percentage points)"
    texts: ClassVar[tuple[str, ...]] = ("answers",)
    per_example: ClassVar[tuple[str, ...]] = ("answers",)

    apart: ClassVar[str] = (
        "each call ablates with the mean visual token of its own examples. Give object_ablation all batches at once, as a list."
    )

    correct: Bool[Tensor, " example"]
    correct_ablated: Float[Tensor, "condition margin example"]
    p: Float[Tensor, " example"]
    p_ablated: Float[Tensor, "condition margin example"]
    n_tokens: Int[Tensor, "margin example"]
    conditions: tuple[str, ...]
    margins: tuple[int, ...]
    answers: tuple[str, ...]
    model: str

    @property
    def drop(self) -> Float[Tensor, "condition margin example"]:
        """100 (correct - correct_ablated), in percentage points.

        The mean over examples is the drop in naming accuracy.
        """
        return 100 * (self.correct.float() - self.correct_ablated)

    @property
    def interval(self) -> Interval:
        """The mean drop over examples [condition margin] with its 95 % bootstrap interval.

        In percentage points.
        """
        return mean_interval(self.drop.movedim(-1, 0))

    def to_frame(self) -> pd.DataFrame:
        """One row per condition, margin and example.

        Columns: n_tokens, correct, correct_ablated, drop, p and p_ablated.
        """
        labels = {"condition": self.conditions, "margin": self.margins, "example": range(len(self.p))}
        frame = long_frame(self.correct_ablated, **labels).rename(columns={"value": "correct_ablated"})
        frame["p_ablated"] = long_frame(self.p_ablated, **labels)["value"]
        frame["drop"] = long_frame(self.drop, **labels)["value"]
        for name in ("p", "correct"):
            frame[name] = getattr(self, name).numpy()[frame["example"]]
        rows = frame["margin"].map({m: i for i, m in enumerate(self.margins)})
        return self.with_ids(frame.assign(n_tokens=self.n_tokens.numpy()[rows, frame["example"]]))

    @plots(lambda self, **_: (max(5.5, 1.8 + 1.5 * len(self.margins)), 3.9))
    def plot(self, canvas: Canvas) -> None:
        """The drop in naming accuracy by margin, a bar for each condition.

        A bar over fewer examples than there are says over how many.
        """
        ax, n = canvas.ax, self.drop.shape[-1]
        self._draw_bars(ax)
        ax.axhline(0, color=pen("#444444"), linewidth=0.8)
        ax.margins(y=0.15)
        tokens = self.n_tokens.double().mean(-1).tolist()
        name_places(ax, [f"{m}\n{k:.1f} tokens" for m, k in zip(self.margins, tokens, strict=True)])
        ax.set_xlabel("margin around the object (patches); tokens ablated (mean)")
        ax.set_ylabel(self.units)
        legend_above(ax)
        before = 100 * self.correct.double().mean()
        canvas.head(
            f"Object ablation, {short_name(self.model)}: naming accuracy before {before:.0f} %",
            f"n = {n} examples; bars are means, lines their {INTERVAL}" if n > 1 else ALONE,
        )

    def _draw_bars(self, ax: Axes) -> None:
        """A bar per condition and margin, with its interval and value, and n where it is fewer."""
        interval = self.interval
        n_compared = (~self.drop.isnan()).sum(-1)  # [condition margin]
        n_conditions, n_margins, n = self.drop.shape
        width = 0.8 / n_conditions
        for i, condition in enumerate(self.conditions):
            label, color, hatch = BARS[condition]
            x = np.arange(n_margins) + (i - (n_conditions - 1) / 2) * width
            mean, low, high = (part[i].numpy() for part in interval)
            ax.bar(x, mean, 0.9 * width, label=label, color=hue(color), hatch=hatch, edgecolor="white", linewidth=0)
            ax.vlines(x, low, high, color=pen(), linewidth=1.2)
            tops = np.fmax(high, np.fmax(mean, 0))
            for at, value, top, count in zip(x, mean.tolist(), tops, n_compared[i].tolist(), strict=True):
                note = ("–" if np.isnan(value) else number(value, 0)) + (f"\nn = {count}" if count < n else "")
                ax.annotate(
                    note, (at, 0 if np.isnan(value) else top), xytext=(0, 2), textcoords="offset points", ha="center",
                    va="bottom", fontsize="x-small", color=pen(),
                )  # fmt: skip


def object_ablation(
    vlm: VLM,
    inputs: Readable,
    boxes: Sequence[Sequence[float | int]],
    answers: Answers,
    margins: Sequence[int] = (0, 1, 2),
    draws: int = 5,
    seed: int = 0,
) -> ObjectAblationResult:
    """Naming accuracy with an object's visual tokens ablated, against random and high-norm others.

    Where the tokens enter the decoder they become the mean visual token of all examples (Neo et al.
    2024, "Towards Interpreting Visual Information Processing in Vision-Language Models"). Both
    controls are as many tokens of the same image from outside of the object (with the same margin).
    An answer is right when the model's first token is the answer's.

    >>> result = mv.object_ablation(vlm, inputs, boxes=[(14, 20, 60, 72)], answers="dog")
    >>> result.drop  # [condition margin example], in percentage points

    Args:
        vlm: the model.
        inputs: any number of examples, as one batch or several, of one image each; on NDIF those of
            one batch are two requests.
        boxes: the object of each example, (left, top, right, bottom) in pixels of the original
            image.
        answers: what the object is rightly named, a word or token id for all examples, or one each.
        margins: how many patches around the object go with it.
        draws: how often random tokens are drawn.
        seed: of the draws.

    An object's tokens are the patches of which it covers at least half, or, where it covers none so
    far, the one of which it covers most. InstructBLIP's queries have no place: its object's tokens
    are the quarter of the queries whose reading of the image (`query_reading`) lies in these
    patches most.

    Raises:
        InputError: for boxes or answers that do not fit the examples, or an object that the model
            does not see.
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
    mean, readings = _mean_token(vlm, batches)
    by_example = for_each(
        vlm,
        examples,
        _ablate_object,
        lambda example: (_object_positions(example, boxes[example.number], margins, readings), mean, draws, seed),
        "object ablation",
    )
    tokens, correct, p, n_tokens, by_condition = zip(*by_example, strict=True)
    correct_ablated, p_ablated = torch.stack(by_condition, -1)
    return ObjectAblationResult(
        correct=torch.tensor(correct), correct_ablated=correct_ablated, p=float32(p), p_ablated=p_ablated,
        n_tokens=torch.tensor(n_tokens).T, conditions=ABLATION_CONDITIONS, margins=tuple(int(m) for m in margins),
        answers=vlm.to_str_tokens(torch.tensor(tokens)), model=vlm.name, example_ids=examples.ids,
    )  # fmt: skip


def _ablate_object(
    vlm: VLM, example: Example, objects: list[list[int]], mean: Tensor, draws: int, seed: int
) -> tuple[int, bool, float, list[int], Float[Tensor, "2 condition margin"]]:
    """One example under every condition; `objects` holds the object's positions for each margin.

    Returns:
        The answer's token, whether the model gives it, its probability, how many tokens are ablated
        with each margin, and under each condition the share of right answers and the probability
        (NaN where there is nothing to compare with).
    """
    clean = run(vlm, example.inputs)
    token = example.token(clean.logits)
    image = example.inputs.tokens.image
    norms = clean.resid[0][0, image].float().norm(dim=-1).cpu()
    generator = torch.Generator().manual_seed(seed + example.number)
    chosen: dict[tuple, list[int]] = {}  # by (condition, margin, draw)
    for m, own in enumerate(objects):
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
    measured = torch.full((2, len(ABLATION_CONDITIONS), len(objects)), torch.nan, dtype=torch.float32)
    for condition, m in {key[:2] for key in chosen}:
        by_draw = torch.stack([row for key, row in logits.items() if key[:2] == (condition, m)])
        measured[0, condition, m] = (by_draw.argmax(-1) == token).float().mean()
        measured[1, condition, m] = by_draw.softmax(-1)[:, token].mean()
    return token, int(clean.logits.argmax()) == token, clean.p(token), [len(own) for own in objects], measured


@dataclass(frozen=True)
class _VisualTokenSum:
    """Probe: the sum of all visual tokens as they enter the decoder [d_model], and their number."""

    def prepare(self, vlm: Model, inputs: Inputs) -> list[tuple[int, Tensor]]:
        """The image's positions, example by example."""
        return [(row, tokens.image) for row, tokens in enumerate(inputs.token_maps)]

    def at_state(self, plan: list[tuple[int, Tensor]], state: State) -> Row | None:
        """The sum at state 0."""
        if state.number:
            return None
        return {"sum": torch.stack([state.resid[row, pos].double().sum(0) for row, pos in plan]).sum(0)}

    def result(self, plan: list[tuple[int, Tensor]], rows: list[Row], vlm: Model, inputs: Inputs) -> tuple[Tensor, int]:
        """The sum, and how many tokens are in it."""
        return rows[0]["sum"].cpu(), sum(len(pos) for _, pos in plan)

    def join(self, results: list[tuple[Tensor, int]]) -> tuple[Tensor, int]:
        """The sum over several batches."""
        return torch.stack([total for total, _ in results]).sum(0), sum(count for _, count in results)


def _mean_token(vlm: VLM, inputs: Readable) -> tuple[Float[Tensor, "1 d_model"], Tensor | None]:
    """The mean visual token as it enters the decoder.

    For a model with queries also where they read the image, [example query row col].
    """
    probes = (_VisualTokenSum(), *([QueryReading()] if vlm.cross_attentions else []))
    (total, count), *reading = read(vlm, inputs, *probes)
    return (total / count).float()[None], reading[0].map if reading else None


def _object_positions(
    example: Example, box: Sequence[float | int], margins: Sequence[int], readings: Tensor | None
) -> list[list[int]]:
    """Positions of the object's tokens, for each margin."""
    tokens = example.inputs.tokens
    if len(tokens.layouts) != 1:
        raise InputError(
            f"Example {example.number} holds {len(tokens.layouts)} images, and a box lies on one: give one image per example."
        )
    grid = tokens.grids[0]
    covered = grid.covered(box)
    left, top, right, bottom = grid.visible_box
    overlaps = box[0] < right and box[2] > left and box[1] < bottom and box[3] > top
    if not (covered.max() > 0 and overlaps):
        raise InputError(
            f"Box {tuple(box)} of example {example.number} is not on the image as the model sees it, "
            f"{tuple(map(round, grid.visible_box))}. Boxes are "
            "(left, top, right, bottom) in pixels of the original image."
        )
    least = min(0.5, float(covered.max()))
    if readings is None:
        return [tokens.pos_in_box(box, covered=least, margin=margin).tolist() for margin in margins]
    by_margin = [grid.inside(box, least, margin) for margin in margins]
    reading = readings[example.number]
    n = max(1, len(tokens.image) // QUERY_SHARE)
    return [tokens.image[(reading * patches).sum((1, 2)).topk(n).indices].tolist() for patches in by_margin]
