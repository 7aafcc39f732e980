"""The driver: promises, the I/O thread with its sockets, and where the consumers of a destination are to be found."""

from __future__ import annotations

import asyncio
import fcntl
import ipaddress
import json
import os
import secrets
import socket as system_socket
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from threading import RLock
from typing import Any, ClassVar, Final, cast

import zmq
from pydantic import BaseModel
from zmq.utils import z85

from messaging_sdk import spi
from messaging_sdk.capabilities import FLAGS, NOTHING, Capabilities, HeaderRules, Level
from messaging_sdk.config import Address
from messaging_sdk.destination import DEAD, Destination, Topic
from messaging_sdk.errors import ConfigError, NotFound
from messaging_sdk.threads import Hop, LoopThread

from . import errors
from . import options as zeromq
from .receiver import QueueReceiver, SignalReceiver
from .sender import MAX_BODY, QueueSender, SignalSender

Parts = list[bytes]
Sink = Callable[[list[Parts]], None]

BEAT_S: Final = 0.25  # between pings; four of them fit into the shortest silence_s
DIAL_S: Final = 2.0  # a connection that is not up by then is dropped and dialled anew
BURST: Final = 500  # frames read before the other sockets of the thread get their turn
MAX_FRAME: Final = 2 * MAX_BODY  # a peer that sends more is cut off by libzmq
MAX_SOCKET_PATH: Final = 100  # of 107 bytes that Linux has for a socket's path
PING: Final = b"P\x01"
# Numbers: an operation on pyzmq's enums costs two microseconds, more than sending a part does.
NO_WAIT: Final = int(zmq.NOBLOCK)
MORE: Final = int(zmq.NOBLOCK | zmq.SNDMORE)
READABLE: Final = int(zmq.POLLIN)
WRITABLE: Final = int(zmq.POLLOUT)
DOORMAN: Final = "inproc://zeromq.zap.01"  # where libzmq asks whom to let in
NO_BLOCK: Final = zeromq.DestinationOptions()
HEADERS: Final = HeaderRules(max_count=1000, max_bytes=1 << 16)
QUEUE: Final = Capabilities(
    settle="individual",
    release="delay",
    lease="connection",
    count="exact",
    backlog=True,
    order="publisher",
    compete="demand",
    confirm="settled",
    batch="entries",
    max_body=MAX_BODY,
    headers=HEADERS,
    window=True,
    ok_means="settled",
    notes={
        "settle": "an acknowledgement to the sender, which keeps the message until then",
        "count": "the sender counts how often it gave the message to a consumer",
        "order": "one connection to each consumer, first come first served",
        "order_redelivery": "what comes back is offered before what was sent after it",
        "order_competition": "one consumer works, under a file lock; the others stand by",
        "compete": "each consumer gives its senders credit",
        "groups": "the sender keeps a copy for each declared group until a member has settled it",
        "lag": "there is no broker to ask: each sender knows its own messages only",
        "confirm": "ok when every group has settled it",
        "ok_means": "settled: it is done",
        "window": "credit",
        "backlog": "waits in its sender's bounded memory, and so does its publish: start a consumer, or publish from "
        "a task; what no consumer took by the deadline is rejected",
        "lease": "the link between sender and consumer; a peer that is silent for silence_s has lost it",
        "hold_s": "a publish waits until its message is settled: give it a timeout_s above handler and retry time",
        "durable": "there is no broker: an unsettled message dies with its sender, whose publish then never said ok",
        "dedup_s": "a link's resends are recognised, a second publish with the same id is another message",
        "release": "an ordered destination is handed back as a whole, by closing",
    },
)
SIGNAL: Final = Capabilities(
    order="publisher",
    compete="round_robin",
    groups="live",
    batch="entries",
    max_body=MAX_BODY,
    headers=HEADERS,
    levels={"groups": Level.EMULATED, "compete": Level.EMULATED},
    notes={"groups": "the sender picks a member of each group", "compete": "in turn, busy or not"},
)


