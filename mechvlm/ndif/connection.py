"""The connection to NDIF: sends a request, waits for its job and fetches the result.

Errors of the connection and of the server become a `RemoteError` in plain words. The API key goes
into the headers of requests and nowhere else: no message holds it.
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

RETRY_WAITS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
"""Seconds before each further attempt: about a minute in all."""
LARGEST_RESULT = 1_000_000_000
"""Bytes of a result that are fetched at most.

Results that are reduced inside the block come back in kilobytes: more is a mistake.
"""
HTTP_TIMEOUT = httpx.Timeout(10.0, read=600.0)
"""Seconds to connect (10), and between two chunks of the answer (600)."""
KEEPALIVE = [(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)] + [
    (socket.IPPROTO_TCP, getattr(socket, name), value)
    for name, value in (("TCP_KEEPIDLE", 30), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 6))
    if hasattr(socket, name)
]
"""Socket options that probe a silent connection after 30 s: a dead one would never report."""


def retrying(work: Callable[[], T], waits: Sequence[float] | None = None) -> T:
    """work(), tried again after each of `waits` while its errors are retryable.

    `waits` are seconds, by default `RETRY_WAITS`. For work that changes nothing on the server, such
    as reading and generating. After a lost connection nobody knows whether the job ran; running it
    once more costs only its quota.

        (lens,) = retrying(lambda: mv.read(vlm, inputs, mv.LogitLens()))

    Raises:
        RemoteError: one that is not `retryable`, at once; or the error of the last attempt.
    """
    for wait in RETRY_WAITS if waits is None else waits:
        try:
            return work()
        except RemoteError as error:
            if not error.retryable:
                raise
        with StatusLine(f"NDIF: cannot be reached, next attempt in {wait:g} s"):
            time.sleep(wait)
    return work()


class Connection(RemoteBackend):
    """nnsight's backend for NDIF, with a calm status line and errors that say what to do.

    Go back to nnsight's own backend once that notices dead connections and keeps the key out of its
    messages.
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.sent = False
        self.display = JobDisplay(self, CONFIG.APP.REMOTE_LOGGING, self.verbose)  # type: ignore[assignment]

    def request(self, request: RequestModel, tracer) -> Any:
        blob = self._serialize(tracer)  # errors in here are not the server's: they stay as they are
        self.status = None
        with self.display:  # type: ignore[attr-defined]
            return self._with_plain_errors(self._run, request, blob)

    def submit(self, tracer) -> None:
        blob = self._serialize(tracer)
        request = RequestModel(model_key=self.model_key, compress=self.compress, env=self.env)
        response = self._with_plain_errors(self._post, request, blob)
        self.job_id, self.status = response.id, response.status

    def last_response(self) -> ResponseModel | None:
        """NDIF's last word on a submitted job; None before it said any, or for an unknown job."""
        return self._with_plain_errors(self._get_response)

    def poll(self, tracer=None) -> Any:
        response = self.last_response()
        return None if response is None else self._with_plain_errors(self.handle, response)

    def note(self, response: ResponseModel) -> bool:
        if response.status is not Status.LOG:
            self.status = response.status
        return super().note(response)

    def download_result(self, url: str | bytes | None) -> Any:
        if isinstance(url, bytes | bytearray):
            self._refuse_large(len(url))
            return self.finalize(bytes(url))
        if not url:
            return None
        # Fetching changes nothing: after a lost connection only the fetch is repeated, not the job.
        return self.finalize(retrying(lambda: self._with_plain_errors(self._fetch, url)))

    # -- steps that raise the libraries' own errors -----------------------------------------------

    def _run(self, request: RequestModel, blob: bytes) -> Any:
        header = {"ndif-api-key": self.api_key} if self.api_key else None
        connection = websocket.create_connection(
            f"{self.ws_host}/subscribe", timeout=10, header=header, sockopt=KEEPALIVE
        )
        try:
            # Subscribe before sending, so that no message is missed.
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

    def _get_response(self) -> ResponseModel | None:
        headers = {"ndif-api-key": self.api_key} if self.api_key else None
        answer = httpx.get(f"{self.host}/response/{self.job_id}", headers=headers, timeout=HTTP_TIMEOUT)
        if answer.status_code == 404:
            return None
        answer.raise_for_status()
        response = ResponseModel.model_validate_json(answer.text)
        self.status = response.status
        return response

    def _fetch(self, url: str) -> bytes:
        content = io.BytesIO()
        with httpx.stream("GET", url, timeout=HTTP_TIMEOUT) as answer:
            if answer.status_code in (403, 404, 410):
                raise RemoteError(
                    "NDIF no longer keeps this result: it must be collected soon after its job ends. Send the request "
                    "again."
                )
            answer.raise_for_status()
            self._refuse_large(int(answer.headers.get("Content-Length", 0)))
            for chunk in answer.iter_bytes():
                content.write(chunk)
                self._refuse_large(content.tell())
        return content.getvalue()

    def _refuse_large(self, size: int) -> None:
        if size > LARGEST_RESULT:
            raise RemoteError(
                f"The result is too large: {size / 1e6:,.1f} MB, and at most {LARGEST_RESULT / 1e6:,.1f} MB are "
                "fetched. Save less: reduce inside the block (a mean, a top k, some positions), ask for fewer layers, "
                "or send smaller batches. The limit is mechvlm.ndif.connection.LARGEST_RESULT, in bytes."
            )

    def _with_plain_errors(self, work: Callable, *args) -> Any:
        try:
            return work(*args)
        except (ServersError, OSError, websocket.WebSocketException, httpx.HTTPError) as error:
            plain_error = in_plain_words(error, self)
        # Raised outside of the except block, so that the original error, whose text can hold the
        # key, does not become its context.
        raise plain_error


class JobDisplay:
    """What nnsight calls its display: one line with the job's status, and the block's prints."""

    def __init__(self, request: Connection, enabled: bool, verbose: bool) -> None:
        self.request, self.enabled, self.verbose = request, enabled or verbose, verbose

    def __enter__(self) -> "JobDisplay":
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
                print(text)  # a print inside the block
            return
        status = STATUS_WORDS[response.status] + (f" ({text.rstrip('.')})" if "position" in text else "")
        if hasattr(self, "line"):
            self.line.update(f"NDIF: {status}", also_print=self.verbose)

    def refresh(self) -> None:
        """nnsight calls this to redraw the line, which redraws itself."""
