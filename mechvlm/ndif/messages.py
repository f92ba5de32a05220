"""Messages for what went wrong on NDIF: each says what happened, where, and what to do."""

import json
import socket
from typing import Protocol, runtime_checkable

import httpx
import websocket
from nnsight import CONFIG
from nnsight.intervention.backends.remote import RemoteError as ServersError
from nnsight.ndif import CRITICAL_PACKAGES, EnvComparison, get_local_env
from nnsight.schema.response import Status

from mechvlm.errors import RemoteError
from mechvlm.ndif.streams import LARGEST_ANSWER, exchange
from mechvlm.outside.files import printable

STATUS_WORDS = {
    Status.RECEIVED: "received",
    Status.QUEUED: "queued",
    Status.PROVISIONING: "finding a place for the model",
    Status.DEPLOYING: "loading the model",
    Status.DISPATCHED: "approved",
    Status.RUNNING: "running",
    Status.COMPLETED: "completed",
    Status.ERROR: "failed",
}


@runtime_checkable
class Attempt(Protocol):
    """A request to NDIF, as far as a message needs it: where it went, and how far it got."""

    host: str
    api_key: str
    model_key: str
    job_id: str | None
    sent: bool
    status: Status | None


def without_key(text: str, key: str) -> str:
    """The text with the API key blotted out: a server may send the key back."""
    for secret in {key, CONFIG.API.APIKEY or ""} - {""}:
        text = text.replace(secret, "(your API key)")
    return text


def presentable(text: str, key: str) -> str:
    """A server's text as it is shown: no key, no escapes of terminals, and not long."""
    text = printable(without_key(text, key))
    return text if len(text) <= 20_000 else f"{text[:5_000]}\n[...]\n{text[-15_000:]}"


def in_plain_words(error: Exception, at: Attempt) -> RemoteError:
    """A connection's or a server's error as a `RemoteError`: what it means, and what to do."""
    cause = error.__cause__ if isinstance(error, ServersError) else error
    if isinstance(cause, httpx.HTTPStatusError):
        text, retryable = _refused(cause.response.status_code, _detail(cause.response), at)
    elif isinstance(cause, websocket.WebSocketBadStatusException):
        text, retryable = _refused(cause.status_code, f"status {cause.status_code} to a subscription", at)
    elif isinstance(error, ServersError) and cause is None:
        text, retryable = _failed(str(error), at)
    else:
        text, retryable = _lost(cause or error, at), True
    return RemoteError(presentable(text, at.api_key), retryable=retryable)


def _lost(error: BaseException, at: Attempt) -> str:
    reason = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    never_connected = isinstance(
        error, ConnectionRefusedError | socket.gaierror | httpx.ConnectError | httpx.ConnectTimeout
    )
    if never_connected or not (at.sent or at.job_id):
        return (
            f"No NDIF answers at {at.host} ({reason}). Check that the address is right (nnsight.CONFIG.API.HOST, or "
            "NDIF_HOST in the environment) and that this machine reaches it, or try again later."
        )
    if at.job_id:
        return (
            f"The connection to NDIF at {at.host} was lost ({reason}). The job {at.job_id} goes on: ask about it again."
        )
    progress = (
        f"The job was {STATUS_WORDS[at.status]}"
        if at.status is not None
        else "It is not known whether the server took the job"
    )
    return (
        f"The connection to NDIF at {at.host} was lost ({reason}). {progress}. Ask again: that changes nothing on the "
        "server, and costs at most a second run."
    )


def _detail(answer: httpx.Response) -> str:
    try:
        body = answer.json()
    except (ValueError, RecursionError):
        return answer.text.strip()[:500] or f"status {answer.status_code}"
    return str(body.get("detail") if isinstance(body, dict) else body)


def _refused(code: int, detail: str, at: Attempt) -> tuple[str, bool]:
    """A request that the server did not take."""
    if "minimum supported" in detail or "version was not provided" in detail:
        return f"NDIF at {at.host} does not work with the versions here: {detail} {_versions(at)}", False
    if code in (401, 403) or "API key" in detail:
        get_one = (
            "Get one at https://login.ndif.us, and keep it with `nnsight login`, or in NDIF_API_KEY in the environment."
        )
        if not at.api_key:
            return f"NDIF at {at.host} wants an API key, and there is none in nnsight's configuration. {get_one}", False
        return f"NDIF at {at.host} does not take the API key of nnsight's configuration ({detail}). {get_one}", False
    if code == 413:
        return f"The request is too large for NDIF at {at.host} ({detail}). Send smaller batches.", False
    if code == 429 or code >= 500:
        return f"NDIF at {at.host} cannot take requests now ({detail}). Try again in a few minutes.", True
    return f"NDIF at {at.host} refused the request: {detail}", False


def _failed(text: str, at: Attempt) -> tuple[str, bool]:
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
        return f"NDIF could not read the request. {text.splitlines()[0]} {_versions(at)}", False
    if "try again later" in text or "cancelled or preempted" in text:
        return f"NDIF did not run the job: {text} Send it again.", True
    if "out of memory" in text.lower():
        return f"NDIF ran out of memory on this request. Send smaller batches, or save less.\n{_block(text)}", False
    if "Traceback (most recent call last)" in text:
        return f"Your block failed on NDIF, with {model}:\n{_block(text)}", False
    return f"NDIF could not run the job on {model}: {text}", False


def _block(text: str) -> str:
    """The traceback without frames of the server's packages: they say nothing about the block."""
    lines, kept, in_servers_frame = text.rstrip().splitlines(), [], False
    for line in lines:
        if line.startswith("  File "):
            in_servers_frame = any(place in line for place in ("site-packages/", "/lib/python3", "/ndif/services/"))
        elif not line.startswith("    "):
            in_servers_frame = False
        if not in_servers_frame:
            kept.append(line)
    return "\n".join(kept if any(line.startswith("  File ") for line in kept) else lines)


def _model(model_key: str) -> str:
    try:
        return json.loads(model_key.partition(":")[2])["repo_id"]
    except (ValueError, KeyError):
        return model_key


def _hosted(at: Attempt) -> str:
    try:
        status = exchange("GET", f"{at.host}/status", LARGEST_ANSWER).raise_for_status().json()
        running = [d["repo_id"] for d in status["deployments"].values() if d.get("application_state") == "RUNNING"]
        names = sorted({str(name)[:200] for name in running if name})
    except Exception:  # a second odd answer must not hide the first
        return "`nnsight.status()` says what it hosts."
    return f"It runs {', '.join(names) or 'no model'} at the moment; `nnsight.status()` says more."


def _versions(at: Attempt) -> str:
    """The versions that differ between here and the server, of the packages that matter."""
    try:
        there = exchange("GET", f"{at.host}/env", LARGEST_ANSWER).raise_for_status().json()
        comparison = EnvComparison(get_local_env(), there)
        # Builds of one version, such as +cpu and +cu128, do not differ.
        differ = [
            f"{name} is {p['remote']} there and {p['local']} here"
            for name, p in sorted(comparison.critical_mismatches.items())
            if p["remote"].split("+")[0] != p["local"].split("+")[0]
        ]
        if not comparison.python_matches:
            differ.append(f"Python is {comparison.remote_python} there and {comparison.local_python} here")
    except Exception:  # a second odd answer must not hide the first
        return "`print(nnsight.compare())` says which versions differ."
    if not differ:
        return f"The versions of {', '.join(sorted(CRITICAL_PACKAGES))} are the same there and here."
    return f"The versions differ: {', '.join(differ)}. Install the server's; `print(nnsight.compare())` shows all."