class Driver(spi.Driver):
    """Direct links between processes: an I/O thread of its own, no broker."""

    name: ClassVar[str] = "zeromq"
    client: ClassVar[str] = "pyzmq"
    brokerless: ClassVar[bool] = True
    Options: ClassVar[type[BaseModel]] = zeromq.Options
    DestinationOptions: ClassVar[type[BaseModel]] = zeromq.DestinationOptions

    def __init__(self, address: Address, options: BaseModel, destinations: Mapping[str, BaseModel]) -> None:
        super().__init__(address, options, destinations)
        if address.user is not None or address.password is not None:
            raise ConfigError("zeromq: the url has a user; there is nobody to check one: use the curve_ options")
        if len(address.hosts) > 1 or (address.hosts and address.hosts[0][1]):
            raise ConfigError("zeromq: the url names this machine's address or none, without a port")
        if address.host and not _is_own_address(address.host):
            raise ConfigError(
                f"zeromq: the url's host is {address.host!r}; write the IPv4 address by which others reach this "
                "machine, or the name of its network interface"
            )
        if address.path == "/":
            raise ConfigError("zeromq: the url's path is the rendezvous directory, as in zeromq:///run/app")
        if not address.host and len(os.fsencode(address.path)) > MAX_SOCKET_PATH - len("/s/0123456789ab"):
            raise ConfigError(
                "zeromq: the rendezvous directory's path is too long for a Unix socket; choose a shorter one, or name "
                "this machine's address in the url to use TCP"
            )
        self.options: zeromq.Options = cast("zeromq.Options", options)
        self.root = Path(address.path) if address.path else None
        self.home: Home | None = None

    def block(self, destination: Destination[Any]) -> zeromq.DestinationOptions:
        return cast("zeromq.DestinationOptions", self.destinations.get(destination.name, NO_BLOCK))

    def capabilities(self, destination: Destination[Any]) -> Capabilities:
        block = self.block(destination)
        listed = bool(block.groups if destination.tag == "topic" else block.consumers)
        if destination.name.rpartition(".")[2] == DEAD and destination.settles:
            return Capabilities(notes={"tag": f'a route of "*.{DEAD}" to a backend that stores: ZeroMQ keeps nothing'})
        if (
            not self.root
            and not self.address.host
            and not listed
            and not (destination.tag == "topic" and not destination.groups)
        ):
            where = "groups" if destination.tag == "topic" else "consumers"
            return Capabilities(notes={"tag": f"a directory in the url, or zeromq.{where} for this destination"})
        if not destination.settles:
            return SIGNAL
        notes = dict(QUEUE.notes)
        single = not listed or all(len(e) == 1 for e in (block.groups.values() or [block.consumers]))
        ordered = destination.ordered and single
        if destination.ordered and not single:
            notes["order_competition"] = notes["order_redelivery"] = "one endpoint only, or a rendezvous directory"
        found = replace(
            QUEUE,
            order_redelivery=ordered,
            order_competition=ordered,
            release="none" if destination.ordered else "delay",
            compete=("none" if listed else "standby") if destination.ordered else "demand",
            groups="durable" if destination.tag == "topic" else "none",
            notes=notes,
        )
        kept = [f for f in FLAGS if getattr(found, f) not in NOTHING and f not in ("max_body", "headers", "batch")]
        levels = dict.fromkeys((f for f in kept if f != "hold_s"), Level.EMULATED)
        if destination.ordered and not single:
            levels |= dict.fromkeys(("order_redelivery", "order_competition"), Level.CONFIG)
        return replace(found, levels=levels)

    def check(self, destination: Destination[Any]) -> None:
        block = self.block(destination)
        lacking = [g for g in destination.groups if block.groups and g not in block.groups]
        if lacking:
            raise ConfigError(f"zeromq: {destination}: groups has no endpoints for {', '.join(lacking)}")
        listed = [endpoint for endpoints in block.groups.values() for endpoint in endpoints]
        if len(set(listed)) < len(listed):
            raise ConfigError(f"zeromq: {destination}: an endpoint belongs to one group only, and stands there once")
        if block.consumers if destination.tag == "topic" else block.groups:
            raise ConfigError(f"zeromq: {destination}: a Topic lists `groups`, a Queue or Signal `consumers`")

    async def open(self) -> None:
        if self.home is not None:
            return
        if self.address.host and self.root is None:
            raise ConfigError(
                f"zeromq: the url names no rendezvous directory, as in zeromq://{self.address.host}/run/app"
            )
        if self.root is not None:
            try:
                (self.root / "s").mkdir(mode=0o700, parents=True, exist_ok=True)
                if not os.access(self.root / "s", os.W_OK | os.X_OK):
                    raise PermissionError(13, "not writable")
            except OSError as error:
                raise errors.from_native(error, f"rendezvous directory {self.root}") from error
        self.home = Home(self.options, self.address.host)
        try:
            await self.home.start()
        except zmq.ZMQError as error:
            await self.close()
            raise errors.from_native(error, "starting ZeroMQ") from error

    async def provision(self, destinations: Sequence[Destination[Any]], mode: spi.Provision) -> None:
        for destination in destinations:
            place = self.place(destination)
            if place.folder is None or not destination.settles or mode == "none":
                continue
            if mode == "create":
                try:
                    place.folder.mkdir(exist_ok=True)
                except OSError as error:
                    raise errors.from_native(error, f"{destination} in {self.root}") from error
            elif not place.folder.is_dir():
                raise NotFound(
                    f"{destination} is not known in {self.root}: compare it with the directory of the other processes; "
                    'if it is right, provision = "create" makes it'
                )

    def place(self, destination: Destination[Any]) -> Place:
        block = self.block(destination)
        listed: dict[str, str | None] = dict.fromkeys(block.consumers)
        listed |= {e: group for group, endpoints in block.groups.items() for e in endpoints}
        root = None if listed else self.root
        return Place(root, f"{destination.tag}.{destination.name}", listed)

    def ready(self) -> Home:
        if self.home is None or not self.home.thread.is_alive:
            raise errors.closed("zeromq")
        return self.home

    async def open_sender(self, destination: Destination[Any]) -> spi.Sender:
        home, place = self.ready(), self.place(destination)
        if self.options.curve_public and not self.options.curve_consumer:
            raise ConfigError("zeromq: to send with CURVE, curve_consumer must name the consumers' public key")
        if not destination.settles:
            return SignalSender(home, place)
        groups = destination.groups if isinstance(destination, Topic) else (None,)
        return QueueSender(home, place, groups, ordered=destination.ordered)

    async def open_receiver(
        self, destination: Destination[Any], group: str | None, window: int, on_revoke: spi.OnRevoke
    ) -> spi.Receiver:
        home, place = self.ready(), self.place(destination)
        if self.options.curve_public and not self.options.curve_senders:
            raise ConfigError("zeromq: to consume with CURVE, curve_senders must list the public keys that are let in")
        if not destination.settles:
            listener = SignalReceiver(home, place, group, self.options.signal_buffer)
            await listener.open()
            return listener
        receiver = QueueReceiver(home, place, group, window, on_revoke, ordered=destination.ordered)
        await receiver.open()
        return receiver

    async def close(self) -> None:
        home, self.home = self.home, None
        if home is not None:
            await home.close()

    def server(self) -> str:
        return f"libzmq {zmq.zmq_version()}"

    def native(self) -> zmq.Context[zmq.Socket[bytes]] | None:
        return self.home.context if self.home is not None else None


