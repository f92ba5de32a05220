"""NDIF's processes for blocks, forked from one that has imported torch and nnsight already.

NDIF starts an interpreter for every request, which mostly imports. `python forking.py SOCKET`
imports once, and `spawn`, in place of NDIF's, asks it for a copy. A block still gets a fresh process
without weights, which ends with its request.
"""

import contextlib
import importlib
import json
import os
import signal
import socket
import sys
import threading
import time
import uuid

SOCKET = "MECHVLM_FORKS"
"""Environment variable that holds the path of the socket."""


FAMILIES = ("llava.modeling_llava", "instructblip.modeling_instructblip")
"""Models that most tests ask for; others are imported by the forks that need them."""


class Fork:
    """A forked process, with the methods of `subprocess.Popen` that NDIF calls.

    The process ends when this end of the socket does, so it outlives no model actor.
    """

    def __init__(self, arguments: list[str]):
        self.link = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.link.connect(os.environ[SOCKET])
        self.link.sendall(json.dumps(arguments).encode() + b"\n")

    def poll(self) -> int | None:
        try:
            return None if self.link.recv(1, socket.MSG_DONTWAIT) else 0
        except BlockingIOError:
            return None
        except OSError:
            return 0

    def terminate(self) -> None:
        with contextlib.suppress(OSError):  # it may have ended by itself
            self.link.shutdown(socket.SHUT_WR)

    kill = terminate

    def wait(self, timeout: float | None = None) -> None:
        self.link.settimeout(timeout)
        with contextlib.suppress(OSError):
            self.link.recv(1)
        self.link.close()


def spawn(python="", quiet=True, timeout=600.0, peers=1, model_key=None, trust_remote_code=False):
    """NDIF's `spawn`, with a fork in place of a new interpreter."""
    from ndif.services.ray.sandbox.host import Sandbox

    path = f"/tmp/sbx-{uuid.uuid4().hex[:12]}.sock"
    key = [] if model_key is None else [model_key, "1" if trust_remote_code else "0"]
    process = Fork([path, str(peers), *key])
    deadline = time.time() + timeout
    while time.time() < deadline:
        if process.poll() is not None:
            raise RuntimeError("runner process exited before its socket was ready")
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
                probe.connect(path)
            return Sandbox(path, process)
        except OSError:
            time.sleep(0.02)
    process.kill()
    raise TimeoutError("timed out waiting for the runner socket")


def run(link: socket.socket, arguments: list[str]) -> None:
    """What NDIF's runner does, until the other end of the link is closed."""
    from ndif.services.ray.sandbox.runner import Runner

    signal.signal(signal.SIGCHLD, signal.SIG_DFL)

    def end_with_link() -> None:
        link.recv(1)
        os._exit(0)

    threading.Thread(target=end_with_link, daemon=True).start()
    path, peers, *key = arguments
    Runner(path, int(peers), *(key[:1] or [None]), trust_remote_code=key[1:] == ["1"]).serve()


def main(path: str) -> None:
    for name in ("ndif.services.ray.sandbox.runner", *(f"transformers.models.{family}" for family in FAMILIES)):
        importlib.import_module(name)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those that have ended
    server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    server.bind(path)
    server.listen(16)
    while True:
        link, _ = server.accept()
        with link, link.makefile("rb") as lines:
            arguments = json.loads(lines.readline())
            if os.fork() == 0:
                server.close()
                run(link, arguments)


if __name__ == "__main__":
    main(sys.argv[1])
