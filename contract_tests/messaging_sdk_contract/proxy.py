"""A TCP proxy on loopback whose connections can be reset, for faults between a client and its broker."""

from __future__ import annotations

import socket
import struct
import threading
from contextlib import suppress

CHUNK_BYTES = 1 << 16
RESET_ON_CLOSE = struct.pack("ii", 1, 0)  # SO_LINGER with 0 s: close sends RST instead of FIN


class TcpProxy:
    """Forwards 127.0.0.1:`port` to `target`. Threads, so that a busy event loop under test does not delay it.

    `target` may be set later: some brokers have to be told at their start by which address clients come.
    """

    def __init__(self, target: tuple[str, int] = ("", 0)) -> None:
        self.target = target
        self._pairs: set[tuple[socket.socket, socket.socket]] = set()
        self._asked: set[socket.socket] = set()  # clients whose last bytes are not answered yet
        self._lock = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, name=f"proxy-{self.port}", daemon=True).start()

    def cut(self, *, if_asked: bool = False) -> bool:
        """Reset every open connection on both sides.

        With `if_asked` only while one of them waits for an answer, which is lost then; False if none did.
        """
        with self._lock:
            if if_asked and not any(pair[0] in self._asked for pair in self._pairs):
                return False
            pairs, self._pairs = self._pairs, set()
        for pair in pairs:
            for end in pair:
                with suppress(OSError):
                    end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
            for end in pair:  # wakes both pumps, which close; SHUT_WR would send FIN first
                with suppress(OSError):
                    end.shutdown(socket.SHUT_RD)
        return True

    def close(self) -> None:
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            try:
                server = socket.create_connection(self.target, timeout=5)
            except OSError:
                client.close()
                continue
            server.settimeout(None)
            for end in (client, server):
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            pair = (client, server)
            with self._lock:
                self._pairs.add(pair)
            for source, sink in (pair, pair[::-1]):
                threading.Thread(target=self._pump, args=(source, sink, pair), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, pair: tuple[socket.socket, socket.socket]) -> None:
        with suppress(OSError):
            while chunk := source.recv(CHUNK_BYTES):
                with self._lock:
                    if pair not in self._pairs:  # it was cut: this never arrives
                        break
                    (self._asked.add if source is pair[0] else self._asked.discard)(pair[0])
                sink.sendall(chunk)
        self._asked.discard(pair[0])
        with self._lock:
            was_cut = pair not in self._pairs
            self._pairs.discard(pair)
        if not was_cut:
            for end in pair:  # wakes the other pump
                with suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)
        # Each pump closes only what it reads: a socket closed under another thread's recv stays open in the kernel.
        source.close()
