"""A server on loopback that answers a request to NDIF as a test wants it to: mostly wrongly."""

import base64
import hashlib
import io
import itertools
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import suppress

import torch
import zstandard

Chunks = bytes | Iterator[bytes]
MAGIC = "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"


def saved(values: object, **options) -> bytes:
    """The bytes of `torch.save`."""
    buffer = io.BytesIO()
    torch.save(values, buffer, **options)
    return buffer.getvalue()


def packed(content: bytes) -> bytes:
    return zstandard.ZstdCompressor(level=3).compress(content)


def status(name: str, **fields) -> bytes:
    return json.dumps({"id": "job-1", "status": name, **fields}).encode()


def answer(body: Chunks, code: int = 200, headers: str = "") -> Iterator[bytes]:
    length = f"Content-Length: {len(body)}\r\n" if isinstance(body, bytes) else ""
    yield f"HTTP/1.1 {code} X\r\nConnection: close\r\n{length}{headers}\r\n".encode()
    yield from [body] if isinstance(body, bytes) else body


def frame(payload: bytes, opcode: int = 1, fin: bool = True, length: int | None = None) -> bytes:
    """A frame of a websocket; `length` is the one that it claims."""
    size = len(payload) if length is None else length
    head = bytes([opcode | 128 * fin])
    head += bytes([size]) if size < 126 else b"\x7e" + size.to_bytes(2) if size < 65536 else b"\x7f" + size.to_bytes(8)
    return head + payload


GREETING = frame(b'{"session_id": "s"}')


class HostileServer:
    """Serves `pages`, {path: a function that gives an HTTP answer}, and `frames` to a subscription.

    A page's function is given the request's head, to echo it. `paths` lists what was asked for.
    """

    def __init__(self) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        self.pages: dict = {"/request": lambda _: answer(status("RECEIVED"))}
        self.frames: object = ()
        self.opening: object = None
        self.paths: list[str] = []
        self.sent = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self.listener.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                threading.Thread(target=self._serve, args=self.listener.accept()[:1], daemon=True).start()

    def _serve(self, end: socket.socket) -> None:
        with suppress(OSError), end:
            head = b""
            while b"\r\n\r\n" not in head:
                head += end.recv(65536)
            text = head.decode("latin1")
            path = text.split()[1]
            self.paths.append(path)
            if path == "/subscribe":
                chunks = (
                    self.opening(text) if self.opening else itertools.chain([accepted(text), GREETING], self.frames)
                )
            else:
                threading.Thread(target=_drain, args=(end,), daemon=True).start()
                page = self.pages.get(path) or (lambda _: answer(b"nothing", 404))
                chunks = page(text)
            for chunk in chunks:
                end.sendall(chunk)
                self.sent += len(chunk)
            end.shutdown(socket.SHUT_WR)
            with suppress(OSError):
                while path == "/subscribe" and end.recv(65536):
                    pass
            threading.Event().wait(0.2)


def _drain(end: socket.socket) -> None:
    with suppress(OSError):
        while end.recv(65536):
            pass


def accepted(text: str) -> bytes:
    key = next(line for line in text.splitlines() if line.lower().startswith("sec-websocket-key")).split(": ")[1]
    accept = base64.b64encode(hashlib.sha1((key + MAGIC).encode()).digest()).decode()
    return (
        "HTTP/1.1 101 X\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n" + f"Sec-WebSocket-Accept: {accept}\r\n\r\n"
    ).encode()
