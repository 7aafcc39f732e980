"""Receiving: sessions with the senders, credit, settlements; and the listener of a Signal."""

from __future__ import annotations

import asyncio
import logging
import secrets
import struct
from asyncio import Future
from collections import defaultdict, deque
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from itertools import accumulate, chain, count, islice, repeat, starmap
from types import MethodType
from typing import TYPE_CHECKING, Any, Final

import zmq

from messaging_sdk.errors import ConnectError, MessagingError
from messaging_sdk.model import Delivery, Message, Meta, Session
from messaging_sdk.spi import Disposition, OnRevoke, Receiver

from . import errors
from .sender import HEAD, SIGNAL_HEAD, VERSION, columns

if TYPE_CHECKING:
    from .driver import Home, Locked, Parts, Place, Wire

log: Final = logging.getLogger("messaging_sdk")

GOODBYE_S: Final = 1.0  # how long a closing consumer waits for its senders to have read its settlements
TURN_S: Final = 0.05  # between looks whether the one that works has gone
SMALL: Final = 50  # half a window that is not worth halving
REMEMBERED: Final = 20_000  # settled ids whose settlement may be lost with a link

Known = tuple[str, float]  # id and creation time: an id that is published again is another message


class Peer(Session):
    """One session with one sender."""

    __slots__ = ("identity", "limit", "number", "out", "sender")

    def __init__(self, identity: bytes, sender: bytes, number: int) -> None:
        super().__init__(f"sender {sender.hex()} session {number}")
        self.identity = identity
        self.sender = sender
        self.number = number
        self.limit = 0
        self.out = 0  # handed out by receive_batch and not settled


class Block:
    """The messages of one frame, taken apart. Raises ValueError or struct.error for what is none."""

    __slots__ = ("bodies", "created", "ids", "rest")

    def __init__(self, parts: Sequence[bytes]) -> None:
        lengths, bodies, ids, created, rest = parts
        sizes = struct.unpack(f"<{len(lengths) // 4}I", lengths)
        ends = [*accumulate(sizes)]
        self.bodies = [bodies[end - size : end] for end, size in zip(ends, sizes, strict=True)]
        self.ids = ids.decode().split("\n")
        self.created: Sequence[float] = struct.unpack(f"<{len(created) // 8}d", created)
        self.rest = columns(rest)
        if not sizes or ends[-1] != len(bodies) or not len(sizes) == len(self.ids) == len(self.created):
            raise ValueError("columns of different lengths")
        for name in self.rest.keys() & {"k", "c", "h", "t"}:
            column, kind = self.rest[name], dict if name == "h" else str
            if name == "t" and (column is None or isinstance(column, str)):
                continue
            fits = isinstance(column, list) and len(column) == len(sizes)
            if not (fits and all(cell is None or isinstance(cell, kind) for cell in column)):
                raise ValueError(f"column {name!r} does not fit")

    def messages(self) -> Iterator[tuple[bytes, str, str | None, Callable[[], Meta]]]:
        """Body, id, key and what gives the meta of each. A bound method is a `partial` at two thirds of the price."""
        keys = self.rest.get("k") or repeat(None)
        return zip(self.bodies, self.ids, keys, map(MethodType, repeat(self._meta), count()), strict=False)

    def _meta(self, index: int) -> Meta:
        rest = self.rest
        kind, correlation, headers = rest.get("t"), rest.get("c"), rest.get("h")
        return Meta(
            (headers[index] if headers else None) or {},
            kind[index] if isinstance(kind, list) else kind,
            correlation[index] if correlation else None,
            self.created[index] or None,
        )


class Given:
    """One frame of a session, as long as a message of it is unsettled."""

    __slots__ = ("block", "frame", "peer")

    def __init__(self, peer: Peer, frame: int, block: Block) -> None:
        self.peer = peer
        self.frame = frame
        self.block = block


