"""Activation patching over the decoder: which states, or which heads, carry the answer?

1. A clean example and a corrupted one, of the same length, give two values of a metric.
2. The corrupted forward runs again with one clean activation put in: that of one position (or group
   of positions) at one layer, or that of one head.
3. The metric between its corrupted value (0) and its clean one (1) says how much of the difference
   that activation carries.
"""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mechvlm.errors import InputError
from mechvlm.experiments.cases import Example, Examples, for_each
from mechvlm.experiments.cases import positions as positions_of
from mechvlm.experiments.patch_grid_result import PatchGridResult
from mechvlm.experiments.sweep import Edit, run, sweep
from mechvlm.inputs.batches import Answers
from mechvlm.inputs.tokens import Modality, TokenMap
from mechvlm.results import float32
from mechvlm.tracing.interventions import patch
from mechvlm.tracing.reading import Readable
from mechvlm.vlm.vlm import VLM

PATCHED_SITES = ("resid_pre", "attn_out", "mlp_out", "z")
METRICS = {"logit_diff": "logit difference", "probability": "probability", "kl": "KL divergence from clean"}
"""The metrics by name, and as a picture's heading says them."""

Metric = str | Callable[[Tensor], Any]
"""A name of `METRICS`, or a function of the logits of the last position, [d_vocab] in float32."""


