"""The contract kit's way to ZeroMQ: a rendezvous directory, a foreign client that speaks the protocol, cut sockets."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import shutil
import socket
import struct
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Event, Thread
from typing import Any, ClassVar, Final

import zmq

from messaging_sdk import ConfigError, ConnectError, Destination, memory
from messaging_sdk_contract import harness
from messaging_sdk_contract.harness import Environment, Fault, NativeMessage, Refusal

SECRET: Final = "n0t-the-passw0rd"
HOST, FAULT_HOST = "127.0.0.1", "127.0.0.2"  # two addresses of one machine: `cut` tells them apart
SILENCE_S: Final = 3.0  # a busy machine's threads stand still for a second now and then
HEAD: Final = struct.Struct("<cBII")
PATIENCE_S: Final = 30.0

Socket = zmq.Socket[bytes]


class Harness(harness.Harness):
    """Processes that meet in a directory and talk by TCP, by Unix sockets, or by TCP with CURVE."""

    name: ClassVar[str] = "zeromq"
    profiles: ClassVar[Sequence[str]] = ("tcp", "ipc", "curve")
    faults: ClassVar[frozenset[Fault]] = frozenset({"cut", "subprocess"})
    takeover_s = SILENCE_S + 3

    def __init__(self, profile: str = "tcp") -> None:
        super().__init__(profile)
        self._folder = ""
        self._keys: dict[str, str] = {}
        if profile == "ipc":
            self.faults = frozenset({"subprocess"})  # type: ignore[misc]  # per instance: no address to tell apart

    def start(self) -> None:
        self._folder = tempfile.mkdtemp(prefix="msdk-zmq-")
        if self.profile == "curve":
            public, secret = (key.decode() for key in zmq.curve_keypair())
            self._keys = {"curve_public": public, "curve_secret": secret, "curve_consumer": public}

    def stop(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)
        memory.forget([self._graves])

    def backend(self) -> Mapping[str, Any]:
        return self._table(HOST)

    def fault_backend(self) -> Mapping[str, Any]:
        return self._table(FAULT_HOST)

    def _table(self, host: str) -> dict[str, Any]:
        host = "" if self.profile == "ipc" else host
        table: dict[str, Any] = {"url": f"zeromq://{host}{self._folder}/meet", "silence_s": SILENCE_S, **self._keys}
        if self._keys:
            table["curve_senders"] = [self._keys["curve_public"]]
        return table

    def dead_letter_backend(self) -> Mapping[str, Any]:
        return {"url": f"memory://{self._graves}"}

    @property
    def _graves(self) -> str:
        return f"graves-{os.path.basename(self._folder)}"

    def environment(self) -> Environment:
        return Environment(f"libzmq {zmq.zmq_version()}")

    async def native_send(
        self, destination: Destination[Any], body: bytes, headers: Mapping[str, str], id: str | None
    ) -> None:
        """To whoever listens now or comes within half a minute; a Signal only to who listens now."""
        block = _block(body, headers, id or secrets.token_hex(8))
        if not destination.settles:
            await asyncio.to_thread(self._signal, destination, block)
            return
        groups = getattr(destination, "groups", ()) or (None,)
        given = [_Given(self, destination, group, block) for group in groups]
        await asyncio.gather(*(asyncio.to_thread(one.wait) for one in given))

    def hand_over(self, destination: Destination[Any], group: str | None, block: list[bytes], sent: Event) -> None:
        """Give one message to a consumer, and keep the link until it is settled or half a minute has passed."""
        place = _place(destination) + (f"/{group}" if group else "")
        with self._socket(zmq.DEALER) as dealer:
            dealer.connect(self._await_listener(destination, group))
            dealer.send_multipart([HEAD.pack(b"H", 1, 7, 0), secrets.token_bytes(8), place.encode()])
            _expect(dealer, b"W")
            dealer.send_multipart([HEAD.pack(b"B", 1, 7, 1), struct.pack("<I", 1), *block])
            sent.set()
            with suppress(TimeoutError):
                _expect(dealer, b"A")

    def _signal(self, destination: Destination[Any], block: list[bytes]) -> None:
        with self._socket(zmq.XPUB) as xpub:
            listeners = self._listeners(destination)
            for listener in listeners:
                xpub.connect(listener["endpoint"])
            left = len(listeners)
            while left and xpub.poll(2000):
                left -= xpub.recv()[:2] == b"\x01@"
            topic = b"*%s\0" % _place(destination).encode()
            xpub.send_multipart([topic, struct.pack("<cB8sQ", b"S", 1, b"foreign1", 0), *block])

    async def native_receive(
        self, destination: Destination[Any], group: str | None, count: int, wait_s: float
    ) -> list[NativeMessage]:
        return await asyncio.to_thread(self._take, destination, group, count, wait_s)

    def _take(self, destination: Destination[Any], group: str | None, count: int, wait_s: float) -> list[NativeMessage]:
        found: list[NativeMessage] = []
        instance, deadline = secrets.token_hex(6), time.monotonic() + wait_s
        with self._socket(zmq.ROUTER if destination.settles else zmq.SUB, server=True) as own:
            if not destination.settles:
                own.subscribe(b"*%s\0" % _place(destination).encode())
                own.subscribe(f"@{instance}.\0".encode())
            own.bind(f"tcp://{HOST}:*" if self.profile != "ipc" else f"ipc://{self._folder}/meet/s/{instance}")
            with self._announced(destination, group, instance, own.get_string(zmq.LAST_ENDPOINT)):
                while len(found) < count and time.monotonic() < deadline:
                    if own.poll(50):
                        found += (_worked if destination.settles else _heard)(own, own.recv_multipart())
                end = time.monotonic() + 0.5  # the settlements must be read before we vanish
                while destination.settles and time.monotonic() < end:
                    if own.poll(50):
                        _worked(own, own.recv_multipart())
        return found

    @contextmanager
    def _announced(
        self, destination: Destination[Any], group: str | None, instance: str, endpoint: str
    ) -> Iterator[None]:
        import fcntl

        folder = Path(self._folder, "meet", _place(destination))
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{instance}.at"
        with Path(folder, f".{instance}").open("w") as file:
            file.write(json.dumps({"version": 1, "endpoint": endpoint, "group": group}))
            file.flush()
            fcntl.flock(file, fcntl.LOCK_EX)
            Path(file.name).rename(path)
            try:
                yield
            finally:
                path.unlink(missing_ok=True)

    def _listeners(self, destination: Destination[Any]) -> list[dict[str, Any]]:
        folder = Path(self._folder, "meet", _place(destination))
        found = []
        for path in folder.glob("*.at"):
            with suppress(OSError, ValueError):
                found.append(json.loads(path.read_bytes()))
        return found

    def _await_listener(self, destination: Destination[Any], group: str | None) -> str:
        end = time.monotonic() + PATIENCE_S
        while time.monotonic() < end:
            for listener in self._listeners(destination):
                if listener["group"] == group:
                    return str(listener["endpoint"])
            time.sleep(0.02)
        raise TimeoutError(f"nobody listens to {destination} of group {group}")

    @contextmanager
    def _socket(self, kind: int, *, server: bool = False) -> Iterator[Socket]:
        context: zmq.Context[Socket] = zmq.Context()
        made = context.socket(kind)
        if self._keys:
            made.curve_publickey = self._keys["curve_public"].encode()
            made.curve_secretkey = self._keys["curve_secret"].encode()
            if server:
                made.curve_server = True
            else:
                made.curve_serverkey = self._keys["curve_consumer"].encode()
        try:
            yield made
        finally:
            made.close(1000)
            context.term()

    async def depth(self, destination: Destination[Any], group: str | None) -> int | None:
        return None  # nothing holds messages but their senders

    async def remove(self, destinations: Sequence[Destination[Any]]) -> None:
        for destination in destinations:
            shutil.rmtree(Path(self._folder, "meet", _place(destination)), ignore_errors=True)
            memory.broker(self._graves).stores.pop((destination.name, None), None)

    def refusals(self) -> Sequence[Refusal]:
        blocked = Path(self._folder, "file")
        blocked.touch()
        return [
            Refusal("a rendezvous directory below a file", {"url": f"zeromq://{blocked}/meet"}, ConnectError),
            Refusal("a user", {"url": f"zeromq://shop:{SECRET}@{HOST}{self._folder}"}, ConfigError, SECRET),
            Refusal("half a key pair", {"url": f"zeromq://{self._folder}", "curve_secret": SECRET * 3}, ConfigError),
            Refusal("a path too long for a socket", {"url": f"zeromq:///{'x' * 120}"}, ConfigError),
        ]

    def needs_client(self) -> Sequence[str]:
        return ("zmq",)

    async def cut(self) -> None:
        """Shut down every connection of this process from or to the address of `fault_backend`."""
        await asyncio.to_thread(_cut)
        await asyncio.sleep(0.02)  # it shows in the client's own thread


class _Given:
    """A message that a foreign program hands over in a thread of its own, since it must live until it is settled."""

    def __init__(self, on: Harness, destination: Destination[Any], group: str | None, block: list[bytes]) -> None:
        self._sent = Event()
        self._failed: BaseException | None = None

        def run() -> None:
            try:
                on.hand_over(destination, group, block, self._sent)
            except BaseException as error:
                self._failed = error
                self._sent.set()

        Thread(target=run, daemon=True, name="foreign sender").start()

    def wait(self) -> None:
        self._sent.wait()
        if self._failed is not None:
            raise self._failed


def _cut() -> None:
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            if not os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                continue
            found = socket.socket(fileno=os.dup(int(name)))
            try:
                ends = (found.getsockname(), found.getpeername())
                if any(isinstance(end, tuple) and end[0] == FAULT_HOST for end in ends):
                    found.shutdown(socket.SHUT_RDWR)
            finally:
                found.close()


def _place(destination: Destination[Any]) -> str:
    return f"{destination.tag}.{destination.name}"


def _block(body: bytes, headers: Mapping[str, str], id: str) -> list[bytes]:
    rest = json.dumps({"t": None, "h": [dict(headers)]}).encode()
    return [struct.pack("<I", len(body)), body, id.encode(), struct.pack("<d", 0.0), rest]


def _expect(dealer: Socket, kind: bytes) -> None:
    end = time.monotonic() + PATIENCE_S
    while time.monotonic() < end:
        if dealer.poll(100):
            parts = dealer.recv_multipart()
            if parts[0][:1] == kind:
                return
        else:
            dealer.send(b"P\x01")
    raise TimeoutError(f"no {kind!r} from the consumer")


def _worked(own: Socket, parts: list[bytes]) -> list[NativeMessage]:
    """A worker's answer to one frame: greet, take, settle."""
    identity, head, *rest = parts
    if head == b"P\x01":
        own.send_multipart(parts)
        return []
    kind, _, session, frame = HEAD.unpack(head)
    if kind == b"H":
        own.send_multipart([identity, HEAD.pack(b"W", 1, session, 100)])
    if kind != b"B":
        return []
    found = _unpacked(rest[1:])
    settled = struct.pack(f"<{2 + len(found)}I", frame, len(found), *range(len(found)))
    own.send_multipart([identity, HEAD.pack(b"A", 1, session, 0), settled])
    return found


def _heard(own: Socket, parts: list[bytes]) -> list[NativeMessage]:
    return _unpacked(parts[2:])


def _unpacked(parts: list[bytes]) -> list[NativeMessage]:
    lengths, bodies, ids, _, rest = parts
    headers = json.loads(rest).get("h")
    found, at = [], 0
    for index, (size,) in enumerate(struct.iter_unpack("<I", lengths)):
        id = ids.decode().split("\n")[index]
        found.append(NativeMessage(bodies[at : at + size], (headers[index] if headers else None) or {}, id))
        at += size
    return found
