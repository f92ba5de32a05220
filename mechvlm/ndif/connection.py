"""The connection to NDIF: a request is sent, its job waited for, its result fetched; what goes wrong is said in plain words.

The API key goes into the headers of a request, and nowhere else: no message holds it.
"""

import io
import json
import socket
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import httpx
import websocket
from nnsight import CONFIG
from nnsight.intervention.backends.remote import RemoteBackend
from nnsight.intervention.backends.remote import RemoteError as ServersError
from nnsight.schema.request import RequestModel
from nnsight.schema.response import ResponseModel, Status

from mechvlm.errors import RemoteError
from mechvlm.ndif.messages import STATUS_WORDS, in_plain_words, without_key
from mechvlm.progress import StatusLine

T = TypeVar("T")

WAITS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
"""Seconds before each further attempt: about a minute in all."""
LARGEST = 1_000_000_000
"""Bytes of a result that are fetched. What is reduced inside the block comes back in kilobytes: more is a mistake."""
TIMEOUT = httpx.Timeout(10.0, read=600.0)
"""Seconds until a server answers, and between two pieces of what it sends."""
KEEPALIVE = [(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)] + [
    (socket.IPPROTO_TCP, getattr(socket, name), value)
    for name, value in (("TCP_KEEPIDLE", 30), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 6))
    if hasattr(socket, name)
]
"""A connection that nothing comes through is asked for after 30 s: else one that is gone would be waited for for ever."""


def retrying(work: Callable[[], T], waits: Sequence[float] | None = None) -> T:
    """work(), and after each of `waits` (s, by default `WAITS`) once more, as long as what goes wrong may pass by itself.

    For what changes nothing on the server, as reading and generating do: where the connection was lost, nobody knows whether the
    job ran, and running it once more costs no more than its quota.

    Raises:
        RemoteError: one that is not `retryable`, at once; or the last one.
    """
    for wait in WAITS if waits is None else waits:
        try:
            return work()
        except RemoteError as error:
            if not error.retryable:
                raise
        with StatusLine(f"NDIF: not to be reached, tried again after {wait:g} s"):
            time.sleep(wait)
    return work()


class Connection(RemoteBackend):
    """How nnsight runs a block on NDIF, with a calm status line and errors that say what to do.

    Goes back to nnsight's own when that notices a connection that is gone, and keeps the key out of its messages.
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.sent = False
        self.display = Shown(self, CONFIG.APP.REMOTE_LOGGING, self.verbose)  # type: ignore[assignment]

    def request(self, request: RequestModel, tracer) -> Any:
        blob = self._serialize(tracer)  # what goes wrong here is no affair of the server's
        self.status = None
        with self.display:  # type: ignore[attr-defined]
            return self._plainly(self._run, request, blob)

    def submit(self, tracer) -> None:
        blob = self._serialize(tracer)
        request = RequestModel(model_key=self.model_key, compress=self.compress, env=self.env)
        response = self._plainly(self._post, request, blob)
        self.job_id, self.status = response.id, response.status

    def look(self) -> ResponseModel | None:
        """What NDIF last said of a job that nobody waits for; None before it said anything, or where it knows none."""
        return self._plainly(self._look)

    def poll(self, tracer=None) -> Any:
        response = self.look()
        return None if response is None else self._plainly(self.handle, response)

    def note(self, response: ResponseModel) -> bool:
        if response.status is not Status.LOG:
            self.status = response.status
        return super().note(response)

    def download_result(self, url: str | bytes | None) -> Any:
        if isinstance(url, bytes | bytearray):
            self._measure(len(url))
            return self.finalize(bytes(url))
        if not url:
            return None
        # Fetching a file changes nothing: a connection that breaks here costs no second run.
        return self.finalize(retrying(lambda: self._plainly(self._fetch, url)))

    # -- the steps, whose errors are the libraries' -------------------------------------------------------------------

    def _run(self, request: RequestModel, blob: bytes) -> Any:
        header = {"ndif-api-key": self.api_key} if self.api_key else None
        connection = websocket.create_connection(
            f"{self.ws_host}/subscribe", timeout=10, header=header, sockopt=KEEPALIVE
        )
        try:
            # Subscribed before it is sent, so that no word is missed.
            request.session_id = json.loads(connection.recv())["session_id"]
            self.send(request, blob)
            connection.settimeout(None)
            while True:
                message = connection.recv()
                if not message:
                    raise websocket.WebSocketConnectionClosedException("the server closed it")
                response = self.parse(message)
                result = self.handle(response)
                if response.status == Status.COMPLETED:
                    return result
        finally:
            connection.close()

    def _post(self, request: RequestModel, blob: bytes) -> ResponseModel:
        self.sent = True
        return super()._post(request, blob)

    def _look(self) -> ResponseModel | None:
        headers = {"ndif-api-key": self.api_key} if self.api_key else None
        answer = httpx.get(f"{self.host}/response/{self.job_id}", headers=headers, timeout=TIMEOUT)
        if answer.status_code == 404:
            return None
        answer.raise_for_status()
        response = ResponseModel.model_validate_json(answer.text)
        self.status = response.status
        return response

    def _fetch(self, url: str) -> bytes:
        content = io.BytesIO()
        with httpx.stream("GET", url, timeout=TIMEOUT) as answer:
            if answer.status_code in (403, 404, 410):
                raise RemoteError(
                    "NDIF keeps the result no longer: it has to be collected soon after. Ask for it again."
                )
            answer.raise_for_status()
            self._measure(int(answer.headers.get("Content-Length", 0)))
            for chunk in answer.iter_bytes():
                content.write(chunk)
                self._measure(content.tell())
        return content.getvalue()

    def _measure(self, size: int) -> None:
        if size > LARGEST:
            raise RemoteError(
                f"The result is too large: {size / 1e6:,.1f} MB, where {LARGEST / 1e6:,.1f} MB are fetched at most. Save less: "
                "reduce inside the block (a mean, a top k, some positions), ask for fewer layers, or send smaller batches. The "
                "limit is mechvlm.ndif.connection.LARGEST, in bytes."
            )

    def _plainly(self, work: Callable, *args) -> Any:
        try:
            return work(*args)
        except (ServersError, OSError, websocket.WebSocketException, httpx.HTTPError) as error:
            said = in_plain_words(error, self)
        # Raised here, where that error is handled no longer, and so hangs on this one: its own words can hold the key.
        raise said


class Shown:
    """What nnsight calls its display: the job's status as one line, and what the block prints."""

    def __init__(self, request: Connection, enabled: bool, verbose: bool) -> None:
        self.request, self.enabled, self.verbose = request, enabled or verbose, verbose

    def __enter__(self) -> "Shown":
        self.line = StatusLine("NDIF: sending", shown=self.enabled and not self.verbose)
        self.line.__enter__()
        return self

    def __exit__(self, *_) -> None:
        self.line.__exit__()
        del self.line

    def update(self, response: ResponseModel) -> None:
        text = without_key(response.description, self.request.api_key)
        if response.status is Status.LOG:
            if self.enabled:
                print(text)  # what the block printed, where it would print here
            return
        said = STATUS_WORDS[response.status] + (f" ({text.rstrip('.')})" if "position" in text else "")
        if hasattr(self, "line"):
            self.line.say(f"NDIF: {said}", aloud=self.verbose)

    def refresh(self) -> None:
        """The line keeps its own time."""


# -- what went wrong, in plain words ----------------------------------------------------------------------------------
