"""A server that answers wrongly: each answer becomes a RemoteError that does not hold the key."""

import copy
import itertools
import json
import logging
import os
import pickle
import resource
import time
import traceback
from pathlib import Path

import nnsight
import pytest
import torch
from nnsight.schema.response import Status
from PIL import Image

import mechvlm as mv
from helpers.hostile_server import HostileServer, accepted, answer, frame, packed, saved, status
from mechvlm import bundled
from mechvlm.ndif import connection, streams
from mechvlm.ndif.requests import Request

pytestmark = pytest.mark.long

KEY = "3f2b8a10-5a1e-4c56-9b7d-0c0ffee0beef"


@pytest.fixture(scope="module")
def there():
    return mv.load("tiny-llava", remote=True)


@pytest.fixture(scope="module")
def inputs(there):
    return there.inputs(Image.new("RGB", (40, 30)), "What is it?")


@pytest.fixture
def hostile(monkeypatch, caplog, capfd):
    """The server. Afterwards no output and no log holds the key."""
    server = HostileServer()
    monkeypatch.setattr(nnsight.CONFIG.API, "HOST", server.address)
    monkeypatch.setattr(nnsight.CONFIG.API, "APIKEY", KEY)
    monkeypatch.setattr(connection, "RETRY_WAITS", ())
    caplog.set_level(logging.DEBUG)
    yield server
    server.close()
    written = capfd.readouterr()
    assert KEY not in caplog.text + written.out + written.err


@pytest.fixture(params=["read", "trace", "job", "collected"])
def ask(request, there, inputs, hostile):
    """The ways to ask. `hostile.data` and `hostile.text` are what the server completes it with."""

    def work():
        if request.param == "read":
            return mv.read(there, inputs, mv.LogitLens())
        if request.param == "trace":
            with torch.no_grad(), there.trace(inputs):
                value = nnsight.save(there.resid_post[2])
            return value
        if request.param == "job":
            return there.job("job-1").result()
        return mv.read(there, inputs, mv.LogitLens(), blocking=False, job_id="job-1").result()

    return work


def completed(hostile: HostileServer, data: object) -> None:
    """Let every job be complete with this data; bytes are served at an address."""
    if isinstance(data, bytes):
        hostile.pages["/result"] = lambda _, content=data: answer(content)
        data = f"{hostile.address}/result"
    text = status("COMPLETED", data=data)
    hostile.pages["/response/job-1"] = lambda _: answer(text)
    hostile.frames = [frame(text)]


def error_of(work, **local) -> mv.RemoteError:
    """The RemoteError of some work. It holds no key, nor do its causes, pickles and frames."""
    with pytest.raises(mv.RemoteError) as caught:
        work()
    error = caught.value
    assert error.__cause__ is None
    assert error.__context__ is None
    assert KEY not in f"{error}{error!r}{vars(error)}".lower()
    assert KEY.encode() not in pickle.dumps(error)
    shown = traceback.TracebackException.from_exception(error, capture_locals=True)
    ours = [frame for frame in shown.stack if "/mechvlm/" in frame.filename or "site-packages" in frame.filename]
    assert KEY not in "".join(f"{frame.locals}" for frame in ours)
    return error


class Runs:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_code_in_a_result_does_not_run(hostile, ask, tmp_path):
    completed(hostile, packed(saved({"rows": [Runs(tmp_path / "ran")]})))
    assert "could run code" in str(error_of(ask))
    assert not (tmp_path / "ran").exists()


def test_code_in_a_frame_does_not_run(hostile, there, inputs, tmp_path):
    """A status comes as a file of torch.save too, before any result is read."""
    hostile.frames = [frame(saved({"id": "job-1", "status": Runs(tmp_path / "ran")}), opcode=2)]
    assert "could run code" in str(error_of(lambda: mv.read(there, inputs, mv.LogitLens())))
    assert not (tmp_path / "ran").exists()


def test_a_result_on_the_socket_is_read(hostile, there, inputs):
    content = {"value": torch.arange(3.0)}
    whole = {"id": "job-1", "status": Status.COMPLETED, "data": packed(saved(content))}
    hostile.frames = [frame(status("RUNNING")), frame(saved(whole, pickle_protocol=4), opcode=2)]
    with torch.no_grad(), there.trace(inputs):
        value = nnsight.save(there.resid_post[2])
    assert value.tolist() == [0.0, 1.0, 2.0]


