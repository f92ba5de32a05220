"""Causal tracing: which states bring the answer back into a corrupted forward.

1. A clean forward gives the answer's probability, and the states to restore.
2. A corrupted forward has noise on its image's or words' embeddings, or another image. The answer
   becomes less likely.
3. The corrupted forward runs again with a few clean states put back: those of one group of
   positions, in a window of layers. How much of the probability returns is the indirect effect.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from PIL import Image
from torch import Tensor

from mechvlm.errors import InputError
from mechvlm.experiments.cases import Example, Examples, for_each, positions
from mechvlm.experiments.sweep import Edit, run, sweep, windows
from mechvlm.figures.canvas import Canvas, plots
from mechvlm.figures.fitted import write_in_cell
from mechvlm.figures.headings import ALONE, INTERVAL, n_examples, number, short_name, window_width
from mechvlm.figures.style import SIGNED, color_bar, heatmap, text
from mechvlm.inputs.batch import Inputs
from mechvlm.inputs.batches import Answers, as_batches
from mechvlm.inputs.tokens import Modality
from mechvlm.intervals import Interval, mean_interval
from mechvlm.results import Result, float32, long_frame
from mechvlm.tracing.interventions import patch
from mechvlm.tracing.reading import Readable
from mechvlm.vlm.vlm import VLM

CORRUPTIONS = ("noise", "image", "blank", "words")
RESTORED_SITES = ("resid_pre", "attn_out", "mlp_out")
GROUPS = ("image", "question", "last")
NOISE = 3.0
"""Standard deviations of the embeddings, as in Meng et al. 2022."""
CORRUPTED = {
    "noise": "noise on the image", "image": "image exchanged", "blank": "image greyed out", "words": "noise on the words",
}  # fmt: skip
"""Each corruption as a picture's heading says it."""
TOTAL_WIDTH = 0.5
"""Width of the total effect's cell in a picture; a group's is 1."""


