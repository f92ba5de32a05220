"""One result of every kind that has a plot, of made numbers, for tests of how they are drawn."""

import torch

import mechvlm as mv
from mechvlm.experiments.object_ablation import ABLATION_CONDITIONS
from mechvlm.inputs.tokens import Modality

N, LAYERS, HEADS = 5, 16, 8
MODEL = "some/llava-v1.6-mistral-7b-hf"


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def lens(rows: int = 24, n: int = 1, n_states: int = 8) -> mv.LogitLensResult:
    """Of the image's patches, `rows` by `rows`: the likeliest token of point p is "w{p}"."""
    own = rows * rows
    ids = torch.arange(n * own).repeat(n_states, 1)[..., None]
    row, col = torch.meshgrid(torch.arange(rows), torch.arange(rows), indexing="ij")
    cells = torch.stack([torch.zeros(own), row.flatten(), col.flatten()], 1).long().repeat(n, 1)
    return mv.LogitLensResult(
        ids, rand(n_states, n * own, 1), tuple(range(n_states)), torch.arange(n).repeat_interleave(own),
        (torch.arange(own) + 5).repeat(n), tuple((i, f" w{i}") for i in range(n * own)), True, MODEL, cells, True, own + 20,
    )  # fmt: skip


def norms(n: int = N, side: int = 4, sink: float = 1.0) -> mv.NormAttentionResult:
    """3 tokens of text, an image of `side` by `side`, 6 of text; `sink` is the first one's norm."""
    kinds = [Modality.SPECIAL, *[Modality.TEXT] * 2, *[Modality.IMAGE] * side * side, *[Modality.TEXT] * 6]
    length = len(kinds)
    norm = rand(LAYERS, n, 1, length)
    norm[2:, :, :, 0] *= sink
    cells = torch.full((length, 3), -1)
    cells[3 : 3 + side * side] = torch.tensor([(0, r, c) for r in range(side) for c in range(side)])
    ids = torch.arange(length)
    names = ["<s>", " USER", ":", *["<image>"] * side * side, " what", " color", " is", " the", " heart", ":"]
    return mv.NormAttentionResult(
        norm=norm, weight=rand(LAYERS, n, HEADS, 1, length), value_norm=rand(LAYERS, n, HEADS, length),
        layers=tuple(range(LAYERS)), dest=torch.full((n, 1), length - 1), names=("last_text",), model=MODEL,
        modality=torch.tensor([int(kind) for kind in kinds]).repeat(n, 1), ids=ids.repeat(n, 1),
        vocabulary=tuple(zip(ids.tolist(), names, strict=True)), cells=cells.repeat(n, 1, 1),
    )  # fmt: skip


def memory(n: int = N) -> mv.MemoryAttentionResult:
    return mv.MemoryAttentionResult(
        rand(4, n, 1, 30), rand(4, n, HEADS, 1, 30), rand(4, n, HEADS, 30), (3, 8, 13, 18), torch.full((n, 1), 9),
        ("last",), MODEL, 10,
    )  # fmt: skip


def shares(n: int = N) -> mv.AttentionShareResult:
    return mv.AttentionShareResult(rand(LAYERS, n, HEADS, 1, 4), None, "weight", ("last_text",), MODEL)


def localization(n: int = N) -> mv.LocalizationHeadsResult:
    return mv.LocalizationHeadsResult(
        rand(LAYERS, n, HEADS), rand(LAYERS, n, HEADS, seed=1) * 3, "last_text", MODEL
    )  # fmt: skip


def contextualization(n: int = N) -> mv.ContextualizationResult:
    curves = [rand(LAYERS + 1, n, seed=i) for i in range(3)]
    sums = [rand(LAYERS + 1, 2)] * 2
    return mv.ContextualizationResult(
        *curves, rand(3, LAYERS + 1), True, False, False, MODEL, *sums, rand(3, LAYERS + 1)
    )  # fmt: skip


def controls(n: int = N) -> mv.ContextualizationControlsResult:
    return mv.ContextualizationControlsResult(
        rand(LAYERS + 1, n), rand(3, LAYERS + 1, n), rand(LAYERS + 1), ("noise", "words", "text"), 0, MODEL
    )  # fmt: skip


def attribution(n: int = N) -> mv.LogitAttributionResult:
    heads = rand(LAYERS, n, HEADS) - 0.5
    return mv.LogitAttributionResult(
        embed=rand(n), heads=heads, from_image=0.3 * heads, attn_bias=rand(LAYERS, n), mlps=rand(LAYERS, n, seed=3),
        bias=rand(n), logit=rand(n), answers=(" red",) * n, versus=(" blue",) * n, model=MODEL,
    )  # fmt: skip


