"""On a real NDIF server: errors in plain words, without the API key.

Errors that may pass by themselves are retryable.
"""

import logging
import os
import re
import shutil
import time
import traceback

import nnsight
import pytest
import torch

import mechvlm as mv
from helpers.cut_line import Line
from helpers.ndif import TOLERANCE, difference
from mechvlm import bundled
from mechvlm.datasets.naming import naming
from mechvlm.ndif import connection, messages
from mechvlm.ndif.connection import retrying
from mechvlm.ndif.requests import Request

pytestmark = pytest.mark.ndif

KEYS, NEWER = "http://127.0.0.1:8010", "http://127.0.0.1:8011"
"""Two more addresses of the server that scripts/ndif_loopback starts.

The first wants API keys, the second newer clients.
"""
WELL_FORMED = "3f2b8a10-5a1e-4c56-9b7d-0c0ffee0beef"
LIMIT = float(os.environ.get("NDIF_DEFAULT_EXECUTION_TIMEOUT_SECONDS", 60))
"""Seconds after which the server stops a job."""


@pytest.fixture(scope="module")
def there(server):
    return mv.load("tiny-llava", remote=True)


@pytest.fixture(scope="module")
def inputs(there):
    examples = naming(2, seed=3)
    return there.inputs([e.image for e in examples], [e.prompt for e in examples])


@pytest.fixture
def line(server, monkeypatch):
    line = Line(server)
    monkeypatch.setattr(nnsight.CONFIG.API, "HOST", line.address)
    return line


@pytest.fixture
def key(monkeypatch, caplog, capfd):
    """Sets a key. Afterwards no output and no log holds it."""
    caplog.set_level(logging.DEBUG)

    def use(value):
        monkeypatch.setattr(nnsight.CONFIG.API, "APIKEY", value)
        return value

    yield use
    written = capfd.readouterr()
    for secret in {nnsight.CONFIG.API.APIKEY} - {None}:
        assert secret not in caplog.text + written.out + written.err


def error_of(work) -> mv.RemoteError:
    """The error that the work raises; neither it nor its causes hold the key."""
    with pytest.raises(mv.RemoteError) as caught:
        work()
    error = caught.value
    cause: BaseException | None = error
    while cause is not None:
        shown = f"{cause}{cause!r}{vars(cause)}" + "".join(traceback.format_exception(cause))
        assert nnsight.CONFIG.API.APIKEY is None or nnsight.CONFIG.API.APIKEY not in shown
        cause = cause.__cause__ or cause.__context__
    return error


def save_state(vlm, inputs):
    with torch.no_grad(), vlm.trace(inputs):
        resid = nnsight.save(vlm.resid_post[2])
    return resid


def test_no_key(there, inputs, key, monkeypatch):
    monkeypatch.setattr(nnsight.CONFIG.API, "HOST", KEYS)
    key(None)
    error = error_of(lambda: save_state(there, inputs))
    assert "wants an API key, and there is none" in str(error)
    assert "nnsight login" in str(error)
    assert not error.retryable


@pytest.mark.parametrize("blocking", [True, False])
def test_a_text_that_is_no_key(there, inputs, key, monkeypatch, blocking):
    """The server's answer holds the text that was given as the key."""
    monkeypatch.setattr(nnsight.CONFIG.API, "HOST", KEYS)
    key("secret-and-mistyped")
    error = error_of(lambda: mv.read(there, inputs, mv.LogitLens(), blocking=blocking))
    assert "does not take the API key" in str(error)
    assert "(your API key)" in str(error)
    assert not error.retryable


def test_a_server_that_cannot_look_keys_up(there, inputs, key, monkeypatch):
    monkeypatch.setattr(nnsight.CONFIG.API, "HOST", KEYS)
    key(WELL_FORMED)
    error = error_of(lambda: save_state(there, inputs))
    assert "cannot take requests now (Auth backend unavailable.)" in str(error)
    assert error.retryable


def test_a_model_that_is_not_hosted(there, inputs, key, tmp_path):
    key(WELL_FORMED)
    save_state(there, inputs)  # makes the server host this model
    shutil.copytree(bundled.path("tiny-llava"), tmp_path / "other")
    next((tmp_path / "other").glob("*.safetensors")).unlink()
    other = mv.load(tmp_path / "other", remote=True)
    error = error_of(lambda: save_state(other, inputs))
    assert f"does not host {tmp_path / 'other'}" in str(error)
    assert re.search(f"It runs .*{bundled.path('tiny-llava')}.* at the moment", str(error))
    assert not error.retryable


def test_a_client_that_is_too_old(there, inputs, key, monkeypatch):
    monkeypatch.setattr(nnsight.CONFIG.API, "HOST", NEWER)
    key(WELL_FORMED)
    error = error_of(lambda: save_state(there, inputs))
    assert "below the minimum supported 99.0" in str(error)
    assert "pip install --upgrade nnsight" in str(error)
    assert not error.retryable


