"""remote="local": a trace is packed as for NDIF, unpacked with mechvlm hidden, and run here."""

import threading

import nnsight
import pytest

import mechvlm as mv
from helpers.ndif import difference
from mechvlm.datasets.scenes import scenes


def test_a_rehearsal_needs_no_server(monkeypatch):
    """remote="local" packs a trace as for NDIF, unpacks it with mechvlm hidden, runs it here."""
    monkeypatch.setattr(nnsight.CONFIG.API, "HOST", "http://127.0.0.1:1")
    rehearsed, here = mv.load("tiny-llava", remote="local"), mv.load("tiny-llava")
    inputs = here.inputs(next(scenes(1)).image, "Describe the scene.")
    probes = mv.LogitLens(), mv.Contextualization(), mv.NormAttention(), mv.LogitAttribution("red")
    assert difference(mv.read(rehearsed, inputs, *probes), mv.read(here, inputs, *probes)) == 0
    assert rehearsed.generate(inputs) == here.generate(inputs)
    flows = [mv.information_flow(vlm, inputs, "red", window=8) for vlm in (rehearsed, here)]
    assert difference(*flows) == 0
    lock = threading.Lock()  # cannot be pickled, which a rehearsal shows
    with pytest.raises(TypeError, match="cannot pickle"), rehearsed.trace(inputs):
        nnsight.save(str(lock))
