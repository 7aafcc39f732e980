"""The way of a delivery: window, key lanes, handler or stream, retry that holds, dead letter, settlement in batches.

A Consumer lives as long as its `on` or `consume`; its Receiver lives for one connection and is opened again.
"""

from __future__ import annotations

import asyncio
import logging
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Final, Literal, cast

from .capabilities import Capabilities
from .destination import Destination
from .errors import (
    AlreadySettled,
    CapabilityError,
    Closed,
    ConnectError,
    ConnectionLost,
    DecodeError,
    MessagingError,
    Reject,
    RetryLater,
    SettleLost,
    Unmet,
    UsageError,
)
from .lanes import Lanes
from .model import Delivery, Message, Session
from .retry import Backoff, Retry
from .spi import ACCEPT, RELEASE, Disposition, Leased, Receiver

log: Final = logging.getLogger("messaging_sdk")

OnFailure = Literal["dead_letter", "drop", "stop"]
current: Final[ContextVar[Message[Any] | None]] = ContextVar("messaging_sdk.current", default=None)
"""The message whose handler runs in this task: publishes made there carry its correlation id."""

RECEIVE: Final = 500  # deliveries asked for at once: batches beyond it gained nothing
REPEATS_S: Final = 120.0  # within which a message comes again whose settlement was lost; or two leases, if longer
CANCEL_S: Final = 1.0  # for a cancelled handler to end; one that refuses is abandoned
EXTENSIONS_PER_LEASE: Final = 3  # one may be late or lost before a lease runs out


@dataclass(slots=True)
class Stats:
    """Counters of one consumer since its start."""

    received: int = 0
    settled: int = 0
    failed: int = 0
    """Handler runs that raised."""
    dead_lettered: int = 0
    dropped: int = 0
    """Given up by on_failure="drop", or on a Signal: failed, undecodable, or lost in a full local buffer."""
    handed_back: int = 0
    repeats_suppressed: int = 0
    """Arrivals whose settlement was not recorded, settled again without a second handler run."""
    reopened: int = 0


@dataclass(frozen=True, slots=True)
class Terms:
    """How a consumer treats what it gets."""

    destination: Destination[Any]
    group: str | None
    window: int
    on_failure: OnFailure
    max_deliveries: int
    capabilities: Capabilities
    retry: Retry = field(default_factory=Retry)


class Settler(ABC):
    """What a Delivery of a stream calls."""

    __slots__ = ()

    @abstractmethod
    async def ack(self, delivery: Delivery[Any]) -> None: ...
    @abstractmethod
    async def retry(self, delivery: Delivery[Any], after_s: float) -> None: ...
    @abstractmethod
    async def reject(self, delivery: Delivery[Any], reason: str) -> None: ...
    @abstractmethod
    async def release(self, delivery: Delivery[Any]) -> None: ...


Bury = Callable[[Terms, Message[Any], str, str, int], Awaitable[None]]
"""(terms, message, reason, error text, attempts): a confirmed publish to the dead letters; raises if it failed."""
OpenReceiver = Callable[[Callable[[Sequence[Session], float], Awaitable[None]]], Awaitable[Receiver]]