def test_versions_that_differ(there, inputs, key, monkeypatch):
    """A request that the server cannot read: the message compares its versions with those here."""
    key(WELL_FORMED)
    here = messages.get_local_env()
    older = {**here, "packages": {**here["packages"], "transformers": "4.9.1"}}
    monkeypatch.setattr(messages, "get_local_env", lambda: older)
    monkeypatch.setattr(Request, "_serialize", lambda self, tracer: b"from another version")
    error = error_of(lambda: save_state(there, inputs))
    assert "could not read the request" in str(error)
    assert f"transformers is {here['packages']['transformers']} there and 4.9.1 here" in str(error)
    assert "torch is" not in str(error)
    assert not error.retryable
    monkeypatch.setattr(messages, "get_local_env", lambda: here)
    assert "are the same there and here" in str(error_of(lambda: save_state(there, inputs)))


def test_a_job_that_takes_too_long(there, inputs, key):
    key(WELL_FORMED)

    def slow():
        with there.trace(inputs):
            for _ in range(int(LIMIT) * 10 + 100):
                time.sleep(0.1)
            resid = nnsight.save(there.resid_post[2])
        return resid

    error = error_of(slow)
    assert f"exceeded the execution timeout of {LIMIT}s" in str(error)
    assert "a smaller batch" in str(error)
    assert not error.retryable
    assert len(save_state(there, inputs)) == 2  # the server still works


@pytest.mark.parametrize("blocking", [True, False])
def test_a_result_that_is_too_large(there, inputs, key, monkeypatch, blocking):
    """A result comes over the connection; a job's result comes from a store."""
    key(WELL_FORMED)
    monkeypatch.setattr(connection, "LARGEST_RESULT", 20_000)

    def large():
        with torch.no_grad(), there.trace(inputs, blocking=blocking) as tracer:
            resid = nnsight.save(there.resid_post[2])
        return resid if blocking else there.job(tracer.backend.job_id).result()

    error = error_of(large)
    assert "The result is too large: 0.1 MB, and at most 0.0 MB are fetched" in str(error)
    assert "reduce inside the block" in str(error)
    assert not error.retryable


def broken(vlm, inputs):
    with torch.no_grad(), vlm.trace(inputs):
        resid = vlm.resid_post[2]
        letter = nnsight.save(first_letter(resid))
    return letter


def first_letter(resid):
    return resid.letters[0]


def test_an_error_in_the_block(there, inputs, user, key):
    """The message shows the block's own lines, and none of the server's packages."""
    key(WELL_FORMED)
    error = error_of(lambda: broken(there, inputs))
    message = str(error)
    assert message.startswith(f"Your block failed on NDIF, with {bundled.path('tiny-llava')}:\nTraceback")
    assert "letter = nnsight.save(first_letter(resid))" in message
    assert "return resid.letters[0]" in message
    assert message.endswith("AttributeError: 'Tensor' object has no attribute 'letters'")
    assert "site-packages" not in message
    assert not error.retryable


def test_prints_in_the_block(there, inputs, user, monkeypatch, capsys):
    monkeypatch.setattr(nnsight.CONFIG.APP, "REMOTE_LOGGING", True)
    with torch.no_grad(), there.trace(inputs):
        print("two examples:", len(there.resid_post[2]))
    assert "two examples: 2" in capsys.readouterr().out


def test_a_connection_that_is_lost(there, inputs, line, traffic, key, monkeypatch):
    """During the job: the error says so, and another request gives the same as here."""
    key(WELL_FORMED)
    post = Request._post
    cuts = []

    def cutting(self, *args):
        if not cuts:
            cuts.append(line.cut())  # cuts the subscription: the request has its own connection
        return post(self, *args)

    monkeypatch.setattr(Request, "_post", cutting)
    error = error_of(lambda: mv.read(there, inputs, mv.LogitLens()))
    assert f"The connection to NDIF at {line.address} was lost" in str(error)
    assert "The job was received." in str(error)
    assert error.retryable
    cuts.clear()
    (remote,) = retrying(lambda: mv.read(there, inputs, mv.LogitLens()), waits=(0.1,))
    assert len(cuts) == 1
    (here,) = mv.read(mv.load("tiny-llava"), inputs, mv.LogitLens())
    assert difference(remote, here) <= TOLERANCE
    assert traffic.requests == 3


def test_a_connection_that_is_lost_costs_a_job_nothing(there, inputs, line, traffic, key):
    """NDIF is asked about the job again; the job is submitted once."""
    key(WELL_FORMED)
    job = mv.read(there, inputs, mv.LogitLens(), blocking=False)
    line.cut(seconds=1.5)
    start = time.monotonic()
    (remote,) = job.result()
    assert time.monotonic() - start > 0.9
    (here,) = mv.read(mv.load("tiny-llava"), inputs, mv.LogitLens())
    assert difference(remote, here) <= TOLERANCE
    assert traffic.requests == 1