@dataclass(frozen=True, repr=False)
class CausalTraceResult(Result):
    """How much of the answer a few clean states bring back into a corrupted forward.

    Attributes:
        p: of the answer's first token, undisturbed.
        p_corrupt: with the image or the words corrupted.
        p_restored: corrupted, with a group's states restored in the window around each layer.
        groups: names of the groups of positions.
        layers: the center of each window, 0 to n_layers - 1. With at="resid_pre" what is restored
            is the state of that number, which the layer reads; else what the layer wrote.
        windows: (first, last + 1) of each window of layers.
        at, corrupt: the site that is restored, and what was corrupted.
        answers: the tokens whose probability is measured, as text.
        model: the model's name.
    """

    units: ClassVar[str] = "probability of the answer brought back"
    texts: ClassVar[tuple[str, ...]] = ("answers",)
    per_example: ClassVar[tuple[str, ...]] = ("answers",)

    p: Float[Tensor, " example"]
    p_corrupt: Float[Tensor, " example"]
    p_restored: Float[Tensor, "layer group example"]
    groups: tuple[str, ...]
    layers: tuple[int, ...]
    windows: tuple[tuple[int, int], ...]
    at: str
    corrupt: str
    answers: tuple[str, ...]
    model: str

    @classmethod
    def counted_from_0(cls, values: dict[str, Any]) -> dict[str, Any]:
        """The fields of a file of format 1, with their layers counted from 0."""
        return values | {"layers": tuple(range(len(values["layers"])))}

    @property
    def effect(self) -> Float[Tensor, "layer group example"]:
        """The indirect effect, p_restored - p_corrupt, in probability (Meng et al. 2022)."""
        return self.p_restored - self.p_corrupt

    @property
    def interval(self) -> Interval:
        """The mean effect over examples [layer group] with its 95 % bootstrap interval."""
        return mean_interval(self.effect.movedim(-1, 0))

    @property
    def total_effect(self) -> Float[Tensor, " example"]:
        """p - p_corrupt: what the corruption took, and a full restoration brings back."""
        return self.p - self.p_corrupt

    def to_frame(self) -> pd.DataFrame:
        """One row per layer, group and example: p, p_corrupt, p_restored and effect."""
        labels = {"layer": self.layers, "group": self.groups, "example": range(len(self.p))}
        frame = long_frame(self.p_restored, **labels).rename(columns={"value": "p_restored"})
        for name in ("p", "p_corrupt"):
            frame[name] = getattr(self, name).numpy()[frame["example"]]
        return self.with_ids(frame.assign(effect=frame["p_restored"] - frame["p_corrupt"]))

    @plots(lambda self, **_: self._size)
    def plot(self, canvas: Canvas) -> None:
        """The mean effect by layer and group, and the total effect as the last column.

        Hatched cells are those whose interval holds 0.
        """
        interval, total = self.interval, mean_interval(self.total_effect)
        n_layers, n_groups = interval.mean.shape
        # After a gap, the total effect is one cell of the map's height. It has the same colors,
        # since it is the most that can come back.
        gap, column = np.full((n_layers, 1), np.nan), np.full((n_layers, 1), float(total.mean))
        shown = np.concatenate([interval.mean.numpy(), gap, column], axis=1)
        start, stop = n_groups - 0.3, n_groups - 0.3 + TOTAL_WIDTH
        edges = np.append(np.arange(n_groups + 1) - 0.5, [start, stop])
        most = float(np.nanmax(np.abs(shown), initial=1e-6))
        ax = canvas.ax
        mesh = heatmap(ax, shown, self.layers, edges, cmap=SIGNED, vmin=-most, vmax=most)
        write_effects(ax, interval, most)
        write_total(ax, total, n_layers, most, start)
        self._label(canvas, middle=(start + stop) / 2)
        bar = color_bar(ax, mesh, self.units)
        bar.ax.set_ylim(min(0, float(np.nanmin(shown, initial=0))), most)

    @property
    def _size(self) -> tuple[float, float]:
        n_layers = len(self.layers)
        return max(6.4, 3.2 + 0.8 * len(self.groups)), 1.9 + min(0.3 * n_layers, 2.4 + 0.15 * n_layers)

    def _label(self, canvas: Canvas, middle: float) -> None:
        """Name the groups and the total effect (its cell's `middle`); titles and axis labels."""
        ax = canvas.ax
        names = [text(group, 24) for group in self.groups]
        ax.set_xticks([*range(len(names)), middle], [*names, "total\neffect"])
        ax.tick_params(axis="x", length=0)
        # In inches; the layout will leave the cells about seven tenths of what they have now.
        cell_width = 0.7 * ax.get_window_extent().width / ax.figure.dpi / (len(names) + 1)
        letter = 0.6 * float(ax.get_xticklabels()[0].get_fontsize()) / 72
        if max(map(len, names)) * letter > cell_width:
            ax.tick_params(axis="x", rotation=90)
        ax.spines[:].set_visible(False)
        ax.set_xlabel(f"positions whose {self.at} was restored")
        several = f"{n_examples(self.effect)}, means; hatched: the {INTERVAL} holds 0"
        canvas.head(
            f"Causal trace, {short_name(self.model)}: {CORRUPTED[self.corrupt]}",
            f"{self.at} restored {window_width(self.windows)}\n{several if len(self.p) > 1 else ALONE}",
        )


