"""Consuming: `Member`, a thread that owns one consumer, and `Receiver`, its face on the loop."""

from __future__ import annotations

import asyncio
import threading
import time
from base64 import b64decode, b64encode
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, Final, cast

from confluent_kafka import OFFSET_END, Consumer, KafkaError, KafkaException, TopicPartition
from confluent_kafka import Message as Record

from messaging_sdk.errors import ConnectError, ConnectionLost, MessagingError, SettleLost
from messaging_sdk.model import Delivery, Message, Meta, Session
from messaging_sdk.offsets import OffsetLedger
from messaging_sdk.spi import Disposition, OnRevoke
from messaging_sdk.spi import Receiver as ReceiverContract
from messaging_sdk.threads import Hop

from .errors import TABLE, UNKNOWN_TOPIC, Solitude, loss, native_of, no_protocol, no_release, refusal
from .sender import CONTENT_TYPE, CORRELATION, ID, OURS

BATCH: Final = 500
"""Records taken from the client at once; 5,000 were slower in measurements."""
GAP: Final = 16_384
"""Offsets from the first unsettled one on at which a partition stalls. A commit's metadata notes each of them in a bit,
and has room for 24,000 (offset.metadata.max.bytes, 4096 by default)."""
BUSY_POLL_S: Final = 0.002
"""Wait for records while deliveries are out: a settlement waits as long at most, since nothing wakes a poll."""
IDLE_POLL_S: Final = 0.02
STALL_S: Final = 0.02
"""Between two polls while the window is full. Each may take one record, which is kept aside."""
ASIDE: Final = 32
"""Records kept aside at which all partitions are paused: pausing throws away what the client has prefetched."""
JOIN_S: Final = 3.0
"""How long an open waits for a share of the partitions; a group may have more members than those."""
LEAVE_S: Final = 5.0
"""Longest wait for the last commit of a leaving member."""
REACH_S: Final = 1.0
"""Longest wait for an answer of the broker that is of use, but not needed."""
RETRY_COMMIT_S: Final = 0.05
REFUSED_S: Final = 60.0
"""How long a broker may refuse commits until the receiver is given up for it: core says so and opens another."""
UNKNOWN_S: Final = 3.0
"""How long a topic may be unknown to a broker until it is taken for deleted; the producer waits as long."""
_VERSION: Final = "ahead1:"
_LOST: Final = (
    KafkaError.UNKNOWN_MEMBER_ID,
    KafkaError.FENCED_INSTANCE_ID,
    KafkaError.FENCED_MEMBER_EPOCH,
    KafkaError._FENCED,
)
"""Answers to a commit that say: these partitions are no longer ours. ILLEGAL_GENERATION and STALE_MEMBER_EPOCH do not:
the commit met a rebalance, and may be made again when the member has heard of it. Else the client tells of the loss."""

_REBALANCES: Final = (
    KafkaError.REBALANCE_IN_PROGRESS,
    KafkaError.ILLEGAL_GENERATION,
    KafkaError.STALE_MEMBER_EPOCH,
)
"""Answers to a commit that end with the rebalance, which takes as long as the slowest member."""
_UNHEALING: Final = (
    *UNKNOWN_TOPIC,
    KafkaError.TOPIC_AUTHORIZATION_FAILED,
    KafkaError.GROUP_AUTHORIZATION_FAILED,
)


class Claim:
    """One partition for as long as it is ours. A receipt is (claim, offset)."""

    __slots__ = ("done", "end", "is_gone", "is_stalled", "ledger", "partition", "refused_since_s", "session", "taken")

    def __init__(self, what: str, partition: int, position: int, done: set[int]) -> None:
        self.partition = partition
        self.session = Session(f"{what} partition {partition}")
        self.ledger = OffsetLedger(max(0, position), notes_ahead=True)
        self.done = done
        """Offsets that an earlier owner settled ahead of its position."""
        self.end = max(0, position)
        """Behind the last offset that was delivered."""
        self.is_stalled = False
        self.is_gone = False
        """The thread's own: core says `session.lost` while settlements of it are still on their way here."""
        self.refused_since_s: float | None = None
        """Since when the broker has refused each commit of it, for another reason than a rebalance."""
        self.taken: list[int] = []
        """Offsets of the batch at hand."""


