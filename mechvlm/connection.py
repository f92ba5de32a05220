"""The connection to NDIF: a request is sent, its job waited for, its result fetched; what goes wrong is said in plain words.

What travels is `mechvlm.remote`'s affair. The API key goes into the headers of a request, and nowhere else: no message holds it.
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
from nnsight.ndif import CRITICAL_PACKAGES, EnvComparison, get_local_env, get_remote_env
from nnsight.schema.request import RequestModel
from nnsight.schema.response import ResponseModel, Status

from mechvlm.errors import RemoteError
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
                "limit is mechvlm.connection.LARGEST, in bytes."
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
        said = WORDS[response.status] + (f" ({text.rstrip('.')})" if "position" in text else "")
        if hasattr(self, "line"):
            self.line.say(f"NDIF: {said}", aloud=self.verbose)

    def refresh(self) -> None:
        """The line keeps its own time."""


WORDS = {
    Status.RECEIVED: "received",
    Status.QUEUED: "queued",
    Status.PROVISIONING: "finding a place for the model",
    Status.DEPLOYING: "loading the model",
    Status.DISPATCHED: "approved",
    Status.RUNNING: "running",
    Status.COMPLETED: "completed",
    Status.ERROR: "failed",
}


# -- what went wrong, in plain words ----------------------------------------------------------------------------------


def without_key(text: str, key: str) -> str:
    """The text, with the API key blotted out: a server may send it back."""
    for secret in {key, CONFIG.API.APIKEY or ""} - {""}:
        text = text.replace(secret, "(your API key)")
    return text


def in_plain_words(error: Exception, at: Connection) -> RemoteError:
    """What an error of the connection or of the server means, and what to do."""
    cause = error.__cause__ if isinstance(error, ServersError) else error
    if isinstance(cause, httpx.HTTPStatusError):
        text, retryable = _refused(cause.response.status_code, _detail(cause.response), at)
    elif isinstance(cause, websocket.WebSocketBadStatusException):
        text, retryable = _refused(cause.status_code, f"status {cause.status_code} to a subscription", at)
    elif isinstance(error, ServersError) and cause is None:
        text, retryable = _failed(str(error), at)
    else:
        text, retryable = _lost(cause or error, at), True
    return RemoteError(without_key(text, at.api_key), retryable=retryable)


def _lost(error: BaseException, at: Connection) -> str:
    reason = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    before = isinstance(error, ConnectionRefusedError | socket.gaierror | httpx.ConnectError | httpx.ConnectTimeout)
    if before or not (at.sent or at.job_id):
        return (
            f"No NDIF answers at {at.host} ({reason}). Look whether the address is right (nnsight.CONFIG.API.HOST, or the "
            "environment's NDIF_HOST) and whether this machine reaches it, or try again later."
        )
    if at.job_id:
        return (
            f"The connection to NDIF at {at.host} was lost ({reason}). The job {at.job_id} goes on: ask after it again."
        )
    what = f"The job was {WORDS[at.status]}" if at.status is not None else "Whether the job was taken is not known"
    return (
        f"The connection to NDIF at {at.host} was lost ({reason}). {what}. Ask again: that changes nothing on the server, and "
        "costs at most a second run."
    )


def _detail(answer: httpx.Response) -> str:
    try:
        body = answer.json()
    except ValueError:
        return answer.text.strip()[:500] or f"status {answer.status_code}"
    return str(body.get("detail") if isinstance(body, dict) else body)


def _refused(code: int, detail: str, at: Connection) -> tuple[str, bool]:
    """A request that the server did not take."""
    if "minimum supported" in detail or "version was not provided" in detail:
        return f"NDIF at {at.host} does not work with the versions here: {detail} {_versions()}", False
    if code in (401, 403) or "API key" in detail:
        get = "One is to be had at https://login.ndif.us; `nnsight login` keeps it, or the environment's NDIF_API_KEY holds it."
        if not at.api_key:
            return f"NDIF at {at.host} wants an API key, and there is none in nnsight's configuration. {get}", False
        return f"NDIF at {at.host} does not take the API key of nnsight's configuration ({detail}). {get}", False
    if code == 413:
        return f"The request is too large for NDIF at {at.host} ({detail}). Send smaller batches.", False
    if code == 429 or code >= 500:
        return f"NDIF at {at.host} cannot take requests now ({detail}). Try again in a few minutes.", True
    return f"NDIF at {at.host} refused the request: {detail}", False


def _failed(text: str, at: Connection) -> tuple[str, bool]:
    """A job that the server took and did not complete."""
    model = _model(at.model_key)
    if text.startswith("Could not deploy this model."):
        reason = text.removeprefix("Could not deploy this model.").strip().split("\nTraceback")[0]
        return f"NDIF at {at.host} does not host {model}: {reason} {_hosted(at)}", False
    if "execution timeout" in text:
        return (
            f"NDIF stopped the job, which took too long: {text} Ask for less at once: a smaller batch, fewer layers or "
            "positions, fewer new tokens."
        ), False
    if "payload could not be read" in text or "doesn't match the one your code was traced against" in text:
        return f"NDIF could not read the request. {text.splitlines()[0]} {_versions()}", False
    if "try again later" in text or "cancelled or preempted" in text:
        return f"NDIF did not run the job: {text} It may be asked again.", True
    if "out of memory" in text.lower():
        return f"NDIF ran out of memory on this request. Send smaller batches, or save less.\n{_block(text)}", False
    if "Traceback (most recent call last)" in text:
        return f"Your block failed on NDIF, with {model}:\n{_block(text)}", False
    return f"NDIF could not run the job on {model}: {text}", False


def _block(text: str) -> str:
    """The traceback, from the lines of the block on: those of the server's own packages say nothing about it."""
    lines, kept, theirs = text.rstrip().splitlines(), [], False
    for line in lines:
        if line.startswith("  File "):
            theirs = any(place in line for place in ("site-packages/", "/lib/python3", "/ndif/services/"))
        elif not line.startswith("    "):
            theirs = False
        if not theirs:
            kept.append(line)
    return "\n".join(kept if any(line.startswith("  File ") for line in kept) else lines)


def _model(model_key: str) -> str:
    try:
        return json.loads(model_key.partition(":")[2])["repo_id"]
    except (ValueError, KeyError):
        return model_key


def _hosted(at: Connection) -> str:
    try:
        there = httpx.get(f"{at.host}/status", timeout=30).raise_for_status().json()["deployments"].values()
    except (httpx.HTTPError, ValueError, KeyError):
        return "`nnsight.status()` says what it hosts."
    names = sorted({d["repo_id"] for d in there if d.get("application_state") == "RUNNING" and d.get("repo_id")})
    return f"It runs {', '.join(names) or 'no model'} at the moment; `nnsight.status()` says more."


def _versions() -> str:
    """Which versions differ between here and the server, of the packages that matter."""
    try:
        found = EnvComparison(get_local_env(), get_remote_env(force_refresh=True))
    except (httpx.HTTPError, ValueError):
        return "`print(nnsight.compare())` says which versions differ."
    differ = [
        f"{name} is {p['remote']} there and {p['local']} here"
        for name, p in sorted(found.critical_mismatches.items())
        if p["remote"].split("+")[0] != p["local"].split("+")[0]  # +cpu, +cu128 are builds of one version
    ]
    if not found.python_matches:
        differ.append(f"Python is {found.remote_python} there and {found.local_python} here")
    if not differ:
        return f"The versions of {', '.join(sorted(CRITICAL_PACKAGES))} are the same there and here."
    return f"The versions differ: {', '.join(differ)}. Install the server's; `print(nnsight.compare())` shows all."
