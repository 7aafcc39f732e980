"""Sending: messages packed into frames, links to consumers, and each group's outbox that waits for credit."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import struct
import time
from collections import defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import zmq

from messaging_sdk.errors import Backpressure, CapabilityError, InvalidMessage, MessagingError
from messaging_sdk.model import SENT, Outgoing, SendResult, indeterminate, rejected
from messaging_sdk.spi import OnOutcomes, Sender

from . import errors

if TYPE_CHECKING:
    from .driver import Home, Parts, Place

log: Final = logging.getLogger("messaging_sdk")

VERSION: Final = 1
MAX_BODY: Final = 16 << 20
FRAME: Final = 500  # messages of one frame: more gained nothing
FRAME_BYTES: Final = 1 << 20
LOOK_S: Final = 0.1  # between looks for consumers that came or went
REDIAL_S: Final = 0.2
JOIN_S: Final = 1.0  # how long signals wait for a listener that has just announced itself
HEAD: Final = struct.Struct("<cBII")  # type, version, session, frame or limit
SIGNAL_HEAD: Final = struct.Struct("<cB8sQ")  # type, version, sender, number of the first message


class Batch:
    """One `send_batch`: whom to tell, and of a topic with several groups how many have yet to settle each message."""

    __slots__ = ("left", "on_outcomes")

    def __init__(self, on_outcomes: OnOutcomes, size: int, groups: int) -> None:
        self.on_outcomes = on_outcomes
        self.left = [groups] * size if groups > 1 else None


class Entry:
    """One message of one group until it is settled."""

    __slots__ = ("attempt", "batch", "index", "message", "serial")

    def __init__(self, message: Outgoing, batch: Batch, index: int, serial: int) -> None:
        self.message = message
        self.batch = batch
        self.index = index
        self.serial = serial
        self.attempt = 1


def pack(messages: Sequence[Outgoing]) -> Parts:
    """Lengths, bodies, ids, creation times and the rest of `messages`, a column each."""
    bodies = [m.body for m in messages]
    count = len(bodies)
    return [
        struct.pack(f"<{count}I", *map(len, bodies)),
        b"".join(bodies),
        "\n".join([m.id for m in messages]).encode(),
        struct.pack(f"<{count}d", *[m.created_s for m in messages]),
        _rest(messages),
    ]


def _rest(messages: Sequence[Outgoing]) -> bytes:
    """As JSON, with only the columns that are needed; the content type once where all have the same."""
    kind = messages[0].content_type
    rest: dict[str, Any] = {"t": kind}
    for m in messages:
        if m.key is not None or m.headers or m.correlation_id is not None or m.content_type != kind:
            break
    else:
        return json.dumps(rest).encode()
    columns: dict[str, list[Any]] = {
        "k": [m.key for m in messages],
        "c": [m.correlation_id for m in messages],
        "h": [dict(m.headers) if m.headers else None for m in messages],
    }
    rest |= {name: column for name, column in columns.items() if any(v is not None for v in column)}
    if any(m.content_type != kind for m in messages):
        rest["t"] = [m.content_type for m in messages]
    return json.dumps(rest, separators=(",", ":")).encode()


def odd(m: Outgoing) -> bool:
    """Is there anything that `problem` has to say?"""
    if m.delay_s is not None or m.ttl_s is not None or m.priority is not None:
        return True
    return len(m.body) > MAX_BODY or "\n" in m.id


def problem(name: str, message: Outgoing) -> MessagingError | None:
    """Why `message` cannot be sent."""
    if not odd(message):
        return None
    if message.delay_s is not None or message.ttl_s is not None or message.priority is not None:
        asked = {"delay": message.delay_s, "ttl": message.ttl_s, "priority": message.priority}
        return CapabilityError([u for f, v in asked.items() if v is not None for u in errors.absent(name, f).unmet])
    if len(message.body) > MAX_BODY:
        return errors.too_large(len(message.body), MAX_BODY)
    return InvalidMessage(f"{name}: a message id has a line break")


def weight(m: Outgoing) -> int:
    """Bytes of a frame that it needs at most, about: JSON may write a character of a key or header in twelve."""
    if not m.headers and m.key is None and m.correlation_id is None:
        return len(m.body)
    texts = sum([len(name) + len(value) for name, value in m.headers.items()])
    return len(m.body) + 12 * (texts + len(m.key or "") + len(m.correlation_id or ""))


class Frame:
    """Entries that were sent together; None where one is settled or came back."""

    __slots__ = ("entries", "left")

    def __init__(self, entries: Sequence[Entry]) -> None:
        self.entries: list[Entry | None] = [*entries]
        self.left = len(entries)


class Link:
    """One connection to one consumer: greeted, given credit, dead at the first loss; its frames go back."""

    def __init__(self, outbox: Outbox, endpoint: str) -> None:
        self.endpoint = endpoint
        self.outbox = outbox
        self.session = outbox.next_session()
        self.limit = 0
        self.free = 0
        self.frames: dict[int, Frame] = {}
        self.ready = self.dead = False
        self._frame = 0
        self._wire = outbox.home.wire(zmq.DEALER, self._arrived, self._lost)
        self._wire.connect(endpoint)
        self._wire.send([HEAD.pack(b"H", VERSION, self.session, 0), outbox.id, outbox.place_name])

    def send(self, entries: Sequence[Entry]) -> None:
        """Send entries of one attempt as one frame."""
        self._frame += 1
        self.frames[self._frame] = Frame(entries)
        self.free -= len(entries)
        head, attempt = HEAD.pack(b"B", VERSION, self.session, self._frame), struct.pack("<I", entries[0].attempt)
        self._wire.send([head, attempt, *pack([e.message for e in entries])])

    def unsettled(self) -> list[Entry]:
        return [e for frame in self.frames.values() for e in frame.entries if e is not None]

    def _arrived(self, frames: list[Parts]) -> None:
        try:
            self._read(frames)
        except Exception as error:  # whatever a consumer sends harms its own link alone
            log.warning("zeromq: %s sent a frame that is not of this protocol: %r", self.endpoint, error)
            self.drop()

    def _read(self, frames: list[Parts]) -> None:
        for parts in frames:
            if self.dead:
                return
            kind, version, session, number = HEAD.unpack_from(parts[0])
            if version != VERSION or kind == b"N":
                why = parts[1].decode("utf-8", "replace") if len(parts) > 1 else f"it speaks version {version}"
                log.warning("zeromq: the consumer at %s refuses this sender: %s", self.endpoint, why)
                self.drop()
            elif session != self.session:
                continue
            elif kind == b"A":
                self._settled(parts[1])
            elif kind == b"R":
                self._returned(parts[1])
            elif kind in b"WLQ":  # welcome, limit, quitting (a limit of 0)
                self.ready = True
                self.free += number - self.limit
                self.limit = number
            elif kind == b"X":  # all it had to say is said: what is unsettled is ours again
                self._wire.send([HEAD.pack(b"X", VERSION, self.session, 0)])
                self.drop(politely=True)
            else:  # "?": it does not know our session
                self.drop()
        self.outbox.dispatch()

    def _claim(self, frame: int, indexes: Sequence[int]) -> list[Entry]:
        """Take entries out of a frame; those that are not in it were settled before."""
        found = self.frames.get(frame)
        if found is None:
            return []
        entries = found.entries
        claimed: list[Entry] = []
        for index in indexes:
            entry = entries[index] if index < len(entries) else None
            if entry is not None:
                claimed.append(entry)
                entries[index] = None
        found.left -= len(claimed)
        if not found.left:
            del self.frames[frame]
        self.free += len(claimed)
        return claimed

    def _settled(self, payload: bytes) -> None:
        numbers = struct.unpack(f"<{len(payload) // 4}I", payload)
        at = 0
        while at < len(numbers):
            frame, count = numbers[at : at + 2]
            self.outbox.settled(self._claim(frame, numbers[at + 2 : at + 2 + count]))
            at += 2 + count

    def _returned(self, payload: bytes) -> None:
        back: list[Entry] = []
        for frame, index, delay_s in struct.iter_unpack("<IId", payload):
            entries = self._claim(frame, (index,))
            if delay_s >= 0:  # it was handed out; below 0 it never was
                for entry in entries:
                    entry.attempt += 1
            if delay_s > 0:
                self.outbox.give_back(entries, delay_s)
            else:
                back += entries
        self.outbox.give_back(back)

    def _lost(self, _: bytes) -> None:
        if not self.ready:
            self.outbox.unreachable(self.endpoint)
        self.drop()

    def drop(self, *, politely: bool = False) -> None:
        """The end of this link. What is unsettled was delivered once more than before and goes back."""
        if self.dead:
            return
        self.dead = True
        self._wire.close(abruptly=not politely)
        back = self.unsettled()
        self.frames.clear()
        for entry in back:
            entry.attempt += 1
        self.outbox.link_lost(self, back)

    def leave(self) -> None:
        """Say goodbye: the consumer drops what it has not started."""
        self._wire.send([HEAD.pack(b"X", VERSION, self.session, 0)])
        self.drop(politely=True)


class Outbox:
    """One group's messages, from `send_batch` to their settlement, and the links to its consumers."""

    def __init__(self, sender: QueueSender, place: Place, group: str | None, *, ordered: bool) -> None:
        self.home = sender.home
        self.id = os.urandom(8)
        self.place = place
        self.place_name = f"{place.name}/{group}".encode() if group else place.name.encode()
        self.held = self.held_bytes = 0
        self._sender = sender
        self._group = group
        self._ordered = ordered
        self._waiting: deque[Entry] = deque()
        self._links: dict[str, Link] = {}
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._redial: dict[str, float] = {}
        self._warned: set[str] = set()
        self._sessions = 0
        self._turn = 0
        self._closed = False
        self._look()

    def next_session(self) -> int:
        self._sessions += 1
        return self._sessions

    # --- consumers come and go

    def _look(self) -> None:
        self._timer = self._loop.call_later(LOOK_S, self._look)
        now = self._loop.time()
        if self.place.changed() or any(at <= now for at in self._redial.values()):
            self.look()

    def look(self) -> None:
        """Have a link to each consumer there is, and to no other."""
        now = self._loop.time()
        found = self.place.scan()
        if found is None:
            return
        there = {x.endpoint for x in found if x.group == self._group}
        for endpoint in [e for e in self._links if e not in there]:
            self._links[endpoint].drop()
        self._redial = {e: at for e, at in self._redial.items() if e in there}
        for endpoint in there:
            if endpoint not in self._links and self._redial.get(endpoint, 0.0) <= now:
                self._redial.pop(endpoint, None)
                self._links[endpoint] = Link(self, endpoint)

    def link_lost(self, link: Link, back: list[Entry]) -> None:
        if self._links.get(link.endpoint) is link:
            del self._links[link.endpoint]
        if self._closed:
            return
        self._redial[link.endpoint] = self._loop.time() + REDIAL_S
        self.give_back(back)

    def unreachable(self, endpoint: str) -> None:
        """Say once that a consumer does not answer; it is dialled again all the while."""
        if endpoint not in self._warned:
            self._warned.add(endpoint)
            log.warning(
                "%s: the consumer at %s does not answer: it is frozen or not reachable%s",
                self.place.name,
                endpoint,
                ", or one of them does not know the other's CURVE key" if self.home.options.curve_public else "",
            )

    # --- messages come and go

    def put(self, entries: list[Entry]) -> None:
        self._waiting.extend(entries)
        if not self._links and self.place.changed():
            self.look()
        self.dispatch()

    def give_back(self, entries: list[Entry], delay_s: float = 0.0) -> None:
        """Offer them again, before everything that was sent after them."""
        if self._closed or not entries:
            return
        if delay_s:
            self._loop.call_later(delay_s, self.give_back, entries)
            return
        self._waiting = deque(sorted((*entries, *self._waiting), key=lambda e: e.serial))
        self.dispatch()

    def settled(self, entries: list[Entry]) -> None:
        """Tell whoever sent them, one call per run of one batch."""
        self.held -= len(entries)
        self.held_bytes -= sum([len(e.message.body) for e in entries])
        at = 0
        while at < len(entries):
            batch, start = entries[at].batch, at
            while at < len(entries) and entries[at].batch is batch:
                at += 1
            run = [e.index for e in entries[start:at]]
            if batch.left is not None:
                run = [index for index in run if self._last(batch.left, index)]
            if run:
                batch.on_outcomes([(index, SENT) for index in run])

    @staticmethod
    def _last(left: list[int], index: int) -> bool:
        left[index] -= 1
        return left[index] == 0

    def dispatch(self) -> None:
        """Hand out what waits, as far as there is credit."""
        while self._waiting and not self._closed:
            open_ = [x for x in self._links.values() if x.ready and x.free > 0]
            if not open_ or (self._ordered and self._divided()):
                return
            self._turn += 1
            link = open_[self._turn % len(open_)]
            share = -(-len(self._waiting) // len(open_))
            link.send(self._cut(min(link.free, share, FRAME)))

    def _divided(self) -> bool:
        """Another consumer than the ready one may still work on what it was given: wait until that is known."""
        return sum(bool(x.ready or x.frames) for x in self._links.values()) > 1

    def _cut(self, count: int) -> list[Entry]:
        """Up to `count` entries of one attempt, of one frame's size together."""
        waiting, size = self._waiting, 0
        entries: list[Entry] = []
        attempt = waiting[0].attempt
        while waiting and len(entries) < count and waiting[0].attempt == attempt:
            size += weight(waiting[0].message)
            if size > FRAME_BYTES and entries:
                break
            entries.append(waiting.popleft())
        return entries

    # --- the end

    def withdraw(self, batch_messages: set[int]) -> list[Entry]:
        """Forget waiting entries of these messages that were never dispatched."""
        out = [e for e in self._waiting if e.attempt == 1 and id(e.message) in batch_messages]
        if out:
            gone = set(map(id, out))
            self._waiting = deque(e for e in self._waiting if id(e) not in gone)
            self.held -= len(out)
            self.held_bytes -= sum(len(e.message.body) for e in out)
        return out

    def close(self) -> list[Entry]:
        """Leave all links; return what is not settled."""
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
        left = [*self._waiting]
        for link in list(self._links.values()):
            left += link.unsettled()
            link.leave()
        self._waiting.clear()
        return left


class QueueSender(Sender):
    """Queue and Topic: an outbox for each group. A message is OK when every group has settled it."""

    max_batch = FRAME
    max_batch_bytes = FRAME_BYTES
    max_in_flight = 1 << 30  # an outcome waits for a handler: `max_held` bounds what is out, not a number of batches

    def __init__(self, home: Home, place: Place, groups: Sequence[str | None], *, ordered: bool) -> None:
        self.home = home
        self._name = place.name
        self._serial = 0
        self._lost = False
        self._outboxes = [Outbox(self, place.again(), group, ordered=ordered) for group in groups]
        home.open.add(self)

    def send_batch(self, messages: Sequence[Outgoing], on_outcomes: OnOutcomes) -> None:
        if self._lost:
            raise errors.closed(self._name)
        batch = Batch(on_outcomes, len(messages), len(self._outboxes))
        refused: list[tuple[int, SendResult]] = []
        good = [*enumerate(messages)]
        size = sum([len(m.body) for m in messages])
        if self._full(len(messages) - 1, size) or any(map(odd, messages)):
            good.clear()
            for index, message in enumerate(messages):
                bytes_ahead = sum(len(m.body) for _, m in good)
                wrong = problem(self._name, message) or self._full(len(good), bytes_ahead + len(message.body))
                if wrong is not None:
                    refused.append((index, rejected(wrong)))
                else:
                    good.append((index, message))
            size = sum(len(m.body) for _, m in good)
        if not self._outboxes:  # a topic without groups: accepted, and goes nowhere
            on_outcomes([*refused, *((index, SENT) for index, _ in good)])
            return
        if refused:
            on_outcomes(refused)
        serial, self._serial = self._serial, self._serial + len(good)
        for outbox in self._outboxes:
            outbox.held += len(good)
            outbox.held_bytes += size
            outbox.put([Entry(m, batch, index, serial + n) for n, (index, m) in enumerate(good)])

    def _full(self, ahead: int, size: int) -> MessagingError | None:
        options = self.home.options
        for outbox in self._outboxes:
            if outbox.held + ahead >= options.max_held or outbox.held_bytes + size > options.max_held_bytes:
                return Backpressure(f"{self._name}: {outbox.held} messages are unsettled here; the limit is reached")
        return None

    def withdraw(self, messages: Sequence[Outgoing]) -> Sequence[Outgoing]:
        wanted = set(map(id, messages))
        copies: dict[int, list[Entry]] = defaultdict(list)
        for outbox in self._outboxes:
            for entry in outbox.withdraw(wanted):
                copies[id(entry.message)].append(entry)
        never = [entries[0] for entries in copies.values() if len(entries) == len(self._outboxes)]
        for entries in copies.values():
            told = rejected if len(entries) == len(self._outboxes) else indeterminate
            self._tell_later(entries[0], told(Backpressure(f"{self._name}: no consumer took it")), len(entries))
        return [e.message for e in never]

    def _tell_later(self, entry: Entry, result: SendResult, copies: int) -> None:
        left = entry.batch.left
        if left is not None:
            left[entry.index] -= copies
            if left[entry.index]:
                return  # a group has it still: its settlement is the last word
        asyncio.get_running_loop().call_soon(partial(entry.batch.on_outcomes, [(entry.index, result)]))

    def lose(self) -> None:
        """The driver closes, or core does: resolve what is left."""
        if self._lost:
            return
        self._lost = True
        self.home.open.discard(self)
        left: dict[int, Entry] = {}
        for outbox in self._outboxes:
            left |= {id(e.message): e for e in outbox.close()}
        for entry in left.values():
            unsure = indeterminate(errors.closed(self._name))
            entry.batch.on_outcomes([(entry.index, unsure)])

    async def close(self) -> None:
        self.lose()


# --- signals


class SignalSender(Sender):
    """Publishes to every listener that has subscribed; OK when it is handed to the socket.

    A listener that has announced itself is waited for, up to `JOIN_S`, until its subscription is here.
    """

    max_batch = FRAME
    max_batch_bytes = FRAME_BYTES
    max_in_flight = 2

    def __init__(self, home: Home, place: Place) -> None:
        self._home = home
        self._place = place
        self._name = place.name
        self._id = os.urandom(8)
        self._everyone = b"*%s\0" % place.name.encode()
        self._wire = home.wire(zmq.XPUB, self._subscribed, high_water=home.options.signal_frames)
        self._known: dict[str, str] = {}  # endpoint -> instance
        self._joining: dict[str, float] = {}  # instance -> until when to wait for it
        self._groups: dict[str, list[bytes]] = {}  # group ("" = none) -> topics of its members
        self._numbers: defaultdict[bytes, int] = defaultdict(int)
        self._held: list[tuple[Sequence[Outgoing], Callable[[], None]]] = []
        self._turn = 0
        self._armed = self._lost = False
        self._timer: asyncio.TimerHandle | None = None
        self._look()
        home.open.add(self)

    def send_batch(self, messages: Sequence[Outgoing], on_outcomes: OnOutcomes) -> None:
        if self._lost:
            raise errors.closed(self._name)
        told = [(i, problem(self._name, m)) for i, m in enumerate(messages)]
        good = [m for m, (_, wrong) in zip(messages, told, strict=True) if wrong is None]
        if self._place.changed():
            self._look()
        outcomes = [(i, SENT if wrong is None else rejected(wrong)) for i, wrong in told]
        self._held.append((good, partial(on_outcomes, outcomes)))
        if not self._armed:  # what comes in this turn of the loop goes in one frame
            self._armed = True
            asyncio.get_running_loop().call_soon(self._next_turn)

    def _look(self) -> None:
        found = self._place.scan()
        if found is None:
            return
        there = {x.endpoint: x.instance for x in found}
        for endpoint in [e for e in self._known if e not in there]:
            self._wire.disconnect(endpoint)
            self._joining.pop(self._known.pop(endpoint), None)
        for endpoint, instance in there.items():
            if endpoint not in self._known:
                self._known[endpoint] = instance
                self._wire.connect(endpoint)
                if instance:
                    self._joining[instance] = time.monotonic() + JOIN_S
        if self._joining and self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(JOIN_S, self._joined_late)

    def _joined_late(self) -> None:
        self._timer = None
        now = time.monotonic()
        self._joining = {i: at for i, at in self._joining.items() if at > now}
        if self._joining:
            self._timer = asyncio.get_running_loop().call_later(JOIN_S / 4, self._joined_late)
        else:
            self._flush()

    def _subscribed(self, frames: list[Parts]) -> None:
        """A listener's own topic is "@<instance>.<group>\\0"; its subscription says that it hears us from now on."""
        for said, *_ in frames:
            topic = said[1:]
            if topic[:1] != b"@":
                continue
            instance, _, group = topic[1:-1].decode("utf-8", "replace").partition(".")
            members = self._groups.setdefault(group, [])
            if said[:1] == b"\x01":
                self._joining.pop(instance, None)
                if topic not in members:
                    members.append(topic)
            elif topic in members:
                members.remove(topic)
                self._numbers.pop(topic, None)
        if not self._joining:
            self._flush()

    def _next_turn(self) -> None:
        self._armed = False
        if not self._joining and not self._lost:
            self._flush()

    def _flush(self) -> None:
        held, self._held = self._held, []
        messages = [m for batch, _ in held for m in batch]
        start = size = 0
        for at, message in enumerate(messages):
            added = weight(message)
            if at > start and (size + added > FRAME_BYTES or at - start >= FRAME):
                self._emit(messages[start:at])
                start, size = at, 0
            size += added
        if messages:
            self._emit(messages[start:])
        for _, tell in held:
            tell()

    def _emit(self, messages: Sequence[Outgoing]) -> None:
        for group, members in self._groups.items():
            if not group or not members:
                continue
            self._turn += 1
            for n in range(min(len(members), len(messages))):
                self._write(members[(self._turn + n) % len(members)], messages[n :: len(members)])
        self._write(self._everyone, messages)

    def _write(self, topic: bytes, messages: Sequence[Outgoing]) -> None:
        if not messages:
            return
        number = self._numbers[topic]
        self._numbers[topic] += len(messages)
        self._wire.send([topic, SIGNAL_HEAD.pack(b"S", VERSION, self._id, number), *pack(messages)])

    def lose(self) -> None:
        if self._lost:
            return
        self._flush()
        self._lost = True
        self._home.open.discard(self)
        if self._timer is not None:
            self._timer.cancel()
        self._wire.close()

    async def close(self) -> None:
        self.lose()


def columns(rest: bytes) -> Mapping[str, Any]:
    """What `_rest` wrote. Raises ValueError for anything else."""
    found = json.loads(rest)
    if not isinstance(found, dict):
        raise ValueError("no JSON object")
    return found
