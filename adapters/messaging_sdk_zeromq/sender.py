"""Sending: messages packed into frames, links to consumers, and each group's outbox that waits for credit."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import struct
import time
from bisect import bisect_right
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import accumulate, chain, groupby, islice, repeat
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Final

import zmq

from messaging_sdk.errors import Backpressure, CapabilityError, InvalidMessage, MessagingError
from messaging_sdk.model import SENT, Outgoing, SendResult, indeterminate, rejected
from messaging_sdk.spi import OnOutcomes, Sender, accepted

from . import errors

if TYPE_CHECKING:
    from .driver import Home, Parts, Place

log: Final = logging.getLogger("messaging_sdk")

VERSION: Final = 1
MAX_BODY: Final = 16 << 20
FRAME: Final = 500  # messages of one frame: more gained nothing
FRAME_BYTES: Final = 1 << 20
ALL: Final = tuple(range(FRAME))
LOOK_S: Final = 0.1  # between looks for consumers that came or went
REDIAL_S: Final = 0.2
JOIN_S: Final = 1.0  # how long signals wait for a listener that has just announced itself
HEAD: Final = struct.Struct("<cBII")  # type, version, session, frame or limit
SIGNAL_HEAD: Final = struct.Struct("<cB8sQ")  # type, version, sender, number of the first message


class Batch:
    """One `send_batch`: whom to tell, and of a topic with several groups how many have yet to settle each message."""

    __slots__ = ("left", "messages", "on_outcomes", "rest", "serial", "size", "weight")

    def __init__(self, messages: Sequence[Outgoing], on_outcomes: OnOutcomes, serial: int = 0, groups: int = 1) -> None:
        self.messages = messages
        self.on_outcomes = on_outcomes
        self.serial = serial
        self.left = [groups] * len(messages) if groups > 1 else None
        self.size = sum([len(m.body) for m in messages])
        self.rest = _plain(messages)
        self.weight = self.size if self.rest is not None else sum(map(weight, messages))

    @property
    def flawed(self) -> bool:
        """May `problem` have something to say about one of them?"""
        return self.size > MAX_BODY or (self.rest is None and any(map(odd, self.messages)))


class Run:
    """Messages of a batch that follow each other, for one group, until they are settled."""

    __slots__ = ("attempt", "batch", "first", "stop")

    def __init__(self, batch: Batch, first: int, stop: int, attempt: int = 1) -> None:
        self.batch = batch
        self.first = first
        self.stop = stop
        self.attempt = attempt

    def __len__(self) -> int:
        return self.stop - self.first

    @property
    def messages(self) -> Sequence[Outgoing]:
        return self.batch.messages[self.first : self.stop]

    @property
    def place(self) -> int:
        return self.batch.serial + self.first

    def size(self) -> int:
        """Bytes of its bodies."""
        return self.batch.size if len(self) == len(self.batch.messages) else sum([len(m.body) for m in self.messages])

    def head(self, count: int) -> Run:
        """Take off the first `count` messages."""
        first, self.first = self.first, self.first + count
        return Run(self.batch, first, self.first, self.attempt)

    def each(self) -> Iterator[tuple[Run, int]]:
        return zip(repeat(self), range(self.first, self.stop), strict=False)


def joined(found: Iterable[tuple[Run, int]]) -> list[Run]:
    """Runs of these messages, each named by a run that it was in and its index in the batch."""
    runs: list[Run] = []
    for run, index in found:
        if runs and runs[-1].stop == index and runs[-1].batch is run.batch:
            runs[-1].stop = index + 1
        else:
            runs.append(Run(run.batch, index, index + 1, run.attempt))
    return runs


def cut(waiting: deque[Run], count: int) -> list[Run]:
    """Take off up to `count` messages of one attempt, of one frame's size together."""
    runs: list[Run] = []
    size, attempt = 0, waiting[0].attempt
    while waiting and count and waiting[0].attempt == attempt:
        run = waiting[0]
        fits = min(count, len(run))
        if size + run.batch.weight <= FRAME_BYTES:  # no part of it weighs more
            size += run.batch.weight
        else:
            sizes = [*accumulate(map(weight, run.messages[:fits]), initial=size)]
            fits = max(bisect_right(sizes, FRAME_BYTES) - 1, 0 if runs else 1)
            if fits == 0:
                break
            size = sizes[fits]
        runs.append(waiting.popleft() if fits == len(run) else run.head(fits))
        count -= fits
    return runs