# --- the I/O thread


class Home:
    """One thread that reads all sockets of a driver, and answers pings while the opener's loop is blocked."""

    def __init__(self, options: zeromq.Options, host: str) -> None:
        self.options = options
        self.host = host
        self.thread = LoopThread("messaging-zeromq")
        self.outward = Hop(asyncio.get_running_loop())
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.open: set[Any] = set()
        """Senders and receivers; told when the driver closes."""
        self.wires: set[Wire] = set()
        """Those with a socket; the I/O thread's."""

    async def start(self) -> None:
        """Let only known CURVE keys in: without a doorman libzmq lets every key pass."""
        self.context.set(zmq.MAX_SOCKETS, 8192)
        if self.options.curve_senders:
            await Wire(self, zmq.ROUTER, None).bind(DOORMAN)

    def answer(self, request: Parts) -> Parts:
        """The doorman's answer (ZAP, RFC 27), on the I/O thread."""
        known = {z85.decode(k) for k in self.options.curve_senders}
        mechanism, key = (request[5], request[6]) if len(request) > 6 else (b"", b"")
        admitted = mechanism == b"CURVE" and key in known
        status = (b"200", b"OK") if admitted else (b"400", b"unknown key")
        return [request[0], request[1], *status, b"", b""]

    def wire(
        self,
        kind: int,
        sink: Sink,
        gone: Callable[[bytes], None] | None = None,
        *,
        topics: Sequence[bytes] = (),
        high_water: int = 0,
    ) -> Wire:
        return Wire(self, kind, sink, gone, topics, high_water)

    def endpoint(self, folder: Path) -> str:
        """A new endpoint to bind: a socket in the rendezvous directory, or a free port of this machine's address."""
        if self.host:
            return f"tcp://{self.host}:*"
        return f"ipc://{folder.parent / 's' / secrets.token_hex(6)}"

    async def close(self) -> None:
        for one in list(self.open):
            one.lose()
        with suppress(RuntimeError):
            await self.thread.run(self._end())
        self.thread.stop()

    async def _end(self) -> None:
        for wire in list(self.wires):
            wire.end(0)
        self.context.term()  # waits for what the closed sockets still push out: linger_s at most


