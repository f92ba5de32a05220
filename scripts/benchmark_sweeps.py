"""The causal experiments' sweeps over all windows of layers, against one whole forward per window."""

from collections.abc import Callable

import nnsight
import torch
from benchmark_measure import times
from benchmark_models import QUESTION, build, noise

import mechvlm as mv


def sweeps(layers: int, width: int, repeats: int) -> list[dict]:
    """Sweeps over all windows of one layer: each experiment as it is, and as one whole forward per window.

    `image -> question` changes the words behind the image, `image -> last` the last position alone, and `causal trace` all
    from the first visual token on, so that there only the layers below a window are saved. Every time holds all that the
    experiment does, its clean (and its corrupted) forward too.
    """
    vlm, hf = build("llava", layers, width)
    inputs = vlm.inputs(noise(0), QUESTION)
    encoding = vlm.encoding(inputs)
    tokens, answer = inputs.tokens, 7
    behind = [p for p in tokens.question.tolist() if p > tokens.last_image]

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
        old = clean[0][:, tokens.image]
        broken = old + 3 * old.std() * torch.randn(old.shape, generator=torch.Generator().manual_seed(0))

        def restore(layer: int) -> None:
            mv.patch(vlm, broken, tokens.image, 0, at="resid_pre")
            mv.patch(vlm, clean[layer], tokens.image, layer, at="resid_pre")

        return [p_of(restore, layer) for layer in range(layers)]

    def flow(name: str) -> list[float]:
        return mv.information_flow(vlm, inputs, answer, window=1, flows=[name]).p_knocked.flatten().tolist()

    def trace() -> list[float]:
        return mv.causal_trace(vlm, inputs, answer, groups=["image"]).p_restored.flatten().tolist()

    found: dict[str, list[float]] = {}

    def kept(name: str, case: Callable[[], list[float]]) -> Callable[[], None]:
        return lambda: found.update({name: case()})

    @torch.no_grad()
    def bare() -> None:
        hf(**encoding, logits_to_keep=1, use_cache=False)

    pairs = {
        "image -> question": (lambda: flow("image -> question"), lambda: whole_flow(behind)),
        "image -> last": (lambda: flow("image -> last"), lambda: whole_flow(tokens.last)),
        "causal trace, image": (trace, whole_trace),
    }
    fast = {name: kept(name, case) for name, (case, _) in pairs.items()}
    whole = {f"{name}, whole forwards": kept(f"{name}, whole forwards", case) for name, (_, case) in pairs.items()}
    seconds = times({"bare forward": bare} | fast, repeats) | times(whole, 1)
    rows = []
    for name, s in seconds.items():
        row = {"case": name, "seconds": s, f"of {layers} bare forwards": s / seconds["bare forward"] / layers}
        if name in pairs:
            naive = found[f"{name}, whole forwards"]
            row["apart"] = max(abs(a / b - 1) for a, b in zip(found[name], naive, strict=True))
        rows.append(row)
    return rows