def pack(messages: Sequence[Outgoing], rest: bytes | None) -> Parts:
    """Lengths, bodies, ids, creation times and the rest of `messages`, a column each."""
    bodies = [m.body for m in messages]
    count = len(bodies)
    return [
        struct.pack(f"<{count}I", *map(len, bodies)),
        b"".join(bodies),
        "\n".join([m.id for m in messages]).encode(),
        struct.pack(f"<{count}d", *[m.created_s for m in messages]),
        _rest(messages) if rest is None else rest,
    ]


def shared(batches: Iterable[Batch]) -> bytes | None:
    """The rest of messages of these batches, if it is the same for all and plain."""
    rests = {batch.rest for batch in batches}
    return rests.pop() if len(rests) == 1 else None


def _plain(messages: Sequence[Outgoing]) -> bytes | None:
    """The rest of messages that are not odd and have no more than one content type; None if they are not like that."""
    kind = messages[0].content_type
    for m in messages:
        if (
            m.key is not None or m.headers or m.correlation_id is not None or m.content_type != kind
            or m.delay_s is not None or m.ttl_s is not None or m.priority is not None or "\n" in m.id
        ):  # fmt: skip
            return None
    return json.dumps({"t": kind}).encode()


def _rest(messages: Sequence[Outgoing]) -> bytes:
    """As JSON, with only the columns that are needed; the content type once where all have the same."""
    kinds = [m.content_type for m in messages]
    columns: dict[str, list[Any]] = {
        "k": [m.key for m in messages],
        "c": [m.correlation_id for m in messages],
        "h": [dict(m.headers) if m.headers else None for m in messages],
    }
    rest: dict[str, Any] = {"t": kinds if len(set(kinds)) > 1 else kinds[0]}
    rest |= {name: column for name, column in columns.items() if any(v is not None for v in column)}
    return json.dumps(rest, separators=(",", ":")).encode()


def odd(m: Outgoing) -> bool:
    """Is there anything that `problem` has to say?"""
    if m.delay_s is not None or m.ttl_s is not None or m.priority is not None:
        return True
    return len(m.body) > MAX_BODY or "\n" in m.id


def problem(name: str, message: Outgoing) -> MessagingError | None:
    """Why `message` cannot be sent."""
    asked = {"delay": message.delay_s, "ttl": message.ttl_s, "priority": message.priority}
    unmet = [u for f, v in asked.items() if v is not None for u in errors.absent(name, f).unmet]
    if unmet:
        return CapabilityError(unmet)
    if len(message.body) > MAX_BODY:
        return errors.too_large(len(message.body), MAX_BODY)
    return InvalidMessage(f"{name}: a message id has a line break") if "\n" in message.id else None


def weight(m: Outgoing) -> int:
    """Bytes of a frame that it needs at most, about: JSON may write a character of a key or header in twelve."""
    if not m.headers and m.key is None and m.correlation_id is None:
        return len(m.body)
    texts = sum([len(name) + len(value) for name, value in m.headers.items()])
    return len(m.body) + 12 * (texts + len(m.key or "") + len(m.correlation_id or ""))


