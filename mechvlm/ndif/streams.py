"""Receives a server's answers, over HTTP or a websocket, up to a size and within a time.

Sizes are counted as bytes arrive, and are those of what is kept: compressed results are
unpacked up to a limit. Redirects are not followed, since the API key would go with them.
"""

import ipaddress
import os
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any
from urllib.parse import urlsplit

import httpx
import websocket
from websocket._abnf import ABNF, frame_buffer

from mechvlm.errors import RemoteError

LARGEST_ANSWER = 10_000_000
"""Bytes of a status, a message or a refusal."""
LARGEST_CONTROL = 125
"""Bytes of a websocket's control frame, such as a ping."""
MOST_FRAMES = 4096
"""Frames of one message of a websocket."""
HTTP_TIMEOUT = httpx.Timeout(10.0, read=600.0)
"""Seconds to connect (10), and between two chunks of the answer (600)."""
LONGEST_ANSWER = 3600.0
"""Seconds until an answer is whole."""
LONGEST_GREETING = 30.0
"""Seconds until a websocket is open and has said its session."""
KEEPALIVE = [(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)] + [
    (socket.IPPROTO_TCP, getattr(socket, name), value)
    for name, value in (("TCP_KEEPIDLE", 30), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 6))
    if hasattr(socket, name)
]
"""Socket options that probe a silent connection after 30 s: a dead one would never report."""
ALLOW_PLAIN = "MECHVLM_PLAIN_HTTP"
"""Variable of the environment that allows http without TLS beyond this machine, as "1"."""


def require_private(url: str, of: str = "") -> None:
    """Raises RemoteError unless what goes to `url` can be read by its server alone.

    That is https anywhere, or http on this machine. With `of`, the address of the server that
    named `url`, an address on this machine is for a server on this machine alone.
    """
    parts = urlsplit(url)
    here = _is_loopback(parts.hostname)
    if of and here and not _is_loopback(urlsplit(of).hostname):
        raise RemoteError(
            f"NDIF at {of} says that the result lies on this machine, at {parts.netloc}. It is not fetched."
        )
    if parts.scheme == "https" or (parts.scheme == "http" and (here or os.environ.get(ALLOW_PLAIN) == "1")):
        return
    if parts.scheme != "http":
        raise RemoteError(
            f"NDIF at {of or url} says that the result lies at {parts.scheme}://, and only https is fetched."
        )
    raise RemoteError(
        f"{parts.scheme}://{parts.netloc} is not encrypted: anybody on the way can read the API key, and change results. "
        f"Give an https address, or set {ALLOW_PLAIN}=1 in the environment if you trust the whole network."
    )


def _is_loopback(host: str | None) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host or "").is_loopback
    except ValueError:
        return False


def exchange(method: str, url: str, most: int, what: str = "answer", **options: Any) -> httpx.Response:
    """The whole answer to an HTTP request, of at most `most` bytes.

    Raises:
        RemoteError: for an answer that is larger, compressed, or not whole after `LONGEST_ANSWER`.
        httpx.HTTPError: when the connection is lost.
    """
    headers = {**options.pop("headers", {}), "accept-encoding": "identity"}
    end, content = time.monotonic() + LONGEST_ANSWER, bytearray()
    with httpx.stream(method, url, headers=headers, timeout=HTTP_TIMEOUT, **options) as answer:
        refuse_large(_announced(answer.headers), most, what)
        if answer.headers.get("content-encoding", "identity") != "identity":
            raise RemoteError("NDIF's answer is compressed, which it was asked not to be: it is not unpacked.")
        for chunk in answer.iter_raw():
            content += chunk
            refuse_large(len(content), most, what)
            if time.monotonic() > end:
                raise RemoteError(f"NDIF's {what} was not whole after {LONGEST_ANSWER / 60:g} minutes.")
    return httpx.Response(answer.status_code, content=bytes(content), request=answer.request)


def _announced(headers: Mapping[str, str]) -> int:
    length = headers.get("content-length", "0")
    return int(length) if length.isdecimal() and len(length) < 20 else 0


def refuse_large(size: int, most: int, what: str = "result") -> None:
    """Raises RemoteError when a result (or another answer) has more than `most` bytes."""
    if size <= most:
        return
    if what != "result":
        raise RemoteError(f"NDIF's {what} is too large: at most {most / 1e6:,.1f} MB of it are read.")
    raise RemoteError(
        f"The result is too large: {size / 1e6:,.1f} MB, and at most {most / 1e6:,.1f} MB are "
        "fetched. Save less: reduce inside the block (a mean, a top k, some positions), ask for fewer layers, "
        "or send smaller batches. The limit is mechvlm.ndif.connection.LARGEST_RESULT, in bytes."
    )


def unpacked(content: bytes, most: int) -> bytes:
    """Content compressed with zstd, as it was before: at most `most` bytes.

    Raises:
        RemoteError: for more, or for what is not zstd.
    """
    import zstandard

    whole = bytearray()
    try:
        with zstandard.ZstdDecompressor().stream_reader(content) as reader:
            while chunk := reader.read(1_000_000):
                whole += chunk
                refuse_large(len(whole), most)
    except zstandard.ZstdError:
        raise RemoteError("NDIF's result cannot be read: it is not compressed as it was asked to be.") from None
    return bytes(whole)


class Frames(frame_buffer):
    """Frames of a websocket, measured before they are read."""

    def __init__(self, receive: Any, most: int):
        super().__init__(receive, skip_utf8_validation=False)
        self.most, self.kind, self.size, self.count = most, ABNF.OPCODE_TEXT, 0, 0

    def recv_length(self) -> None:
        super().recv_length()
        opcode, length = self.header[4], self.length or 0  # type: ignore[index]
        if opcode not in (ABNF.OPCODE_TEXT, ABNF.OPCODE_BINARY, ABNF.OPCODE_CONT):
            refuse_large(length, LARGEST_CONTROL, "control frame")
            return
        if opcode != ABNF.OPCODE_CONT:
            self.kind, self.size, self.count = opcode, 0, 0
        self.size, self.count = self.size + length, self.count + 1
        if self.kind == ABNF.OPCODE_BINARY:
            refuse_large(self.size, self.most)
        else:
            refuse_large(self.size, LARGEST_ANSWER, "message")
        if self.count > MOST_FRAMES:
            raise RemoteError(f"NDIF's message comes in more than {MOST_FRAMES:,} frames: it is not read.")


@contextmanager
def subscription(url: str, header: dict[str, str] | None, most: int) -> Iterator[tuple[websocket.WebSocket, str]]:
    """An open websocket whose messages have at most `most` bytes, and its first message."""
    stream = websocket.WebSocket(sockopt=KEEPALIVE)
    stream.frame_buffer = Frames(stream._recv, most)
    stream.settimeout(10)
    # A server that sends its greeting byte by byte would keep each of the stream's own timeouts.
    watch = threading.Timer(LONGEST_GREETING, _cut, [stream])
    watch.daemon = True
    watch.start()
    try:
        stream.connect(url, header=header, redirect_limit=0)
        greeting = stream.recv()
        watch.cancel()
        stream.settimeout(None)
        yield stream, greeting
    finally:
        watch.cancel()
        # What still comes is of no use: the stream's own `close` would read on for a while.
        with suppress(OSError, websocket.WebSocketException):
            stream.settimeout(1)
            if stream.connected:
                stream.send_close()
        stream.shutdown()


def _cut(stream: websocket.WebSocket) -> None:
    with suppress(OSError):  # it ended by itself
        if stream.sock is not None:
            stream.sock.shutdown(socket.SHUT_RDWR)