def patch_grid(
    vlm: VLM,
    clean: Readable,
    corrupted: Readable,
    answers: Answers = None,
    versus: Answers = None,
    at: str = "resid_pre",
    positions: str | Sequence[str | int | Sequence[int]] | None = None,
    metric: Metric = "logit_diff",
) -> PatchGridResult:
    """A metric of the corrupted example with one clean activation at a time put in.

        (m_patched - m_corrupted) / (m_clean - m_corrupted)

    0 is the corrupted example, 1 the clean one; above 1 and below 0 are possible. This is
    denoising: a cell says what is enough to bring the answer back. For noising (what the answer
    needs) exchange `clean` and `corrupted` and give `answers` and `versus` as they were: 0 is then
    the clean example, and 1 the corrupted one.

    >>> red, blue = vlm.inputs(red_cup, question), vlm.inputs(blue_cup, question)
    >>> grid = mv.patch_grid(vlm, red, blue, "red", versus="blue")    # [layer position example]
    >>> heads = mv.patch_grid(vlm, red, blue, "red", versus="blue", at="z")  # [layer head example]

    Args:
        vlm: the model.
        clean: any number of examples, as one batch or several. Each is run alone; on NDIF those of
            one batch are one request.
        corrupted: as many examples: of each the same number of tokens, with the images in the same
            places.
        answers: a word or token id for all examples, or one each; by default the model's own first
            token on the clean example.
        versus: the same, for the answer whose logit is subtracted; by default the model's own first
            token on the corrupted example.
        at: what is patched: "resid_pre" (the residual stream where it enters the layer),
            "attn_out", "mlp_out", or "z", the outputs of single heads.
        positions: the columns: names of `TokenMap.select`, words, "question + last" for several
            together, or numbers in the example alone; by default the image as one, and every other
            token by itself. With at="z", whose columns are the heads, one name: the positions that
            each head is patched at, by default "all".
        metric: "logit_diff", logit(answer) - logit(versus); "probability" of the answer; "kl", the
            divergence of the clean distribution from the patched one; or a function of the logits
            of the last position, [d_vocab], that returns a number.

    Where clean and corrupted agree, up to rounding, there is nothing to bring back: their cells are
    NaN, a warning names them, and means leave them out.

    Sources: Meng et al. 2022, "Locating and Editing Factual Associations in GPT"; Wang et al. 2022,
    "Interpretability in the Wild" (the normalised logit difference); Zhang and Nanda 2024, "Towards
    Best Practices of Activation Patching" (metrics); Heimersheim and Nanda 2024, "How to Use and
    Interpret Activation Patching" (denoising and noising).
    Every cell starts from the corrupted states at its layer and position. Tested: equals Hugging
    Face's own forward with a hook; on a model made to copy one patch with one head, the patch's
    position below that head, the head, and the last position above it are 1 and all else is 0.

    Raises:
        InputError: for other numbers of examples, lengths or places of images; the same inputs; one
            answer for both; answers that do not fit; or columns that are not as many in each
            example.
        ValueError: for an unknown site, metric or position, or answers that the metric does not
            look at.
        ModelError: for a layer without attention heads, with at="z".
    """
    if at not in PATCHED_SITES:
        raise ValueError(f"There is no site {at!r} to patch. Sites: {', '.join(PATCHED_SITES)}.")
    _check_metric(metric, answers, versus)
    if at == "z" and not isinstance(positions, str | None):
        raise ValueError(f"With at='z' the columns are the heads, and `positions` is one name, not {positions!r}.")
    where = positions if isinstance(positions, str) else "all"  # of heads
    examples, others = Examples(vlm, clean, answers), Examples(vlm, corrupted, versus)
    if len(examples) != len(others):
        raise InputError(f"{len(examples)} clean examples and {len(others)} corrupted ones were given: give as many.")
    labels: list[list[str]] = []

    def arguments(example: Example) -> tuple:
        other = others[example.number]
        _check_pair(example, other)
        tokens = example.inputs.tokens
        if at == "z":
            everywhere = positions_of(tokens, where).tolist()
            columns = [(str(head), everywhere, head) for head in range(vlm.n_heads)]
        else:
            columns = [(label, pos, None) for label, pos in _columns(tokens, positions)]
        labels.append([label for label, *_ in columns])
        if len(labels[-1]) != len(labels[0]):
            raise InputError(
                f"Example {example.number} has {len(labels[-1])} columns of positions and example 0 has {len(labels[0])}: give "
                "`positions` by names that all have, such as ['image', 'question', 'last']."
            )
        return other, [column[1:] for column in columns], at, metric

    by_example = for_each(vlm, examples, _patch_cells, arguments, "patch grid")
    answer, other_answer, m_clean, m_corrupted, m_patched = zip(*by_example, strict=True)
    result = PatchGridResult(
        m_clean=float32(m_clean), m_corrupted=float32(m_corrupted), m_patched=float32(m_patched).permute(1, 2, 0),
        columns=_joined_labels(labels), at=at, positions=where if at == "z" else "",
        metric=METRICS[metric] if isinstance(metric, str) else getattr(metric, "__name__", "metric"),
        answers=vlm.to_str_tokens(torch.tensor(answer)), versus=vlm.to_str_tokens(torch.tensor(other_answer)),
        model=vlm.name, example_ids=examples.ids,
    )  # fmt: skip
    if alike := result.alike.nonzero()[:, 0].tolist():
        warnings.warn(
            f"patch_grid: clean and corrupted have the same {result.metric} in the examples {alike}. There is nothing to bring "
            "back: their cells are NaN.",
            stacklevel=2,
        )
    return result


def _check_metric(metric: Metric, answers: Answers, versus: Answers) -> None:
    if isinstance(metric, str) and metric not in METRICS:
        raise ValueError(f"There is no metric {metric!r}: {', '.join(METRICS)}, or a function of the logits.")
    looks_at = {"logit_diff": ("answers", "versus"), "probability": ("answers",)}.get(str(metric), ())
    for name, given in (("answers", answers), ("versus", versus)):
        if given is not None and name not in looks_at:
            raise ValueError(f"`{name}` was given, and metric={metric!r} does not look at it: leave it out.")


def _check_pair(example: Example, other: Example) -> None:
    """Raises InputError where a clean and a corrupted example do not match token by token."""
    tokens, others = example.inputs.tokens, other.inputs.tokens
    if len(tokens) != len(others):
        raise InputError(
            f"Example {example.number} has {len(tokens)} tokens clean and {len(others)} corrupted: states are patched position "
            "by position. Give prompts of as many tokens, and images that the model sees with as many."
        )
    if not torch.equal(*(own.modality == Modality.IMAGE for own in (tokens, others))):
        raise InputError(f"Example {example.number} has its images in other places clean and corrupted.")


