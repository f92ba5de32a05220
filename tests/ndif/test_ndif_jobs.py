"""On a real NDIF server: jobs that nobody waits for are collected by their id.

In this process, and in another.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

import nnsight
import pytest
import torch

import mechvlm as mv
from helpers.ndif import HOST, TOLERANCE, difference
from mechvlm.datasets.naming import naming
from mechvlm.ndif import jobs

pytestmark = pytest.mark.ndif

COLLECT = """
import sys

import beartype, nnsight, torch
import mechvlm as mv
from mechvlm.datasets.naming import naming

nnsight.CONFIG.API.HOST = sys.argv[1]
vlm = mv.load(sys.argv[2], remote=True)
examples = naming(2, seed=3)
inputs = vlm.inputs([e.image for e in examples], [e.prompt for e in examples])
job = mv.read(vlm, inputs, mv.LogitLens(k=3), mv.Contextualization(), blocking=False, job_id=sys.argv[3])
lens, context = job.result(timeout=120.0)
torch.save([lens.ids, lens.probs, context.inter], sys.argv[4])
"""


def inputs_of(vlm):
    """The inputs that `COLLECT` makes."""
    examples = naming(2, seed=3)
    return vlm.inputs([e.image for e in examples], [e.prompt for e in examples])


def test_a_job_gives_what_waiting_gives(pair, user, traffic, monkeypatch):
    key = "3f2b8a10-5a1e-4c56-9b7d-0c0ffee0beef"
    monkeypatch.setattr(nnsight.CONFIG.API, "APIKEY", key)
    probes = mv.LogitLens(), mv.NormAttention()
    job = mv.read(pair.there, pair.inputs, *probes, blocking=False)
    assert isinstance(job, mv.Job)
    assert job.status in ("received", "queued", "provisioning", "deploying", "dispatched", "running", "completed")
    there, here = job.result(), mv.read(pair.here, pair.inputs, *probes)
    assert difference(there, here) <= TOLERANCE
    assert job.status == "completed"
    assert difference(job.result(), here) <= TOLERANCE  # a result can be taken several times
    assert traffic.requests == 1
    assert repr(job) == f"Job({job.id!r})"
    assert key not in f"{job!r}{job.id}{[repr(value) for value in vars(job).values()]}"


def test_another_process_collects_it(server, pair, tmp_path):
    """With the same lines of code, and the id."""
    inputs = inputs_of(pair.there)
    probes = mv.LogitLens(k=3), mv.Contextualization()
    job = mv.read(pair.there, inputs, *probes, blocking=False)
    script, collected = tmp_path / "collect.py", tmp_path / "collected.pt"
    script.write_text(COLLECT)
    env = {**os.environ, "PYTHONPATH": str(Path(mv.__file__).parent.parent)}
    subprocess.run([sys.executable, script, HOST, pair.here.name, job.id, collected], check=True, env=env, timeout=300)
    lens, context = mv.read(pair.here, inputs, *probes)
    assert difference(torch.load(collected), [lens.ids, lens.probs, context.inter]) <= TOLERANCE


def test_a_job_that_was_asked_something_else(pair):
    job = mv.read(pair.there, pair.inputs, mv.LogitLens(), blocking=False)
    job.result()
    for inputs, probe in ((pair.inputs[0], mv.LogitLens()), (pair.inputs, mv.LogitLens(k=2))):
        with pytest.raises(mv.InputError, match="asked something else"):
            mv.read(pair.there, inputs, probe, blocking=False, job_id=job.id).result()


def test_a_trace_that_nobody_waits_for(pair, user, traffic):
    """An ordinary trace gives the values that it saved, by their names."""
    with torch.no_grad(), pair.there.trace(pair.inputs, blocking=False) as tracer:
        norms = nnsight.save(pair.there.resid_post[2].norm(dim=-1))
    saved = pair.there.job(tracer.backend.job_id).result()
    assert set(saved) == {"norms"}
    with torch.no_grad(), pair.here.trace(pair.inputs):
        norms = nnsight.save(pair.here.resid_post[2].norm(dim=-1))
    assert difference(saved["norms"], norms) <= TOLERANCE
    assert traffic.requests == 1


def test_a_job_that_is_not_done_in_time(pair):
    with torch.no_grad(), pair.there.trace(pair.inputs, blocking=False) as tracer:
        for _ in range(30):
            time.sleep(0.1)
        answer = nnsight.save(pair.there.logits[:, -1].argmax(-1))  # noqa: F841
    job = pair.there.job(tracer.backend.job_id)
    with pytest.raises(mv.RemoteError, match=r"not done after 0\.5 s\. It goes on") as caught:
        job.result(timeout=0.5)
    assert caught.value.retryable
    assert len(job.result(timeout=60.0)["answer"]) == 3


def test_a_job_that_failed(pair):
    with torch.no_grad(), pair.there.trace(pair.inputs, blocking=False) as tracer:
        answer = nnsight.save(pair.there.resid_post[2] @ torch.zeros(3))  # noqa: F841
    job = pair.there.job(tracer.backend.job_id)
    with pytest.raises(mv.RemoteError, match=r"resid_post\[2\] @ torch.zeros"):
        job.result()
    assert job.status == "error"


def test_a_job_that_the_server_does_not_know(pair, monkeypatch):
    monkeypatch.setattr(jobs, "UNKNOWN_AFTER", 0.3)
    with pytest.raises(mv.RemoteError, match="knows no job 'mistyped'") as caught:
        pair.there.job("mistyped").result()
    assert not caught.value.retryable