class Wire:
    """One socket. `send` and `close` are called on the opener's loop, which also gets what arrives, one call per
    burst; the rest runs on the I/O thread. A DEALER whose connection ends is dead: `gone(b"")` is called once. Of a
    ROUTER each peer that vanished is told: `gone(identity)`.

    Both threads write, under a lock: one that is woken to write would wait for the interpreter as long as the opener's
    loop has something else to do.
    """

    def __init__(
        self,
        home: Home,
        kind: int,
        sink: Sink | None,
        gone: Callable[[bytes], None] | None = None,
        topics: Sequence[bytes] = (),
        high_water: int = 0,
    ) -> None:
        """Without `sink` it is the doorman's, whom the I/O thread answers for."""
        self._home = home
        self._kind = kind
        self._sink = sink
        self._gone = gone
        self._topics = topics
        self._high_water = high_water
        self._socket: zmq.Socket[bytes] | None = None
        self._outbox: list[Parts] = []
        self._up = False
        self._began = self._heard_s = 0.0
        self._heard: dict[bytes, float] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._again = False
        self._untold = 0  # frames that the opener's loop has not taken yet
        self._lock = RLock()  # held by whoever uses the socket
        self._asked = self._done = 0  # calls that were posted to the I/O thread, and those that have run
        self.endpoint = ""

    # from the opener's loop

    def send(self, *frames: Parts) -> None:
        """Write `frames` in order."""
        left: Sequence[Parts] = frames
        if self._asked == self._done and self._lock.acquire(blocking=False):
            try:
                left = self._written(frames)
            finally:
                self._lock.release()
        if left:
            self._post(self._write, left)

    def _written(self, frames: Sequence[Parts]) -> Sequence[Parts]:
        """Write what can be written here and now; return what the I/O thread has to."""
        socket = self._socket
        if socket is None or not self._open():
            return frames
        for at, parts in enumerate(frames):
            try:
                _send(socket, parts)
            except zmq.ZMQError:
                return frames[at:]
        if _events(socket) & READABLE:  # its descriptor may have told of that already, and tells it once
            self._home.thread.inward.post(self._locked, self._pump)
        return ()

    def connect(self, endpoint: str) -> None:
        self._post(self._connect, endpoint)

    def disconnect(self, endpoint: str) -> None:
        self._post(self._disconnect, endpoint)

    def _post(self, call: Callable[..., object], *what: Any) -> None:
        self._asked += 1
        self._home.thread.inward.post(self._run, call, *what)

    async def bind(self, endpoint: str) -> str:
        """Bind and return the endpoint with its port. Raises ZMQError."""
        return await self._home.thread.run(self._bind(endpoint))

    def close(self, *, abruptly: bool = False) -> None:
        """Close; what is written is pushed out for `linger_s` at most, unless `abruptly`."""
        linger_ms = 0 if abruptly else int(self._home.options.linger_s * 1000)
        with suppress(RuntimeError):  # the thread has ended, and its sockets with it
            self._post(self.end, linger_ms)

    # on the I/O thread

    def _locked(self, call: Callable[..., object], *what: Any) -> None:
        with self._lock:
            call(*what)

    def _run(self, call: Callable[..., object], *what: Any) -> None:
        try:
            self._locked(call, *what)
        finally:
            self._done += 1

    def _made(self) -> zmq.Socket[bytes]:
        socket = self._socket = self._home.context.socket(self._kind)
        self._home.wires.add(self)
        options = self._home.options
        socket.set(zmq.LINGER, 0)
        socket.set(zmq.MAXMSGSIZE, MAX_FRAME)
        socket.set(zmq.SNDHWM, self._high_water)  # 0 = none: credit bounds what is on the way
        socket.set(zmq.RCVHWM, self._high_water)
        if self._kind == zmq.DEALER:
            socket.set(zmq.IMMEDIATE, 1)  # else frames for a dead peer wait in silence
            socket.set(zmq.RECONNECT_IVL, -1)  # one connection, one life
        if self._kind == zmq.ROUTER:
            socket.set(zmq.ROUTER_MANDATORY, 1)  # else frames for a gone peer vanish
        for topic in self._topics:
            socket.set(zmq.SUBSCRIBE, topic)
        if options.curve_public and options.curve_secret and self._sink is not None:
            socket.set(zmq.CURVE_PUBLICKEY, options.curve_public.encode())
            socket.set(zmq.CURVE_SECRETKEY, options.curve_secret.encode())
        self._began = self._heard_s = time.monotonic()
        asyncio.get_running_loop().add_reader(socket.FD, self._locked, self._pump)
        if self._gone is not None:
            self._timer = asyncio.get_running_loop().call_later(BEAT_S, self._locked, self._beat)
        return socket

    async def _bind(self, endpoint: str) -> str:
        with self._lock:
            socket = self._made()
            if self._home.options.curve_senders and self._sink is not None:
                socket.set(zmq.CURVE_SERVER, 1)
            try:
                socket.bind(endpoint)
            except zmq.ZMQError:
                self.end(0)
                raise
            self.endpoint = socket.get_string(zmq.LAST_ENDPOINT)
            return self.endpoint

    def _connect(self, endpoint: str) -> None:
        consumer = self._home.options.curve_consumer
        try:
            socket = self._socket or self._made()
            if consumer is not None:
                socket.set(zmq.CURVE_SERVERKEY, consumer.encode())
            socket.connect(self._from_here(endpoint))
        except zmq.ZMQError:  # too many sockets, too
            self._lose(b"")
        else:
            self._pump()

    def _from_here(self, endpoint: str) -> str:
        """Connect from the address that the url names, as a machine with several of them wants it."""
        if self._home.host and endpoint.startswith("tcp://"):
            return f"tcp://{self._home.host}:0;{endpoint.removeprefix('tcp://')}"
        return endpoint

    def _disconnect(self, endpoint: str) -> None:
        if self._socket is not None:
            with suppress(zmq.ZMQError):  # its connection has ended by itself
                self._socket.disconnect(self._from_here(endpoint))

    def _write(self, frames: Sequence[Parts]) -> None:
        if self._socket is None:
            return
        if self._open():
            for parts in frames:
                self._put(parts)
        else:
            self._outbox += frames
        self._pump()

    def _open(self) -> bool:
        """May something be written, and nothing waits before it?"""
        return not self._outbox and (self._up or self._kind != zmq.DEALER)

    def _put(self, parts: Parts) -> bool:
        assert self._socket is not None
        try:
            _send(self._socket, parts)
        except zmq.ZMQError:  # EAGAIN: a DEALER without a connection; EHOSTUNREACH: a ROUTER's peer has gone
            self._lose(parts[0] if self._kind == zmq.ROUTER else b"")
            return False
        return True

    def _pump(self) -> None:
        """Read all there is. The descriptor only tells of changes: it is looked at after every use of the socket."""
        self._again = False
        socket = self._socket
        arrived: list[Parts] = []
        if socket is None:
            return
        if self._outbox and not self._up and _events(socket) & WRITABLE:
            self._up, outbox, self._outbox = True, self._outbox, []
            for parts in outbox:
                if not self._put(parts):
                    return
        while (most := self._room(len(arrived))) > 0 and _events(socket) & READABLE:
            try:
                for _ in range(most):
                    arrived.append(_receive(socket))
            except zmq.Again:
                continue
            self._soon()
            break
        if arrived:
            self._take(arrived)

    def _room(self, read: int) -> int:
        """Frames to read now, behind `read`. A Signal's wait in libzmq, which drops them beyond a limit, not here."""
        return BURST if self._kind != zmq.SUB else min(BURST, self._high_water - self._untold - read)

    def _look(self) -> None:
        """After something was written beside a read: its descriptor may have told of what has come since."""
        if self._socket is not None and _events(self._socket) & READABLE:
            self._soon()

    def _soon(self) -> None:
        if not self._again:
            self._again = True
            asyncio.get_running_loop().call_soon(self._locked, self._pump)

    def _take(self, arrived: list[Parts]) -> None:
        now = self._heard_s = time.monotonic()
        if self._sink is None:
            for identity, empty, *request in arrived:
                self._put([identity, empty, *self._home.answer(request)])
            self._look()
            return
        if self._kind == zmq.ROUTER:
            pings = [parts for parts in arrived if parts[1] == PING]
            self._heard |= {parts[0]: now for parts in arrived}
            if pings:
                for parts in pings:
                    self._put(parts)
                self._look()
                arrived = [p for p in arrived if p[1] != PING]
        elif self._kind == zmq.DEALER:
            arrived = [p for p in arrived if p[0] != PING]
        if self._kind == zmq.SUB:
            self._untold += len(arrived)
            self._tell(self._hand, arrived)
        elif arrived:
            self._tell(self._sink, arrived)

    def _hand(self, arrived: list[Parts]) -> None:
        """On the opener's loop: take them, and say so."""
        try:
            if self._sink is not None:
                self._sink(arrived)
        finally:
            with suppress(RuntimeError):
                self._post(self._handed, len(arrived))

    def _handed(self, count: int) -> None:
        self._untold -= count
        self._pump()

    def _beat(self) -> None:
        self._pump()  # what was sent while this process stood still is no silence
        if self._home.outward.is_closed:  # its loop was closed without closing the driver, and nobody will be told
            self.end(0)
        if self._socket is None:
            return
        self._timer = asyncio.get_running_loop().call_later(BEAT_S, self._locked, self._beat)
        now, patience_s = time.monotonic(), self._home.options.silence_s
        if self._kind == zmq.ROUTER:
            for identity in [i for i, at in self._heard.items() if now - at > patience_s]:
                self._lose(identity)
        elif now - (self._heard_s if self._up else self._began) > (patience_s if self._up else DIAL_S):
            self._lose(b"")
        elif self._up and self._put([PING]):
            self._look()

    def _lose(self, identity: bytes) -> None:
        if self._kind == zmq.DEALER:
            self.end(0)
        elif self._heard.pop(identity, None) is None:
            return
        if self._gone is not None:
            self._tell(self._gone, identity)

    def _tell(self, call: Callable[[Any], None], what: Any) -> None:
        try:
            self._home.outward.post(call, what)
        except RuntimeError:  # the opener's loop was closed without closing the driver: nobody is left to be told
            self.end(0)

    def end(self, linger_ms: int) -> None:
        with self._lock:
            socket, self._socket = self._socket, None
            if socket is None:
                return
            self._home.wires.discard(self)
            if self._timer is not None:
                self._timer.cancel()
            asyncio.get_running_loop().remove_reader(socket.FD)
            socket.close(linger_ms)