def causal_trace(
    vlm: VLM,
    inputs: Readable,
    answers: Answers = None,
    corrupt: str = "noise",
    window: int = 1,
    at: str = "resid_pre",
    groups: Sequence[str] | Sequence[Mapping[str, Sequence[int] | Tensor]] = GROUPS,
    seed: int = 0,
) -> CausalTraceResult:
    """The answer's probability in a corrupted forward with a group's states restored.

    p_restored - p_corrupt, the indirect effect (Meng et al. 2022, "Locating and Editing Factual
    Associations in GPT"; for vision-language models Basu et al. 2024, "Understanding Information
    Storage and Transfer in Multi-modal LLMs").

    >>> result = mv.causal_trace(vlm, inputs, answers, corrupt="image", window=3)
    >>> result.interval.mean  # [layer group], differences of probabilities

    Args:
        vlm: the model.
        inputs: any number of examples, as one batch or several. Each is run alone, its windows
            batched; on NDIF those of one batch are one request.
        answers: a word or token id for all examples, or one each; by default the model's own first
            token.
        corrupt: "noise" on the visual tokens' embeddings and "words" the same on the text tokens'
            (Gaussian, 3 standard deviations of those embeddings); "blank" a grey image; "image"
            that of the next example with another image and another answer.
        window: how many layers around each layer are restored together.
        at: what is restored: "resid_pre" (the residual stream where it enters the layer),
            "attn_out" or "mlp_out".
        groups: names of `TokenMap.select` ("question + last" joins two), or for each example a
            mapping from the groups' names to positions of that example alone, without padding; the
            names are the same for all.
        seed: of the noise.

    InstructBLIP's queries read the words in the Q-Former too; "words" corrupts them in the decoder
    alone.

    Raises:
        InputError: for answers or groups that do not fit the examples, another image that gives
            another number of tokens, a corruption that changes nothing, or corrupt="image" where
            every other example has the same image or the same answer.
        ValueError: for an unknown corruption, site or group.
    """
    for value, known, kind in ((corrupt, CORRUPTIONS, "corruption"), (at, RESTORED_SITES, "site to restore")):
        if value not in known:
            raise ValueError(f"There is no {kind} {value!r}. Known: {', '.join(known)}.")
    spans = windows(vlm.n_layers, window)
    if corrupt == "image" and answers is None:
        # Which image has another answer shows only once every answer is known.
        inputs = as_batches(inputs)
        answers = torch.cat([vlm.next_tokens(batch) for batch in inputs])
    examples = Examples(vlm, inputs, answers)
    groups_of = _groups_by_example(groups, len(examples))
    by_example = for_each(
        vlm,
        examples,
        _restore_groups,
        lambda example: (
            _with_other_image(vlm, example, examples, corrupt),
            [_group_positions(example, group) for group in groups_of[example.number].values()],
            spans,
            corrupt,
            at,
            seed,
        ),
        "causal trace",
    )
    tokens, p, p_corrupt, p_restored = zip(*by_example, strict=True)
    return CausalTraceResult(
        p=float32(p), p_corrupt=float32(p_corrupt), p_restored=float32(p_restored).permute(1, 2, 0),
        groups=tuple(groups_of[0]), layers=tuple(range(vlm.n_layers)),
        windows=tuple((span.start, span.stop) for span in spans), at=at, corrupt=corrupt,
        answers=vlm.to_str_tokens(torch.tensor(tokens)), model=vlm.name, example_ids=examples.ids,
    )  # fmt: skip


def _groups_by_example(groups, count: int) -> list[Mapping]:
    """For each of `count` examples: the groups' names, and their positions by name or number."""
    if not len(groups):
        raise ValueError(f"No group of positions was given; by default they are {', '.join(GROUPS)}.")
    if all(isinstance(group, str) for group in groups):
        return [{group: group for group in groups}] * count
    if len(groups) != count or any(not isinstance(g, Mapping) or list(g) != list(groups[0]) for g in groups):
        raise InputError(f"Groups are names, or one mapping per example ({count}) with the same names in each.")
    return list(groups)


def _group_positions(example: Example, group) -> list[int]:
    tokens = example.inputs.tokens
    return (positions(tokens, group) if isinstance(group, str) else tokens.select(group)).tolist()


def _restore_groups(
    vlm: VLM, example: Example, other: Inputs | None, groups: list[list[int]], spans: list[range], corrupt: str, at: str,
    seed: int,
) -> tuple[int, float, float, list[list[float]]]:  # fmt: skip
    """The answer's token, and its probability clean, corrupted, and restored [window group].

    `other` is the example with another image, or None where noise corrupts it.
    """
    clean = run(vlm, example.inputs, keep=at)
    token = example.token(clean.logits)
    if other is not None:
        corrupted = run(vlm, other, edits_at=at)
    else:
        embeddings = _noisy_embeddings(example, clean.resid[0], corrupt, seed)
        corrupted = run(vlm, example.inputs, embeddings=embeddings, edits_at=at)
    # An image that is a memory changes no embedding, but later states.
    states = zip([*corrupted.resid, corrupted.logits], [*clean.resid, clean.logits], strict=True)
    if all(torch.equal(one, other) for one, other in states):
        raise InputError(f"corrupt={corrupt!r} changes nothing in example {example.number}: choose another corruption.")

    def change(layer: int, rows: list[Edit]) -> None:
        first = rows[0].pos
        pos = [[i - first for i in groups[edit.key[0]]] if layer in edit.layers else None for edit in rows]
        if any(pos):
            patch(vlm, clean.kept[layer][:, first:], pos, layer, at=at)

    edits = [Edit((g, span), span, min(pos)) for g, pos in enumerate(groups) for span in dict.fromkeys(spans)]
    logits = sweep(vlm, corrupted, edits, change)
    restored = [[float(logits[g, span].softmax(-1)[token]) for g in range(len(groups))] for span in spans]
    return token, clean.p(token), corrupted.p(token), restored