class Settled:
    """Messages whose sender has perhaps not heard of it. Sorted only when one is looked for, which is rare."""

    def __init__(self) -> None:
        self.count = 0
        self._runs: list[tuple[bytes, Sequence[str], Sequence[float]]] = []
        self._senders: dict[Known, bytes] = {}

    def add(self, given: Given, indexes: Sequence[int]) -> None:
        if not indexes:
            return
        ids, created = given.block.ids, given.block.created
        self.count += len(indexes)
        if len(indexes) < len(ids):
            ids, created = [ids[i] for i in indexes], [created[i] for i in indexes]
        self._runs.append((given.peer.sender, ids, created))

    def has(self, sender: bytes, message: Known) -> bool:
        """Without a creation time nobody knows whether it is the same message."""
        for by, ids, created in self._runs:
            self._senders.update(dict.fromkeys(zip(ids, created, strict=True), by))
        self._runs.clear()
        return bool(message[1]) and self._senders.get(message) == sender


class Waiting(Receiver):
    """What both receivers share: a buffer that `receive_batch` waits for, and an end."""

    def __init__(self, home: Home, place: Place, group: str | None) -> None:
        self._home = home
        self._place = place
        self._group = group
        self._loop = asyncio.get_running_loop()
        self._buffer: deque[list[Any]] = deque()  # what came in one frame stays together
        self._waiter: Future[None] | None = None
        self._ended = False
        self._instance = secrets.token_hex(6)
        self._wire: Wire | None = None
        self._announced: Locked | None = None
        home.open.add(self)

    async def _listen(self, kind: int, sink: Callable[[list[Parts]], None], **settings: Any) -> None:
        """Bind, and be found."""
        places: list[str] = [x.endpoint for x in self._place.listed if x.group == self._group]
        if self._place.folder is not None:
            places = [self._home.endpoint(self._place.folder)]
        failure: zmq.ZMQError | None = None
        for endpoint in places:
            self._wire = self._home.wire(kind, sink, **settings)  # before it is bound: who dials already is answered
            try:
                found = await self._wire.bind(endpoint)
            except zmq.ZMQError as error:
                failure, self._wire = error, None
                continue
            if self._place.folder is not None:
                try:
                    self._announced = self._place.announce(found, self._group, self._instance)
                except OSError as error:
                    self.lose()
                    raise errors.from_native(error, f"{self._place.name}: announcing a consumer") from error
            return
        self.lose()
        what = f"{self._place.name}: none of {', '.join(places) or 'no endpoints'} can be bound"
        if failure is None:
            raise ConnectError(f"{what}; list some for group {self._group!r}", transient=False)
        raise errors.from_native(failure, what) from failure

    async def receive_batch(self, max_deliveries: int) -> list[Any]:
        while True:
            found = self._take(max_deliveries)
            if found:
                return found
            if self._ended:
                raise errors.closed(self._place.name)
            self._waiter = self._loop.create_future()
            await self._waiter

    def _take(self, count: int) -> list[Any]:
        return [*chain.from_iterable(self._pieces(count))]

    def _pieces(self, count: int) -> Iterator[list[Any]]:
        """Up to `count` of what is buffered, each piece from one frame."""
        while count > 0 and self._buffer:
            piece = self._buffer.popleft()
            if len(piece) > count:
                self._buffer.appendleft(piece[count:])
                del piece[count:]
            count -= len(piece)
            yield piece

    def _wake(self) -> None:
        waiter, self._waiter = self._waiter, None
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    def lose(self) -> None:
        """The end, at once."""
        self._ended = True
        self._home.open.discard(self)
        if self._announced is not None:
            self._announced.leave()
        if self._wire is not None:
            self._wire.close()
        self._wake()


