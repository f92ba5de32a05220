"""The connection to NDIF: sends a request, waits for its job and fetches the result.

Nothing that a server answers is trusted. Answers are measured while they arrive
(`mechvlm.ndif.streams`), values are read without running code (`mechvlm.ndif.plain_values`), and
whatever is wrong with an answer becomes a `RemoteError` in plain words. The API key goes into the
headers of requests and nowhere else: no message, log or pickle holds it.
"""

import logging
import re
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Any, NoReturn, TypeVar
from urllib.parse import quote

import httpx
import websocket
from nnsight import CONFIG
from nnsight.intervention.backends.remote import RemoteBackend
from nnsight.intervention.backends.remote import RemoteError as ServersError
from nnsight.schema.request import RequestModel
from nnsight.schema.response import ResponseModel, Status
from pydantic import BaseModel

from mechvlm.errors import RemoteError
from mechvlm.ndif.messages import STATUS_WORDS, in_plain_words, presentable, without_key
from mechvlm.ndif.plain_values import plain_values
from mechvlm.ndif.streams import LARGEST_ANSWER, exchange, refuse_large, require_private, subscription, unpacked
from mechvlm.progress import StatusLine

T = TypeVar("T")

RETRY_WAITS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
"""Seconds before each further attempt: about a minute in all."""
LARGEST_RESULT = 1_000_000_000
"""Bytes of a result that are fetched at most.

Results that are reduced inside the block come back in kilobytes: more is a mistake.
"""
JOB_ID = re.compile(r"[\w.-]{1,200}")
LOGGERS = ("httpx", "httpcore.connection", "httpcore.http11", "httpcore.http2", "httpcore.proxy", "websocket")
"""The loggers of what carries requests: at their lowest level they write a server's headers."""


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

    It trusts no answer. Go back to nnsight's own backend once that reads results without running
    code, limits what it reads, notices dead connections, and keeps the key out of its messages.

    Raises:
        RemoteError: when the key and the results would go over plain http to another machine.
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        require_private(self.host)
        self.sent = False
        self.display = JobDisplay(self, CONFIG.APP.REMOTE_LOGGING, self.verbose)  # type: ignore[assignment]
        for name in LOGGERS:
            logging.getLogger(name).addFilter(blot_out_key)

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "A connection to NDIF holds the API key and is not pickled. Keep a job's id: vlm.job(id) finds it again."
        )

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

    def download_result(self, url: Any) -> Any:
        if isinstance(url, bytes | bytearray):
            refuse_large(len(url), LARGEST_RESULT)
            return self.finalize(bytes(url))
        if not isinstance(url, str) or not url:
            raise RemoteError("NDIF completed the job and gave no result. Send the request again.")
        # Fetching changes nothing: after a lost connection only the fetch is repeated, not the job.
        return self.finalize(retrying(lambda: self._with_plain_errors(self._fetch, url)))

    def finalize(self, content: bytes) -> dict[str, Any]:
        """The saved values by their names, read without running code."""
        self._log(f"result: {len(content):,} bytes")
        return plain_values(unpacked(content, LARGEST_RESULT) if self.compress else content, LARGEST_RESULT)

    def parse(self, message: Any) -> ResponseModel:  # type: ignore[override]
        """A status from one message: JSON, or a file of `torch.save` that holds the result too.

        Where a server sends the key back, it is blotted out.
        """
        if isinstance(message, str):
            response = ResponseModel.model_validate_json(message)
        else:
            response = ResponseModel.model_validate(plain_values(message, LARGEST_RESULT))
        if not JOB_ID.fullmatch(response.id):
            raise RemoteError("NDIF's answer names a job by what is no id.")
        shown = {"id": response.id, "description": response.description}
        if isinstance(response.data, str):
            shown["data"] = response.data
        cost = response.meta if without_key(repr(response.meta), self.api_key) == repr(response.meta) else None
        clean = {name: without_key(text, self.api_key) for name, text in shown.items()}
        return response.model_copy(update=clean | {"meta": cost})

    # -- steps that raise the libraries' own errors -----------------------------------------------

    def _headers(self) -> dict[str, str]:
        return {"ndif-api-key": self.api_key} if self.api_key else {}

    def _run(self, request: RequestModel, blob: bytes) -> Any:
        # Subscribe before sending, so that no message is missed.
        with subscription(f"{self.ws_host}/subscribe", self._headers(), LARGEST_RESULT) as (stream, greeting):
            request.session_id = Greeting.model_validate_json(greeting).session_id
            self.send(request, blob)
            while True:
                message = stream.recv()
                if not message:
                    raise websocket.WebSocketConnectionClosedException("the server closed it")
                response = self.parse(message)
                result = self.handle(response)
                if response.status == Status.COMPLETED:
                    return result

    def _post(self, request: RequestModel, blob: bytes) -> ResponseModel:
        self.sent = True
        headers = self._headers() | {
            "ndif-timestamp": repr(time.time()),
            "nnsight-version": version("nnsight"),
            "python-version": sys.version,
        }
        files = {"blob": ("request", blob, "application/octet-stream")}
        answer = exchange(
            "POST",
            f"{self.host}/request",
            LARGEST_ANSWER,
            headers=headers,
            data={"data": request.metadata()},
            files=files,
        )
        return self.parse(answer.raise_for_status().text)

    def _get_response(self) -> ResponseModel | None:
        url = f"{self.host}/response/{quote(self.job_id or '', safe='')}"
        answer = exchange("GET", url, LARGEST_ANSWER, headers=self._headers())
        if answer.status_code == 404:
            return None
        response = self.parse(answer.raise_for_status().text)
        self.status = response.status
        return response

    def _fetch(self, url: str) -> bytes:
        require_private(url, of=self.host)
        if without_key(url, self.api_key) != url:
            raise RemoteError(
                "NDIF says that the result lies at an address that holds your API key. It is not fetched."
            )
        answer = exchange("GET", url, LARGEST_RESULT, "result")
        if answer.status_code in (403, 404, 410):
            raise RemoteError(
                "NDIF no longer keeps this result: it must be collected soon after its job ends. Send the request again."
            )
        return answer.raise_for_status().content

    def _with_plain_errors(self, work: Callable, *args) -> Any:
        try:
            return work(*args)
        except RemoteError as error:
            plain_error = error.with_traceback(None)
        except (ServersError, OSError, websocket.WebSocketException, httpx.HTTPError) as error:
            plain_error = in_plain_words(error, self)
        except Exception as error:  # whatever an odd answer leads the libraries to
            plain_error = RemoteError(
                f"NDIF at {self.host} gave an answer that makes no sense here ({type(error).__name__}). Is it a server of "
                "NDIF, and of a version that fits nnsight's here?"
            )
        # Raised outside of the except block, so that the original error, whose text can hold the
        # key, does not become its context, nor the frames that hold it part of the traceback.
        plain_error.__context__ = None
        raise plain_error


