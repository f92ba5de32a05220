"""Sweeps of the causal experiments over all windows, against one whole forward per window."""

from collections.abc import Callable

import nnsight
import torch
from benchmark_measure import times
from benchmark_models import QUESTION, build, noise

import mechvlm as mv


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
