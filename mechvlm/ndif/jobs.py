"""Jobs that nobody waits for: they run on NDIF, and are collected by their id, in any process."""

import time
from collections.abc import Callable
from typing import Any, NoReturn

from nnsight.schema.response import Status

from mechvlm.errors import RemoteError
from mechvlm.ndif.connection import Connection, retrying
from mechvlm.progress import StatusLine

UNKNOWN_AFTER = 30.0
"""Seconds of silence after which NDIF is taken not to know a job."""


class Job:
    """Work left on NDIF with `blocking=False`.

        job = mv.read(vlm, inputs, mv.LogitLens(), blocking=False)
        job.status                              # "queued", ..., "completed"
        (lens,) = job.result(timeout=600.0)

    Attributes:
        id: finds the job again: `mv.read(vlm, inputs, *probes, blocking=False, job_id=id)` or
            `vlm.job(id)`.
    """

    def __init__(self, request: Connection, finish: Callable[[dict[str, Any]], Any]):
        self._request, self._finish = request, finish
        self.id: str = request.job_id or ""

    def __repr__(self) -> str:
        return f"Job({self.id!r})"

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            f"A job is not pickled: it holds the connection, and with it the API key. Keep its id, {self.id!r}: vlm.job(id) "
            "finds it again."
        )

    @property
    def status(self) -> str:
        """The job's status on NDIF now.

        One of received, queued, provisioning, deploying, dispatched, running, completed, error.

        Raises:
            RemoteError: when NDIF cannot be asked.
        """
        response = self._request.last_response()
        return (Status.RECEIVED if response is None else response.status).value.lower()

    def result(self, timeout: float | None = None) -> Any:
        """The same result as without `blocking=False`; waits for it, at most `timeout` seconds.

        A connection that is lost meanwhile costs nothing: the job goes on, and NDIF is asked again.

        Raises:
            RemoteError: when the job failed, or when NDIF knows no such job or no longer keeps its
                result; `retryable` when it is not done in time or NDIF cannot be reached.
        """
        start, pause = time.monotonic(), 0.1
        with StatusLine(f"NDIF: {self.id}", shown=self._request.display.enabled) as line:
            while True:
                response = retrying(self._request.last_response)
                if response is not None and response.status in (Status.COMPLETED, Status.ERROR):
                    return self._finish(retrying(self._request.poll))
                waited = time.monotonic() - start
                if response is None and self._request.status is None and waited > UNKNOWN_AFTER:
                    raise RemoteError(
                        f"NDIF at {self._request.host} knows no job {self.id!r}. Check the id, and that the job was "
                        "sent to this server."
                    )
                status = "received" if response is None else response.status.value.lower()
                line.update(f"NDIF: {status}")
                if timeout is not None and waited + pause > timeout:
                    raise RemoteError(
                        f"The job {self.id} is {status} on NDIF, and not done after {timeout:g} s. It goes on: ask for "
                        "its result again, here, or elsewhere by its id.",
                        retryable=True,
                    )
                time.sleep(pause)
                pause = min(1.5 * pause, 5.0)
