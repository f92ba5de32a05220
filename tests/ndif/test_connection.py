"""The connection to NDIF, as far as it needs no server: what is said where none answers, and when it is tried again."""

import io
import logging
import re
import socket
import time
import traceback

import httpx
import nnsight
import pytest
from nnsight.schema.response import ResponseModel, Status
from PIL import Image
from rich.console import Console

import mechvlm as mv
from mechvlm import progress
from mechvlm.ndif import connection
from mechvlm.ndif.connection import Connection, retrying
from mechvlm.ndif.messages import in_plain_words, without_key
from mechvlm.progress import StatusLine

KEY = "3f2b8a10-5a1e-4c56-9b7d-0c0ffee0beef"
MODEL = 'nnsight.modeling.transformers.TransformersModel:{"repo_id": "llava-hf/llava-1.5-7b-hf", "revision": null}'


@pytest.fixture
def request_(monkeypatch):
    monkeypatch.setattr(nnsight.CONFIG.API, "HOST", "http://ndif.test")
    monkeypatch.setattr(nnsight.CONFIG.API, "APIKEY", KEY)
    return Connection(MODEL)


@pytest.fixture
def slept(monkeypatch):
    found = []
    monkeypatch.setattr(connection.time, "sleep", found.append)
    return found


def test_no_server(monkeypatch, caplog, capfd):
    """Nobody listens at this port: said at once, and without the key."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        host = f"http://127.0.0.1:{free.getsockname()[1]}"
    monkeypatch.setattr(nnsight.CONFIG.API, "HOST", host)
    monkeypatch.setattr(nnsight.CONFIG.API, "APIKEY", KEY)
    caplog.set_level(logging.DEBUG)
    vlm = mv.load("tiny-llava", remote=True)  # asks no server
    inputs = vlm.inputs(Image.new("RGB", (40, 30)), "What is it?")
    for ask in (
        lambda: mv.read(vlm, inputs, mv.LogitLens()),
        lambda: mv.read(vlm, inputs, mv.LogitLens(), blocking=False),
        lambda: vlm.generate(inputs),
        lambda: vlm.job("some id").status,
    ):
        with pytest.raises(mv.RemoteError, match=f"No NDIF answers at {host}.*refused.*NDIF_HOST") as caught:
            ask()
        error = caught.value
        assert error.retryable
        assert error.__cause__ is None
        assert error.__context__ is None
        assert KEY not in "".join(traceback.format_exception(error)) + repr(vars(error))
    written = capfd.readouterr()
    assert KEY not in caplog.text + written.out + written.err


def test_what_may_pass_is_tried_again(slept):
    tried = []

    def work():
        tried.append(1)
        if len(tried) < 4:
            raise mv.RemoteError("lost", retryable=True)
        return "found"

    assert retrying(work) == "found"
    assert slept == [1.0, 2.0, 4.0]


def test_what_does_not_come_back_is_given_up(slept):
    tried = []

    def work():
        tried.append(1)
        raise mv.RemoteError("lost", retryable=True)

    with pytest.raises(mv.RemoteError, match="lost"):
        retrying(work)
    assert len(tried) == 7
    assert sum(slept) == 63.0


@pytest.mark.parametrize("error", [mv.RemoteError("no key"), ValueError("no positions")])
def test_what_stays_wrong_is_not_tried_again(slept, error):
    tried = []

    def work():
        tried.append(1)
        raise error

    with pytest.raises(type(error), match=str(error)):
        retrying(work)
    assert len(tried) == 1
    assert not slept


def answered(code: int, detail: str) -> httpx.HTTPStatusError:
    asked = httpx.Request("POST", "http://ndif.test/request", headers={"ndif-api-key": KEY})
    answer = httpx.Response(code, json={"detail": detail}, request=asked)
    return httpx.HTTPStatusError("refused", request=asked, response=answer)


@pytest.mark.parametrize(
    ("code", "detail", "said", "retryable"),
    [
        (401, "Missing or invalid API key.", "does not take the API key of nnsight's configuration", False),
        (400, f"Invalid API key format: '{KEY}'", r"Invalid API key format: '\(your API key\)'", False),
        (413, "Request Entity Too Large", "Send smaller batches", False),
        (422, "no envelope", "refused the request: no envelope", False),
        (429, "Slow down", "Try again in a few minutes", True),
        (503, "compute backend is reconnecting", "cannot take requests now .compute backend is reconnecting", True),
    ],
)
def test_a_request_that_is_refused(request_, code, detail, said, retryable):
    error = in_plain_words(answered(code, detail), request_)
    assert re.search(said, str(error))
    assert KEY not in str(error)
    assert error.retryable is retryable


@pytest.mark.parametrize(
    ("text", "said", "retryable"),
    [
        ("Replica was evicted while processing your request. Please try again later.", "may be asked again", True),
        ("Your job was cancelled or preempted by the server.", "may be asked again", True),
        ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB", "Send smaller batches", False),
        ("Something new.", "could not run the job on llava-hf/llava-1.5-7b-hf: Something new.", False),
    ],
)
def test_a_job_that_is_not_done(request_, text, said, retryable):
    error = in_plain_words(connection.ServersError(text), request_)
    assert said in str(error)
    assert error.retryable is retryable


def test_the_key_is_blotted_out_wherever_it_comes_from(request_, capsys):
    assert without_key(f"a {KEY} b", KEY) == "a (your API key) b"
    assert without_key("a b", "") == "a b"
    request_.display.update(ResponseModel(id="1", status=Status.LOG, description=f"printed {KEY}"))
    assert capsys.readouterr().out == "printed (your API key)\n"


@pytest.fixture
def terminal(monkeypatch):
    """What is drawn on stderr, as if that were a terminal."""
    drawn = io.StringIO()
    monkeypatch.setattr(progress, "STDERR", Console(file=drawn, force_terminal=True, width=60, force_jupyter=False))
    return drawn


def statuses(request_, *names):
    with request_.display:
        for name in names:
            text = "Added to Queue at position 3." if name == "QUEUED" else f"About {KEY}"
            request_.display.update(ResponseModel(id="1", status=Status(name), description=text))
            request_.display.line._line.refresh()


def test_the_line_says_where_the_job_is(request_, terminal):
    statuses(request_, "RECEIVED", "QUEUED", "DISPATCHED", "RUNNING", "COMPLETED")
    drawn = terminal.getvalue()
    at = [drawn.index(f"NDIF: {said}") for said in ("received", "queued (Added", "approved", "running", "completed")]
    assert at == sorted(at)
    assert "position 3" in drawn
    assert "0:00:00" in drawn
    assert KEY not in drawn
    assert drawn.endswith("\x1b[2K")  # wiped away


def test_nothing_is_drawn_where_nobody_looks(request_, capfd, monkeypatch):
    statuses(request_, "RECEIVED", "QUEUED", "RUNNING", "COMPLETED")
    assert capfd.readouterr() == ("", "")
    monkeypatch.setattr(nnsight.CONFIG.APP, "REMOTE_LOGGING", False)
    statuses(Connection(MODEL), "RUNNING")
    assert capfd.readouterr() == ("", "")


def test_asked_for_it_is_written_line_by_line(request_, capfd):
    statuses(Connection(MODEL, verbose=True), "RECEIVED", "RUNNING", "RUNNING", "COMPLETED")
    assert capfd.readouterr() == ("", "NDIF: received\nNDIF: running\nNDIF: completed\n")


def test_the_line_stands_under_a_bar(terminal):
    for _ in progress.track([1, 2], "batches"):
        with StatusLine("NDIF: running"):
            time.sleep(0.3)
    assert "batches" in terminal.getvalue()
    assert "NDIF: running" in terminal.getvalue()


def test_jobs_are_NDIFs(llava_vlm):
    inputs = llava_vlm.inputs(Image.new("RGB", (40, 30)), "what is this")
    for ask in (
        lambda: mv.read(llava_vlm, inputs, mv.LogitLens(), blocking=False),
        lambda: llava_vlm.trace(inputs, blocking=False),
        lambda: llava_vlm.job("some id"),
    ):
        with pytest.raises(mv.ModelError, match="load it with remote=True"):
            ask()