class Frame:
    """Runs that were sent together; what is settled or came back is taken out."""

    __slots__ = ("_open", "_whole", "left")

    def __init__(self, runs: list[Run]) -> None:
        self._whole = runs
        self._open: list[tuple[Run, int] | None] = []  # instead, once a part was asked for
        self.left = sum(map(len, runs))

    def claim(self, indexes: Sequence[int]) -> list[Run]:
        """Take these out; those that are not in it were taken out before."""
        if self._whole:
            whole, self._whole = self._whole, []
            if indexes == ALL[: self.left]:
                self.left = 0
                return whole
            self._open = [*chain.from_iterable(run.each() for run in whole)]
        open_, claimed = self._open, list[tuple[Run, int]]()
        for index in sorted(indexes):
            one = open_[index] if index < len(open_) else None
            if one is not None:
                claimed.append(one)
                open_[index] = None
        self.left -= len(claimed)
        return joined(claimed)

    def unsettled(self) -> list[Run]:
        return self._whole or joined([one for one in self._open if one is not None])


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

    def send(self, runs: list[Run]) -> None:
        """Send runs of one attempt as one frame."""
        self._frame += 1
        frame = self.frames[self._frame] = Frame(runs)
        self.free -= frame.left
        head, attempt = HEAD.pack(b"B", VERSION, self.session, self._frame), struct.pack("<I", runs[0].attempt)
        messages = [m for run in runs for m in run.messages]
        self._wire.send([head, attempt, *pack(messages, shared(run.batch for run in runs))])

    def unsettled(self) -> list[Run]:
        return [run for frame in self.frames.values() for run in frame.unsettled()]

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

    def _claim(self, frame: int, indexes: Sequence[int]) -> list[Run]:
        found = self.frames.get(frame)
        if found is None:
            return []
        self.free += found.left
        claimed = found.claim(indexes)
        self.free -= found.left
        if not found.left:
            del self.frames[frame]
        return claimed

    def _settled(self, payload: bytes) -> None:
        numbers = struct.unpack(f"<{len(payload) // 4}I", payload)
        at = 0
        while at < len(numbers):
            frame, count = numbers[at : at + 2]
            self.outbox.settled(self._claim(frame, numbers[at + 2 : at + 2 + count]))
            at += 2 + count

    def _returned(self, payload: bytes) -> None:
        back: list[Run] = []
        for frame, index, delay_s in struct.iter_unpack("<IId", payload):
            runs = self._claim(frame, (index,))
            if delay_s >= 0:  # it was handed out; below 0 it never was
                for run in runs:
                    run.attempt += 1
            if delay_s > 0:
                self.outbox.give_back(runs, delay_s)
            else:
                back += runs
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
        for run in back:
            run.attempt += 1
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
        self._waiting: deque[Run] = deque()
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

    def link_lost(self, link: Link, back: list[Run]) -> None:
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

    def put(self, runs: Sequence[Run]) -> None:
        self.held += sum(map(len, runs))
        self.held_bytes += sum([run.size() for run in runs])
        self._waiting.extend(runs)
        if not self._links and self.place.changed():
            self.look()
        self.dispatch()

    def give_back(self, runs: Sequence[Run], delay_s: float = 0.0) -> None:
        """Offer them again, before everything that was sent after them."""
        if self._closed or not runs:
            return
        if delay_s:
            self._loop.call_later(delay_s, self.give_back, runs)
            return
        self._waiting = deque(sorted((*runs, *self._waiting), key=lambda run: run.place))
        self.dispatch()

    def _forget(self, runs: Sequence[Run]) -> None:
        self.held -= sum(map(len, runs))
        self.held_bytes -= sum([run.size() for run in runs])

    def settled(self, runs: Sequence[Run]) -> None:
        """Tell whoever sent them."""
        self._forget(runs)
        for batch, same in groupby(runs, attrgetter("batch")):
            told = [*chain.from_iterable(accepted(run.first, run.stop) for run in same)]
            if batch.left is not None:
                told = [(index, result) for index, result in told if self._last(batch.left, index)]
            if told:
                batch.on_outcomes(told)

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
            few = islice(self._waiting, FRAME * len(open_))  # so many are enough for all of them
            share = -(-sum(map(len, few)) // len(open_))
            link.send(cut(self._waiting, min(link.free, share, FRAME)))

    def _divided(self) -> bool:
        """Another consumer than the ready one may still work on what it was given: wait until that is known."""
        return sum(bool(x.ready or x.frames) for x in self._links.values()) > 1

    # --- the end

    def withdraw(self, wanted: set[int]) -> list[tuple[Run, int]]:
        """Forget waiting ones of these messages that were never dispatched."""
        out: list[tuple[Run, int]] = []
        kept: deque[Run] = deque()
        for run in self._waiting:
            if run.attempt > 1 or wanted.isdisjoint(map(id, run.messages)):
                kept.append(run)
                continue
            of_run = [(id(run.batch.messages[index]) in wanted, (run, index)) for _, index in run.each()]
            out += [one for gone, one in of_run if gone]
            kept += joined(one for gone, one in of_run if not gone)
        self._waiting = kept
        self._forget(joined(out))
        return out

    def close(self) -> list[Run]:
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
        batch = Batch(messages, on_outcomes, self._serial, len(self._outboxes))
        self._serial += len(messages)
        refused: list[tuple[int, SendResult]] = []
        runs = [Run(batch, 0, len(messages))]
        if batch.flawed or self._full(len(messages) - 1, batch.size):
            good, size = list[tuple[Run, int]](), 0
            for index, message in enumerate(messages):
                wrong = problem(self._name, message) or self._full(len(good), size + len(message.body))
                if wrong is not None:
                    refused.append((index, rejected(wrong)))
                else:
                    good.append((runs[0], index))
                    size += len(message.body)
            runs = joined(good)
        if not self._outboxes:  # a topic without groups: accepted, and goes nowhere
            on_outcomes([*refused, *((index, SENT) for run in runs for _, index in run.each())])
            return
        if refused:
            on_outcomes(refused)
        for outbox in self._outboxes:
            outbox.put([Run(batch, run.first, run.stop) for run in runs])

    def _full(self, ahead: int, size: int) -> MessagingError | None:
        options = self.home.options
        for outbox in self._outboxes:
            if outbox.held + ahead >= options.max_held or outbox.held_bytes + size > options.max_held_bytes:
                return Backpressure(f"{self._name}: {outbox.held} messages are unsettled here; the limit is reached")
        return None

    def withdraw(self, messages: Sequence[Outgoing]) -> Sequence[Outgoing]:
        wanted = set(map(id, messages))
        copies = Counter((run.batch, index) for outbox in self._outboxes for run, index in outbox.withdraw(wanted))
        never: list[Outgoing] = []
        for (batch, index), count in copies.items():
            everywhere = count == len(self._outboxes)
            if everywhere:
                never.append(batch.messages[index])
            told = (rejected if everywhere else indeterminate)(Backpressure(f"{self._name}: no consumer took it"))
            self._tell_later(batch, index, told, count)
        return never

    def _tell_later(self, batch: Batch, index: int, result: SendResult, copies: int) -> None:
        if batch.left is not None:
            batch.left[index] -= copies
            if batch.left[index]:
                return  # a group has it still: its settlement is the last word
        asyncio.get_running_loop().call_soon(partial(batch.on_outcomes, [(index, result)]))

    def lose(self) -> None:
        """The driver closes, or core does: resolve what is left."""
        if self._lost:
            return
        self._lost = True
        self.home.open.discard(self)
        left = [one for outbox in self._outboxes for run in outbox.close() for one in run.each()]
        for batch, index in dict.fromkeys((run.batch, index) for run, index in left):
            batch.on_outcomes([(index, indeterminate(errors.closed(self._name)))])

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
        self._held: deque[Run] = deque()
        self._tells: list[Callable[[], None]] = []
        self._turn = 0
        self._armed = self._lost = False
        self._timer: asyncio.TimerHandle | None = None
        self._look()
        home.open.add(self)

    def send_batch(self, messages: Sequence[Outgoing], on_outcomes: OnOutcomes) -> None:
        if self._lost:
            raise errors.closed(self._name)
        batch = Batch(messages, on_outcomes)
        runs, told = [Run(batch, 0, len(messages))], accepted(0, len(messages))
        if batch.flawed:
            wrong = [problem(self._name, m) for m in messages]
            told = [(i, SENT if w is None else rejected(w)) for i, w in enumerate(wrong)]
            runs = joined((run, i) for run, i in runs[0].each() if wrong[i] is None)
        if self._place.changed():
            self._look()
        self._held += runs
        self._tells.append(partial(on_outcomes, told))
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
        tells, self._tells = self._tells, []
        while self._held:
            runs = cut(self._held, FRAME)
            self._emit([m for run in runs for m in run.messages], shared(run.batch for run in runs))
        for tell in tells:
            tell()

    def _emit(self, messages: Sequence[Outgoing], rest: bytes | None) -> None:
        for group, members in self._groups.items():
            if not group or not members:
                continue
            self._turn += 1
            for n in range(min(len(members), len(messages))):
                self._write(members[(self._turn + n) % len(members)], messages[n :: len(members)], rest)
        self._write(self._everyone, messages, rest)

    def _write(self, topic: bytes, messages: Sequence[Outgoing], rest: bytes | None) -> None:
        number = self._numbers[topic]
        self._numbers[topic] += len(messages)
        self._wire.send([topic, SIGNAL_HEAD.pack(b"S", VERSION, self._id, number), *pack(messages, rest)])

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
