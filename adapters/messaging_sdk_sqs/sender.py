"""Sender: requests of up to ten messages, several at once, one lane after the other where order counts."""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
import re
from base64 import b64encode
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Final
from zlib import crc32

from messaging_sdk import spi
from messaging_sdk.errors import ConnectionLost, InvalidMessage, MessagingError, Outcome, TooLarge
from messaging_sdk.model import SENT, Outgoing, SendResult, indeterminate, rejected

from . import errors
from .options import MAX_DELAY_S

if TYPE_CHECKING:
    from .driver import Link

ATTRIBUTE: Final = "messaging"
"""The one message attribute: a JSON object of id, key, type, correlation, time, headers and the body's encoding."""
BASE64, EMPTY = "base64", "empty"
BLANK: Final = "-"
"""Stands for an empty body, which SQS refuses."""
PER_REQUEST: Final = 10  # entries of a batch request (SQS and SNS quotas pages)
NO_GROUP: Final = "-"  # the message group of messages without a key: they share core's one lane, too

_ODD: Final = re.compile("[^\t\n\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""What a body may not hold as text (SendMessage page), and CR, which XML on the way through SNS could turn into LF."""
_TOKEN: Final = re.compile(r"[A-Za-z0-9!-/:-@\[-`{-~]{1,128}\Z")
"""What a message group or deduplication id may be (SendMessage page)."""


class Target:
    """Where copies go, a queue or an SNS topic, and the request that takes a batch of entries there."""

    __slots__ = ("lanes", "name", "send")

    def __init__(self, name: str, send: Callable[[list[dict[str, Any]]], Any]) -> None:
        self.name = name
        self.send = send
        self.lanes: tuple[_Lane, ...] = ()


class Terms:
    """What holds for every message of one sender."""

    __slots__ = ("body", "can_delay", "destination", "limit", "ordered", "requests")

    def __init__(
        self, destination: str, *, body: str, ordered: bool, can_delay: bool, limit: int, requests: int
    ) -> None:
        self.destination = destination
        self.body = body  # what an entry calls it
        self.ordered = ordered
        self.can_delay = can_delay
        self.limit = limit  # bytes of a message, and of a request
        self.requests = requests


class Sender(spi.Sender):
    """Messages of one destination: to its queue, to its SNS topic, or a copy to the queue of each group.

    Ordered: a key has a lane, and a lane one request under way at a time, so that after a request with an unknown
    outcome nothing later of its keys has left. An entry that is refused inside a request does not keep later ones of
    its key from being stored by the same request: it is final, never sent again behind them.
    """

    max_batch = 100
    """Core's two batches in flight fill the requests; more would only lengthen what a loss leaves unsure."""

    def __init__(self, link: Link, targets: Sequence[Target], terms: Terms) -> None:
        self._link = link
        self._targets = targets
        self._terms = terms
        self._error: ConnectionLost | None = link.error
        self._open = 0  # copies without an answer
        self._idle: asyncio.Future[None] | None = None
        for target in targets:
            many, each = (terms.requests, 1) if terms.ordered else (1, terms.requests)
            target.lanes = tuple(_Lane(target, each) for _ in range(many))
        self._batches: set[_Batch] = set()
        link.listeners.add(self)

    def send_batch(self, messages: Sequence[Outgoing], on_outcomes: spi.OnOutcomes) -> None:
        if self._error is not None:
            raise self._error
        batch = _Batch(len(messages), len(self._targets), on_outcomes)
        self._batches.add(batch)
        done: list[tuple[int, SendResult]] = []
        for index, message in enumerate(messages):
            try:
                entry, size = _entry(message, self._terms)
            except MessagingError as error:
                batch.refuse(index)
                done.append((index, rejected(error)))
                continue
            if not self._targets:  # a Topic without groups
                done.append((index, SENT))
                continue
            place = crc32((message.key or NO_GROUP).encode()) if self._terms.ordered else 0
            self._open += len(self._targets)
            for target in self._targets:
                target.lanes[place % len(target.lanes)].waiting.append((batch, index, entry, size))
        self._tell(batch, done)
        for target in self._targets:
            for lane in target.lanes:
                self._pump(lane)

    def _pump(self, lane: _Lane) -> None:
        while lane.waiting and lane.busy < lane.limit and self._error is None:
            copies = lane.cut(self._terms.limit)
            entries = [{**entry, "Id": str(n)} for n, (_, _, entry, _) in enumerate(copies)]
            lane.busy += 1
            what = f"send to {lane.target.name}"
            self._link.post(partial(lane.target.send, entries), what, partial(self._answered, lane, copies, what))

    def _answered(
        self, lane: _Lane, copies: list[_Copy], what: str, answer: dict[str, Any] | None, error: MessagingError | None
    ) -> None:
        lane.busy -= 1
        if error is not None:
            result = indeterminate(error) if isinstance(error, ConnectionLost) else rejected(error)
            self._resolve([(copy, result) for copy in copies])
            if isinstance(error, ConnectionLost):
                self.on_lost(error)
        else:
            self._judge(copies, answer or {}, what)
        self._pump(lane)

    def _judge(self, copies: list[_Copy], answer: dict[str, Any], what: str) -> None:
        """Stored is what the answer names as such: a proxy's page with status 200 names nothing."""
        told: dict[int, SendResult] = {int(entry["Id"]): SENT for entry in answer.get("Successful", ())}
        told |= {int(entry["Id"]): self._refusal(entry, what) for entry in answer.get("Failed", ())}
        untold = errors.ServiceDown(f"{what}: the answer does not name this entry")
        self._resolve([(copy, told.get(n) or indeterminate(untold)) for n, copy in enumerate(copies)])
        if len(told) < len(copies):
            self.on_lost(untold)

    def _refusal(self, entry: dict[str, Any], what: str) -> SendResult:
        """Of one entry: the sender's fault and throttling are refusals, else nobody knows."""
        error = errors.from_code(str(entry.get("Code", "")), what, str(entry.get("Message", ""))[:200])
        if entry.get("SenderFault") or error.transient:
            return rejected(error)
        if self._terms.ordered:  # later ones of its key are stored: final, or it would come behind them
            return indeterminate(error)
        return indeterminate(errors.ServiceDown(str(error)))  # core sends it again

    def _resolve(self, results: list[tuple[_Copy, SendResult]]) -> None:
        """Note what became of copies; tell of the messages of which it was the last."""
        self._open -= len(results)
        done: dict[_Batch, list[tuple[int, SendResult]]] = {}
        for (batch, index, _, _), result in results:
            final = batch.note(index, result)
            if final is not None:
                done.setdefault(batch, []).append((index, final))
        for batch, outcomes in done.items():
            self._tell(batch, outcomes)
        if not self._open and self._idle is not None and not self._idle.done():
            self._idle.set_result(None)

    def _tell(self, batch: _Batch, outcomes: list[tuple[int, SendResult]]) -> None:
        batch.left -= len(outcomes)
        if not batch.left:
            self._batches.discard(batch)
        if outcomes:
            batch.on_outcomes(outcomes)

    def on_lost(self, error: ConnectionLost) -> None:
        """Nothing more leaves; requests under way still bring their answers."""
        if self._error is not None:
            return
        self._error = error
        self._link.listeners.discard(self)
        unsent = [copy for target in self._targets for lane in target.lanes for copy in lane.drain()]
        self._resolve([(copy, indeterminate(error)) for copy in unsent])

    async def close(self) -> None:
        try:
            if self._open:
                self._idle = asyncio.get_running_loop().create_future()
                await self._idle
        finally:
            self.on_lost(ConnectionLost(f"{self._terms.destination}: the sender was closed"))
            for batch in list(self._batches):
                lost = ConnectionLost(f"{self._terms.destination}: the sender was closed before the answer")
                self._tell(batch, [(index, indeterminate(lost)) for index in batch.give_up()])


class _Batch:
    """What of one `send_batch` has no outcome yet; a message has one when all of its copies have."""

    __slots__ = ("_copies", "_errors", "_open", "left", "on_outcomes")

    def __init__(self, count: int, copies: int, on_outcomes: spi.OnOutcomes) -> None:
        self.left = count
        self.on_outcomes = on_outcomes
        self._copies = copies
        self._open = [copies] * count
        self._errors: dict[int, list[SendResult]] = {}

    def refuse(self, index: int) -> None:
        """It was never sent, and its outcome is told by whoever found that out."""
        self._open[index] = 0

    def note(self, index: int, result: SendResult) -> SendResult | None:
        """The message's result if this was its last copy; None if others are out, or it was given up."""
        left = self._open[index] = self._open[index] - 1
        if result is not SENT and left >= 0:
            self._errors.setdefault(index, []).append(result)
        if left:
            return None
        found = self._errors.pop(index, None)
        return SENT if found is None else self._verdict(found)

    def _verdict(self, found: list[SendResult]) -> SendResult:
        """Rejected is said only where no copy is, or may be, stored; a lost connection wins, since core tries again."""
        for result in found:
            if isinstance(result.error, ConnectionLost):
                return result
        first = found[0]
        if len(found) == self._copies and all(r.outcome is Outcome.REJECTED for r in found):
            return first
        if self._copies == 1:
            return first
        stored = self._copies - len(found)
        partly = MessagingError(f"{stored} of {self._copies} groups have it: {first.error}", transient=True)
        partly.__cause__ = first.error
        return indeterminate(partly)

    def give_up(self) -> list[int]:
        """The messages without an outcome; they get none from here any more."""
        open_ones = [index for index, left in enumerate(self._open) if left > 0]
        for index in open_ones:
            self._open[index] = -1
        return open_ones


_Copy = tuple[_Batch, int, dict[str, Any], int]


class _Lane:
    """Copies that wait for a request to one target, and how many requests are under way."""

    __slots__ = ("busy", "limit", "target", "waiting")

    def __init__(self, target: Target, limit: int) -> None:
        self.target = target
        self.limit = limit
        self.busy = 0
        self.waiting: deque[_Copy] = deque()

    def cut(self, limit_bytes: int) -> list[_Copy]:
        """The next copies that fit one request; at least one."""
        waiting = self.waiting
        copies = [waiting.popleft()]
        size = copies[0][3]
        while waiting and len(copies) < PER_REQUEST:
            size += waiting[0][3]
            if size > limit_bytes:
                break
            copies.append(waiting.popleft())
        return copies

    def drain(self) -> list[_Copy]:
        copies = list(self.waiting)
        self.waiting.clear()
        return copies


def _entry(message: Outgoing, terms: Terms) -> tuple[dict[str, Any], int]:
    """The entry of a batch request but for its Id, and its size. Raises before a byte is sent."""
    if message.ttl_s is not None or message.priority is not None or message.delay_s is not None:
        _check_options(message, terms)
    text, encoding = _text(message.body)
    about: dict[str, Any] = {"id": message.id}
    for name, value in (
        ("key", message.key),
        ("enc", encoding),
        ("type", message.content_type),
        ("corr", message.correlation_id),
        ("at", message.created_s or None),
        ("headers", message.headers or None),
    ):
        if value is not None:
            about[name] = value
    attribute = json.dumps(about, separators=(",", ":"), default=dict)  # ASCII: every header is allowed text there
    size = len(text.encode()) + len(ATTRIBUTE) + len("String") + len(attribute)
    if size > terms.limit:
        raise TooLarge(
            f"{terms.destination}: {size} bytes with attributes, the service takes {terms.limit}",
            size_bytes=size,
            limit_bytes=terms.limit,
        )
    entry: dict[str, Any] = {
        terms.body: text,
        "MessageAttributes": {ATTRIBUTE: {"DataType": "String", "StringValue": attribute}},
    }
    if terms.ordered:
        entry["MessageGroupId"] = _token(message.key or NO_GROUP)
        entry["MessageDeduplicationId"] = _token(message.id)
    if message.delay_s:
        entry["DelaySeconds"] = math.ceil(message.delay_s)
    return entry, size


def _text(body: bytes) -> tuple[str, str | None]:
    """`body` as SQS takes it, and how it is encoded: None where it is its own UTF-8 text."""
    if not body:
        return BLANK, EMPTY
    try:
        text = body.decode()
    except UnicodeDecodeError:
        return b64encode(body).decode(), BASE64
    if _ODD.search(text):
        return b64encode(body).decode(), BASE64
    return text, None


def _token(text: str) -> str:
    """`text` as a group or deduplication id; its digest where SQS would refuse it. The text itself travels, too."""
    if _TOKEN.match(text):
        return text
    return "sha256:" + hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _check_options(message: Outgoing, terms: Terms) -> None:
    for name, value in (("ttl", message.ttl_s), ("priority", message.priority)):
        if value is not None:
            raise errors.absent(terms.destination, f"{name}=", f"a backend that has {name}")
    if message.delay_s is not None and not terms.can_delay:
        raise errors.absent(terms.destination, "delay=", 'a standard queue, or topics = "fanout", without ordered=True')
    if message.delay_s is not None and message.delay_s > MAX_DELAY_S:
        raise InvalidMessage(f"{terms.destination}: delay of {message.delay_s:g} s, SQS takes at most {MAX_DELAY_S}")
