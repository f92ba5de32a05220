"""Fixtures of the tests marked `ndif`: a real server, and its users, trusted or in a sandbox."""

import dataclasses
import json
import os
import urllib.request
from types import SimpleNamespace

import nnsight
import pytest
import torch
from nnsight.schema.request import RequestModel

import mechvlm as mv
from mechvlm import bundled
from mechvlm.datasets.naming import naming
from mechvlm.ndif.requests import Request

HOST = os.environ.get("NDIF_HOST", "http://127.0.0.1:8009")
TOLERANCE = 1e-5


@pytest.fixture(scope="session")
def server():
    """The server's address. Without one tests fail: skipping would hide what is not tested."""
    try:
        urllib.request.urlopen(f"{HOST}/connected", timeout=10)
    except OSError as error:
        pytest.fail(
            f"No NDIF server answers at {HOST} ({error}). Start one with scripts/ndif_loopback/start.sh, or run the tests "
            "beside one: scripts/ndif_loopback/start.sh pytest -m ndif"
        )
    before = nnsight.CONFIG.API.HOST, nnsight.CONFIG.APP.REMOTE_LOGGING
    nnsight.CONFIG.API.HOST, nnsight.CONFIG.APP.REMOTE_LOGGING = HOST, False
    yield HOST
    nnsight.CONFIG.API.HOST, nnsight.CONFIG.APP.REMOTE_LOGGING = before


@pytest.fixture
def sandboxed(monkeypatch):
    """Runs as a user whose blocks run in a process without weights.

    A server without API keys believes what a request says about trust.
    """
    envelope = RequestModel.metadata
    monkeypatch.setattr(RequestModel, "metadata", lambda r: json.dumps({**json.loads(envelope(r)), "trusted": False}))


@pytest.fixture(params=["trusted", "sandbox"])
def user(request):
    """The user who sends the requests."""
    if request.param == "sandbox":
        request.getfixturevalue("sandboxed")
    return request.param


@pytest.fixture
def traffic(monkeypatch):
    """Traffic with the server: the number of `requests`; `received`, the bytes of each result."""
    counts = SimpleNamespace(requests=0, received=[])
    post, finalize = Request._post, Request.finalize

    def counted(self, *args):
        counts.requests += 1
        return post(self, *args)

    def weighed(self, content):
        counts.received.append(len(content))
        return finalize(self, content)

    monkeypatch.setattr(Request, "_post", counted)
    monkeypatch.setattr(Request, "finalize", weighed)
    return counts


@pytest.fixture(scope="session", params=bundled.NAMES)
def pair(request, server):
    """A bundled model on the server and here, and a padded batch of three prompts.

    The prompts have different lengths. `answers` and `boxes` are those of the three examples.
    """
    there, here = mv.load(request.param, remote=True), mv.load(request.param)
    examples = naming(3, seed=1)
    prompts = [examples[0].prompt, "Describe the scene.", f"{examples[2].prompt} Answer in one word."]
    inputs = there.inputs([e.image for e in examples], prompts)
    assert len({len(inputs[row].tokens) for row in range(3)}) == 3
    answers, boxes = [e.answer for e in examples], [e.box for e in examples]
    return SimpleNamespace(there=there, here=here, inputs=inputs, answers=answers, boxes=boxes)


def difference(a, b) -> float:
    """The largest difference of two results, tensors or nested lists of them.

    Asserts that shapes, dtypes, whole numbers and settings are the same.
    """
    if isinstance(a, torch.Tensor):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        if not a.is_floating_point():
            assert torch.equal(a, b)
            return 0.0
        assert torch.equal(a.isnan(), b.isnan())
        return float((a - b).detach().nan_to_num().abs().max()) if a.numel() else 0.0
    if dataclasses.is_dataclass(a):
        assert type(a) is type(b)
        return max(difference(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(a))
    if isinstance(a, list | tuple):
        assert len(a) == len(b)
        return max((difference(x, y) for x, y in zip(a, b, strict=True)), default=0.0)
    assert a == b
    return 0.0


def tensor_bytes(result) -> int:
    """The size of a result's tensors, in bytes."""
    return sum(t.numel() * t.element_size() for t in vars(result).values() if isinstance(t, torch.Tensor))