def _columns(tokens: TokenMap, positions: Any) -> list[tuple[str, list[int]]]:
    """Label and positions of each column of one example."""
    if positions is None:
        image = [] if tokens.is_memory else tokens.image.tolist()
        groups = [[p] for p in tokens.all.tolist() if p not in image] + [image] * bool(image)
        return [("image" if g == image else tokens.strings[g[0]], g) for g in sorted(groups)]
    columns = [positions] if isinstance(positions, str) else list(positions)
    if not columns:
        raise ValueError("patch_grid was given no positions: leave them out for the image and every other token.")
    return [
        (column, positions_of(tokens, column).tolist())
        if isinstance(column, str)
        else (str(column), tokens.select(column).sort().values.tolist())
        for column in columns
    ]


def _joined_labels(labels: list[list[str]]) -> tuple[str, ...]:
    """One label for each column: the examples' own, where they differ with a stroke between them.

    A label that was there before gets a number, so that each column has a name of its own.
    """
    joined: list[str] = []
    for column in zip(*labels, strict=True):
        label = name = "/".join(dict.fromkeys(column))
        number = 1
        while label in joined:
            number += 1
            label = f"{name} ({number})"
        joined.append(label)
    return tuple(joined)


def _measure(metric: Metric, token: int, versus: int, clean: Float[Tensor, " d_vocab"]) -> Callable[[Tensor], float]:
    """The metric as a function of the logits of the last position."""
    if metric == "logit_diff":
        return lambda logits: float(logits[token] - logits[versus])
    if metric == "probability":
        return lambda logits: float(logits.softmax(-1)[token])
    if metric == "kl":
        log_p = clean.double().log_softmax(-1)
        return lambda logits: float((log_p.exp() * (log_p - logits.double().log_softmax(-1))).nansum())
    return lambda logits: float(metric(logits))  # type: ignore[operator]


def _patch_cells(
    vlm: VLM, example: Example, other: Example, columns: list[tuple[list[int], int | None]], at: str, metric: Metric
) -> tuple[int, int, float, float, list[list[float]]]:
    """Both answers' tokens, and the metric clean, corrupted, and patched [layer column].

    A column is its positions, and with at="z" its head.
    """
    clean, corrupted = run(vlm, example.inputs, keep=at), run(vlm, other.inputs, edits_at=at)
    token, versus = example.token(clean.logits), other.token(corrupted.logits)
    # An image that is a memory changes no embedding: then some later state differs.
    if all(map(torch.equal, clean.resid, corrupted.resid)):
        raise InputError(f"Example {example.number} is the same clean and corrupted: there is nothing to patch.")
    if metric == "logit_diff" and token == versus:
        raise InputError(
            f"Example {example.number} has the same answer clean and corrupted (token {token}): there is no difference. Give "
            "`answers` and `versus` that differ, or another metric."
        )
    measure = _measure(metric, token, versus, clean.logits)

    def change(layer: int, rows: list[Edit]) -> None:
        first = rows[0].pos
        mine = [columns[edit.key[1]] if layer in edit.layers else ([], None) for edit in rows]
        where = [[p - first for p in pos] if pos else None for pos, _ in mine]
        if any(where):
            heads = [None if head is None else [head] for _, head in mine] if at == "z" else None
            patch(vlm, clean.kept[layer][:, first:], where, layer, at=at, heads=heads)

    edits = [
        Edit((layer, column), range(layer, layer + 1), min(pos))
        for layer in range(vlm.n_layers)
        for column, (pos, _) in enumerate(columns)
    ]
    logits = sweep(vlm, corrupted, edits, change)
    cells = [[measure(logits[layer, column]) for column in range(len(columns))] for layer in range(vlm.n_layers)]
    return token, versus, measure(clean.logits), measure(corrupted.logits), cells
