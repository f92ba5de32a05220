"""Jobs that nobody waits for: they are looked at, and collected by their id, in this process or in another."""

import time
from collections.abc import Callable
from typing import Any

from nnsight.schema.response import Status

from mechvlm.errors import RemoteError
from mechvlm.ndif.connection import Connection, retrying
from mechvlm.progress import StatusLine

UNKNOWN = 30.0
"""Seconds after which a job that NDIF has said nothing of is taken for one that it does not know."""


class Job:
    """Work that NDIF was given with `blocking=False`.

    Attributes:
        id: by which it is found again: `mv.read(vlm, inputs, *probes, blocking=False, job_id=id)`, `vlm.job(id)`.
    """

    def __init__(self, request: Connection, finish: Callable[[dict[str, Any]], Any]):
        self._request, self._finish = request, finish
        self.id: str = request.job_id or ""

    def __repr__(self) -> str:
        return f"Job({self.id!r})"

    @property
    def status(self) -> str:
        """What NDIF says now: received, queued, provisioning, deploying, dispatched, running, completed or error.

        Raises:
            RemoteError: when NDIF cannot be asked.
        """
        found = self._request.look()
        return (Status.RECEIVED if found is None else found.status).value.lower()

    def result(self, timeout: float | None = None) -> Any:
        """What it found, as without `blocking=False`; waits for it, at most `timeout` seconds.

        A connection that is lost meanwhile costs nothing: the job goes on, and is asked after again.

        Raises:
            RemoteError: where it failed, where NDIF knows no such job or keeps its result no longer; `retryable` where it is not
                done in time, or NDIF cannot be reached.
        """
        begun, pause = time.monotonic(), 0.1
        with StatusLine(f"NDIF: {self.id}", shown=self._request.display.enabled) as line:
            while True:
                found = retrying(self._request.look)
                if found is not None and found.status in (Status.COMPLETED, Status.ERROR):
                    return self._finish(retrying(self._request.poll))
                waited = time.monotonic() - begun
                if found is None and self._request.status is None and waited > UNKNOWN:
                    raise RemoteError(
                        f"NDIF at {self._request.host} knows no job {self.id!r}. Look at the id, and whether the job "
                        "was given to this server."
                    )
                status = "received" if found is None else found.status.value.lower()
                line.say(f"NDIF: {status}")
                if timeout is not None and waited + pause > timeout:
                    raise RemoteError(
                        f"The job {self.id} is {status} on NDIF, and not done after {timeout:g} s. It goes on: ask for its "
                        "result again, here or by its id elsewhere.",
                        retryable=True,
                    )
                time.sleep(pause)
                pause = min(1.5 * pause, 5.0)
