"""Receiver: long polls that fill a buffer, settlements and extensions in batches of ten, leases kept by the clock."""

from __future__ import annotations

import asyncio
import json
import math
import threading
import time
from base64 import b64decode
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from messaging_sdk import spi
from messaging_sdk.errors import Backpressure, ConnectionLost, MessagingError, SettleLost
from messaging_sdk.model import Delivery, Meta, Session
from messaging_sdk.threads import Calls

from . import errors
from .options import MAX_VISIBILITY_S, Options
from .sender import ATTRIBUTE, BASE64, EMPTY, PER_REQUEST

if TYPE_CHECKING:
    from mypy_boto3_sqs import SQSClient

    from .driver import Link

Failures = Sequence[tuple[int, MessagingError]]

SETTLE_REQUESTS: Final = 4  # at once per receiver: what queues up meanwhile goes in tens
GROUPS_AT_LEAST: Final = 4  # that fit a window of an ordered queue, so that one key does not keep all others out
MARGIN_S: Final = 60  # of the 12 h, for clocks and answers under way
PAUSE_S: Final = 1.0  # between polls while the service refuses them for its load: the pace of an idle poll
MAX_REFUSALS: Final = 10  # in a row; then the service counts as lost


class Receipt:
    """What settles one delivery, and until when it is ours."""

    __slots__ = ("extending", "handle", "last_s", "until_s")

    def __init__(self, handle: str, until_s: float, last_s: float = math.inf) -> None:
        self.handle = handle
        self.until_s = until_s
        self.last_s = last_s  # SQS hides nothing for longer than 12 h in all
        self.extending = False