class QueueReceiver(Waiting):
    """A worker of a Queue or of a group of a Topic."""

    def __init__(
        self, home: Home, place: Place, group: str | None, window: int, on_revoke: OnRevoke, *, ordered: bool
    ) -> None:
        super().__init__(home, place, group)
        self._ordered = ordered
        self._window = window
        self._on_revoke = on_revoke
        self._place_name = f"{place.name}/{group}".encode() if group else place.name.encode()
        self._peers: dict[bytes, Peer] = {}
        self._out = 0
        self._stopped = False
        self._turn: Locked | None = None
        self._standing: asyncio.Task[None] | None = None
        self._farewell: Future[None] | None = None
        self._leaving: set[bytes] = set()
        self._settled, self._settled_before = Settled(), Settled()
        self._tasks: set[asyncio.Task[None]] = set()
        self._failure: BaseException | None = None

    async def open(self) -> None:
        if not self._ordered or self._place.folder is None:
            await self._listen(zmq.ROUTER, self._arrived, gone=self._gone)
        elif not await self._my_turn():
            self._standing = self._background(self._stand_by())

    def _background(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """A task whose failure ends this receiver."""
        task = self._loop.create_task(work)
        self._tasks.add(task)

        def done(ended: asyncio.Task[None]) -> None:
            self._tasks.discard(ended)
            if not ended.cancelled() and (error := ended.exception()) is not None:
                self._failure = error
                self._wake()

        task.add_done_callback(done)
        return task

    async def _my_turn(self) -> bool:
        self._turn = self._place.turn(self._group)
        if self._turn is None:
            return False
        await self._listen(zmq.ROUTER, self._arrived, gone=self._gone)
        return True

    async def _stand_by(self) -> None:
        """Wait until the one that works has left or died."""
        while not await self._my_turn():  # noqa: ASYNC110  # a file lock has no event
            await asyncio.sleep(TURN_S)

    # --- what senders say

    def _arrived(self, frames: list[Parts]) -> None:
        for identity, head, *rest in frames:
            try:
                kind, version, number, frame = HEAD.unpack(head)
                if version != VERSION:
                    self._say(identity, b"N", number, 0, b"this consumer speaks version %d" % VERSION)
                elif kind == b"H":
                    self._greet(identity, number, *rest)
                elif kind == b"B":
                    self._deliver(identity, number, frame, rest)
                elif kind == b"X":
                    self._gone(identity)
            except Exception as error:  # whatever a peer sends harms that peer alone
                log.warning("%s: a frame that is not of this protocol was dropped: %r", self._place.name, error)
                self._say(identity, b"N", 0, 0, b"that is no frame of this protocol")
        if self._buffer:
            self._wake()

    def _say(self, identity: bytes, kind: bytes, session: int, number: int, *rest: bytes) -> None:
        if self._wire is not None:
            self._wire.send([identity, HEAD.pack(kind, VERSION, session, number), *rest])

    def _greet(self, identity: bytes, number: int, sender: bytes, place: bytes) -> None:
        if place != self._place_name:
            self._say(identity, b"N", number, 0, b"here is " + self._place_name)
            return
        if self._stopped:
            self._say(identity, b"Q", number, 0)
            return
        for old in [p for p in self._peers.values() if p.sender == sender]:
            self._gone(old.identity)
        peer = self._peers[identity] = Peer(identity, sender, number)
        peer.limit = self._credit()
        self._say(identity, b"W", number, peer.limit)
        self._share_credit()

    def _credit(self) -> int:
        return max(1, self._window // max(1, len(self._peers)))

    def _share_credit(self) -> None:
        """The window is divided among the senders."""
        limit = self._credit()
        for peer in self._peers.values():
            if peer.limit != limit and not self._stopped:
                peer.limit = limit
                self._say(peer.identity, b"L", peer.number, limit)

    def _deliver(self, identity: bytes, number: int, frame: int, parts: Sequence[bytes]) -> None:
        peer = self._peers.get(identity)
        if peer is None or peer.number != number:
            self._say(identity, b"?", number, 0)
            return
        (attempt,) = struct.unpack("<I", parts[0])
        block = Block(parts[1:])
        again, given = attempt > 1, Given(peer, frame, block)
        arrived: list[Delivery[Any]] = [
            Delivery(body, id, key, meta, receipt=(given, n), session=peer, deliveries=attempt, redelivered=again)
            for n, (body, id, key, meta) in enumerate(block.messages())
        ]
        if again:
            arrived = self._not_settled(given, arrived)
        if self._stopped:
            self._hand_back(arrived)
        elif arrived:
            self._buffer.append(arrived)

    def _not_settled(self, given: Given, arrived: list[Delivery[Any]]) -> list[Delivery[Any]]:
        """Say again what was settled here and was lost with a link; return the rest."""
        sender, known = given.peer.sender, zip(given.block.ids, given.block.created, strict=True)
        books = (self._settled, self._settled_before)
        done = [index for index, message in enumerate(known) if any(b.has(sender, message) for b in books)]
        if done:
            self._tell({given: done}, {})
        gone = set(done)
        return [d for d in arrived if d.receipt[1] not in gone]

    def _gone(self, identity: bytes) -> None:
        """A sender left, died, or calls again: what it has is its own again."""
        if self._wire is not None and self._farewell is not None:
            self._leaving.discard(identity)
            if not self._leaving and not self._farewell.done():
                self._farewell.set_result(None)
        peer = self._peers.pop(identity, None)
        if peer is None:
            return
        peer.closing = peer.lost = True
        self._say(identity, b"?", peer.number, 0)  # it may only have stood still, and think that all is well
        self._out -= peer.out
        self._buffer = deque(piece for piece in self._buffer if piece[0].session is not peer)
        self._background(self._revoke(peer))
        self._share_credit()
        self._wake()

    async def _revoke(self, peer: Peer) -> None:
        await self._on_revoke([peer], 0.0)

    # --- what core asks

    async def receive_batch(self, max_deliveries: int) -> list[Any]:
        """Half a window at a time: its settlements are on their way while the other half is worked on."""
        if self._buffer:
            await asyncio.sleep(0)  # the first half's handlers run
            await asyncio.sleep(0)  # and core settles it
        return await super().receive_batch(min(max_deliveries, max(SMALL, self._window // 2)))

    def _take(self, count: int) -> list[Any]:
        if self._failure is not None:
            raise self._failure
        taken: list[Any] = []
        if not self._stopped:
            for piece in self._pieces(min(count, self._window - self._out)):
                piece[0].session.out += len(piece)
                taken += piece
            self._out += len(taken)
        return taken

    def settle_batch(
        self, settlements: Sequence[tuple[Any, Disposition]]
    ) -> Future[Sequence[tuple[int, MessagingError]]] | None:
        if self._ended:
            raise errors.closed(self._place.name)
        failed: list[tuple[int, MessagingError]] = []
        accepted: dict[Given, list[int]] = {}  # -> indexes
        released: dict[Given, list[tuple[int, float]]] = {}  # -> indexes with their delays
        last: Given | None = None
        lost, run = False, list[int]()
        for at, ((given, index), disposition) in enumerate(settlements):
            if given is not last:
                last, lost, run = given, given.peer.lost, accepted.setdefault(given, [])
            if lost:
                failed.append((at, errors.settle_lost()))
            elif disposition.kind == "accept":
                run.append(index)
            elif self._ordered:  # later ones of its key are on the way here
                failed.append((at, errors.absent(self._place.name, "release")))
            else:
                released.setdefault(given, []).append((index, disposition.delay_s))
        for given, run in accepted.items():
            self._finished(given, run, len(released.get(given, ())))
        self._tell(accepted, released)
        if self._buffer:
            self._wake()
        if not failed:
            return None
        answer: Future[Sequence[tuple[int, MessagingError]]] = self._loop.create_future()
        answer.set_result(failed)
        return answer

    def _finished(self, given: Given, accepted: Sequence[int], released: int) -> None:
        given.peer.out -= len(accepted) + released
        self._out -= len(accepted) + released
        self._settled.add(given, accepted)
        if self._settled.count > REMEMBERED:
            self._settled, self._settled_before = Settled(), self._settled

    def _tell(self, accepted: dict[Given, list[int]], released: dict[Given, list[tuple[int, float]]]) -> None:
        """One frame for each peer and kind."""
        done: defaultdict[Peer, list[int]] = defaultdict(list)
        back: defaultdict[Peer, bytearray] = defaultdict(bytearray)
        for given, indexes in accepted.items():
            if indexes:
                done[given.peer] += (given.frame, len(indexes), *indexes)
        for given, items in released.items():
            for index, delay_s in items:
                back[given.peer] += struct.pack("<IId", given.frame, index, delay_s)
        for peer, numbers in done.items():
            self._say(peer.identity, b"A", peer.number, 0, struct.pack(f"<{len(numbers)}I", *numbers))
        for peer, packed in back.items():
            self._say(peer.identity, b"R", peer.number, 0, bytes(packed))

    async def stop(self) -> None:
        self._stopped = True
        if self._standing is not None:
            self._standing.cancel()
        for peer in self._peers.values():
            self._say(peer.identity, b"Q", peer.number, 0)
        buffer, self._buffer = self._buffer, deque()
        self._hand_back(chain.from_iterable(buffer))

    def _hand_back(self, deliveries: Iterable[Delivery[Any]]) -> None:
        """Give back what was never handed out; that is no delivery, hence the negative delay."""
        returned: defaultdict[Given, list[tuple[int, float]]] = defaultdict(list)
        for delivery in deliveries:
            given, index = delivery.receipt
            returned[given].append((index, -1.0))
        self._tell({}, returned)

    async def close(self) -> None:
        """Say goodbye, and be found until every sender has read it: else it would send again what is settled."""
        if self._ended:
            return
        try:
            await self.stop()
            self._leaving = set(self._peers)
            if self._leaving:
                self._farewell = self._loop.create_future()
                for peer in self._peers.values():
                    self._say(peer.identity, b"X", peer.number, 0)
                await asyncio.wait({self._farewell}, timeout=GOODBYE_S)
        finally:
            self.lose()

    def lose(self) -> None:
        if self._standing is not None:
            self._standing.cancel()
        for peer in self._peers.values():
            peer.closing = peer.lost = True
        self._peers.clear()
        super().lose()
        if self._turn is not None:
            self._turn.leave()


class SignalReceiver(Waiting):
    """A listener of a Signal, alone or as a member of a group."""

    def __init__(self, home: Home, place: Place, group: str | None, buffer: int) -> None:
        super().__init__(home, place, group)
        self._room = buffer
        self._next: dict[tuple[bytes, bytes], int] = {}  # sender and topic -> number of the next message
        self._topic = f"@{self._instance}.{group or ''}\0".encode()

    async def open(self) -> None:
        everyone = b"*%s\0" % self._place.name.encode()
        topics = [self._topic] if self._group else [everyone, self._topic]  # its own last: it means that all are there
        await self._listen(zmq.SUB, self._arrived, topics=topics, high_water=self._home.options.signal_frames)

    def _arrived(self, frames: list[Parts]) -> None:
        for topic, head, *parts in frames:
            try:
                _, version, sender, number = SIGNAL_HEAD.unpack(head)
                if version != VERSION:
                    raise ValueError(f"version {version}")
                block = Block(parts)
            except Exception as error:
                log.warning("%s: a frame that is not of this protocol was dropped: %r", self._place.name, error)
                continue
            size, stream = len(block.ids), (sender, topic)
            self.dropped += max(0, number - self._next.get(stream, number))  # libzmq drops in silence: the gap tells
            self._next[stream] = number + size
            if len(self._next) > REMEMBERED:
                del self._next[next(iter(self._next))]
            kept = min(size, self._room)
            self.dropped += size - kept
            if not kept:
                continue
            self._room -= kept
            self._buffer.append([*starmap(Message, islice(block.messages(), kept))])
        if self._buffer:
            self._wake()

    def _take(self, count: int) -> list[Any]:
        taken = super()._take(count)
        self._room += len(taken)
        return taken

    def settle_batch(
        self, settlements: Sequence[tuple[Any, Disposition]]
    ) -> Future[Sequence[tuple[int, MessagingError]]] | None:
        return None  # a Signal settles nothing

    async def stop(self) -> None:
        """What is here already is nobody else's."""

    async def close(self) -> None:
        self.lose()