def _is_own_address(host: str) -> bool:
    """Can a socket be bound to it, and connect from it? libzmq takes IPv4 addresses and interfaces, but no names."""
    try:
        return not ipaddress.IPv4Address(host).is_unspecified
    except ValueError:
        return host in {name for _, name in system_socket.if_nameindex()}


def _send(socket: zmq.Socket[bytes], parts: Parts) -> None:
    """All or nothing. Raises ZMQError."""
    for part in parts[:-1]:
        socket.send(part, MORE)
    socket.send(parts[-1], NO_WAIT)


def _receive(socket: zmq.Socket[bytes]) -> Parts:
    """As `recv_multipart`, which asks for an option after each part. Raises Again."""
    frame = socket.recv(NO_WAIT, copy=False)
    parts = [frame.bytes]
    while frame.more:
        frame = socket.recv(NO_WAIT, copy=False)
        parts.append(frame.bytes)
    return parts


def _events(socket: zmq.Socket[bytes]) -> int:
    return cast("int", socket.get(zmq.EVENTS))


# --- who is where


@dataclass(frozen=True, slots=True)
class Listener:
    """A consumer as it announced itself."""

    endpoint: str
    group: str | None
    instance: str


class Place:
    """The meeting point of one destination: a folder of announcements, or the endpoints that its options list.

    An announcement is a file that its consumer keeps locked as long as it lives; the kernel unlocks it at any death,
    and who finds it unlocked removes it.
    """

    RECENT_S: ClassVar[float] = 0.05  # a folder's time stamp is some milliseconds coarse: a recent one may hide more

    def __init__(self, root: Path | None, name: str, listed: Mapping[str, str | None]) -> None:
        self.name = name
        self.folder = root / name if root is not None else None
        self.listed = [Listener(e, group, "") for e, group in listed.items()]
        self._seen_ns = -1

    def again(self) -> Place:
        """The same, for another who looks."""
        return Place(self.folder.parent if self.folder else None, self.name, {x.endpoint: x.group for x in self.listed})

    def changed(self) -> bool:
        """May `scan` find something else than last time? Costs a microsecond."""
        if self.folder is None:
            first, self._seen_ns = self._seen_ns < 0, 0
            return first
        try:
            stamp = os.stat(self.folder).st_mtime_ns
        except OSError:
            stamp = 0
        if stamp == self._seen_ns and time.time_ns() - stamp > self.RECENT_S * 1e9:
            return False
        self._seen_ns = stamp
        return True

    def scan(self) -> list[Listener] | None:
        """Everyone who is alive and listens; None where that cannot be found out now (no free descriptor): `changed`
        then asks for another look."""
        if self.folder is None:
            return self.listed
        found = []
        try:
            for name in sorted(os.listdir(self.folder)):
                if name.endswith(".at") and (listener := self._read(self.folder / name)) is not None:
                    found.append(listener)
        except FileNotFoundError:
            pass
        except OSError:
            self._seen_ns = -1
            return None
        return found

    def _read(self, path: Path) -> Listener | None:
        with suppress(FileNotFoundError, PermissionError, ValueError, KeyError, TypeError), path.open("rb") as file:
            said = json.loads(file.read())
            listener = Listener(said["endpoint"], said["group"], path.stem)
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return listener
            path.unlink(missing_ok=True)
            if listener.endpoint.startswith("ipc://"):
                Path(listener.endpoint.removeprefix("ipc://")).unlink(missing_ok=True)
        return None

    def announce(self, endpoint: str, group: str | None, instance: str) -> Locked:
        """Be found at `endpoint` until the returned object is left."""
        assert self.folder is not None
        made = Locked(self.folder / f".{instance}")
        os.write(made.file, json.dumps({"version": 1, "endpoint": endpoint, "group": group}).encode())
        made.rename(self.folder / f"{instance}.at")
        return made

    def turn(self, group: str | None) -> Locked | None:
        """The right to be the one that works, or None while another has it."""
        assert self.folder is not None
        try:
            return Locked(self.folder / (f"turn.{group}" if group else "turn"), keep=True)
        except BlockingIOError:
            return None


class Locked:
    """A file that this process holds locked; a forked child does not hold it along."""

    def __init__(self, path: Path, *, keep: bool = False) -> None:
        """Raises BlockingIOError if another holds it. `keep`: leaving unlocks the file and does not remove it."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self.file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._keep = keep
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BaseException:
            os.close(self.file)
            raise
        _locked.add(self)

    def rename(self, path: Path) -> None:
        self.path.rename(path)
        self.path = path

    def leave(self) -> None:
        file, self.file = self.file, -1
        if file < 0:
            return
        if not self._keep:
            self.path.unlink(missing_ok=True)
        os.close(file)


_locked: Final[weakref.WeakSet[Locked]] = weakref.WeakSet()


def _drop_in_child() -> None:
    for one in list(_locked):
        if one.file >= 0:
            os.close(one.file)
            one.file = -1


os.register_at_fork(after_in_child=_drop_in_child)
