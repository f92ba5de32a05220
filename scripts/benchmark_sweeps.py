"""Sweeps over all windows, and over all heads, against one whole forward per window or head."""

from collections.abc import Callable

import nnsight
import torch
from benchmark_measure import times
from benchmark_models import QUESTION, build, noise

import mechvlm as mv

MOST = 0.6
"""Bar of a sweep over all heads, in whole forwards of each."""


def sweeps(layers: int, width: int, repeats: int) -> list[dict]:
    """Each experiment over all windows of one layer: as mechvlm does it, and by whole forwards.

    mechvlm saves the work that a window does not change. That depends on the positions changed:

    - `image -> question`: the question's words after the image.
    - `image -> last`: the last position alone.
    - `causal trace`: all positions from the first visual token on, so only the layers below a
      window are saved.

    Every time includes the experiment's clean forward, and its corrupted one where it has one.

    Args:
        layers: layers of the decoder, and windows of each sweep.
        width: d_model.
        repeats: runs of mechvlm's sweeps; those by whole forwards run once.
    """
    vlm, hf = build("llava", layers, width)
    inputs = vlm.inputs(noise(0), QUESTION)
    encoding = vlm.encoding(inputs)
    tokens, answer = inputs.tokens, 7
    after_image = [p for p in tokens.question.tolist() if p > tokens.last_image]

    def p_of(change: Callable[[int], object], layer: int) -> float:
        with torch.no_grad(), vlm.trace(inputs, logits_to_keep=1, use_cache=False):
            change(layer)
            logits = nnsight.save(vlm.logits)
        return float(logits[0, -1].softmax(-1)[answer])

    def whole_flow(dst) -> list[float]:
        return [p_of(lambda at: mv.knock_out(vlm, tokens.image, dst, at), layer) for layer in range(layers)]

    def whole_trace() -> list[float]:
        with torch.no_grad(), vlm.trace(inputs, logits_to_keep=1, use_cache=False):
            clean = nnsight.save([])
            for layer in range(layers):
                clean.append(vlm.resid_pre[layer])
        image = clean[0][:, tokens.image]
        corrupted = image + 3 * image.std() * torch.randn(image.shape, generator=torch.Generator().manual_seed(0))

        def restore(layer: int) -> None:
            mv.patch(vlm, corrupted, tokens.image, 0, at="resid_pre")
            mv.patch(vlm, clean[layer], tokens.image, layer, at="resid_pre")

        return [p_of(restore, layer) for layer in range(layers)]

    def flow(name: str) -> list[float]:
        return mv.information_flow(vlm, inputs, answer, window=1, flows=[name]).p_knocked.flatten().tolist()

    def trace() -> list[float]:
        return mv.causal_trace(vlm, inputs, answer, groups=["image"]).p_restored.flatten().tolist()

    answers: dict[str, list[float]] = {}  # p(answer) of each window

    def keeping(name: str, case: Callable[[], list[float]]) -> Callable[[], None]:
        return lambda: answers.update({name: case()})

    @torch.no_grad()
    def bare() -> None:
        hf(**encoding, logits_to_keep=1, use_cache=False)

    experiments = {
        "image -> question": (lambda: flow("image -> question"), lambda: whole_flow(after_image)),
        "image -> last": (lambda: flow("image -> last"), lambda: whole_flow(tokens.last)),
        "causal trace, image": (trace, whole_trace),
    }
    ours = {name: keeping(name, case) for name, (case, _) in experiments.items()}
    whole = {
        f"{name}, whole forwards": keeping(f"{name}, whole forwards", case) for name, (_, case) in experiments.items()
    }
    seconds = times({"bare forward": bare} | ours, repeats) | times(whole, 1)
    rows = []
    for name, s in seconds.items():
        row = {"case": name, "seconds": s, f"of {layers} bare forwards": s / seconds["bare forward"] / layers}
        if name in experiments:
            by_forwards = answers[f"{name}, whole forwards"]
            row["apart"] = max(abs(a / b - 1) for a, b in zip(answers[name], by_forwards, strict=True))
        rows.append(row)
    return rows


def heads(layers: int, width: int, repeats: int) -> list[dict]:
    """All heads ablated, and all patched, one by one: as mechvlm does it, and by whole forwards.

    Every position of a head changes, so nothing is saved but the layers below: half of the work.
    Every time includes the experiment's clean forward, and the grid's corrupted one.

    Args:
        layers: layers of the decoder.
        width: d_model; heads are 128 wide.
        repeats: runs of the bare forward; the sweeps of n forwards run once.
    """
    vlm, hf = build("llava", layers, width)
    inputs, other = vlm.inputs(noise(0), QUESTION), vlm.inputs(noise(1), QUESTION)
    encoding = vlm.encoding(inputs)
    n = layers * vlm.n_heads
    measured: dict[str, list[float]] = {}

    def ablate() -> None:
        measured["all heads ablated"] = mv.head_ablation(vlm, inputs, 7).logit_ablated.flatten().tolist()

    def patch() -> None:
        mv.patch_grid(vlm, inputs, other, 7, versus=9, at="z")

    def ablate_by_forwards() -> None:
        logits = []
        for layer in range(layers):
            for head in range(vlm.n_heads):
                with torch.no_grad(), vlm.trace(inputs, logits_to_keep=1, use_cache=False):
                    mv.ablate(vlm, inputs.tokens.all, layer, at="z", heads=head)
                    logit = nnsight.save(vlm.logits[0, -1, 7])
                logits.append(float(logit))
        measured["all heads ablated, whole forwards"] = logits

    @torch.no_grad()
    def bare() -> None:
        hf(**encoding, logits_to_keep=1, use_cache=False)

    ours = {"all heads ablated": ablate, "all heads patched": patch}
    whole = {"all heads ablated, whole forwards": ablate_by_forwards}
    seconds = times({"bare forward": bare}, repeats) | times(ours | whole, 1)
    rows = []
    for name, s in seconds.items():
        row: dict = {"case": name, "seconds": s, f"of {n} bare forwards": s / seconds["bare forward"] / n}
        if name in ours:
            row["most"] = MOST
        if name == "all heads ablated":
            by_forwards = measured["all heads ablated, whole forwards"]
            row["apart"] = max(abs(a - b) for a, b in zip(measured[name], by_forwards, strict=True))
        rows.append(row)
    return rows