class Greeting(BaseModel):
    """The first message of a subscription."""

    session_id: str


def blot_out_key(record: logging.LogRecord) -> bool:
    """A filter of loggers: no record holds the API key, even where a server sends it back."""
    message = record.getMessage()
    if without_key(message, "") != message:
        record.msg, record.args = without_key(message, ""), ()
    return True


class JobDisplay:
    """What nnsight calls its display: one line with the job's status, and the block's prints."""

    def __init__(self, request: Connection, enabled: bool, verbose: bool) -> None:
        self.request, self.enabled, self.verbose = request, enabled or verbose, verbose

    def __enter__(self) -> "JobDisplay":
        self.line = StatusLine("NDIF: sending", shown=self.enabled and not self.verbose)
        self.line.__enter__()
        return self

    def __exit__(self, *error) -> None:
        self.line.__exit__(*error)
        del self.line

    def update(self, response: ResponseModel) -> None:
        text = presentable(response.description, self.request.api_key)
        if response.status is Status.LOG:
            if self.enabled:
                print(text)  # a print inside the block
            return
        status = STATUS_WORDS[response.status] + (f" ({text.rstrip('.')})" if "position" in text else "")
        if hasattr(self, "line"):
            self.line.update(f"NDIF: {status}", also_print=self.verbose)

    def refresh(self) -> None:
        """nnsight calls this to redraw the line, which redraws itself."""
