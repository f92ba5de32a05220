"""Attention knockout in a sliding window of layers: along which edges, and where, the answer's information flows."""

from collections.abc import Sequence

import torch

from mechvlm.batches import Answers, pieces
from mechvlm.errors import InputError
from mechvlm.experiments.examples import Example, Examples, each, positions
from mechvlm.experiments.rerun import Edit, run, sweep, windows
from mechvlm.experiments.results import InformationFlowResult
from mechvlm.inputs import Inputs
from mechvlm.interventions import knock_out
from mechvlm.vlm import VLM

FLOWS = ("image -> question", "image -> last", "question -> last", "last -> last")


def information_flow(
    vlm: VLM,
    inputs: Inputs | Sequence[Inputs],
    answers: Answers = None,
    window: int = 9,
    flows: Sequence[str] = FLOWS,
) -> InformationFlowResult:
    """The answer's probability with attention from one group of positions to another knocked out, window by window.

    100 (p' - p) / p, where p' is the probability of the answer's first token while no position of the destination attends
    to the source in the `window` layers around each layer (Zhang et al. 2024, "Cross-modal Information Flow in Multimodal
    Large Language Models", window 9). Differs: "question" is all that is neither image nor the last position, so that
    image, question and last are every position once.

    Args:
        vlm: the model; its attention must be sdpa or eager.
        inputs: any number of examples, as one batch or several. Each is run alone, its windows batched; on NDIF
            those of one batch are one request.
        answers: a word or token id for all examples, or one each; by default the model's own first token.
        window: layers knocked out together; at the ends of the decoder fewer.
        flows: "source -> destination", in names of `TokenMap.select`; several are joined, "image -> question + last".

    Every window starts from the clean states at its first layer and computes only the positions that it can change.
    Tested: equals one whole forward per window.

    Raises:
        InputError: for answers that do not fit the examples, or a flow that an example does not have.
        ValueError: for an unknown flow or window.
    """
    spans = windows(vlm.n_layers, window)
    if not flows or any(flow.count("->") != 1 for flow in flows):
        raise ValueError(f"A flow reads 'source -> destination', such as {FLOWS[0]!r}; got {list(flows)}.")
    found = each(
        vlm,
        Examples(vlm, inputs, answers),
        _knocked_out,
        lambda example: ([_edges(example, flow) for flow in flows], spans),
        "information flow",
    )
    tokens, p, p_knocked = zip(*found, strict=True)
    return InformationFlowResult(
        p=torch.tensor(p), p_knocked=torch.tensor(p_knocked).permute(1, 2, 0), flows=tuple(flows),
        windows=tuple((span.start, span.stop) for span in spans),
        answers=pieces(vlm, torch.tensor(tokens)), model=vlm.name,
    )  # fmt: skip


def _knocked_out(vlm: VLM, example: Example, edges: list, spans: list[range]) -> tuple[int, float, list[list[float]]]:
    """The answer's token, its probability, and that with each flow knocked out in each window [flow window]."""
    clean = run(vlm, example.inputs)
    token = example.token(clean.logits)

    def change(layer: int, rows: list[Edit]) -> None:
        here = [edges[edit.key[0]] if layer in edit.layers else (None, None) for edit in rows]
        if any(src for src, _ in here):
            knock_out(vlm, [src for src, _ in here], [dst for _, dst in here], layer)

    # Near the ends windows may be the same: each is run once.
    edits = [Edit((flow, span), span, min(dst)) for flow, (_, dst) in enumerate(edges) for span in dict.fromkeys(spans)]
    logits = sweep(vlm, clean, edits, change)
    knocked = [[float(logits[flow, span].softmax(-1)[token]) for span in spans] for flow in range(len(edges))]
    return token, clean.p(token), knocked


def _edges(example: Example, flow: str) -> tuple[list[int], list[int]]:
    """Sources, and those destinations that stand after (or at) one of them."""
    source, _, destination = flow.partition("->")
    tokens = example.inputs.tokens
    src = positions(tokens, source).tolist()
    dst = [d for d in positions(tokens, destination).tolist() if d >= src[0]]
    if not dst:
        raise InputError(f"Example {example.number} has no flow {flow!r}: no destination stands after a source.")
    return src, dst