class Consumer(Settler):
    """Intake, lanes and settlement of one destination and group. What takes from `ready` is Workers or a Stream."""

    # beyond 30 attributes of a dict CPython reads each of them the slow way
    __slots__ = (
        "_accepted", "_acking", "_answers", "_bury", "_done", "_extender", "_flush_armed", "_intake", "_lanes",
        "_loop", "_on_stop", "_open_receiver", "_receiver", "_repeats", "_repeats_until_s", "_room", "_running",
        "_settlements", "_settles", "_settling", "_takers", "_tasks", "_timers", "_unsettled",
        "cancel_handlers", "closing", "failure", "ready", "stats", "terms",
    )  # fmt: skip

    def __init__(
        self,
        terms: Terms,
        open_receiver: OpenReceiver,
        bury: Bury,
        on_stop: Callable[[BaseException], None],
    ) -> None:
        self.terms = terms
        self.stats = Stats()
        self.ready: deque[Message[Any]] = deque()
        self.failure: BaseException | None = None
        self._open_receiver = open_receiver
        self._bury = bury
        self._on_stop = on_stop
        self._loop = asyncio.get_running_loop()
        self._settles = terms.destination.settles
        self._lanes = Lanes() if terms.destination.ordered else None
        self._receiver: Receiver | None = None
        self._unsettled: dict[Delivery[Any], float] = {}  # -> when its lease was last known to start
        self._takers: deque[asyncio.Future[None]] = deque()
        self._settlements: list[tuple[Any, Disposition]] = []
        self._settling: list[asyncio.Future[None] | None] = []
        self._flush_armed = False
        self._answers: set[asyncio.Future[Any]] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._running: set[Delivery[Any]] = set()
        self._timers: dict[Delivery[Any], asyncio.TimerHandle] = {}
        self._accepted: deque[str | Delivery[Any]] = deque(maxlen=terms.window)
        """The last ones that were handled and settled: their ids, or where these are not decoded yet themselves."""
        self._repeats: dict[str, float] = {}  # id -> until when it is expected
        self._repeats_until_s = 0.0  # the last of these times
        self._done: set[Delivery[Any]] = set()
        """Arrived again, and handled before."""
        self._acking: dict[Delivery[Any], asyncio.Future[None]] = {}
        """Settled by an `ack` that has not returned yet."""
        self._intake: asyncio.Task[None] | None = None
        self._extender: asyncio.TimerHandle | None = None
        self.cancel_handlers: Callable[[set[Delivery[Any]]], None] = lambda overdue: None
        """Set by Workers: end the handlers of these deliveries, as one that was cancelled from within would."""
        self._room: asyncio.Future[None] | None = None
        self.closing = False

    # --- intake

    async def start(self) -> None:
        """Open the receiver (a message published after this reaches it) and begin to take from it."""
        self._receiver = await self._open_receiver(self.on_revoke)
        self._watch_leases()
        self._intake = self._loop.create_task(self._take_in(), name=f"intake {self.terms.destination.name}")

    async def _take_in(self) -> None:
        try:
            while not self.closing:
                receiver = self._receiver or await self._reopen()
                try:
                    arrivals = await receiver.receive_batch(RECEIVE)
                except ConnectionLost as error:
                    self._lose_connection(error)
                    continue
                self._arrive(arrivals)
                if len(self.ready) > RECEIVE:
                    await self._let_takers_work()
        except asyncio.CancelledError:
            raise
        except BaseException as error:
            self.fail(error)

    async def _let_takers_work(self) -> None:
        """An intake that never suspends would starve them; one without settlement has no window to bound it."""
        await asyncio.sleep(0)
        while not self._settles and len(self.ready) >= self.terms.window and self.failure is None:
            self._room = self._loop.create_future()
            await self._room

    async def _reopen(self) -> Receiver:
        backoff = Backoff()
        while True:
            await asyncio.sleep(backoff.wait_s())
            try:
                receiver = await self._open_receiver(self.on_revoke)
            except (ConnectError, ConnectionLost) as error:
                if not error.transient:
                    raise
                log.warning("%s: cannot reopen, trying again: %s", self.terms.destination, error)
                continue
            self.stats.reopened += 1
            self._receiver = receiver
            self._expect_again(list(self._repeats))  # from now on they can come
            self._watch_leases()
            return receiver

    def _arrive(self, arrivals: Sequence[Message[Any]]) -> None:
        self.stats.received += len(arrivals)
        ready, lanes = self.ready, self._lanes
        if self._settles:
            unsettled, now = self._unsettled, self._loop.time()
            for delivery in cast("Sequence[Delivery[Any]]", arrivals):
                unsettled[delivery] = now
                if self._repeats and self._is_repeat(delivery.id):
                    self._done.add(delivery)
                if lanes is None or lanes.enter(delivery):
                    ready.append(delivery)
        else:
            ready.extend(arrivals)
        if ready and self._takers:
            self.wake()

    def _lose_connection(self, error: ConnectionLost) -> None:
        """Everything unsettled is lost to us: the broker gives it to someone again."""
        receiver, self._receiver = self._receiver, None
        if receiver is None:
            return
        log.info("%s: connection lost, reopening: %s", self.terms.destination, error)
        for delivery in self._unsettled:
            delivery.session.lost = True
        for timer in self._timers.values():
            timer.cancel()
        self._timers.clear()
        self._unsettled = dict.fromkeys(self._running, 0.0)
        if self._settles:
            self.ready.clear()
        if self._lanes is not None:  # a key whose handler still runs stays taken
            self._lanes.clear()
            for delivery in self._running:
                self._lanes.enter(delivery)
        self._repeats.clear()
        self._expect_last_accepted()
        self._expect_again([d.id for d in self._done])
        self._done.clear()
        self._flush()
        self._background(self._close_receiver(receiver, 1.0))

    # --- taking

    def wake(self) -> None:
        """Wake one taker; it wakes the next while there is more, so that a burst costs a doubling chain."""
        while self._takers:
            taker = self._takers.popleft()
            if not taker.done():
                taker.set_result(None)
                return

    def release_takers(self) -> None:
        """Wake all, to see `closing` or `failure`."""
        while self._takers:
            self.wake()
        if self._room is not None and not self._room.done():
            self._room.set_result(None)

    async def wait_ready(self) -> None:
        """Wait until `ready` may have something. Cancelling loses nothing."""
        taker = self._loop.create_future()
        self._takers.append(taker)
        try:
            await taker
        finally:
            if taker.cancelled():
                with suppress(ValueError):
                    self._takers.remove(taker)
            elif self.ready:
                self.wake()

    def next(self) -> Message[Any] | None:
        """The next decoded message, or None if `ready` is empty. What can not be decoded goes to on_failure."""
        ready, terms = self.ready, self.terms
        while ready:
            message = ready.popleft()
            delivery: Any = message  # a Delivery, where it settles; a cast would cost a call
            if self._settles:
                if self.closing or delivery.session.closing or delivery.session.lost:
                    continue  # what is still ours stays in _unsettled and is handed back
                if (self._done or self._repeats) and self._is_done(delivery):
                    self.stats.repeats_suppressed += 1
                    self._accepted.append(delivery._id or delivery)
                    self._settle(delivery, ACCEPT)
                    continue
                if delivery.deliveries is not None and delivery.deliveries > terms.max_deliveries:
                    self.give_up(delivery, "deliveries", f"delivered {delivery.deliveries} times")
                    continue
            try:
                message.data = terms.destination.codec.decode(message.body)
            except DecodeError as error:
                self.give_up(message, "undecodable", str(error))
                continue
            if self._settles:
                self._running.add(delivery)
            elif self._room is not None and len(ready) < terms.window // 2:
                self._room.set_result(None)
                self._room = None
            return message
        return None

    # --- settling

    def accept(self, delivery: Delivery[Any]) -> None:
        """Settle what was handled, in the next batch; a repeat needs no second run. Nothing happens if it is no longer
        ours."""
        if delivery.session.lost:
            self._finish_late(delivery)
            return
        self._running.discard(delivery)
        self._accepted.append(delivery._id or delivery)
        self._settle(delivery, ACCEPT)

    def _accept_given_up(self, delivery: Delivery[Any]) -> None:
        """The same, but it may be published again with its id, and is then to run."""
        if delivery.session.lost:
            self._finish_late(delivery)
            return
        self._running.discard(delivery)
        self._settle(delivery, ACCEPT)

    def _finish_late(self, delivery: Delivery[Any]) -> None:
        self._expect_again([delivery.id])  # and it is done
        self._forget(delivery)

    def _expect_again(self, ids: Iterable[str]) -> None:
        """These are done, and may come once more, soon: an id that is published again later is another message."""
        self._repeats_until_s = self._loop.time() + max(REPEATS_S, 2 * self.terms.capabilities.lease_s)
        self._repeats.update(dict.fromkeys(ids, self._repeats_until_s))

    def _expect_last_accepted(self) -> None:
        """Which of them are not recorded is not known; an `ack` that has not returned may yet say that it is one."""
        accepted = {known if isinstance(known, str) else known.id for known in self._accepted}
        accepted.difference_update(d.id for d, answer in self._acking.items() if not _is_recorded(answer))
        now = self._loop.time()
        self._repeats = {id: until_s for id, until_s in self._repeats.items() if until_s >= now}
        self._expect_again(accepted)

    def _run_again(self, delivery: Delivery[Any]) -> None:
        """Its ack did not return: whoever called it takes the message for not done."""
        self._repeats.pop(delivery.id, None)
        for known in (delivery, delivery.id):
            with suppress(ValueError):
                self._accepted.remove(known)

    def _is_done(self, delivery: Delivery[Any]) -> bool:
        if delivery in self._done:
            self._done.discard(delivery)
            return True
        return self._is_repeat(delivery.id)  # its handler may have ended after it arrived

    def _is_repeat(self, id: str) -> bool:
        now = self._loop.time()
        if now > self._repeats_until_s:
            self._repeats.clear()
        return self._repeats.pop(id, 0.0) >= now

    def _settle(
        self,
        delivery: Delivery[Any],
        disposition: Disposition,
        waiter: asyncio.Future[None] | None = None,
    ) -> None:
        delivery.settled = True
        if disposition is ACCEPT:
            self.stats.settled += 1
        self._settlements.append((delivery.receipt, disposition))
        self._settling.append(waiter)
        if self._lanes is None:
            self._unsettled.pop(delivery, None)
        else:
            self._finish(delivery)
        if not self._flush_armed:
            self._flush_armed = True
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._flush_armed = False
        if not self._settlements:
            return
        settlements, self._settlements = self._settlements, []
        waiters, self._settling = self._settling, []
        receiver = self._receiver
        try:
            if receiver is None:
                raise ConnectionLost("the connection was lost before the settlement was sent")
            answer = receiver.settle_batch(settlements)
        except ConnectionLost as error:
            _answer(waiters, [(i, _settle_lost(error)) for i in range(len(waiters))])
            return
        except Exception as error:
            self.fail(error)
            _answer(waiters, [(i, _settle_lost(error)) for i in range(len(waiters))])
            return
        if answer is None:
            _answer(waiters, ())
            return
        self._answers.add(answer)

        def answered(future: asyncio.Future[Sequence[tuple[int, MessagingError]]]) -> None:
            self._answers.discard(future)
            if future.cancelled():
                failed: Sequence[tuple[int, MessagingError]] = [
                    (i, SettleLost("the connection was closed before the broker answered")) for i in range(len(waiters))
                ]
            elif (error := future.exception()) is not None:
                failed = [(i, _settle_lost(error)) for i in range(len(waiters))]
            else:
                failed = future.result()
                if any(settlements[index][1] is ACCEPT for index, _ in failed):  # no ids were kept of these
                    self._expect_last_accepted()
            _answer(waiters, failed)

        answer.add_done_callback(answered)

    def _finish(self, delivery: Delivery[Any]) -> None:
        """Forget a settled delivery and let the next of its key go."""
        if self._unsettled.pop(delivery, None) is None or self._lanes is None:
            return
        follower = self._lanes.leave(delivery)
        if follower is not None:
            self.ready.append(follower)
            if self._takers:
                self.wake()

    def _forget(self, delivery: Delivery[Any]) -> None:
        self._running.discard(delivery)
        delivery.settled = True
        self._finish(delivery)

    def hand_over(self, delivery: Delivery[Any]) -> None:
        """Its session is going or gone: the next owner runs it, which costs it no attempt here."""
        self.stats.handed_back += 1
        self._forget(delivery)

    # --- Settler: the verbs of a stream's deliveries

    def _claim(self, delivery: Delivery[Any]) -> None:
        if asyncio.get_running_loop() is not self._loop:
            raise UsageError(
                "a delivery is settled on the event loop it arrived on; from threads use messaging_sdk.sync"
            )
        if delivery.settled:
            if delivery.session.lost:
                raise SettleLost(f"{delivery!r} is no longer ours: its connection was lost; it will come again")
            raise AlreadySettled(f"{delivery!r} was settled before; the first settlement counts")
        if delivery.session.lost:
            self._forget(delivery)
            raise SettleLost(f"{delivery!r} is no longer ours: its connection was lost; it will come again")
        if delivery not in self._running:
            raise UsageError(f"{delivery!r} is held for a retry; settle the next arrival of it instead")

    async def ack(self, delivery: Delivery[Any]) -> None:
        self._claim(delivery)
        try:
            await self._ack(delivery)
        except (SettleLost, asyncio.CancelledError):
            self._run_again(delivery)
            raise
        finally:
            del self._acking[delivery]

    async def ack_all(self, deliveries: Iterable[Delivery[Any]]) -> None:
        """Ack many with one wait. The first error is raised after all that can be were sent."""
        answers: dict[Delivery[Any], asyncio.Future[None]] = {}
        errors: list[BaseException] = []
        for delivery in deliveries:
            try:
                self._claim(delivery)
            except MessagingError as error:  # one that was lost must not keep the others unsettled
                errors.append(error)
                continue
            answers[delivery] = self._ack(delivery)
        try:
            results = await asyncio.gather(*answers.values(), return_exceptions=True)
        finally:
            for delivery, answer in answers.items():
                del self._acking[delivery]
                if not _is_recorded(answer):
                    self._run_again(delivery)
        errors += [result for result in results if isinstance(result, BaseException)]
        if errors:
            raise errors[0]

    def _ack(self, delivery: Delivery[Any]) -> asyncio.Future[None]:
        self._running.discard(delivery)
        self._accepted.append(delivery._id or delivery)
        answer = self._acking[delivery] = self._loop.create_future()
        self._settle(delivery, ACCEPT, answer)
        return answer

    async def retry(self, delivery: Delivery[Any], after_s: float) -> None:
        self._claim(delivery)
        if after_s < 0:
            raise UsageError(f"retry: after_s must be >= 0, not {after_s}")
        self.hold(delivery, after_s)

    async def reject(self, delivery: Delivery[Any], reason: str) -> None:
        self._claim(delivery)
        delivery.settled = True  # the verdict is final, although the broker is told when the dead letter is stored
        self.give_up(delivery, "rejected", reason)

    async def release(self, delivery: Delivery[Any]) -> None:
        self._claim(delivery)
        if self.terms.capabilities.release == "none":
            note = self.terms.capabilities.notes.get("release", "close the stream: what is unsettled goes back")
            raise CapabilityError([Unmet(self.terms.destination.name, "release='now'", "of this route", note)])
        self._running.discard(delivery)
        answer = self._loop.create_future()
        followers = self._lanes.drain(delivery) if self._lanes is not None else []
        self.stats.handed_back += 1 + len(followers)
        self._settle(delivery, RELEASE, answer)
        for follower in followers:  # an ordered key goes back from this message on
            follower.settled = True
            self._unsettled.pop(follower, None)
            self._settlements.append((follower.receipt, RELEASE))
            self._settling.append(None)
        await answer

    # --- failure

    def hold(self, delivery: Delivery[Any], after_s: float) -> None:
        """Keep it unsettled and make it ready again after `after_s`; its lane stays taken.

        What is being revoked is not kept: its next owner runs it, and a lane held here would never be left. When it is
        the consumer that ends, closing hands it back.
        """
        if delivery.session.closing and not self.closing:
            self.hand_over(delivery)
            return
        self._running.discard(delivery)
        delivery.attempt += 1
        self._timers[delivery] = self._loop.call_later(after_s, self._again, delivery)

    def _again(self, delivery: Delivery[Any]) -> None:
        del self._timers[delivery]
        self.ready.append(delivery)
        self.wake()

    @property
    def held(self) -> int:
        """Deliveries that wait for their next attempt; they occupy the window."""
        return len(self._timers)

    @property
    def idle(self) -> bool:
        """Nothing runs, waits or is held here."""
        return not (self._unsettled or self.ready or self._settlements or self._answers)

    def failed(self, delivery: Message[Any], error: BaseException) -> None:
        """A handler raised: try again, or give up when the attempts are used."""
        self.stats.failed += 1
        if not isinstance(delivery, Delivery):
            self.stats.dropped += 1
            log.warning("%s: handler failed on a signal, dropped: %r", self.terms.destination, error)
        elif delivery.session.lost:
            self._forget(delivery)
        elif isinstance(error, Reject):
            self.give_up(delivery, "rejected", str(error))
        elif delivery.attempt >= self.terms.retry.attempts:
            self.give_up(delivery, "attempts", f"{type(error).__name__}: {error}")
        elif isinstance(error, RetryLater):
            self.hold(delivery, error.after_s)
        else:
            log.info(
                "%s: attempt %d failed, will run again: %r",
                self.terms.destination,
                delivery.attempt,
                error,
            )
            self.hold(delivery, self.terms.retry.wait_s(delivery.attempt))

    def give_up(self, delivery: Message[Any], reason: str, error: str) -> None:
        """on_failure: it stays unsettled (and its lane taken) until the dead letter is stored."""
        terms = self.terms
        if not isinstance(delivery, Delivery) or not self._settles:
            self.stats.dropped += 1
            log.warning("%s: %s signal dropped: %s", terms.destination, reason, error)
            return
        if terms.on_failure == "drop":
            self.stats.dropped += 1
            log.warning("%s: message %s dropped (%s): %s", terms.destination, delivery.id, reason, error)
            self._accept_given_up(delivery)
        elif terms.on_failure == "stop":
            self._running.discard(delivery)
            self.fail(
                MessagingError(f"{terms.destination}: message {delivery.id} {reason}: {error}; on_failure = stop")
            )
        else:
            self._running.add(delivery)
            self._background(self._to_dead_letters(delivery, reason, error))

    async def _to_dead_letters(self, delivery: Delivery[Any], reason: str, error: str) -> None:
        backoff = Backoff()
        while True:
            try:
                await self._bury(self.terms, delivery, reason, error, delivery.attempt)
                break
            except MessagingError as problem:
                log.error(
                    "%s: message %s cannot be written to its dead letters and is held: %s",
                    self.terms.destination, delivery.id, problem,
                )  # fmt: skip
                await asyncio.sleep(backoff.wait_s())
                if delivery.session.lost:
                    self._forget(delivery)
                    return
        self.stats.dead_lettered += 1
        log.warning(
            "%s: message %s to the dead letters (%s): %s",
            self.terms.destination,
            delivery.id,
            reason,
            error,
        )
        self._accept_given_up(delivery)

    def fail(self, error: BaseException) -> None:
        """Stop for good, loudly."""
        if self.failure is None:
            self.failure = error
            log.error("%s: consumer stopped: %r", self.terms.destination, error)
            self.release_takers()
            self._on_stop(error)

    # --- leases and revocation

    def _watch_leases(self) -> None:
        if self._extender is not None:
            self._extender.cancel()
            self._extender = None
        if self.terms.capabilities.lease == "timeout" and _leased(self._receiver) is not None:
            period_s = self.terms.capabilities.lease_s / EXTENSIONS_PER_LEASE
            self._extender = self._loop.call_later(period_s / 2, self._extend, period_s)

    def _extend(self, period_s: float) -> None:
        now = self._loop.time()
        due = []
        for delivery, since in self._unsettled.items():
            if now - since >= 0.75 * period_s and not delivery.session.lost:
                due.append(delivery)
        receiver = _leased(self._receiver)
        if due and receiver is not None:
            for delivery in due:
                self._unsettled[delivery] = now
            with suppress(ConnectionLost):  # receive_batch tells of it
                receiver.extend_batch([d.receipt for d in due])
        self._extender = self._loop.call_later(period_s / 2, self._extend, period_s)

    async def on_revoke(self, sessions: Sequence[Session], deadline_s: float) -> None:
        """The adapter gives up `sessions`: drop what has not started, let what runs end, settle.

        Where order holds under competition, a handler that outlives the deadline is cancelled and its delivery handed
        back: the next owner would run it, and what follows it, beside ours.
        """
        gone = set(map(id, sessions))
        mine = [d for d in self._unsettled if id(d.session) in gone]
        for session in sessions:
            session.closing = True
            session.lost = session.lost or deadline_s <= 0
        for delivery in mine:
            if delivery not in self._running:
                timer = self._timers.pop(delivery, None)
                if timer is not None:
                    timer.cancel()
                self._unsettled.pop(delivery, None)
        dropped = set(mine)
        self._expect_again([d.id for d in self._done & dropped])
        self._done -= dropped
        self.ready = deque(d for d in self.ready if d not in dropped)
        if self._lanes is not None:  # keys whose lane waits behind a revoked delivery start anew
            self._relane()
        if deadline_s > 0:
            await self._until_ended(mine, deadline_s)
            self._flush()
        for session in sessions:
            session.lost = True
        overdue = self._running.intersection(mine)
        if overdue and self.terms.capabilities.order_competition:
            self.cancel_handlers(overdue)
            await self._until_ended(overdue, CANCEL_S)

    async def _until_ended(self, deliveries: Iterable[Delivery[Any]], wait_s: float) -> None:
        """Wait until none of these runs, at most `wait_s`."""
        end = self._loop.time() + wait_s
        while not self._running.isdisjoint(deliveries) and self._loop.time() < end:  # noqa: ASYNC110  # rare, and bounded
            await asyncio.sleep(0.005)

    def _relane(self) -> None:
        if self._lanes is None:
            return
        self._lanes = Lanes()
        busy = {*self._running, *self._timers}
        for delivery in [d for d in self._unsettled if d in busy] + [d for d in self._unsettled if d not in busy]:
            self._lanes.enter(delivery)
        waiting = set(self._lanes.waiting())
        self.ready = deque(d for d in self._unsettled if d not in busy and d not in waiting)

    # --- the end

    async def stop_intake(self, timeout_s: float = 2.0) -> None:
        """Take no more from the broker, within `timeout_s`; what runs goes on."""
        self.closing = True
        self.release_takers()  # they need not wait for the backend to stop
        if self._intake is not None:
            self._intake.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await self._intake
            self._intake = None
        if self._receiver is not None:
            with suppress(MessagingError, TimeoutError):
                async with asyncio.timeout(timeout_s):
                    await self._receiver.stop()
        for timer in self._timers.values():
            timer.cancel()
        self._timers.clear()

    async def close(self, timeout_s: float) -> None:
        """Hand back what is unsettled, flush what is settled, leave. The caller has ended the takers before."""
        self.closing = True
        deadline = self._loop.time() + timeout_s
        if self._intake is not None:
            await self.stop_intake(timeout_s)
        for task in list(self._tasks):
            task.cancel()
        if self._extender is not None:
            self._extender.cancel()
        self._flush()
        self._hand_back()
        self._flush()
        if self._answers:
            await asyncio.wait(self._answers, timeout=max(0.05, (deadline - self._loop.time()) / 2))
        receiver, self._receiver = self._receiver, None
        if receiver is not None:
            await self._close_receiver(receiver, max(0.1, deadline - self._loop.time()))
        if self.failure is None:
            self.failure = Closed(f"{self.terms.destination}: the consumer was closed")
        self.release_takers()

    def _hand_back(self) -> None:
        """Ordered destinations are not released one by one: the adapter's close gives all back in order."""
        mine = [d for d in self._unsettled if not d.session.lost]
        self.stats.handed_back += len(mine)
        self._running.clear()
        self.ready.clear()
        for delivery in mine:
            delivery.settled = True
        self._unsettled.clear()
        if self._settles and self._lanes is None and self.terms.capabilities.release != "none":
            for delivery in mine:
                self._settlements.append((delivery.receipt, RELEASE))
                self._settling.append(None)

    async def _close_receiver(self, receiver: Receiver, timeout_s: float) -> None:
        self.stats.dropped += receiver.dropped
        try:
            async with asyncio.timeout(timeout_s):
                await receiver.close()
        except TimeoutError:
            log.debug("%s: receiver did not close within %.1f s", self.terms.destination, timeout_s)
        except Exception as error:
            log.debug("%s: error while closing a receiver: %r", self.terms.destination, error)

    def _background(self, work: Any) -> None:
        task: asyncio.Task[None] = self._loop.create_task(work)
        self._tasks.add(task)

        def done(ended: asyncio.Task[None]) -> None:
            self._tasks.discard(ended)
            if not ended.cancelled() and (error := ended.exception()) is not None:
                self.fail(error)

        task.add_done_callback(done)


def _leased(receiver: object) -> Leased | None:
    return receiver if isinstance(receiver, Leased) else None


def _is_recorded(answer: asyncio.Future[None]) -> bool:
    return answer.done() and not answer.cancelled() and answer.exception() is None


def _settle_lost(error: BaseException) -> SettleLost:
    lost = SettleLost(f"the settlement was not recorded, the message may come again: {error}")
    lost.__cause__ = error
    return lost


def _answer(waiters: list[asyncio.Future[None] | None], failed: Sequence[tuple[int, MessagingError]]) -> None:
    errors = dict(failed)
    for index, waiter in enumerate(waiters):
        if waiter is None or waiter.done():
            continue
        error = errors.get(index)
        if error is None:
            waiter.set_result(None)
        else:
            waiter.set_exception(error)