def _noisy_embeddings(example: Example, old: Tensor, corrupt: str, seed: int) -> Float[Tensor, "1 pos d_model"]:
    """The embeddings `old` with noise on those of the image ("noise") or of the words."""
    tokens = example.inputs.tokens
    words = tokens.question[tokens.modality[tokens.question] == Modality.TEXT]
    pos = tokens.image if corrupt == "noise" else words
    if not len(pos):
        raise InputError(f"Example {example.number} has no words before its last position to corrupt.")
    embeddings = old.clone()
    at = old[:, pos].float()
    generator = torch.Generator().manual_seed(seed + example.number)
    noise = torch.randn(at.shape, generator=generator, dtype=torch.float32).to(at.device)
    embeddings[:, pos] = (at + NOISE * at.std() * noise).to(embeddings)
    return embeddings


def _with_other_image(vlm: VLM, example: Example, examples: Examples, corrupt: str) -> Inputs | None:
    """The example with another image, or a grey one; None where noise corrupts it."""
    if corrupt in ("noise", "words"):
        return None
    inputs, tokens = example.inputs, example.inputs.tokens
    images = inputs.images[0]
    if corrupt == "blank":
        others = [Image.new("RGB", image.size, (127, 127, 127)) for image in images]
    else:
        others = _next_image(example, examples)
    other = vlm.inputs([others], inputs.prompts[0])
    if not torch.equal(other.tokens.ids, tokens.ids):
        raise InputError(
            f"Example {example.number} with another image has {len(other.tokens)} tokens instead of {len(tokens)}: "
            "its states cannot be restored position by position. Give examples with the same number of images, of one size."
        )
    return other


def _next_image(example: Example, examples: Examples) -> list[Image.Image]:
    """The images of the next example that has other images and another answer.

    With the same answer the image would corrupt nothing: it supports the clean answer too.
    """
    turns = [(example.number + step) % len(examples) for step in range(1, len(examples))]
    n_others = 0
    for other in map(examples.__getitem__, turns):  # one by one: each may have to be prepared
        if other.inputs.images[0] == example.inputs.images[0]:
            continue
        if other.answer != example.answer:
            return list(other.inputs.images[0])
        n_others += 1
    if not n_others:
        raise InputError(
            "corrupt='image' takes the image of another example, and there is none: give at least two examples, of "
            "different images."
        )
    raise InputError(
        f"corrupt='image' takes the image of an example with another answer, and all {n_others} others have the answer of "
        f"example {example.number}: give examples with different answers, or corrupt='blank'."
    )


def write_effects(ax: Axes, interval: Interval, most: float) -> None:
    """Hatch the cells whose interval holds 0, and write the mean into cells that have room for it.

    `most` is the value of the darkest color.
    """
    digits = _digits(most)
    for row, group in np.ndindex(*interval.mean.shape):
        value, unsure = float(interval.mean[row, group]), holds_0(interval, row, group)
        if unsure:
            hatch(ax, group - 0.5, row - 0.5, 1, 1)
        if not np.isnan(value):
            color = ink(value / most, "#666666" if unsure else "#222222")
            write_in_cell(ax, group, row, number(value, digits), color=color, fontsize="x-small")


def write_total(ax: Axes, total: Interval, n_layers: int, most: float, start: float) -> None:
    """Write the total effect with its interval into its cell, which begins at x = `start`."""
    digits, stop = _digits(most), start + TOTAL_WIDTH
    if holds_0(total):
        hatch(ax, start, -0.5, TOTAL_WIDTH, n_layers)
    ends = "" if total.low.isnan() else f"\n[{number(total.low, digits)}, {number(total.high, digits)}]"
    write_in_cell(
        ax, (start + stop) / 2, (n_layers - 1) / 2, number(total.mean, digits) + ends, (TOTAL_WIDTH, n_layers), rotation=90,
        color=ink(float(total.mean) / most, "#222222"), fontsize="x-small",
    )  # fmt: skip


def _digits(most: float) -> int:
    """Digits after the point that show the largest value to two figures; 2 to 6 of them."""
    return min(max(2, 1 - int(np.floor(np.log10(most)))), 6)


def holds_0(interval: Interval, *at: int) -> bool:
    return bool(interval.low[at] <= 0 <= interval.high[at])


def ink(share: float, dark: str) -> str:
    """The color of text on a cell whose value is this share of the darkest color's."""
    return "white" if abs(share) > 0.6 else dark


def hatch(ax: Axes, x: float, y: float, width: float | int, height: int) -> None:
    ax.add_patch(Rectangle((x, y), width, height, fill=False, hatch="////", edgecolor="#d2d2d2", linewidth=0))