def test_a_server_sets_no_other_names(hostile, there, inputs):
    """Only the names of the block: not this function's own variables, nor a module's."""
    mine = "mine"
    completed(hostile, packed(saved({"value": 1, "mine": "theirs"})))

    def work():
        with torch.no_grad(), there.trace(inputs):
            value = nnsight.save(there.resid_post[2])
        return value

    assert "'mine', which the block does not name" in str(error_of(work))
    assert mine == "mine"


ODD_DATA = {
    "nothing": None,
    "a number": 7,
    "a list": [1, 2],
    "an empty text": "",
    "a file": "file:///etc/passwd",
    "another protocol": "ftp://127.0.0.1/x",
    "plain http": "http://192.0.2.1/result",
    "the key": f"https://192.0.2.1/{KEY}",
    "no address": "not an address",
    "not packed": b"hello",
    "not saved": packed(b"hello"),
    "a list of values": packed(saved([1])),
    "numbers as names": packed(saved({1: 2})),
    "empty": packed(saved({})),
    "wrong values": packed(saved({"asked": [""], "rows": 3, "finite": "x"})),
    "wrong tensors": packed(saved({"rows": [[torch.ones(2)]], "finite": [torch.ones(1)]})),
    "a bomb": packed(saved({"a": torch.zeros(300_000_000, dtype=torch.uint8)})),
}


@pytest.mark.parametrize("name", ODD_DATA)
def test_odd_data(hostile, there, inputs, name, monkeypatch):
    monkeypatch.setattr(connection, "LARGEST_RESULT", 100_000_000)
    completed(hostile, ODD_DATA[name])
    error_of(lambda: mv.read(there, inputs, mv.LogitLens()))
    if name not in ("empty", "wrong values", "wrong tensors"):  # jobs give what was saved, as it is
        error_of(lambda: there.job("job-1").result())


@pytest.mark.parametrize(
    "text",
    [
        b"hello",
        KEY.encode(),
        b"[" * 100_000,
        b"{}",
        b"[]",
        b"null",
        b'{"id": 1, "status": "RUNNING"}',
        b'{"id": "job-1", "status": "DANCING"}',
        b'{"id": "../../etc", "status": "RUNNING"}',
        b'{"id": "job-1", "status": "RUNNING", "description": ["x"]}',
        b'{"id": "job-1", "status": "RUNNING", "meta": 3}',
        b"\xff\xfe",
        json.dumps({"id": KEY + "/", "status": "RUNNING"}).encode(),
        json.dumps({"id": "a", "status": "ERROR", "description": f"\x1b[2J{KEY}" + "x" * 1_000_000}).encode(),
    ],
)
def test_odd_statuses(hostile, there, inputs, text):
    """On the socket, as the answer to a request, and to a question about a job."""
    hostile.frames = [frame(text)]
    errors = [error_of(lambda: mv.read(there, inputs, mv.LogitLens()))]
    hostile.pages = {"/request": lambda _: answer(text), "/response/job-1": lambda _: answer(text)}
    errors += [error_of(lambda: mv.read(there, inputs, mv.LogitLens()))]
    errors += [error_of(lambda: there.job("job-1").result())]
    if b"ERROR" not in text:
        errors += [error_of(lambda: there.job("job-1").status)]
        errors += [error_of(lambda: mv.read(there, inputs, mv.LogitLens(), blocking=False))]
    assert all("\x1b" not in str(error) and len(str(error)) < 25_000 for error in errors)


@pytest.mark.parametrize("greeting", [b"hello", b"{}", b"[1]", b'{"session_id": 3}', b"[" * 50_000, KEY.encode()])
def test_odd_greetings(hostile, there, inputs, greeting):
    hostile.opening = lambda head: [accepted(head), frame(greeting)]
    error_of(lambda: mv.read(there, inputs, mv.LogitLens()))