class Answers:
    """One `settle_batch`: what failed of it, and who waits."""

    __slots__ = ("failed", "future", "settlements")

    def __init__(self, settlements: Sequence[tuple[Any, Disposition]], future: asyncio.Future[Any]) -> None:
        self.settlements = settlements
        self.future = future
        self.failed: dict[int, MessagingError] = {}

    def fail(self, error: Callable[[], MessagingError], claims: Iterable[Claim] | None = None) -> None:
        """These were not recorded: all, or those of `claims`."""
        gone = None if claims is None else set(claims)
        for index, ((claim, _), _d) in enumerate(self.settlements):
            if index not in self.failed and (gone is None or claim in gone):
                self.failed[index] = error()


class Member:
    """The thread that owns one consumer: all calls of it are made there, since others starve beside a poll loop
    (confluent-kafka 2.16). `orders` come from the loop, everything goes back by one hop per burst.

    Three ways to read: settling (a Queue, a group of a Topic), committing before hand-out (a group of a Signal), or
    from given positions without a group (a listener of a Signal).
    """

    def __init__(
        self,
        receiver: Receiver,
        config: Mapping[str, Any],
        topic: str,
        what: str,
        *,
        window: int | None,
        start: Sequence[TopicPartition] | None,
        on_revoke: OnRevoke,
        revoke_timeout_s: float,
    ) -> None:
        self._receiver = receiver
        self._topic = topic
        self._what = what
        self._window = window  # None: does not settle
        self._start = start
        self._on_revoke = on_revoke
        self._revoke_timeout_s = revoke_timeout_s
        self._loop = asyncio.get_running_loop()
        self._hop = Hop(self._loop)
        self._solitude = Solitude(self._left_alone)
        told = {"error_cb": self._on_error, "on_commit": self._on_commit}
        self._config = {**config, **self._solitude.config(), **told}
        self._orders: deque[Callable[[], object]] = deque()
        self._ordered = threading.Event()
        self._claims: dict[int, Claim] = {}
        self._out = 0  # handed over and not settled
        self._aside: list[Record] = []
        self._is_paused = False
        self._stopped = False
        self._leaving = False
        self._dropped = False
        self._is_noteless = False  # the broker takes no note of our size
        self._lost: MessagingError | None = None
        self._joined_s = 0.0
        self._joining_since_s = time.monotonic()
        self._told_ready = False
        self._settled: list[Answers] = []  # recorded here, in no commit yet
        self._commit: tuple[list[tuple[Claim, int]], list[Answers]] | None = None
        self._next_commit_s = 0.0
        self.thread = threading.Thread(target=self._main, name="messaging-sdk-kafka-receiver", daemon=True)

    def order(self, work: Callable[[], object]) -> None:
        """From the loop: have `work` done on the thread."""
        self._orders.append(work)
        self._ordered.set()

    def tell(self, call: Callable[..., object], *args: Any) -> None:
        """From the thread: run `call(*args)` on the loop, in order."""
        with suppress(RuntimeError):  # the loop was closed: nobody listens
            self._hop.post(call, *args)

    # --- the thread's life

    def _main(self) -> None:
        error: BaseException | None = None
        try:
            self._consumer = Consumer(self._config)
            try:
                self._begin()
                while not (self._leaving or self._lost):
                    self._turn()
                    if self._loop.is_closed():  # nobody closed the receiver, nobody listens
                        self.drop()
            finally:
                self._leave()
        except Exception as problem:
            native = native_of(problem)
            error = problem if native is None else refusal(problem, self._what)
            if native is not None and self._joined_s and native.code() not in _UNHEALING:
                error = loss(problem, self._what)  # of a member that worked: core opens another
        self.tell(self._receiver.ended, error or self._lost or loss(None, self._what))

    def _begin(self) -> None:
        if self._start is not None:
            self._consumer.assign(list(self._start))
            self._ready()
        else:
            self._consumer.subscribe(
                [self._topic], on_assign=self._assigned, on_revoke=self._revoked, on_lost=self._partitions_lost
            )

    def _turn(self) -> None:
        """Obey, then take records if there is room for them, else only serve the client."""
        self._obey()
        if self._settled or self._commit is None:
            self._begin_commit()
        if not self._told_ready:
            self._look_whether_joined()
        room = self._room()
        if room <= 0:
            self._serve()
            return
        if self._aside:
            aside, self._aside = self._aside[:room], self._aside[room:]
            self._take(aside)
            return
        if self._is_paused:
            self._resume()
        first = self._consumer.poll(BUSY_POLL_S if self._out or self._commit else IDLE_POLL_S)
        if first is not None:
            more = min(room, BATCH) - 1
            self._take([first, *self._consumer.consume(more, 0)] if more else [first])

    def _room(self) -> int:
        if self._stopped:
            return 0
        return BATCH if self._window is None else self._window - self._out

    def _serve(self) -> None:
        """Rebalances and answers come by polling only, and a poll may bring a record that there is no room for."""
        self._ordered.wait(STALL_S if self._commit is None else BUSY_POLL_S)
        if self._orders:
            return
        record = self._consumer.poll(0)
        if record is None:
            return
        if not self._stopped:
            self._aside.append(record)
        if not self._is_paused and (self._stopped or len(self._aside) >= ASIDE):
            self._is_paused = True
            self._consumer.pause(self._partitions(self._claims))

    def _resume(self) -> None:
        self._is_paused = False
        self._flow([p for p, claim in self._claims.items() if not claim.is_stalled])

    def _flow(self, numbers: Sequence[int]) -> None:
        """Resume these, and wake the client up by a question to their leaders: librdkafka 2.16 would look again within
        a second only."""
        resumed = self._partitions(numbers)
        self._consumer.resume(resumed)
        if resumed:
            asked = [TopicPartition(p.topic, p.partition, OFFSET_END) for p in resumed]
            with suppress(KafkaException):  # it only wakes
                self._consumer.offsets_for_times(asked, timeout=REACH_S)

    def _obey(self) -> None:
        self._ordered.clear()
        orders = self._orders
        while orders:
            orders.popleft()()

    def _leave(self) -> None:
        """Commit what is settled, leave the group. Blocks while no broker answers; the loop does not wait for it."""
        self._leaving = True
        self._obey()
        if self._lost is not None and not self._dropped:
            self._reach_coordinator()
        elif not self._dropped:
            self._commit_now()
        self._fail_answers(lambda: _unrecorded(self._what))
        self._consumer.close()
        self._forget(list(self._claims.values()))

    def _reach_coordinator(self) -> None:
        """One answer of it, so that it can be told of the leave: else the group waits for a session to end."""
        with suppress(KafkaException):
            self._consumer.committed([TopicPartition(self._topic, 0)], timeout=REACH_S)

    def finish(self) -> None:
        """On the loop, when the thread has ended: answer what was ordered too late."""
        self._obey()
        self._fail_answers(lambda: _unrecorded(self._what))

    def stop(self) -> None:
        """On the thread: take no more."""
        self._stopped = True
        self._aside.clear()

    def leave(self) -> None:
        """On the thread."""
        self._leaving = True

    def drop(self) -> None:
        """On the thread: leave without a last commit."""
        self._leaving = self._dropped = True

    # --- records

    def _take(self, records: Sequence[Record]) -> None:
        good = [record for record in records if record.error() is None or not self._is_error(record)]
        if self._start is not None:
            found = [message_of(record) for record in good]
        else:
            found = self._claimed(good)
            taken = [claim for claim in self._claims.values() if claim.taken]
            for claim in taken:
                self._note(claim)
            if self._window is not None:
                self._out += len(found)
            elif not self._committed_before_hand_out(taken):
                self.tell(self._receiver.lost_some, len(found))
                return
        if found:
            self.tell(self._receiver.arrived, found)

    def _claimed(self, records: Iterable[Record]) -> list[Message[Any]]:
        """What of these is ours and not settled before."""
        found: list[Message[Any]] = []
        claims, settles = self._claims, self._window is not None
        for record in records:
            claim = claims.get(cast(int, record.partition()))
            if claim is None:
                continue
            offset = cast(int, record.offset())
            if offset < claim.end:
                if offset >= claim.ledger.position:
                    self._read_again(claim, offset)
                    break
                claim = self._begun_anew(claim, offset)
                if settles:  # what was taken just now went with the old claim
                    found = [d for d in found if not cast("Delivery[Any]", d).session.lost]
            claim.end = offset + 1
            claim.taken.append(offset)
            if not (claim.done and offset in claim.done):
                found.append(_delivery(record, claim, offset) if settles else message_of(record))
        return found

    def _read_again(self, claim: Claim, offset: int) -> None:
        """From amid what is out: the client's doing, or other messages than before. What is not settled comes again to
        another member, which begins at the commit, without a note that may be of the other ones."""
        at = TopicPartition(self._topic, claim.partition, claim.ledger.position, "")
        with suppress(KafkaException):
            self._consumer.commit(offsets=[at], asynchronous=False)
        self._lose(KafkaError(KafkaError.OFFSET_OUT_OF_RANGE, f"the client reads again from offset {offset}"))

    def _begun_anew(self, claim: Claim, offset: int) -> Claim:
        """The log was cut off behind us, and the client reads it again from `offset`: other messages than before."""
        aside = self._aside  # behind this record, and so the new claim's
        self._partitions_lost(self._consumer, [TopicPartition(self._topic, claim.partition)])
        self._aside = [] if self._stopped else aside
        made = self._claims[claim.partition] = Claim(self._what, claim.partition, offset, set())
        return made

    def _note(self, claim: Claim) -> None:
        """In the ledger: these are out, but for those that an earlier owner settled ahead of its position."""
        delivered, claim.taken = claim.taken, []
        claim.ledger.deliver(delivered)
        if claim.done:
            for offset in claim.done.intersection(delivered):
                claim.done.discard(offset)
                claim.ledger.settle(offset)
        if claim.ledger.span > GAP:
            claim.is_stalled = True
            self._consumer.pause(self._partitions([claim.partition]))

    def _committed_before_hand_out(self, taken: Iterable[Claim]) -> bool:
        """At most once: what cannot be committed may be another member's by now."""
        for claim in taken:
            claim.ledger.settle_all()
        return self._commit_now()

    def _is_error(self, record: Record) -> bool:
        error = record.error()
        assert error is not None, "asked for records with an error only"
        code = error.code()
        if code == KafkaError._FATAL and not self._joined_s and "group.protocol" in self._config:
            raise no_protocol(self._what)
        if code in _UNHEALING:
            if self._is_for_good(code):
                raise refusal(error, self._what)
        elif error.fatal() or code == KafkaError._MAX_POLL_EXCEEDED or code not in TABLE:
            self._lose(error)  # what is not known to heal in this client may do so in the next
        return True

    def _is_for_good(self, code: int) -> bool:
        """Is one of `_UNHEALING` so? A broker that has just come up may not know all topics yet."""
        if code not in UNKNOWN_TOPIC:
            return True
        end = time.monotonic() + UNKNOWN_S
        while not self._leaving and time.monotonic() < end:
            with suppress(KafkaException):
                if self._consumer.list_topics(self._topic, REACH_S).topics[self._topic].error is None:
                    return False
            time.sleep(RETRY_COMMIT_S)
        return not self._leaving

    def _on_error(self, error: KafkaError) -> None:
        """Within a poll. One broker that is down is the client's business, all of them ours."""
        if error.code() in (KafkaError._AUTHENTICATION, KafkaError._SSL) and not self._joined_s:
            self._lost = self._lost or refusal(error, self._what)
        elif error.code() == KafkaError._ALL_BROKERS_DOWN or error.fatal():
            self._lose(error)

    def _left_alone(self, error: KafkaError) -> None:
        """Within a poll."""
        if self._joined_s:
            self._lose(error)

    def _lose(self, error: KafkaError) -> None:
        if self._lost is None:
            if self._joined_s:
                self._lost = loss(error, self._what)
            elif error.code() == KafkaError._FATAL and "group.protocol" in self._config:
                self._lost = no_protocol(self._what)
            else:
                self._lost = refusal(error, self._what)
            self.tell(self._receiver.lose, self._lost)

    # --- settling

    def settle(self, answers: Answers) -> None:
        """On the thread: note settlements; the next commit takes them along."""
        self._settled.append(answers)
        for index, ((claim, offset), disposition) in enumerate(answers.settlements):
            if disposition.kind != "accept":
                answers.failed[index] = no_release(self._what)
                continue
            if claim.is_gone or not claim.ledger.settle(offset):
                answers.failed[index] = _not_ours(self._what)
                continue
            self._out -= 1
            if claim.is_stalled and claim.ledger.span < GAP // 2:
                claim.is_stalled = False
                if not self._is_paused:
                    self._flow([claim.partition])

    def _begin_commit(self) -> None:
        if self._commit is not None or time.monotonic() < self._next_commit_s:
            return
        due = self._due()
        answers, self._settled = self._settled, []
        if not due:
            self._answer(answers)
            return
        self._commit = due, answers
        try:
            self._consumer.commit(offsets=self._notes(due), asynchronous=True)
        except KafkaException as error:
            self._end_commit(error.args[0], ())

    def _due(self) -> list[tuple[Claim, int]]:
        found = []
        for claim in self._claims.values():
            position = claim.ledger.begin_commit()
            if position is not None:
                found.append((claim, position))
        return found

    def _notes(self, due: Iterable[tuple[Claim, int]]) -> list[TopicPartition]:
        return [TopicPartition(self._topic, c.partition, at, self._note_of(c, at)) for c, at in due]

    def _note_of(self, claim: Claim, position: int) -> str:
        """What is settled ahead, what an earlier owner settled and we have not come to included."""
        if self._is_noteless:
            return ""
        ahead = claim.ledger.ahead()
        if claim.done:
            ahead = sorted({*ahead, *(offset for offset in claim.done if offset >= position)})
        return noted(position, ahead)

    def _on_commit(self, error: KafkaError | None, partitions: list[TopicPartition]) -> None:
        """Within a poll. The answer of a commit that was waited for may come here too: it is not the one under way."""
        if self._commit is None:
            return
        if {(p.partition, p.offset) for p in partitions} == {(c.partition, at) for c, at in self._commit[0]}:
            self._end_commit(error, partitions)
            self._begin_commit()

    def _end_commit(self, error: KafkaError | None, partitions: Sequence[TopicPartition]) -> None:
        assert self._commit is not None
        (due, answers), self._commit = self._commit, None
        errors = {p.partition: p.error for p in partitions if p.error is not None}
        gone: list[Claim] = []
        again = False
        for claim, _ in due:
            problem = errors.get(claim.partition, error)
            claim.ledger.end_commit(stored=problem is None)
            if problem is None:
                claim.refused_since_s = None
            elif problem.code() in _LOST:
                gone.append(claim)
            else:
                again = True
                self._refused(claim, problem)
        if gone:
            for waiting in answers:
                waiting.fail(lambda: _not_ours(self._what), gone)
        if gone or again:
            self._next_commit_s = time.monotonic() + RETRY_COMMIT_S
        if again:  # a rebalance, or a coordinator that moves: the same commit is accepted a moment later
            self._settled = [*answers, *self._settled]
        else:
            self._answer(answers)

    def _refused(self, claim: Claim, error: KafkaError) -> None:
        self._learn_of(error)
        now = time.monotonic()
        claim.refused_since_s = None if error.code() in _REBALANCES else claim.refused_since_s or now
        if self._lost is None and error.code() in _UNHEALING and self._is_for_good(error.code()):
            self._lost = refusal(error, self._what)
            self.tell(self._receiver.lose, self._lost)
        elif claim.refused_since_s is not None and now - claim.refused_since_s > REFUSED_S:
            self._lose(error)

    def _learn_of(self, error: KafkaError) -> None:
        """What to do otherwise when a refused commit is made again."""
        if error.code() == KafkaError.OFFSET_METADATA_TOO_LARGE:
            self._is_noteless = True

    def _commit_now(self, ending: Sequence[Claim] | None = None) -> bool:
        """Commit all that is settled and wait for it; was it recorded? If not, those of `ending` (all) are lost."""
        under_way, self._commit = self._commit, None
        for claim, _ in under_way[0] if under_way else ():
            claim.ledger.end_commit(stored=False)
        due = self._due()
        answers = [*(under_way[1] if under_way else ()), *self._settled]
        self._settled = []
        stored = not due or self._stored(due)
        for claim, _ in due:
            claim.ledger.end_commit(stored=stored)
            claim.refused_since_s = None
        if not stored:
            for waiting in answers:
                waiting.fail(lambda: _unrecorded(self._what), ending)
            if ending is not None:
                self._settled = answers  # the others' are still to be committed
                return False
        self._answer(answers)
        return stored

    def _stored(self, due: Sequence[tuple[Claim, int]]) -> bool:
        """Commit and wait; again while a rebalance or a coordinator that moves refuses it, at most `LEAVE_S`."""
        end = time.monotonic() + LEAVE_S
        while self._lost is None:
            try:
                done = self._consumer.commit(offsets=self._notes(due), asynchronous=False) or ()
                error = next((p.error for p in done if p.error is not None), None)
            except KafkaException as problem:
                error = native_of(problem)
            if error is None:
                return True
            if error.code() in (*_LOST, *_UNHEALING) or time.monotonic() > end:
                return False
            self._learn_of(error)
            time.sleep(RETRY_COMMIT_S)
        return False

    def _answer(self, answers: Iterable[Answers]) -> None:
        told = [(a.future, list(a.failed.items())) for a in answers]
        if told:
            self.tell(_resolve, told)

    def _fail_answers(self, error: Callable[[], MessagingError]) -> None:
        answers = [*(self._commit[1] if self._commit else ()), *self._settled]
        self._commit, self._settled = None, []
        for waiting in answers:
            waiting.fail(error)
        self._answer(answers)

    # --- what is ours; the client calls these within a poll, or within close

    def _assigned(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        self._joined_s = self._joined_s or time.monotonic()
        if not partitions:
            return
        try:
            found = consumer.committed(partitions, timeout=LEAVE_S)
        except KafkaException as error:
            self._lose(error.args[0])
            return
        for partition in found:
            position = partition.offset
            done = ahead_of(position, partition.metadata)
            self._claims[partition.partition] = Claim(self._what, partition.partition, position, done)
        at = [TopicPartition(self._topic, p.partition, p.offset if p.offset >= 0 else -2) for p in found]
        consumer.incremental_assign(at)
        (consumer.pause if self._is_paused else consumer.resume)(at)  # the client remembers what an earlier claim had
        self._ready()

    def _revoked(self, _consumer: Consumer, partitions: list[TopicPartition]) -> None:
        """Others wait for these: let their handlers end, commit what they settled, give them up."""
        claims = [self._claims[p.partition] for p in partitions if p.partition in self._claims]
        if not claims:
            return
        if self._window is not None and not self._leaving:
            self._hand_over(claims, self._revoke_timeout_s)
            self._commit_now(claims)
        self._forget(claims)

    def _partitions_lost(self, _consumer: Consumer, partitions: list[TopicPartition]) -> None:
        """Others have these already."""
        claims = [self._claims[p.partition] for p in partitions if p.partition in self._claims]
        for claim in claims:
            claim.session.lost = claim.is_gone = True
        if self._window is not None and not self._leaving:
            self._hand_over(claims, 0.0)
        self._forget(claims)

    def _hand_over(self, claims: Sequence[Claim], deadline_s: float) -> None:
        """Wait for core on the loop, and obey meanwhile: what its handlers settle comes as orders."""
        for claim in claims:
            claim.session.closing = True
        try:
            asked = asyncio.run_coroutine_threadsafe(
                _awaited(self._on_revoke, [c.session for c in claims], deadline_s), self._loop
            )
        except RuntimeError:  # the loop was closed
            return
        end = time.monotonic() + deadline_s + 1.0
        while not asked.done() and time.monotonic() < end:
            self._ordered.wait(0.01)
            self._obey()
        asked.cancel()
        self._obey()

    def _forget(self, claims: Sequence[Claim]) -> None:
        for waiting in [*(self._commit[1] if self._commit else ()), *self._settled]:
            waiting.fail(lambda: _not_ours(self._what), claims)
        for claim in claims:
            claim.session.lost = claim.is_gone = True
            self._out -= claim.ledger.unsettled if self._window is not None else 0
            del self._claims[claim.partition]
            self._aside = [record for record in self._aside if record.partition() != claim.partition]

    def _look_whether_joined(self) -> None:
        """A member without partitions is in as well: classic groups say so, others say nothing."""
        now = time.monotonic()
        since = self._joined_s or ("group.protocol" in self._config and self._joining_since_s)
        if since and now - since > JOIN_S:
            self._ready()

    def _ready(self) -> None:
        self._joined_s = self._joined_s or time.monotonic()
        if not self._told_ready:
            self._told_ready = True
            self.tell(self._receiver.ready)

    def _partitions(self, numbers: Iterable[int]) -> list[TopicPartition]:
        if self._start is not None:
            return [TopicPartition(self._topic, p.partition) for p in self._start]
        return [TopicPartition(self._topic, number) for number in numbers]


class Receiver(ReceiverContract):
    """Deliveries of one topic to one member of a group, or messages of a Signal. Runs on the loop."""

    def __init__(self, what: str, *, limit: int | None) -> None:
        self._what = what
        self._settles = limit is None
        self._buffer: deque[Any] = deque(maxlen=limit)
        self._waiter: asyncio.Future[None] | None = None
        self._opened: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._gone: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._error: BaseException | None = None
        self.member: Member

    async def open(self, member: Member, wait_s: float) -> None:
        """Return when the group has let it in and it has its share. Raises ConnectError, AuthError, CapabilityError."""
        self.member = member
        member.thread.start()
        try:
            async with asyncio.timeout(wait_s):
                await self._opened
        except TimeoutError:
            member.order(member.drop)
            raise ConnectError(f"{self._what}: the group did not let it in within {wait_s:g} s") from None
        except BaseException:
            member.order(member.drop)
            raise

    async def receive_batch(self, max_deliveries: int) -> list[Delivery[Any]] | list[Message[Any]]:
        while True:
            if self._error is not None:
                raise self._error
            if self._buffer:
                found = self._taken(max_deliveries)
                if found:
                    return found
                continue
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter

    def _taken(self, most: int) -> list[Any]:
        buffer = self._buffer
        found = [buffer.popleft() for _ in range(min(most, len(buffer)))]
        if self._settles:  # what was revoked while it lay here is another member's
            return [d for d in found if not (d.session.closing or d.session.lost)]
        return found

    def settle_batch(
        self, settlements: Sequence[tuple[Any, Disposition]]
    ) -> asyncio.Future[Sequence[tuple[int, MessagingError]]] | None:
        if self._error is not None:
            raise ConnectionLost(str(self._error))
        future: asyncio.Future[Sequence[tuple[int, MessagingError]]] = asyncio.get_running_loop().create_future()
        self.member.order(partial(self.member.settle, Answers(settlements, future)))
        return future

    async def stop(self) -> None:
        self._buffer.clear()
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if self._error is None:
            self.member.order(self.member.stop)
            self.member.order(partial(self.member.tell, _resolve, [(done, None)]))
            await asyncio.wait([done, self._gone], return_when=asyncio.FIRST_COMPLETED)
        self._buffer.clear()

    async def close(self) -> None:
        self._error = self._error or loss(None, self._what)
        self._wake()
        try:
            self.member.order(self.member.leave)
            await asyncio.shield(self._gone)
        except asyncio.CancelledError:
            self.member.order(self.member.drop)
            raise

    # called by the thread's hop

    def arrived(self, found: Sequence[Message[Any]]) -> None:
        if self._buffer.maxlen is not None:
            self.dropped += max(0, len(self._buffer) + len(found) - self._buffer.maxlen)
        self._buffer.extend(found)
        self._wake()

    def lost_some(self, count: int) -> None:
        self.dropped += count

    def ready(self) -> None:
        if not self._opened.done():
            self._opened.set_result(None)

    def lose(self, error: BaseException) -> None:
        """Nothing more comes, and nothing can be settled."""
        self._error = self._error or error
        if not self._opened.done():
            self._opened.set_exception(error)
        self._wake()

    def ended(self, error: BaseException) -> None:
        self.lose(error)
        self.member.finish()
        if not self._gone.done():
            self._gone.set_result(None)

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


def noted(position: int, ahead: Sequence[int]) -> str:
    """A commit's metadata: a bit per offset from `position` on, set where it is settled. Empty if none is."""
    if not ahead:
        return ""
    bits = bytearray(min((ahead[-1] - position) // 8 + 1, 3000))
    for offset in ahead:
        byte, bit = divmod(offset - position, 8)
        if byte < len(bits):  # beyond: it is delivered once more after a crash
            bits[byte] |= 1 << bit
    return _VERSION + b64encode(bits).decode()


def ahead_of(position: int, metadata: str | None) -> set[int]:
    """The offsets in `noted`'s text; none where another program wrote it."""
    if not metadata or not metadata.startswith(_VERSION):
        return set()
    try:
        bits = b64decode(metadata[len(_VERSION) :], validate=True)
    except ValueError:
        return set()
    return {position + 8 * n + bit for n, byte in enumerate(bits) if byte for bit in range(8) if byte >> bit & 1}


def _delivery(record: Record, claim: Claim, offset: int) -> Delivery[Any]:
    return Delivery(
        record.value() or b"",
        None,
        _key(record),
        partial(meta_of, record),
        receipt=(claim, offset),
        session=claim.session,
        native=record,
    )


def message_of(record: Record) -> Message[Any]:
    return Message(record.value() or b"", None, _key(record), partial(meta_of, record))


def _key(record: Record) -> str | None:
    key = record.key()
    return None if key is None else key.decode("utf-8", "replace")


def meta_of(record: Record) -> Meta:
    """What arrived beside body and key. The id is the publisher's; a foreign record's is its place, which stays the
    same when it comes again."""
    headers: dict[str, str] = {}
    ours: dict[str, str] = {}
    for name, value in _headers(record):
        raw = value if isinstance(value, bytes) else (value or "").encode()
        (ours if name in OURS else headers)[name] = raw.decode("utf-8", "replace")
    kind, at_ms = record.timestamp()
    id = ours.get(ID) or f"{record.topic()}/{record.partition()}/{record.offset()}"
    return Meta(headers, ours.get(CONTENT_TYPE), ours.get(CORRELATION), at_ms / 1000 if kind else None, id)


def _headers(record: Record) -> list[tuple[str, str | bytes | None]]:
    """A foreign record may have a header whose name is not UTF-8: confluent-kafka 2.16.1 raises for it, and crashes the
    process when it is asked again. Such a record has none."""
    try:
        return cast("list[tuple[str, str | bytes | None]]", record.headers() or [])  # never a dict on arrival
    except SystemError:
        record.set_headers([])
        return []


def _resolve(told: Iterable[tuple[asyncio.Future[Any], object]]) -> None:
    for future, result in told:
        if not future.done():
            future.set_result(result)


async def _awaited(on_revoke: OnRevoke, sessions: Sequence[Session], deadline_s: float) -> None:
    await on_revoke(sessions, deadline_s)


def _not_ours(what: str) -> SettleLost:
    return SettleLost(f"{what}: the partition went to another member of the group")


def _unrecorded(what: str) -> SettleLost:
    return SettleLost(f"{what}: the broker did not record the settlement; the message comes again")
