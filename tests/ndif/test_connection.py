"""The connection to NDIF without a server: messages, status lines, and when work is tried again."""

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
from mechvlm.ndif.pickling import shown_path
from mechvlm.progress import StatusLine

KEY = "3f2b8a10-5a1e-4c56-9b7d-0c0ffee0beef"
MODEL = 'nnsight.modeling.transformers.TransformersModel:{"repo_id": "llava-hf/llava-1.5-7b-hf", "revision": null}'


@pytest.fixture
def request_(monkeypatch):
    monkeypatch.setattr(nnsight.CONFIG.API, "HOST", "https://ndif.test")
    monkeypatch.setattr(nnsight.CONFIG.API, "APIKEY", KEY)
    return Connection(MODEL)


@pytest.fixture
def slept(monkeypatch):
    """The seconds of every sleep, none of which is slept."""
    seconds = []
    monkeypatch.setattr(connection.time, "sleep", seconds.append)
    return seconds


def test_no_server(monkeypatch, caplog, capfd):
    """Nobody listens at this port: the error comes at once, and does not hold the key."""
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


def test_a_retryable_error_is_tried_again(slept):
    attempts = []

    def work():
        attempts.append(1)
        if len(attempts) < 4:
            raise mv.RemoteError("lost", retryable=True)
        return "result"

    assert retrying(work) == "result"
    assert slept == [1.0, 2.0, 4.0]


def test_the_last_attempt_raises(slept):
    attempts = []

    def work():
        attempts.append(1)
        raise mv.RemoteError("lost", retryable=True)

    with pytest.raises(mv.RemoteError, match="lost"):
        retrying(work)
    assert len(attempts) == 7
    assert sum(slept) == 63.0


@pytest.mark.parametrize("error", [mv.RemoteError("no key"), ValueError("no positions")])
def test_another_error_is_not_tried_again(slept, error):
    attempts = []

    def work():
        attempts.append(1)
        raise error

    with pytest.raises(type(error), match=str(error)):
        retrying(work)
    assert len(attempts) == 1
    assert not slept


def refusal(code: int, detail: str) -> httpx.HTTPStatusError:
    request = httpx.Request("POST", "http://ndif.test/request", headers={"ndif-api-key": KEY})
    response = httpx.Response(code, json={"detail": detail}, request=request)
    return httpx.HTTPStatusError("refused", request=request, response=response)


@pytest.mark.parametrize(
    ("code", "detail", "message", "retryable"),
    [
        (401, "Missing or invalid API key.", "does not take the API key of nnsight's configuration", False),
        (400, f"Invalid API key format: '{KEY}'", r"Invalid API key format: '\(your API key\)'", False),
        (413, "Request Entity Too Large", "Send smaller batches", False),
        (422, "no envelope", "refused the request: no envelope", False),
        (429, "Slow down", "Try again in a few minutes", True),
        (503, "compute backend is reconnecting", "cannot take requests now .compute backend is reconnecting", True),
    ],
)
def test_a_request_that_is_refused(request_, code, detail, message, retryable):
    error = in_plain_words(refusal(code, detail), request_)
    assert re.search(message, str(error))
    assert KEY not in str(error)
    assert error.retryable is retryable


@pytest.mark.parametrize(
    ("text", "message", "retryable"),
    [
        ("Replica was evicted while processing your request. Please try again later.", "later. Send it again.", True),
        ("Your job was cancelled or preempted by the server.", "server. Send it again.", True),
        ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB", "Send smaller batches", False),
        ("Something new.", "could not run the job on llava-hf/llava-1.5-7b-hf: Something new.", False),
    ],
)
def test_a_job_that_is_not_done(request_, text, message, retryable):
    error = in_plain_words(connection.ServersError(text), request_)
    assert message in str(error)
    assert error.retryable is retryable


def test_the_key_is_blotted_out_of_every_text(request_, capsys):
    assert without_key(f"a {KEY} b", KEY) == "a (your API key) b"
    assert without_key("a b", "") == "a b"
    request_.display.update(ResponseModel(id="1", status=Status.LOG, description=f"printed {KEY}"))
    assert capsys.readouterr().out == "printed (your API key)\n"


@pytest.fixture
def terminal(monkeypatch):
    """Everything drawn on stderr, as on a terminal."""
    drawn = io.StringIO()
    monkeypatch.setattr(progress, "STDERR", Console(file=drawn, force_terminal=True, width=60, force_jupyter=False))
    return drawn


def statuses(request_, *names):
    with request_.display:
        for name in names:
            text = "Added to Queue at position 3." if name == "QUEUED" else f"About {KEY}"
            request_.display.update(ResponseModel(id="1", status=Status(name), description=text))
            request_.display.line._line.refresh()


def test_the_line_shows_the_jobs_status(request_, terminal):
    statuses(request_, "RECEIVED", "QUEUED", "DISPATCHED", "RUNNING", "COMPLETED")
    drawn = terminal.getvalue()
    shown = ("received", "queued (Added", "approved", "running", "completed")
    places = [drawn.index(f"NDIF: {status}") for status in shown]
    assert places == sorted(places)
    assert "position 3" in drawn
    assert "0:00:00" in drawn
    assert KEY not in drawn
    assert drawn.endswith("\x1b[2K")  # the line is erased


def test_nothing_is_drawn_without_a_terminal(request_, capfd, monkeypatch):
    statuses(request_, "RECEIVED", "QUEUED", "RUNNING", "COMPLETED")
    assert capfd.readouterr() == ("", "")
    monkeypatch.setattr(nnsight.CONFIG.APP, "REMOTE_LOGGING", False)
    statuses(Connection(MODEL), "RUNNING")
    assert capfd.readouterr() == ("", "")


def test_verbose_prints_every_status_as_a_line(request_, capfd):
    statuses(Connection(MODEL, verbose=True), "RECEIVED", "RUNNING", "RUNNING", "COMPLETED")
    assert capfd.readouterr() == ("", "NDIF: received\nNDIF: running\nNDIF: completed\n")


def test_the_line_is_drawn_under_a_bar(terminal):
    for _ in progress.track([1, 2], "batches"):
        with StatusLine("NDIF: running"):
            time.sleep(0.3)
    assert "batches" in terminal.getvalue()
    assert "NDIF: running" in terminal.getvalue()


def test_a_job_needs_a_model_on_ndif(llava_vlm):
    inputs = llava_vlm.inputs(Image.new("RGB", (40, 30)), "what is this")
    for ask in (
        lambda: mv.read(llava_vlm, inputs, mv.LogitLens(), blocking=False),
        lambda: llava_vlm.trace(inputs, blocking=False),
        lambda: llava_vlm.job("some id"),
    ):
        with pytest.raises(mv.ModelError, match="load it with remote=True"):
            ask()


def test_a_traceback_names_a_file_by_its_place_in_its_package(tmp_path):
    """Wherever it is installed: an editable install puts no folder on `sys.path`."""
    folder = tmp_path / "elsewhere" / "mechvlm" / "tracing"
    folder.mkdir(parents=True)
    for package in (folder, folder.parent):
        (package / "__init__.py").touch()
    assert shown_path(str(folder / "reading.py")) == "mechvlm/tracing/reading.py"
    assert shown_path(str(tmp_path / "notes" / "script.py")) == "script.py"
    assert shown_path("<ipython-input-1>") == "<ipython-input-1>"
