"""Attention knockout in a sliding window of layers: where the answer's information flows.

1. A flow is a source and a destination, groups of positions such as "image -> last".
2. Around each layer, a window of layers has the attention from that source to that destination
   knocked out.
3. The change of the answer's probability says how much of it came along that edge, at these layers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from mechvlm.errors import InputError
from mechvlm.experiments.cases import Example, Examples, for_each, positions
from mechvlm.experiments.sweep import Edit, run, sweep, windows
from mechvlm.figures.canvas import Canvas, plots
from mechvlm.figures.headings import ALONE, INTERVAL, n_examples, short_name, window_width
from mechvlm.figures.legends import legend_above
from mechvlm.figures.settings import marker_size, pen
from mechvlm.figures.style import LAYER, PALETTE, hue, number_ticks, text
from mechvlm.inputs.batches import Answers
from mechvlm.intervals import Interval, mean_interval
from mechvlm.results import Result, float32, long_frame
from mechvlm.tracing.interventions import MEMORY_SOURCE, block_edges, close_memory
from mechvlm.tracing.reading import Readable
from mechvlm.vlm.vlm import VLM

FLOWS = ("image -> question", "image -> last", "question -> last", "last -> last")
MEMORY_FLOWS = tuple(flow.replace("image", MEMORY_SOURCE) for flow in FLOWS)
"""The same of a model whose image is a memory that its cross-attention layers read."""
FLOW_DASHES = ("-", "--", "-.", ":")
"""Seven colors and four dashes have no common divisor: 28 flows look different."""
FLOW_MARKERS = ("o", "s", "^", "D")


@dataclass(frozen=True, repr=False)
class InformationFlowResult(Result):
    """How the answer's probability changes where attention from a source to a destination is gone.

    Attributes:
        p: of the answer's first token, undisturbed.
        p_knocked: with the flow knocked out in the window around each layer.
        flows: "source -> destination", by the names of a `TokenMap`.
        windows: (first, last + 1) of each window, in layers 0 to n_layers - 1.
        answers: the tokens whose probability is measured, as text.
        model: the model's name.
    """

    units: ClassVar[str] = "change of the answer's probability (%)"
    texts: ClassVar[tuple[str, ...]] = ("answers",)
    per_example: ClassVar[tuple[str, ...]] = ("answers",)

    p: Float[Tensor, " example"]
    p_knocked: Float[Tensor, "flow layer example"]
    flows: tuple[str, ...]
    windows: tuple[tuple[int, int], ...]
    answers: tuple[str, ...]
    model: str

    @property
    def change(self) -> Float[Tensor, "flow layer example"]:
        """100 (p' - p) / p, in percent: -100 where the answer is lost, NaN where its p was 0."""
        return 100 * (self.p_knocked - self.p) / torch.where(self.p > 0, self.p, torch.nan)

    @property
    def interval(self) -> Interval:
        """The mean change over examples [flow layer] with its 95 % bootstrap interval (%)."""
        return mean_interval(self.change.movedim(-1, 0))

    def to_frame(self) -> pd.DataFrame:
        """One row per flow, layer (the window's center) and example: p, p_knocked, change (%)."""
        labels = {"flow": self.flows, "layer": range(len(self.windows)), "example": range(len(self.p))}
        frame = long_frame(self.p_knocked, **labels).rename(columns={"value": "p_knocked"})
        frame["p"] = self.p.numpy()[frame["example"]]
        return self.with_ids(frame.assign(change=long_frame(self.change, **labels)["value"]))

    @plots((7, 4))
    def plot(self, canvas: Canvas) -> None:
        """The mean change by the window's center, a line in its band of the interval for each flow.

        An answer of probability 0 has no relative change: its example is left out.
        """
        change, interval = self.change, self.interval
        layers = np.arange(len(self.windows))
        step = -(-len(layers) // 14)
        ax = canvas.ax
        ax.axhline(0, color=pen("#444444"), linewidth=0.8)
        for i, flow in enumerate(self.flows):
            color = hue(PALETTE[i % len(PALETTE)])
            mean, low, high = (values[i].numpy() for values in interval)
            ax.fill_between(layers, low, high, color=color, alpha=0.15, linewidth=0)
            ax.plot(
                layers, mean, color=color, linestyle=FLOW_DASHES[i % 4], marker=FLOW_MARKERS[i % 4], label=arrow(flow),
                markevery=step, markersize=marker_size(),
            )  # fmt: skip
        ax.set_xlim(-0.25, len(layers) - 0.75)
        number_ticks(ax.xaxis, range(len(layers)))
        ax.set_xlabel(f"center of the window, {LAYER}")
        ax.set_ylabel(self.units)
        legend_above(ax)
        canvas.head(
            f"Information flow, {short_name(self.model)}: attention knocked out {window_width(self.windows)}",
            f"{n_examples(change)}; lines are means, bands their {INTERVAL}" if change.shape[-1] > 1 else ALONE,
        )


def information_flow(
    vlm: VLM,
    inputs: Readable,
    answers: Answers = None,
    window: int = 9,
    flows: Sequence[str] | None = None,
) -> InformationFlowResult:
    """The answer's probability with attention between two groups of positions knocked out.

    100 (p' - p) / p, where p' is the probability of the answer's first token while no position of
    the destination attends to the source in the `window` layers around each layer (Zhang et al.
    2024, "Cross-modal Information Flow in Multimodal Large Language Models", window 9). Differs:
    "question" is all that is neither image nor the last position, so that image, question and last
    are every position once.

    >>> result = mv.information_flow(vlm, inputs, "red", flows=["image -> last"])
    >>> result.interval.mean  # [flow layer], in percent

    Args:
        vlm: the model; its attention must be sdpa or eager.
        inputs: any number of examples, as one batch or several. Each is run alone, its windows
            batched; on NDIF those of one batch are one request.
        answers: a word or token id for all examples, or one each; by default the model's own first
            token.
        window: layers knocked out together; at the ends of the decoder fewer.
        flows: "source -> destination", in names of `TokenMap.select`; several are joined,
            "image -> question + last". By default `FLOWS`. Where the image is a memory (Mllama,
            Idefics), its source is "memory", which is closed as by `mv.knock_out`, and the default
            is `MEMORY_FLOWS`.

    Every window starts from the clean states at its first layer and computes only the positions
    that it can change. Tested: equals one whole forward per window.

    Raises:
        InputError: for answers that do not fit the examples, or a flow that an example does not
            have.
        ValueError: for an unknown flow or window.
    """
    spans = windows(vlm.n_layers, window)
    flows = (MEMORY_FLOWS if vlm.memory_layers else FLOWS) if flows is None else flows
    if not flows or any(flow.count("->") != 1 for flow in flows):
        raise ValueError(f"A flow reads 'source -> destination', such as {FLOWS[0]!r}; got {list(flows)}.")
    examples = Examples(vlm, inputs, answers)
    by_example = for_each(
        vlm,
        examples,
        _knock_out_flows,
        lambda example: ([_edges(example, flow) for flow in flows], spans),
        "information flow",
    )
    tokens, p, p_knocked = zip(*by_example, strict=True)
    return InformationFlowResult(
        p=float32(p), p_knocked=float32(p_knocked).permute(1, 2, 0), flows=tuple(flows),
        windows=tuple((span.start, span.stop) for span in spans),
        answers=vlm.to_str_tokens(torch.tensor(tokens)), model=vlm.name, example_ids=examples.ids,
    )  # fmt: skip


def _knock_out_flows(
    vlm: VLM, example: Example, edges: list[tuple[list[int] | None, list[int]]], spans: list[range]
) -> tuple[int, float, list[list[float]]]:
    """The answer's token, and its probability clean and with each flow out [flow window]."""
    clean = run(vlm, example.inputs)
    token = example.token(clean.logits)

    def change(layer: int, rows: list[Edit]) -> None:
        chosen = [edges[edit.key[0]] if layer in edit.layers else (None, None) for edit in rows]
        if vlm.layer_parts[layer].kind.memory:
            readers = [dst if src is None else None for src, dst in chosen]
            if any(readers):
                close_memory(vlm, readers, layer, may_be_idle=True)
        elif any(src for src, _ in chosen):
            sources, destinations = ([pair[i] if pair[0] else None for pair in chosen] for i in (0, 1))
            block_edges(vlm, sources, destinations, layer, may_be_idle=True)

    # Near the ends of the decoder windows may be the same: each is run once.
    edits = [Edit((flow, span), span, min(dst)) for flow, (_, dst) in enumerate(edges) for span in dict.fromkeys(spans)]
    logits = sweep(vlm, clean, edits, change)
    knocked = [[float(logits[flow, span].softmax(-1)[token]) for span in spans] for flow in range(len(edges))]
    return token, clean.p(token), knocked


def _edges(example: Example, flow: str) -> tuple[list[int] | None, list[int]]:
    """The sources, and the destinations that stand at or after the first source.

    The memory has no positions: None, and all destinations.
    """
    source, _, destination = flow.partition("->")
    tokens = example.inputs.tokens
    if source.strip() == MEMORY_SOURCE and tokens.is_memory:
        return None, positions(tokens, destination).tolist()
    src = positions(tokens, source).tolist()
    dst = [d for d in positions(tokens, destination).tolist() if d >= src[0]]
    if not dst:
        raise InputError(
            f"Example {example.number} has no flow {flow!r}: attention looks back, and no destination stands at or after a "
            "source. Turn the flow around, or leave the example out."
        )
    return src, dst


def arrow(flow: str) -> str:
    return text(flow.replace("->", "→"), 60)
