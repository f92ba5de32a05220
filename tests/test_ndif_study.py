"""On a real NDIF server: the study of the paper, and the rehearsal of what travels."""

import threading

import nnsight
import pandas as pd
import pytest
from ndif_lane import TOLERANCE, difference

import mechvlm as mv
from mechvlm.datasets.scenes import scenes
from mechvlm.study import run

pytestmark = pytest.mark.ndif


def test_a_study_of_twenty(pair, traffic):
    """Equals the local one, by one request a batch, one for its gallery's answers, and one that asks for the dtype."""
    there, here = (run([vlm], n=20, batch_size=8, seed=3) for vlm in (pair.there, pair.here))
    assert traffic.requests <= 3 + 1 + 1  # the last: in which dtype the server runs
    for name, table in here.tables.items():
        pd.testing.assert_frame_equal(there.tables[name], table, atol=TOLERANCE, rtol=1e-5, obj=name)
    assert there.tables["contextualization"]["example"].nunique() == 20
    assert there.dataset == here.dataset
    # All positions' words at every layer are by far the most of it.
    assert max(traffic.received) < 600_000


def test_a_rehearsal_needs_no_server(monkeypatch):
    """remote="local" packs a trace as for NDIF, unpacks it where mechvlm is hidden, and runs it here."""
    monkeypatch.setattr(nnsight.CONFIG.API, "HOST", "http://127.0.0.1:1")
    rehearsed, here = mv.load("tiny-llava", remote="local"), mv.load("tiny-llava")
    inputs = here.inputs(next(scenes(1)).image, "Describe the scene.")
    probes = mv.LogitLens(), mv.Contextualization(), mv.NormAttention(), mv.LogitAttribution("red")
    assert difference(mv.read(rehearsed, inputs, *probes), mv.read(here, inputs, *probes)) == 0
    assert rehearsed.generate(inputs) == here.generate(inputs)
    flows = [mv.information_flow(vlm, inputs, "red", window=8) for vlm in (rehearsed, here)]
    assert difference(*flows) == 0
    lock = threading.Lock()  # what cannot travel is found here
    with pytest.raises(TypeError, match="cannot pickle"), rehearsed.trace(inputs):
        nnsight.save(str(lock))