def test_echoes(hostile, there, inputs):
    """A server that sends the request back: its head, with the key, is in every error page."""
    for code in (200, 302, 401, 404, 500):
        echo = lambda head, code=code: answer(head.encode(), code, f"X-Echo: {KEY}\r\n")  # noqa: E731
        hostile.pages = {"/request": echo, "/response/job-1": echo, "/result": echo}
        error_of(lambda: mv.read(there, inputs, mv.LogitLens()))
        if code != 404:
            error_of(lambda: there.job("job-1").status)
        hostile.frames = [frame(status("COMPLETED", data=f"{hostile.address}/result"))]
        hostile.pages = {"/request": lambda _: answer(status("RECEIVED")), "/result": echo}
        error_of(lambda: mv.read(there, inputs, mv.LogitLens()))
        hostile.opening = echo
        error_of(lambda: mv.read(there, inputs, mv.LogitLens()))
        hostile.opening = None


def test_redirects_are_not_followed(hostile, there, inputs):
    """The key would go along, to any other place."""
    other = HostileServer()
    away = lambda _: answer(b"", 307, f"Location: {other.address}/elsewhere\r\n")  # noqa: E731
    hostile.opening = away
    error_of(lambda: mv.read(there, inputs, mv.LogitLens()))
    hostile.opening = None
    hostile.pages = {"/request": away, "/response/job-1": away, "/result": away}
    error_of(lambda: mv.read(there, inputs, mv.LogitLens()))
    error_of(lambda: there.job("job-1").status)
    hostile.pages["/response/job-1"] = lambda _: answer(status("COMPLETED", data=f"{hostile.address}/result"))
    error_of(lambda: there.job("job-1").result())
    assert "/result" in hostile.paths
    assert other.paths == []
    other.close()


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


ENDLESS = itertools.repeat(bytes(1_000_000))


@pytest.mark.parametrize(
    "page",
    [
        lambda: answer(iter(ENDLESS)),
        lambda: answer(iter(ENDLESS), headers="Content-Length: 99999999999999\r\n"),
        lambda: answer(iter(ENDLESS), headers="Content-Encoding: gzip\r\n"),
        lambda: itertools.chain([b"HTTP/1.1 200 OK\r\n"], itertools.repeat(b"X-Header: long\r\n" * 1000)),
        lambda: answer(iter(ENDLESS), code=500),
    ],
)
def test_never_ending_answers(hostile, there, inputs, page, monkeypatch):
    monkeypatch.setattr(connection, "LARGEST_RESULT", 20_000_000)
    before, start = peak(), time.monotonic()
    hostile.pages = {"/request": lambda _: page(), "/response/job-1": lambda _: page(), "/result": lambda _: page()}
    error_of(lambda: mv.read(there, inputs, mv.LogitLens()))
    error_of(lambda: there.job("job-1").status)
    hostile.pages["/request"] = lambda _: answer(status("RECEIVED"))
    hostile.frames = [frame(status("COMPLETED", data=f"{hostile.address}/result"))]
    error_of(lambda: mv.read(there, inputs, mv.LogitLens()))
    assert peak() - before < 300_000_000
    assert time.monotonic() - start < 20


@pytest.mark.parametrize(
    "frames",
    [
        lambda: itertools.chain([frame(b"", opcode=2, length=2**62)], ENDLESS),
        lambda: itertools.chain([frame(b"", opcode=1, length=50_000_000)], ENDLESS),
        lambda: itertools.chain([frame(b"", opcode=9, length=50_000_000)], ENDLESS),
        lambda: itertools.chain([frame(b"x", fin=False)], itertools.repeat(frame(b"x", opcode=0, fin=False))),
        lambda: itertools.chain([frame(b"x", opcode=2, fin=False)], itertools.repeat(frame(bytes(100_000), 0, False))),
        lambda: [frame(b"", opcode=8)],
        lambda: [b"\xff" * 100],
        lambda: [frame(b"", opcode=2)],
    ],
)
def test_frames_are_measured_before_they_are_read(hostile, there, inputs, frames, monkeypatch):
    monkeypatch.setattr(connection, "LARGEST_RESULT", 20_000_000)
    before, start = peak(), time.monotonic()
    hostile.frames = frames()
    error_of(lambda: mv.read(there, inputs, mv.LogitLens()))
    assert peak() - before < 200_000_000
    assert time.monotonic() - start < 20