def windows(width: int = 3) -> tuple[tuple[int, int], ...]:
    return tuple((max(0, i - width // 2), min(LAYERS, i + width // 2 + 1)) for i in range(LAYERS))


def flow(n: int = N) -> mv.InformationFlowResult:
    flows = ("image -> question", "image -> last", "question -> last", "last -> last")
    return mv.InformationFlowResult(
        p=0.5 + 0.4 * rand(n), p_knocked=rand(4, LAYERS, n), flows=flows, windows=windows(), answers=(" red",) * n, model=MODEL,
    )  # fmt: skip


def trace(n: int = N) -> mv.CausalTraceResult:
    return mv.CausalTraceResult(
        p=0.8 + 0.1 * rand(n), p_corrupt=0.1 * rand(n), p_restored=rand(LAYERS, 3, n), groups=("image", "question", "last"),
        layers=tuple(range(LAYERS)), windows=windows(), at="resid_pre", corrupt="noise", answers=(" red",) * n, model=MODEL,
    )  # fmt: skip


def head_map(n: int = N) -> mv.HeadAblationResult:
    return mv.HeadAblationResult(
        rand(n), rand(n), rand(LAYERS, HEADS, n), rand(LAYERS, HEADS, n), "zero", "all", (" red",) * n, MODEL
    )  # fmt: skip


def head_sets(n: int = N) -> mv.HeadSetsResult:
    return mv.HeadSetsResult(
        rand(n), rand(n), rand(2, n), rand(2, n), rand(2, 3, n), rand(2, 3, n), ("to the image", "others"),
        (((0, 1), (2, 3)), ((4, 5),)), ((((0, 2), (2, 1)),) * 3, (((4, 1),),) * 3), "mean", "all", 0, (" red",) * n, MODEL,
    )  # fmt: skip


def ablation(n: int = N) -> mv.ObjectAblationResult:
    return mv.ObjectAblationResult(
        correct=torch.ones(n, dtype=torch.bool), correct_ablated=(rand(3, 3, n) > 0.4).float(), p=rand(n),
        p_ablated=rand(3, 3, n), n_tokens=torch.arange(3)[:, None] * 10 + torch.arange(n), conditions=ABLATION_CONDITIONS,
        margins=(0, 1, 2), answers=(" a",) * n, model=MODEL,
    )  # fmt: skip


def patched(n: int = N) -> mv.PatchGridResult:
    columns = ("<s>", "image", " what", " color", " is", " the", " heart", "?", " Answer", ":")
    return mv.PatchGridResult(
        1 + rand(n), -rand(n), rand(LAYERS, 10, n), columns, "resid_pre", "", "logit difference", (" red",) * n, (" blue",) * n,
        MODEL,
    )  # fmt: skip


def neurons(n: int = N) -> mv.MultimodalNeuronsResult:
    return mv.MultimodalNeuronsResult(
        torch.tensor([3, 9, 14]), torch.tensor([1071, 23, 512]), rand(n, 3), rand(n, 3, 16) - 0.5, torch.tensor([1, -1, 1]),
        ((" red", " rose", " blood"),) * 3, (" red",) * n, (4, 4), MODEL,
    )  # fmt: skip


def pairs(n: int = N) -> mv.WinogroundResult:
    values = rand(5, LAYERS + 1, n, 2, 2)
    values[3, -1], values[4, :-1] = torch.nan, torch.nan
    return mv.WinogroundResult(values, tuple(f"pair {i}" for i in range(n)), (), "Describe.", MODEL)


def words(n: int = N) -> mv.WordReadingResult:
    return mv.WordReadingResult(
        heat=rand(n, 6, 6), inside=rand(n, 5), hit=rand(n, 5).round(), example=torch.arange(n), occurrence=torch.zeros(n).long(),
        logprob=-rand(n), shape=torch.full((n, 2), 6), area=torch.tensor([[0.0, 0, 60, 60]] * n), word=(" heart",) * n,
        boxes=(((10.0, 10.0, 30.0, 30.0),),) * n, answers=("a heart",) * n, layers=tuple(range(LAYERS)), model=MODEL,
    )  # fmt: skip


def queries(n: int = N) -> mv.QueryReadingResult:
    return mv.QueryReadingResult(rand(3, n, 9, 4, 4), MODEL)


def phases() -> mv.fit_phases:
    turns = torch.tensor([0.1, 0.3, 0.5, 0.4, 0.3, 0.35, 0.45, 0.55, 0.6, 0.5, 0.4, 0.3])
    return mv.fit_phases(turns + 0.01 * rand(20, 12))


BY_EXAMPLE = {
    "norms": norms, "memory": memory, "shares": shares, "localization": localization, "contextualization": contextualization,
    "controls": controls, "attribution": attribution, "flow": flow, "trace": trace, "head_map": head_map,
    "head_sets": head_sets, "ablation": ablation, "patched": patched, "neurons": neurons, "pairs": pairs, "words": words,
    "queries": queries,
}  # fmt: skip
"""Makers of results that hold examples; each takes how many."""
MAKERS = {**BY_EXAMPLE, "lens": lambda: lens(6), "lens of 576": lens, "phases": phases}