class Receiver(spi.Receiver):
    """Takes from one queue.

    Nothing is lost by abandoning a poll, since nobody does: it ends in its thread, and what it brings then is handed
    back. Each poll asks for no more than the window still has room for.
    """

    def __init__(
        self, link: Link, client: SQSClient, url: str, window: int, options: Options, *, ordered: bool
    ) -> None:
        self._link = link
        self._client = client
        self._url = url
        self._window = window
        # SQS fills a reply with messages of one group as far as it can: a small window must hold several groups
        self._each = min(PER_REQUEST, max(1, window // GROUPS_AT_LEAST)) if ordered else PER_REQUEST
        self._ordered = ordered
        self._lease_s = options.visibility_timeout_s
        self._wait_s = options.wait_s
        self._max_polls = options.max_polls
        self._name = url.rpartition("/")[2]
        self._session = Session(self._name)
        self._loop = asyncio.get_running_loop()
        self._calls = Calls(f"sqs-poll-{self._name}", options.max_polls)
        self._buffer: deque[tuple[Receipt, Mapping[str, Any]]] = deque()
        self._held: set[Receipt] = set()
        self._asked = 0  # messages that polls under way may bring
        self._polls = 0
        self._most_polls = 1
        self._refusals = 0  # polls in a row that the service refused for its load
        self._paused = False
        # shared with the polls' threads
        self._lock = threading.Lock()
        self._flying = 0  # polls whose thread is not done
        self._abandoned = False  # what still comes is handed back, with `_left`, by the last of them
        self._left: list[Receipt] = []
        self._verbs: deque[_Verb] = deque()
        self._settling = 0
        self._answers: set[asyncio.Future[Failures]] = set()
        self._waiter: asyncio.Future[None] | None = None
        self._quiet: asyncio.Future[None] | None = None  # done when no poll is under way
        self._timer: asyncio.TimerHandle | None = None
        self._error: MessagingError | None = None
        self._stopped = False

    def start(self) -> None:
        self._link.listeners.add(self)
        self._fill()
        self._timer = self._loop.call_later(self._lease_s / 3, self._keep)

    # arriving

    async def receive_batch(self, max_deliveries: int) -> list[Delivery[Any]]:
        while True:
            if self._error is not None:
                raise self._error
            batch = self._claim(max_deliveries)
            if batch:
                return batch
            self._waiter = self._loop.create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None

    def _claim(self, most: int) -> list[Delivery[Any]]:
        buffer, held, session, now = self._buffer, self._held, self._session, time.monotonic()
        batch: list[Delivery[Any]] = []
        while buffer and len(batch) < most:
            receipt, message = buffer.popleft()
            if receipt.until_s <= now:  # it comes again
                if self._ordered:
                    self._forgo(_group(message))
                continue
            held.add(receipt)
            batch.append(_delivery(message, receipt, session))
        self._fill()
        return batch

    def _forgo(self, group: str | None) -> None:
        """What waits here behind a lost message of its group comes again behind it, too."""
        for receipt, message in self._buffer:
            if _group(message) == group:
                receipt.until_s = 0.0

    def _fill(self) -> None:
        """Have as many polls under way as there is room and, as the last answers tell, need for."""
        while self._polls < self._most_polls and not (self._stopped or self._paused or self._error):
            room = self._window - len(self._held) - len(self._buffer) - self._asked
            count = min(self._each, room)
            if count <= 0 or (self._polls and count < self._each):  # one for a little room is enough
                return
            self._polls += 1
            self._asked += count
            with self._lock:
                self._flying += 1
            self._calls.post(partial(self._poll, count), partial(self._polled, count))

    def _poll(self, count: int) -> list[tuple[Receipt, Mapping[str, Any]]]:
        """One long poll; on a thread."""
        arrived: list[tuple[Receipt, Mapping[str, Any]]] = []
        try:
            answer = self._client.receive_message(
                QueueUrl=self._url,
                MaxNumberOfMessages=count,
                WaitTimeSeconds=self._wait_s,
                VisibilityTimeout=self._lease_s,
                MessageAttributeNames=["All"],
                MessageSystemAttributeNames=["ApproximateReceiveCount", "MessageGroupId"],
            )
            now_s = time.monotonic()
            until_s, last_s = now_s + self._lease_s, now_s + MAX_VISIBILITY_S - MARGIN_S - self._wait_s
            messages: Sequence[Mapping[str, Any]] = answer.get("Messages", ())
            arrived = [(Receipt(message["ReceiptHandle"], until_s, last_s), message) for message in messages]
        finally:
            with self._lock:
                self._flying -= 1
                if self._abandoned:
                    self._left += [receipt for receipt, _ in arrived]
                    arrived = []
                left = self._take_left()
            for request in self._returns(left):  # here, since the loop may be gone
                with suppress(Exception):  # then they come with their lease
                    request()
        return arrived

    def _polled(
        self, count: int, arrived: list[tuple[Receipt, Mapping[str, Any]]] | None, error: BaseException | None
    ) -> None:
        self._polls -= 1
        self._asked -= count
        if self._abandoned:
            self._abandon([receipt for receipt, _ in arrived or ()])
        elif error is not None:
            self._poll_failed(errors.from_native(error, f"receive from {self._name}"))
        elif arrived is not None:
            self._buffer.extend(arrived)
            self._refusals = 0
            full = len(arrived) == self._each
            self._most_polls = min(self._max_polls, self._polls + 2) if full else max(1, self._polls)
        self._fill()
        if not self._polls and self._quiet is not None and not self._quiet.done():
            self._quiet.set_result(None)
        if self._stopped:
            self._pump()
        self._wake()

    def _poll_failed(self, error: MessagingError) -> None:
        if isinstance(error, (Backpressure, errors.ServiceDown)) and self._refusals < MAX_REFUSALS:
            self._refusals += 1
            self._paused, self._most_polls = True, 1
            self._loop.call_later(PAUSE_S, self._resume)
        elif isinstance(error, (ConnectionLost, Backpressure)):
            lost = error if isinstance(error, ConnectionLost) else ConnectionLost(str(error))
            self._link.fail(lost)
            self._fail(lost)
        else:
            self._fail(error)

    def _resume(self) -> None:
        self._paused = False
        self._fill()

    # settling

    def settle_batch(self, settlements: Sequence[tuple[Any, spi.Disposition]]) -> asyncio.Future[Failures]:
        if self._error is not None:
            raise self._error
        settles = _Settles(len(settlements), self._loop)
        self._answers.add(settles.future)
        settles.future.add_done_callback(self._answers.discard)
        for index, (receipt, disposition) in enumerate(settlements):
            if receipt not in self._held:
                settles.done(index, SettleLost(f"{self._name}: this receipt was settled or given back before"))
                continue
            self._held.discard(receipt)
            hide_s = None if disposition.kind == "accept" else min(MAX_VISIBILITY_S, math.ceil(disposition.delay_s))
            self._verbs.append(_Verb(receipt, hide_s, partial(settles.done, index)))
        self._pump()
        self._fill()
        return settles.future

    def _pump(self) -> None:
        """Send what waits, in tens of a kind, in the order it came."""
        while self._verbs and self._settling < SETTLE_REQUESTS and self._error is None:
            verbs = self._cut()
            if verbs is None:
                return
            if verbs:
                self._settling += 1
                what = f"settle on {self._name}"
                self._link.post(self._request(verbs), what, partial(self._settled, verbs))

    def _cut(self) -> list[_Verb] | None:
        """The next verbs for one request, without those whose lease has run out; None = all of them must wait."""
        now, waiting = time.monotonic(), self._verbs
        for _ in range(len(waiting)):
            if not self._must_wait(waiting[0]):
                break
            waiting.rotate(-1)  # others need not wait behind it
        else:
            return None
        deletes = waiting[0].hide_s is None
        verbs: list[_Verb] = []
        while waiting and len(verbs) < PER_REQUEST and (waiting[0].hide_s is None) is deletes:
            if self._must_wait(waiting[0]):
                break
            verb = waiting.popleft()
            if verb.receipt.until_s <= now:
                verb.done(SettleLost(f"{self._name}: the lease of {self._lease_s} s ran out; the message comes again"))
            else:
                verbs.append(verb)
        return verbs

    def _must_wait(self, verb: _Verb) -> bool:
        """A release would be undone by an extension that ends after it, and a last poll would only fetch it again."""
        return verb.hide_s is not None and (verb.receipt.extending or (self._stopped and self._polls > 0))

    def _request(self, verbs: Sequence[_Verb]) -> Callable[[], Any]:
        """The request that deletes, or hides for a time, on a thread."""
        if verbs[0].hide_s is None:
            deletions: Any = [{"Id": str(n), "ReceiptHandle": v.receipt.handle} for n, v in enumerate(verbs)]
            return partial(self._client.delete_message_batch, QueueUrl=self._url, Entries=deletions)
        changes: Any = [
            {"Id": str(n), "ReceiptHandle": v.receipt.handle, "VisibilityTimeout": v.hide_s}
            for n, v in enumerate(verbs)
        ]
        return partial(self._client.change_message_visibility_batch, QueueUrl=self._url, Entries=changes)

    def _settled(self, verbs: Sequence[_Verb], answer: Mapping[str, Any] | None, error: MessagingError | None) -> None:
        self._settling -= 1
        self._told(verbs, answer, error)

    def _tell(self, verbs: Sequence[_Verb], answer: Mapping[str, Any] | None, error: MessagingError | None) -> None:
        failed = {int(e["Id"]): e for e in answer.get("Failed", ())} if answer else {}
        done = {int(e["Id"]) for e in answer.get("Successful", ())} if answer else set()
        for n, verb in enumerate(verbs):
            problem: MessagingError | None = None
            if error is not None:
                problem = SettleLost(f"{self._name}: not known to be recorded, the message may come again: {error}")
                problem.__cause__ = error
            elif n in failed:
                code, text = failed[n].get("Code", ""), str(failed[n].get("Message", ""))[:200]
                problem = SettleLost(f"{self._name}: refused, the message comes again ({code}: {text})")
                if not failed[n].get("SenderFault", True):  # the service's own trouble ends no lease
                    problem.__cause__ = errors.from_code(code, self._name, text)
            elif n not in done:
                problem = SettleLost(f"{self._name}: not known to be recorded, the answer does not name it")
                problem.__cause__ = errors.ServiceDown(str(problem))
            verb.done(problem)

    # leases

    def extend_batch(self, receipts: Sequence[Any]) -> None:
        if self._error is None:
            self._extend([receipt for receipt in receipts if receipt in self._held])

    def _keep(self) -> None:
        """Every third of a lease: extend what waits in the buffer; what was handed out core extends."""
        self._extend([receipt for receipt, _ in self._buffer])
        self._timer = self._loop.call_later(self._lease_s / 3, self._keep)

    def _extend(self, receipts: Sequence[Receipt]) -> None:
        began_s = time.monotonic()
        due: list[_Verb] = []
        for receipt in receipts:
            hide_s = int(min(self._lease_s, receipt.last_s - began_s))
            until_s = began_s + hide_s
            if receipt.until_s > began_s and until_s > receipt.until_s and not receipt.extending:
                due.append(_Verb(receipt, hide_s, partial(self._extended, receipt, until_s)))
        for start in range(0, len(due), PER_REQUEST):
            verbs = due[start : start + PER_REQUEST]
            for verb in verbs:
                verb.receipt.extending = True
            self._link.post(self._request(verbs), f"extend on {self._name}", partial(self._told, verbs))

    def _told(self, verbs: Sequence[_Verb], answer: Mapping[str, Any] | None, error: MessagingError | None) -> None:
        self._tell(verbs, answer, error)
        self._pump()

    def _extended(self, receipt: Receipt, until_s: float, error: MessagingError | None) -> None:
        """A refused extension ends the lease at once; one without an answer leaves the old end."""
        receipt.extending = False
        if error is not None and error.__cause__ is None:
            receipt.until_s = 0.0
        elif error is None and receipt.until_s:
            receipt.until_s = until_s

    # leaving

    async def stop(self) -> None:
        self._stopped = True
        try:
            if self._polls and self._error is None:
                self._quiet = self._loop.create_future()
                await self._quiet
        except asyncio.CancelledError:
            self._abandon(self._take_buffer())
            raise
        handed = self._hand_back(self._take_buffer())
        if handed and self._error is None:
            await asyncio.wait(handed)

    def _take_buffer(self) -> list[Receipt]:
        receipts = [receipt for receipt, _ in self._buffer]
        self._buffer.clear()
        return receipts

    def _hand_back(self, receipts: Sequence[Receipt]) -> list[asyncio.Future[None]]:
        """Make them visible at once; a future each, done when that is answered. What fails comes with its lease."""
        if self._error is not None:
            return []
        handed: list[asyncio.Future[None]] = []
        for receipt in receipts:
            answered: asyncio.Future[None] = self._loop.create_future()
            self._verbs.append(_Verb(receipt, 0, partial(_answered, answered)))
            handed.append(answered)
        self._pump()
        return handed

    def _abandon(self, receipts: Sequence[Receipt]) -> None:
        """Nobody waits any more: have these, and what polls still bring, handed back when the last poll has ended.

        Not before, since it would fetch them again, and each time counts as a delivery.
        """
        with self._lock:
            self._abandoned = True
            self._left += receipts
            left = self._take_left()
        if self._link.error is None:
            for request in self._returns(left):
                self._link.post(request, f"give back to {self._name}", _unheard)

    def _take_left(self) -> list[Receipt]:
        """What is to be handed back now; under the lock."""
        left: list[Receipt] = []
        if self._abandoned and not self._flying:
            left, self._left = self._left, []
        return left

    def _returns(self, receipts: Sequence[Receipt]) -> list[Callable[[], Any]]:
        """The requests that make them visible."""
        now = time.monotonic()  # a dead receipt might show what another consumer has by now
        verbs = [_Verb(receipt, 0, _unheard) for receipt in receipts if receipt.until_s > now]
        return [self._request(verbs[at : at + PER_REQUEST]) for at in range(0, len(verbs), PER_REQUEST)]

    async def close(self) -> None:
        try:
            await self.stop()
            while self._answers and self._error is None:
                await asyncio.wait(self._answers)
            held = list(self._held)  # core leaves an ordered destination's to us: a group comes back as a whole
            self._held.clear()
            handed = self._hand_back(held)
            if handed:
                await asyncio.wait(handed)
        except asyncio.CancelledError:
            waiting = [verb.receipt for verb in self._verbs if verb.hide_s is not None]
            self._abandon([*waiting, *self._held])
            raise
        finally:
            self._fail(ConnectionLost(f"{self._name}: the receiver was closed"))

    def on_lost(self, error: ConnectionLost) -> None:
        self._fail(error)

    def _fail(self, error: MessagingError) -> None:
        if self._error is not None:
            return
        self._error = error
        self._abandon(())
        self._calls.stop()
        self._link.listeners.discard(self)
        self._session.closing = self._session.lost = True
        self._buffer.clear()
        lost = SettleLost(f"{self._name}: not recorded, the message comes again: {error}")
        lost.__cause__ = error
        for verb in self._verbs:
            verb.done(lost)
        self._verbs.clear()
        if self._timer is not None:
            self._timer.cancel()
        if self._quiet is not None and not self._quiet.done():
            self._quiet.set_result(None)
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class _Verb:
    """One entry of a request: delete (`hide_s` None) or hide for a time; `done` is told what became of it."""

    __slots__ = ("done", "hide_s", "receipt")

    def __init__(self, receipt: Receipt, hide_s: int | None, done: Callable[[MessagingError | None], None]) -> None:
        self.receipt = receipt
        self.hide_s = hide_s
        self.done = done


class _Settles:
    """The answers of one `settle_batch` that are still to come."""

    __slots__ = ("_failed", "_left", "future")

    def __init__(self, count: int, loop: asyncio.AbstractEventLoop) -> None:
        self._left = count
        self._failed: list[tuple[int, MessagingError]] = []
        self.future: asyncio.Future[Failures] = loop.create_future()
        if not count:
            self.future.set_result(())

    def done(self, index: int, error: MessagingError | None) -> None:
        self._left -= 1
        if error is not None:
            self._failed.append((index, error))
        if not self._left and not self.future.done():
            self.future.set_result(self._failed)


def _answered(waiting: asyncio.Future[None], error: MessagingError | None) -> None:
    if not waiting.done():
        waiting.set_result(None)


def _unheard(*_: object) -> None:
    """An answer that nobody waits for: what was not done is done by the lease's end."""


def _delivery(message: Mapping[str, Any], receipt: Receipt, session: Session) -> Delivery[Any]:
    attributes: Mapping[str, Any] = message.get("MessageAttributes", {})
    about = _about(attributes)
    count = int(message.get("Attributes", {}).get("ApproximateReceiveCount", 1))
    return Delivery(
        _body(message["Body"], about.get("enc")),
        about.get("id") or message["MessageId"],
        about.get("key") if "id" in about else _group(message),
        partial(_meta, attributes, about),
        receipt=receipt,
        session=session,
        deliveries=count,
        redelivered=count > 1,
        native=message,
    )


def _group(message: Mapping[str, Any]) -> str | None:
    """The message group, which only a FIFO queue's message has."""
    group: str | None = message.get("Attributes", {}).get("MessageGroupId")
    return group


def _body(text: str, encoding: object) -> bytes:
    """The bytes that were sent; of a foreign message that only claims to be encoded the text."""
    if encoding == EMPTY:
        return b""
    if encoding == BASE64:
        with suppress(ValueError):
            return b64decode(text, validate=True)
    return text.encode()


def _about(attributes: Mapping[str, Any]) -> Mapping[str, Any]:
    """Our attribute's object; empty where it is absent, or not as we write it."""
    try:
        about = json.loads(attributes[ATTRIBUTE]["StringValue"])
    except (KeyError, ValueError, RecursionError):
        return {}
    if not isinstance(about, dict) or not isinstance(about.get("headers", {}), dict):
        return {}
    texts = (about.get(name, "") for name in ("id", "key", "type", "corr"))
    return about if all(isinstance(text, str) for text in texts) else {}


def _meta(attributes: Mapping[str, Any], about: Mapping[str, Any]) -> Meta:
    """Headers are ours and, of a foreign message, the text and numbers of its attributes."""
    headers = {n: v["StringValue"] for n, v in attributes.items() if n != ATTRIBUTE and "StringValue" in v}
    headers |= {str(n): str(v) for n, v in about.get("headers", {}).items()}
    at = about.get("at")
    return Meta(headers, about.get("type"), about.get("corr"), at if isinstance(at, float) else None)