def test_a_server_that_drips(hostile, there, inputs, monkeypatch):
    """One byte at a time keeps every time-out of one chunk; the whole has a time-out too."""
    monkeypatch.setattr(streams, "LONGEST_GREETING", 0.5)
    monkeypatch.setattr(streams, "LONGEST_ANSWER", 0.5)

    def drip(_):
        for byte in itertools.repeat(b"x"):
            time.sleep(0.05)
            yield byte

    start = time.monotonic()
    hostile.opening = drip
    error_of(lambda: mv.read(there, inputs, mv.LogitLens()))
    hostile.opening = None
    hostile.pages["/request"] = lambda head: answer(drip(head))
    assert "not whole after" in str(error_of(lambda: mv.read(there, inputs, mv.LogitLens())))
    assert time.monotonic() - start < 10


def test_escapes_of_a_terminal_are_written_out(hostile, there, inputs, capfd, monkeypatch):
    monkeypatch.setattr(nnsight.CONFIG.APP, "REMOTE_LOGGING", True)
    hostile.frames = [
        frame(status("LOG", description="\x1b]0;mine\x07 \x9b2J")),
        frame(status("ERROR", description="\x1b[1m")),
    ]
    error = error_of(lambda: mv.read(there, inputs, mv.LogitLens()))
    assert "\\x1b[1m" in str(error)
    assert capfd.readouterr().out.splitlines()[-1] == "\\x1b]0;mine\\x07 \\x9b2J"


@pytest.mark.parametrize("host", ["http://ndif.example", "http://10.0.0.1:8009", "http://localhost.example"])
def test_plain_http_is_refused_beyond_this_machine(there, inputs, monkeypatch, host):
    monkeypatch.setattr(nnsight.CONFIG.API, "HOST", host)
    monkeypatch.setattr(nnsight.CONFIG.API, "APIKEY", KEY)
    for work in (lambda: mv.read(there, inputs, mv.LogitLens()), lambda: there.job("job-1")):
        assert "is not encrypted" in str(error_of(work))
    monkeypatch.setenv("MECHVLM_PLAIN_HTTP", "1")
    there.job("job-1")
    streams.require_private("http://192.0.2.1/result", of=host)


@pytest.mark.parametrize(
    "host", ["http://127.0.0.1:80", "http://localhost", "http://[::1]:8009", "https://ndif.example"]
)
def test_this_machine_and_https_are_taken(host):
    streams.require_private(host)


def test_a_server_elsewhere_names_no_address_here():
    for url in ("http://127.0.0.1:8080/off", "https://localhost/off"):
        with pytest.raises(mv.RemoteError, match="lies on this machine"):
            streams.require_private(url, of="https://ndif.example")


def test_nothing_that_holds_the_key_is_pickled(hostile, there, inputs):
    job = there.job("job-1")
    for thing in (job, job._request):
        for dump in (pickle.dumps, copy.copy, copy.deepcopy):
            with pytest.raises(TypeError, match="API key"):
                dump(thing)
    assert KEY not in f"{job!r}{vars(job)}"


def test_a_request_holds_no_folder_of_this_machine(there, inputs, monkeypatch):
    """Folders say who sends a request: neither a block nor a function brings its own along."""
    blobs = []
    serialize = Request._serialize
    monkeypatch.setattr(connection.CONFIG.API, "COMPRESS", False)
    monkeypatch.setattr(Request, "_serialize", lambda self, tracer: blobs.append(serialize(self, tracer)) or blobs[-1])
    monkeypatch.setattr(Request, "_run", lambda self, request, blob: (_ for _ in ()).throw(OSError("no server")))
    probes = mv.LogitLens(), mv.NormAttention(), mv.Contextualization(), mv.LogitAttribution("red"), mv.Likelihood([3])
    for work in (
        lambda: mv.read(there, inputs, *probes[:4]),
        lambda: there.generate(inputs),
        lambda: mv.information_flow(there, inputs, "red", window=8),
    ):
        with pytest.raises(mv.RemoteError):
            work()
    assert len(blobs) == 3
    # The server is asked for the model by its folder, so that one folder is known to it.
    whole = b"".join(blobs).replace(str(bundled.path("tiny-llava")).encode(), b"")
    for folder in (Path(mv.__file__).parent.parent, Path(__file__).parent, Path.home()):
        assert f"{folder}/".encode() not in whole
    assert b"mechvlm/tracing/reading.py" in whole
