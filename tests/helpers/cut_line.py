"""A line to a server, which a test can cut for a while."""

import socket
import threading
from contextlib import suppress
from urllib.parse import urlparse


class Line:
    """Passes bytes from `address`, an address of its own, to the server and back."""

    def __init__(self, server: str):
        url = urlparse(server)
        self.target = url.hostname, url.port
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        self.whole, self.open = True, []
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self, seconds: float = 0.0) -> None:
        """End all connections at once, and close new ones for `seconds`."""
        self.whole = not seconds
        ends, self.open = self.open, []
        for end in ends:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()
        if seconds:
            threading.Timer(seconds, self._mend).start()

    def _mend(self) -> None:
        self.whole = True

    def _accept(self) -> None:
        while True:
            here, _ = self.listener.accept()
            if not self.whole:
                here.close()
                continue
            there = socket.create_connection(self.target)
            self.open += [here, there]
            for source, sink in ((here, there), (there, here)):
                threading.Thread(target=self._pass_on, args=(source, sink), daemon=True).start()

    @staticmethod
    def _pass_on(source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data)
        with suppress(OSError):
            sink.shutdown(socket.SHUT_WR)
