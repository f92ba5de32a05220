"""Sweeps over windows, heads and positions, against one whole forward for each."""

from collections.abc import Callable

import nnsight
import torch
from benchmark_measure import times
from benchmark_models import QUESTION, build, noise

import mechvlm as mv

MOST = 0.5
"""Bar of a sweep over heads or positions, in whole forwards of each."""


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


def heads(layers: int, width: int, d_head: int, repeats: int) -> list[dict]:
    """Heads ablated one by one, and states of positions restored one by one.

    A head is ablated at every position, so nothing is saved but the layers below, and in its own
    layer the attention: half of the work. A position saves those before it too.

    Two heads of each layer stand for all: the first, and another that the experiment draws. They
    start at each layer as often as all heads do. Of the positions, those after each eighth of the
    sequence stand for all. Every time includes the experiment's clean forward, and the trace's
    corrupted one.

    Args:
        layers: layers of the decoder.
        width: d_model.
        d_head: width of a head.
        repeats: runs of the bare forward; the sweeps run once.
    """
    vlm, hf = build("llava", layers, width, d_head=d_head)
    inputs = vlm.inputs(noise(0), QUESTION)
    encoding, length = vlm.encoding(inputs), len(inputs.tokens)
    sets = {str(layer): [(layer, 0)] for layer in range(layers)}
    places = [length * i // 8 for i in range(1, 8)]
    few = list(range(0, layers, max(1, layers // 3)))  # by whole forwards
    measured: dict[str, list[float]] = {}

    def ablate() -> None:
        result = mv.head_ablation(vlm, inputs, 7, sets=sets, draws=1)
        measured["heads ablated"] = result.logit_ablated[few, 0].tolist()

    def trace() -> None:
        mv.causal_trace(vlm, inputs, 7, groups=[{str(place): [place] for place in places}])

    def ablate_by_forwards() -> None:
        logits = []
        for layer in few:
            with torch.no_grad(), vlm.trace(inputs, logits_to_keep=1, use_cache=False):
                mv.ablate(vlm, inputs.tokens.all, layer, at="z", heads=0)
                logit = nnsight.save(vlm.logits[0, -1, 7])
            logits.append(float(logit))
        measured["whole"] = logits

    @torch.no_grad()
    def bare() -> None:
        hf(**encoding, logits_to_keep=1, use_cache=False)

    ablate_by_forwards()
    count = {"bare forward": 1, "heads ablated": 2 * len(sets), "positions restored": layers * len(places)}
    before = times({"bare forward": bare}, repeats)
    seconds = before | times({"heads ablated": ablate, "positions restored": trace}, 1)
    # Again afterwards: machines drift by several percent within minutes.
    forward = (before["bare forward"] + times({"bare forward": bare}, repeats)["bare forward"]) / 2
    rows = []
    for name, s in seconds.items():
        share = s / forward / count[name]
        row: dict = {"case": name, "how many": count[name], "seconds": s, "of as many bare forwards": share}
        if name != "bare forward":
            row["most"] = MOST
        rows.append(row)
    rows[1]["apart"] = max(abs(a - b) for a, b in zip(measured["heads ablated"], measured["whole"], strict=True))
    return rows
