"""remote="local": a trace is packed as for NDIF, unpacked with mechvlm hidden, and run here."""

import threading

import nnsight
import pytest
import torch

import mechvlm as mv
from helpers.ndif import difference
from mechvlm.datasets.scenes import scenes


def reweighted(vlm, inputs):
    with torch.no_grad(), vlm.trace(inputs):
        mv.reweight(vlm, inputs.tokens.image, inputs.tokens.last, 2, scale=3.0, temperature=0.5)
        logits = nnsight.save(vlm.logits[:, -1])
    return logits


@pytest.mark.long
def test_a_rehearsal_needs_no_server(monkeypatch):
    """remote="local" packs a trace as for NDIF, unpacks it with mechvlm hidden, runs it here."""
    monkeypatch.setattr(nnsight.CONFIG.API, "HOST", "http://127.0.0.1:1")
    rehearsed, here = mv.load("tiny-llava", remote="local"), mv.load("tiny-llava")
    inputs = here.inputs(next(scenes(1)).image, "Describe the scene.")
    probes = mv.LogitLens(), mv.Contextualization(), mv.NormAttention(), mv.LogitAttribution("red")
    assert difference(mv.read(rehearsed, inputs, *probes), mv.read(here, inputs, *probes)) == 0
    written = rehearsed.generate(inputs)
    assert written == here.generate(inputs)
    looking = mv.AttentionShare("writing"), mv.AttentionShare("writing", of="norm"), mv.LocalizationHeads("last_prompt")
    read = [mv.read(vlm, written.inputs, *looking, mv.Likelihood()) for vlm in (rehearsed, here)]
    assert difference(*read) == 0
    flows = [mv.information_flow(vlm, inputs, "red", window=8) for vlm in (rehearsed, here)]
    assert difference(*flows) == 0
    both, sets = here.inputs([scene.image for scene in scenes(2)], "Describe the scene."), {"two": [(1, 0), (6, 2)]}
    for experiment in (
        lambda vlm: mv.head_ablation(vlm, both, "red", how="mean", sets=sets, draws=1),
        lambda vlm: mv.patch_grid(vlm, both[0], both[1], at="z", positions="last", metric=lambda logits: logits[7]),
        lambda vlm: reweighted(vlm, inputs),
    ):
        assert difference(experiment(rehearsed), experiment(here)) == 0
    lock = threading.Lock()  # cannot be pickled, which a rehearsal shows
    with pytest.raises(TypeError, match="cannot pickle"), rehearsed.trace(inputs):
        nnsight.save(str(lock))
