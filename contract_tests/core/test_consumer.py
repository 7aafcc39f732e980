"""Laws of the way of a delivery: window, lanes, retry that holds, dead letter, lost connections, and the end."""

from __future__ import annotations

import asyncio
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from _drive import drive, eventually, fresh, turns
from _scripted import Bench, LeasedScriptedReceiver, ScriptedReceiver, memory
from hypothesis import given
from hypothesis import strategies as st

from messaging_sdk import (
    AlreadySettled,
    Bus,
    CapabilityError,
    Closed,
    ConnectError,
    ConnectionLost,
    Delivery,
    MessagingError,
    Queue,
    Reject,
    Retry,
    RetryLater,
    SettleLost,
    Signal,
    UsageError,
)
from messaging_sdk.capabilities import Capabilities
from messaging_sdk.consumer import Consumer
from messaging_sdk.model import Message, Meta

ORDERED = Queue("work", bytes, key=lambda body: body.decode(), ordered=True)


def law(body: Callable[[], Awaitable[None]]) -> None:
    drive(body())  # type: ignore[arg-type]


async def succeed(message: Message[Any]) -> None:
    """A handler."""


class Held:
    """A handler that stays in each message until it is let go."""

    def __init__(self) -> None:
        self.entered: list[str] = []
        self.gates: dict[str, asyncio.Event] = defaultdict(asyncio.Event)

    async def __call__(self, message: Message[Any]) -> None:
        self.entered.append(message.id)
        await self.gates[message.id].wait()


def refused(settlements: object) -> asyncio.Future[Any]:
    """A receiver's answer: the first of these was not recorded."""
    future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
    future.set_result([(0, SettleLost("not yours"))])
    return future


async def unanswered_ack(
    bench: Bench, is_decoded: bool, at_once: bool
) -> tuple[asyncio.Task[None], asyncio.Future[Any]]:
    """An ack of m1 in pull style that is under way, and the receiver's answer to come."""
    await bench.consumer.start()
    pending: list[asyncio.Future[Any]] = []

    def unanswered(settlements: object) -> asyncio.Future[Any]:
        pending.append(asyncio.get_running_loop().create_future())
        return pending[0]

    bench.receiver.answers = unanswered
    bench.receiver.put(arrival(bench.receiver, is_decoded))
    await eventually(lambda: bool(bench.consumer.ready))
    found = bench.consumer.next()
    assert isinstance(found, Delivery)
    acking = asyncio.create_task(bench.consumer.ack(found) if at_once else bench.consumer.ack_all([found]))
    await eventually(lambda: bool(pending))
    return acking, pending[0]


def arrival(receiver: ScriptedReceiver, is_decoded: bool) -> Delivery[Any]:
    """One delivery of m1, its id at hand or in its meta."""
    id = "m1" if is_decoded else None
    return Delivery(b"", id, None, lambda: Meta(id="m1"), receipt="m1", session=receiver.session)


# --- settling


def test_a_handler_that_returns_settles() -> None:
    async def body() -> None:
        bench = Bench()
        receiver = await bench.start(succeed)
        receiver.give("m1")
        await eventually(lambda: receiver.settled == [("m1", "accept")])
        await bench.stop()
        assert receiver.settled == [("m1", "accept")]

    law(body)


def test_nothing_is_settled_before_its_handler_has_returned() -> None:
    async def body() -> None:
        held, bench = Held(), Bench()
        receiver = await bench.start(held)
        receiver.give("m1")
        await eventually(lambda: held.entered)
        await turns()
        assert receiver.settled == []
        held.gates["m1"].set()
        await eventually(lambda: receiver.settled)
        await bench.stop()

    law(body)


def test_settlements_of_one_burst_go_out_as_one_batch() -> None:
    async def body() -> None:
        bench, batches = Bench(), []
        receiver = await bench.start(succeed)
        receiver.answers = lambda settlements: batches.append(len(settlements))
        receiver.put(*(Delivery(b"", f"m{n}", receipt=f"m{n}", session=receiver.session) for n in range(50)))
        await eventually(lambda: len(receiver.settled) == 50)
        assert batches == [50]
        await bench.stop()

    law(body)


def test_settle_before_settles_first_and_runs_once() -> None:
    async def body() -> None:
        bench = Bench()
        seen: list[tuple[str, int]] = []

        async def fail(message: Message[Any]) -> None:
            seen.append((message.id, len(bench.receiver.settled)))
            raise ValueError("no")

        receiver = await bench.start(fail, settle_before=True)
        receiver.give("m1")
        await eventually(lambda: bench.consumer.stats.dropped == 1)
        assert seen == [("m1", 1)]
        assert bench.buried == []
        await bench.stop()

    law(body)


def test_a_delivery_whose_settlement_was_refused_first_is_not_run_under_settle_before() -> None:
    async def body() -> None:
        bench, seen = Bench(), []

        async def note(message: Message[Any]) -> None:
            seen.append(message.id)

        receiver = await bench.start(note, settle_before=True)

        def refuse(settlements: Any) -> Any:
            answer = asyncio.get_running_loop().create_future()
            answer.set_result([(0, SettleLost("someone else has it"))])
            return answer

        receiver.answers = refuse
        receiver.give("m1")
        await eventually(lambda: receiver.settled)
        await turns()
        assert seen == []
        await bench.stop()

    law(body)


# --- lanes


def test_of_an_ordered_key_the_next_waits_until_the_former_is_settled() -> None:
    async def body() -> None:
        held, bench = Held(), Bench(ORDERED)
        receiver = await bench.start(held, concurrency=4)
        for id, key in (("a1", "a"), ("a2", "a"), ("b1", "b")):
            receiver.give(id, key=key)
        await eventually(lambda: len(held.entered) == 2)
        await turns()
        assert held.entered == ["a1", "b1"]
        held.gates["a1"].set()
        await eventually(lambda: "a2" in held.entered)
        held.gates["a2"].set()
        held.gates["b1"].set()
        await bench.stop()

    law(body)


def test_a_retry_holds_the_lane_of_its_key_and_no_other() -> None:
    async def body() -> None:
        runs: list[tuple[str, int]] = []

        async def fail_a1(message: Message[Any]) -> None:
            assert isinstance(message, Delivery)
            runs.append((message.id, message.attempt))
            if message.id == "a1" and message.attempt < 3:
                raise ConnectionError("down")

        bench = Bench(ORDERED, retry=Retry(5, 0.02, jitter=0))
        receiver = await bench.start(fail_a1, concurrency=4)
        for id, key in (("a1", "a"), ("a2", "a"), ("b1", "b")):
            receiver.give(id, key=key)
        await eventually(lambda: len(receiver.settled) == 3)
        assert [r for r in runs if r[0] != "b1"] == [("a1", 1), ("a1", 2), ("a1", 3), ("a2", 1)]
        assert runs.index(("b1", 1)) < runs.index(("a1", 2))
        await bench.stop()

    law(body)


KEYED = st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 2)), min_size=1, max_size=30)


@given(KEYED, st.integers(1, 6), st.integers(1, 7))
def test_per_key_one_runs_at_a_time_in_order_and_none_is_lost(
    arrivals: list[tuple[str, int]], concurrency: int, burst: int
) -> None:
    """`arrivals` are (key, failures before success); they come in bursts; handlers suspend at random points."""
    running: Counter[str] = Counter()
    done: dict[str, list[str]] = defaultdict(list)
    failures = {f"m{n}": fails for n, (_, fails) in enumerate(arrivals)}

    async def handle(message: Message[Any]) -> None:
        assert isinstance(message, Delivery) and message.key is not None
        running[message.key] += 1
        try:
            assert running[message.key] == 1, "two of one key at once"
            await turns(int(message.id[1:]) % 4)
            if message.attempt <= failures[message.id]:
                raise ConnectionError("again")
            done[message.key].append(message.id)
        finally:
            running[message.key] -= 1

    async def body() -> None:
        bench = Bench(ORDERED, retry=Retry(5, 0, jitter=0))
        receiver = await bench.start(handle, concurrency=concurrency)
        made = [
            Delivery(b"x", f"m{n}", key, receipt=f"m{n}", session=receiver.session)
            for n, (key, _) in enumerate(arrivals)
        ]
        for start in range(0, len(made), burst):
            receiver.put(*made[start : start + burst])
            await turns(3)
        await eventually(lambda: len(receiver.settled) == len(made))
        assert bench.consumer.idle
        await bench.stop()
        for key in "abc":
            assert done[key] == [f"m{n}" for n, (k, _) in enumerate(arrivals) if k == key]
        assert bench.stopped_by == [] and bench.buried == []

    law(body)


@given(st.lists(st.sampled_from("ab"), min_size=1, max_size=12), st.integers(0, 12), st.integers(0, 12))
def test_a_lost_connection_neither_loses_a_message_nor_breaks_the_order_of_a_key(
    keys: list[str], cut_after_runs: int, yields: int
) -> None:
    """The broker gives again what was not settled, in order. Each runs at least once; first runs are in order."""
    first_runs: dict[str, list[str]] = defaultdict(list)
    runs = 0

    async def body() -> None:
        nonlocal runs
        bench = Bench(ORDERED)

        async def handle(message: Message[Any]) -> None:
            nonlocal runs
            runs += 1
            if message.id not in first_runs[message.key or ""]:
                first_runs[message.key or ""].append(message.id)
            await turns(yields)

        def deliver(receiver: ScriptedReceiver, ids: list[int]) -> None:
            made = [Delivery(b"x", f"m{n}", keys[n], receipt=f"m{n}", session=receiver.session) for n in ids]
            if made:
                receiver.put(*made)

        receiver = await bench.start(handle, concurrency=3)
        everything = list(range(len(keys)))
        deliver(receiver, everything)
        await eventually(lambda: runs >= min(cut_after_runs, len(keys)))
        recorded = {receipt for receipt, _ in receiver.settled}
        receiver.break_with(ConnectionLost("cut"))
        await eventually(lambda: len(bench.receivers) == 2)
        recorded |= {receipt for receipt, _ in receiver.settled}
        rest = [n for n in everything if f"m{n}" not in recorded]
        deliver(bench.receiver, rest)
        await eventually(lambda: {r for r, _ in bench.receiver.settled} == {f"m{n}" for n in rest})
        assert bench.consumer.idle
        await bench.stop()
        for key in "ab":
            assert first_runs[key] == [f"m{n}" for n in everything if keys[n] == key]

    law(body)


# --- retry, dead letters, on_failure


def test_attempts_count_handler_runs_and_then_the_message_is_dead() -> None:
    async def body() -> None:
        attempts: list[int] = []

        async def fail(message: Message[Any]) -> None:
            assert isinstance(message, Delivery)
            attempts.append(message.attempt)
            raise ValueError("no")

        bench = Bench(retry=Retry(3, 0.001))
        receiver = await bench.start(fail)
        receiver.give("m1")
        await eventually(lambda: receiver.settled == [("m1", "accept")])
        assert attempts == [1, 2, 3]
        assert bench.buried == [("m1", "attempts", 3)]
        await bench.stop()

    law(body)


def test_reject_goes_to_the_dead_letters_without_another_run() -> None:
    async def body() -> None:
        runs: list[str] = []

        async def reject(message: Message[Any]) -> None:
            runs.append(message.id)
            raise Reject("never")

        bench = Bench()
        receiver = await bench.start(reject)
        receiver.give("m1")
        await eventually(lambda: receiver.settled)
        assert (runs, bench.buried) == (["m1"], [("m1", "rejected", 1)])
        await bench.stop()

    law(body)


def test_retry_later_decides_its_own_delay() -> None:
    async def body() -> None:
        runs: list[float] = []
        loop = asyncio.get_running_loop()

        async def later(message: Message[Any]) -> None:
            runs.append(loop.time())
            if len(runs) == 1:
                raise RetryLater(0.05)

        bench = Bench(retry=Retry(5, "1h"))
        receiver = await bench.start(later)
        receiver.give("m1")
        await eventually(lambda: receiver.settled)
        assert runs[1] - runs[0] >= 0.049
        await bench.stop()

    law(body)


def test_an_undecodable_body_never_reaches_the_handler() -> None:
    async def body() -> None:
        runs: list[str] = []

        async def note(message: Message[Any]) -> None:
            runs.append(message.id)

        bench = Bench(Queue("work", int))
        receiver = await bench.start(note)
        receiver.give("bad", b"{")
        receiver.give("good", b"7")
        await eventually(lambda: len(receiver.settled) == 2)
        assert (runs, bench.buried) == (["good"], [("bad", "undecodable", 1)])
        await bench.stop()

    law(body)


def test_a_message_delivered_too_often_goes_to_the_dead_letters_unrun() -> None:
    async def body() -> None:
        runs: list[str] = []

        async def note(message: Message[Any]) -> None:
            runs.append(message.id)

        bench = Bench(max_deliveries=3)
        receiver = await bench.start(note)
        receiver.give("third", deliveries=3)
        receiver.give("fourth", deliveries=4)
        await eventually(lambda: len(receiver.settled) == 2)
        assert (runs, bench.buried) == (["third"], [("fourth", "deliveries", 1)])
        await bench.stop()

    law(body)


def test_a_message_is_held_while_its_dead_letter_cannot_be_stored() -> None:
    async def body() -> None:
        async def reject(message: Message[Any]) -> None:
            raise Reject("never")

        bench = Bench()
        bench.bury_error = MessagingError("full")
        receiver = await bench.start(reject)
        receiver.give("m1")
        await eventually(lambda: bench.bury_tries >= 2)
        assert receiver.settled == []
        bench.bury_error = None
        await eventually(lambda: receiver.settled == [("m1", "accept")])
        assert bench.buried == [("m1", "rejected", 1)]
        await bench.stop()

    law(body)


def test_the_lane_of_a_key_stays_taken_while_its_dead_letter_cannot_be_stored() -> None:
    async def body() -> None:
        runs: list[str] = []

        async def reject_first(message: Message[Any]) -> None:
            runs.append(message.id)
            if message.id == "a1":
                raise Reject("never")

        bench = Bench(ORDERED)
        bench.bury_error = MessagingError("full")
        receiver = await bench.start(reject_first, concurrency=2)
        receiver.give("a1", key="a")
        receiver.give("a2", key="a")
        await eventually(lambda: bench.bury_tries >= 2)
        assert runs == ["a1"]
        bench.bury_error = None
        await eventually(lambda: len(receiver.settled) == 2)
        assert runs == ["a1", "a2"]
        await bench.stop()

    law(body)


def test_on_failure_drop_settles_and_counts() -> None:
    async def body() -> None:
        async def reject(message: Message[Any]) -> None:
            raise Reject("never")

        bench = Bench(on_failure="drop")
        receiver = await bench.start(reject)
        receiver.give("m1")
        await eventually(lambda: receiver.settled == [("m1", "accept")])
        assert bench.consumer.stats.dropped == 1 and bench.buried == []
        await bench.stop()

    law(body)


def test_on_failure_stop_stops_the_consumer_and_leaves_the_message_unsettled() -> None:
    async def body() -> None:
        async def reject(message: Message[Any]) -> None:
            raise Reject("never")

        bench = Bench(ORDERED, on_failure="stop")
        receiver = await bench.start(reject)
        receiver.give("m1", key="a")
        await eventually(lambda: bench.stopped_by)
        assert "m1" in str(bench.stopped_by[0])
        await bench.stop()
        assert receiver.settled == []

    law(body)


def test_a_handler_over_its_time_limit_is_cancelled_and_runs_again() -> None:
    async def body() -> None:
        attempts: list[int] = []

        async def hang_once(message: Message[Any]) -> None:
            assert isinstance(message, Delivery)
            attempts.append(message.attempt)
            if message.attempt == 1:
                await asyncio.Event().wait()

        bench = Bench()
        receiver = await bench.start(hang_once, timeout_s=0.02)
        receiver.give("m1")
        await eventually(lambda: receiver.settled)
        assert attempts == [1, 2]
        await bench.stop()

    law(body)


def test_a_handler_that_cancels_itself_has_failed_and_its_worker_lives() -> None:
    async def body() -> None:
        async def cancel_once(message: Message[Any]) -> None:
            assert isinstance(message, Delivery)
            if message.attempt == 1:
                raise asyncio.CancelledError

        bench = Bench()
        receiver = await bench.start(cancel_once)
        receiver.give("m1")
        await eventually(lambda: receiver.settled)
        assert bench.consumer.stats.failed == 1
        await bench.stop()

    law(body)


# --- a signal has nothing to settle


def test_a_failed_or_undecodable_signal_is_a_counted_drop() -> None:
    async def body() -> None:
        async def fail(message: Message[Any]) -> None:
            raise ValueError("no")

        bench = Bench(Signal("pulse", int), capabilities=Capabilities())
        receiver = await bench.start(fail)
        receiver.give("bad", b"{")
        receiver.give("good", b"7")
        await eventually(lambda: bench.consumer.stats.dropped == 2)
        assert receiver.settled == [] and bench.buried == []
        await bench.stop()

    law(body)


def test_signals_received_before_a_lost_connection_are_still_handled() -> None:
    async def body() -> None:
        held, bench = Held(), Bench(Signal("pulse", bytes), capabilities=Capabilities())
        receiver = await bench.start(held)
        for id in ("m1", "m2"):
            receiver.give(id)
        await eventually(lambda: held.entered)
        receiver.break_with(ConnectionLost("cut"))
        await eventually(lambda: len(bench.receivers) == 2)
        for id in ("m1", "m2"):
            held.gates[id].set()
        await eventually(lambda: held.entered == ["m1", "m2"])
        await bench.stop()

    law(body)


# --- a lost connection


def test_deliveries_of_a_lost_connection_are_not_started_and_not_settled() -> None:
    async def body() -> None:
        held, bench = Held(), Bench()
        receiver = await bench.start(held)
        receiver.give("m1")
        receiver.give("m2")
        await eventually(lambda: held.entered == ["m1"])
        receiver.break_with(ConnectionLost("cut"))
        await eventually(lambda: len(bench.receivers) == 2)
        assert receiver.session.lost
        held.gates["m1"].set()
        bench.receiver.give("fresh")
        await eventually(lambda: "fresh" in held.entered)
        assert held.entered == ["m1", "fresh"]
        assert receiver.settled == []
        held.gates["fresh"].set()
        await bench.stop()

    law(body)


def test_a_message_whose_settlement_was_lost_is_settled_again_without_a_second_run() -> None:
    async def body() -> None:
        held, bench = Held(), Bench()
        receiver = await bench.start(held)
        receiver.give("m1")
        await eventually(lambda: held.entered)
        receiver.break_with(ConnectionLost("cut"))
        await eventually(lambda: len(bench.receivers) == 2)
        held.gates["m1"].set()
        await eventually(lambda: bench.consumer.idle)
        bench.receiver.give("m1")
        await eventually(lambda: bench.receiver.settled == [("m1", "accept")])
        assert held.entered == ["m1"]
        assert bench.consumer.stats.repeats_suppressed == 1
        await bench.stop()

    law(body)


@pytest.mark.parametrize("is_decoded", [True, False])
@pytest.mark.parametrize("answer", ["none", "late", "failed", "recorded"])
def test_the_last_ones_that_were_settled_are_known_when_they_come_again(answer: str, is_decoded: bool) -> None:
    """After a lost connection, whatever became of their settlements."""

    def answered(settlements: object) -> asyncio.Future[Any] | None:
        if answer == "none":
            return None
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        if answer != "late":
            future.set_result([(0, SettleLost("not yours"))] if answer == "failed" else [])
        return future

    async def body() -> None:
        held, bench = Held(), Bench()
        held.gates["m1"].set()
        receiver = await bench.start(held)
        receiver.answers = answered
        receiver.put(arrival(receiver, is_decoded))
        await eventually(lambda: receiver.settled)
        await turns()
        receiver.break_with(ConnectionLost("cut"))
        await eventually(lambda: len(bench.receivers) == 2)
        bench.receiver.put(arrival(bench.receiver, is_decoded))
        await eventually(lambda: bench.receiver.settled == [("m1", "accept")])
        assert held.entered == ["m1"]
        await bench.stop()

    law(body)


@pytest.mark.parametrize("is_decoded", [True, False])
def test_what_the_broker_did_not_record_as_settled_does_not_run_twice(is_decoded: bool) -> None:
    """On the connection it was settled on: a partition that was taken away and came back, a lease that ran out."""

    async def body() -> None:
        held, bench = Held(), Bench()
        held.gates["m1"].set()
        receiver = await bench.start(held)
        receiver.answers = refused
        receiver.put(arrival(receiver, is_decoded))
        await eventually(lambda: receiver.settled)
        await turns()
        receiver.answers = lambda settlements: None
        receiver.put(arrival(receiver, is_decoded))
        await eventually(lambda: len(receiver.settled) == 2)
        receiver.put(arrival(receiver, is_decoded))  # it is expected once; the next is another message of this id
        await eventually(lambda: len(receiver.settled) == 3)
        assert held.entered == ["m1", "m1"]
        assert bench.consumer.stats.repeats_suppressed == 1
        await bench.stop()

    law(body)


def test_what_was_not_recorded_is_expected_for_a_while_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """However often something else is not recorded meanwhile."""
    monkeypatch.setattr("messaging_sdk.consumer.REPEATS_S", 0.1)

    async def body() -> None:
        bench, ran = Bench(window=1), Counter[str]()

        async def count(message: Message[Any]) -> None:
            ran[message.id] += 1

        receiver = await bench.start(count)
        receiver.answers = refused
        receiver.give("m1")
        await eventually(lambda: ran["m1"] == 1)
        await asyncio.sleep(0.05)
        receiver.give("m2")
        await asyncio.sleep(0.07)
        receiver.give("m1")  # published again, much later
        await eventually(lambda: len(receiver.settled) == 3)
        assert ran["m1"] == 2
        await bench.stop()

    law(body)


@pytest.mark.parametrize("on_failure", ["dead_letter", "drop"])
def test_what_was_given_up_runs_when_it_is_published_again(on_failure: str) -> None:
    """An operator takes it out of the dead letters: another SettleLost meanwhile is no reason to swallow it."""

    async def body() -> None:
        bench, ran = Bench(retry=Retry(1), on_failure=on_failure), Counter[str]()

        async def fail(message: Message[Any]) -> None:
            ran[message.id] += 1
            if message.id == "m1":
                raise ValueError("no")

        receiver = await bench.start(fail)
        receiver.give("m1")
        await eventually(lambda: receiver.settled == [("m1", "accept")])
        receiver.answers = refused
        receiver.give("m2")
        await eventually(lambda: len(receiver.settled) == 2)
        await turns()
        receiver.give("m1")
        await eventually(lambda: len(receiver.settled) == 3)
        assert ran["m1"] == 2
        await bench.stop()

    law(body)


@pytest.mark.parametrize("at_once", [True, False])
def test_a_message_whose_ack_was_cancelled_comes_again_if_it_was_not_recorded(at_once: bool) -> None:
    async def body() -> None:
        bench = Bench()
        acking, answer = await unanswered_ack(bench, is_decoded=True, at_once=at_once)
        acking.cancel()
        await asyncio.wait([acking])
        answer.set_result([(0, SettleLost("not yours"))])
        bench.receiver.give("m1")
        await eventually(lambda: bool(bench.consumer.ready))
        again = bench.consumer.next()
        assert again is not None and again.id == "m1"
        await bench.consumer.close(1.0)

    law(body)


def test_what_was_settled_before_its_handler_runs_once_if_the_connection_is_lost_right_then(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Recorded, by a broker that answers nothing: before the worker has heard of it."""

    async def body() -> None:
        held, bench = Held(), Bench()
        held.gates["m1"].set()
        receiver = await bench.start(held, settle_before=True)

        flush = Consumer._flush

        def flush_and_lose(consumer: Consumer) -> None:
            flush(consumer)
            if receiver.settled:
                monkeypatch.undo()
                consumer._lose_connection(ConnectionLost("cut"))
                receiver.break_with(ConnectionLost("cut"))

        monkeypatch.setattr(Consumer, "_flush", flush_and_lose)
        receiver.give("m1")
        await eventually(lambda: len(bench.receivers) == 2)
        bench.receiver.give("m1")
        await eventually(lambda: bench.receiver.settled == [("m1", "accept")])
        await turns()
        assert held.entered == ["m1"]
        await bench.stop()

    law(body)


@pytest.mark.parametrize("is_decoded", [True, False])
@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize("answer", ["failed", "lost first", "lost and never"])
def test_what_an_ack_said_to_come_again_comes_again(answer: str, at_once: bool, is_decoded: bool) -> None:
    """Whoever was told SettleLost has undone its work: the message is yielded again, whichever is seen first."""

    async def body() -> None:
        bench = Bench()
        acking, told = await unanswered_ack(bench, is_decoded, at_once)
        if answer == "failed":
            told.set_result([(0, SettleLost("not yours"))])
        else:
            bench.receiver.break_with(ConnectionLost("cut"))
            await eventually(lambda: len(bench.receivers) == 2)
        bench.receiver.put(arrival(bench.receiver, is_decoded))
        await eventually(lambda: bool(bench.consumer.ready))
        if answer == "lost first":
            told.set_result([(0, SettleLost("cut"))])
        elif answer == "lost and never":
            told.cancel()
        with pytest.raises(SettleLost):
            await acking
        again = bench.consumer.next()
        assert again is not None and again.id == "m1"
        assert bench.consumer.stats.repeats_suppressed == 0
        await bench.consumer.close(1.0)

    law(body)


@pytest.mark.parametrize("is_decoded", [True, False])
def test_what_was_settled_before_its_handler_and_was_lost_runs_when_it_comes_again(is_decoded: bool) -> None:
    async def body() -> None:
        held, bench = Held(), Bench()
        held.gates["m1"].set()
        receiver = await bench.start(held, settle_before=True)
        receiver.answers = lambda settlements: asyncio.get_running_loop().create_future()  # never answered
        receiver.put(arrival(receiver, is_decoded))
        await eventually(lambda: receiver.settled)
        receiver.break_with(ConnectionLost("cut"))
        for answer in list(bench.consumer._answers):
            answer.cancel()
        await eventually(lambda: len(bench.receivers) == 2)
        await turns()
        bench.receiver.put(arrival(bench.receiver, is_decoded))
        await eventually(lambda: held.entered == ["m1"])
        await bench.stop()

    law(body)


def test_an_id_that_the_adapter_left_to_the_rest_is_decoded_on_first_use() -> None:
    decoded: list[str] = []

    def meta() -> Meta:
        decoded.append("m1")
        return Meta(id="m1")

    made = Message[bytes](b"", None, None, meta)
    assert decoded == []
    assert (made.id, made.id, made.headers) == ("m1", "m1", {})
    assert decoded == ["m1"]


def test_an_id_that_is_published_again_much_later_is_another_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("messaging_sdk.consumer.REPEATS_S", 0.05)

    async def body() -> None:
        held, bench = Held(), Bench()
        receiver = await bench.start(held)
        receiver.give("m1")
        await eventually(lambda: held.entered)
        receiver.break_with(ConnectionLost("cut"))
        await eventually(lambda: len(bench.receivers) == 2)
        held.gates["m1"].set()
        await eventually(lambda: bench.consumer.idle)
        await asyncio.sleep(0.1)
        bench.receiver.give("m1")
        await eventually(lambda: bench.receiver.settled == [("m1", "accept")])
        assert held.entered == ["m1", "m1"]
        assert bench.consumer.stats.repeats_suppressed == 0
        await bench.stop()

    law(body)


def test_a_repeat_that_came_in_time_may_wait_behind_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("messaging_sdk.consumer.REPEATS_S", 0.1)

    async def body() -> None:
        held, bench = Held(), Bench()
        receiver = await bench.start(held)
        held.gates["m1"].set()
        receiver.give("m1")
        await eventually(lambda: receiver.settled)
        receiver.break_with(ConnectionLost("cut"))
        await eventually(lambda: len(bench.receivers) == 2)
        bench.receiver.give("m2")
        bench.receiver.give("m1")
        await asyncio.sleep(0.2)  # m1 waits behind m2, whose handler takes its time
        held.gates["m2"].set()
        await eventually(lambda: ("m1", "accept") in bench.receiver.settled)
        assert held.entered == ["m1", "m2"]
        await bench.stop()

    law(body)


def test_repeats_are_expected_from_the_moment_they_can_come(monkeypatch: pytest.MonkeyPatch) -> None:
    """An outage that is longer than repeats are expected for does not make them forgotten."""
    monkeypatch.setattr("messaging_sdk.consumer.REPEATS_S", 0.1)

    async def body() -> None:
        held, bench = Held(), Bench()
        receiver = await bench.start(held)
        held.gates["m1"].set()
        receiver.give("m1")
        await eventually(lambda: receiver.settled)
        bench.refusals.extend(ConnectError("still down") for _ in range(3))
        receiver.break_with(ConnectionLost("cut"))
        bench.consumer._repeats = dict.fromkeys(bench.consumer._repeats, 0.0)  # as if the outage had lasted
        await eventually(lambda: len(bench.receivers) == 2)
        bench.receiver.give("m1")
        await eventually(lambda: bench.receiver.settled == [("m1", "accept")])
        assert held.entered == ["m1"]
        await bench.stop()

    law(body)


def test_a_message_settled_just_before_the_loss_is_suppressed_once_and_only_once() -> None:
    async def body() -> None:
        runs: list[str] = []

        async def note(message: Message[Any]) -> None:
            runs.append(message.id)

        bench = Bench()
        receiver = await bench.start(note)
        receiver.give("m1")
        await eventually(lambda: receiver.settled)
        receiver.break_with(ConnectionLost("cut"))
        await eventually(lambda: len(bench.receivers) == 2)
        bench.receiver.give("m1")
        await eventually(lambda: len(bench.receiver.settled) == 1)
        bench.receiver.give("m1")  # published again with the same id: another message
        await eventually(lambda: len(bench.receiver.settled) == 2)
        assert runs == ["m1", "m1"]
        await bench.stop()

    law(body)


def test_an_equal_id_on_a_healthy_connection_is_never_suppressed() -> None:
    async def body() -> None:
        runs: list[str] = []

        async def note(message: Message[Any]) -> None:
            runs.append(message.id)

        bench = Bench()
        receiver = await bench.start(note)
        for _ in range(2):
            receiver.give("m1")
        await eventually(lambda: len(receiver.settled) == 2)
        assert runs == ["m1", "m1"]
        await bench.stop()

    law(body)


def test_a_key_whose_handler_still_runs_stays_taken_over_a_lost_connection() -> None:
    async def body() -> None:
        held, bench = Held(), Bench(ORDERED)
        receiver = await bench.start(held, concurrency=4)
        receiver.give("a1", key="a")
        await eventually(lambda: held.entered)
        receiver.break_with(ConnectionLost("cut"))
        await eventually(lambda: len(bench.receivers) == 2)
        for id in ("a1", "a2"):
            bench.receiver.give(id, key="a")
        bench.receiver.give("b1", key="b")
        await eventually(lambda: "b1" in held.entered)
        assert held.entered == ["a1", "b1"]
        for id in ("a1", "a2", "b1"):
            held.gates[id].set()
        await eventually(lambda: len(bench.receiver.settled) == 3)
        assert held.entered == ["a1", "b1", "a2"]
        await bench.stop()

    law(body)


def test_a_held_retry_of_a_lost_connection_is_dropped_for_its_redelivery() -> None:
    async def body() -> None:
        attempts: list[tuple[str, int]] = []

        async def fail_first(message: Message[Any]) -> None:
            assert isinstance(message, Delivery)
            attempts.append((message.id, message.attempt))
            if len(attempts) == 1:
                raise ConnectionError("down")

        bench = Bench(retry=Retry(5, 0.1, jitter=0))
        receiver = await bench.start(fail_first)
        receiver.give("m1")
        await eventually(lambda: bench.consumer.held == 1)
        receiver.break_with(ConnectionLost("cut"))
        await eventually(lambda: len(bench.receivers) == 2)
        assert bench.consumer.held == 0
        bench.receiver.give("m1")
        await eventually(lambda: bench.receiver.settled)
        assert attempts == [("m1", 1), ("m1", 1)]
        await bench.stop()

    law(body)


def test_reopening_is_tried_again_until_it_works() -> None:
    async def body() -> None:
        bench = Bench()
        receiver = await bench.start(succeed)
        bench.refusals.extend([ConnectError("down"), ConnectionLost("cut")])
        receiver.break_with(ConnectionLost("cut"))
        await eventually(lambda: len(bench.receivers) == 2)
        assert bench.stopped_by == [] and bench.consumer.stats.reopened == 1
        await bench.stop()

    law(body)


def test_an_error_that_is_no_lost_connection_stops_the_consumer() -> None:
    async def body() -> None:
        bench = Bench()
        receiver = await bench.start(succeed)
        receiver.break_with(RuntimeError("a bug of the adapter"))
        await eventually(lambda: bench.stopped_by)
        assert str(bench.stopped_by[0]) == "a bug of the adapter"
        await bench.stop()

    law(body)


def test_an_adapter_that_fails_to_settle_stops_the_consumer() -> None:
    async def body() -> None:
        def broken(settlements: Any) -> None:
            raise RuntimeError("a bug of the adapter")

        bench = Bench()
        receiver = await bench.start(succeed)
        receiver.answers = broken
        receiver.give("m1")
        await eventually(lambda: bench.stopped_by)
        await bench.stop()

    law(body)


# --- leases


LEASED = Capabilities(settle="individual", lease="timeout", lease_s=0.06, release="now")


def test_leases_of_running_held_and_waiting_deliveries_are_extended() -> None:
    async def body() -> None:
        held, bench = Held(), Bench(ORDERED, capabilities=LEASED, kind=LeasedScriptedReceiver)
        receiver = await bench.start(held, concurrency=2)
        receiver.give("running", key="a")
        receiver.give("in lane", key="a")
        await eventually(lambda: {"running", "in lane"} <= set(receiver.extended))
        held.gates["running"].set()
        held.gates["in lane"].set()
        await eventually(lambda: len(receiver.settled) == 2)
        receiver.extended.clear()
        receiver.give("next", key="b")
        await eventually(lambda: "next" in receiver.extended)
        assert set(receiver.extended) == {"next"}, "a settled delivery needs no lease"
        held.gates["next"].set()
        await bench.stop()

    law(body)


def test_the_lease_of_a_held_retry_is_extended() -> None:
    async def body() -> None:
        async def fail(message: Message[Any]) -> None:
            raise ConnectionError("down")

        bench = Bench(capabilities=LEASED, kind=LeasedScriptedReceiver, retry=Retry(2, "1h"))
        receiver = await bench.start(fail)
        receiver.give("m1")
        await eventually(lambda: "m1" in receiver.extended)
        assert bench.consumer.held == 1
        await bench.stop()

    law(body)


def test_leases_are_extended_on_the_new_connection_after_a_loss() -> None:
    async def body() -> None:
        held, bench = Held(), Bench(capabilities=LEASED, kind=LeasedScriptedReceiver)
        receiver = await bench.start(held)
        receiver.break_with(ConnectionLost("cut"))
        await eventually(lambda: len(bench.receivers) == 2)
        bench.receiver.give("m1")
        await eventually(lambda: "m1" in bench.receiver.extended)
        held.gates["m1"].set()
        await bench.stop()

    law(body)


# --- revocation


def test_a_revoked_session_starts_nothing_more_and_settles_what_runs() -> None:
    async def body() -> None:
        held, bench = Held(), Bench(ORDERED)
        receiver = await bench.start(held, concurrency=2)
        for id in ("a1", "a2"):
            receiver.give(id, key="a")
        await eventually(lambda: held.entered == ["a1"])
        revoking = asyncio.create_task(bench.consumer.on_revoke([receiver.session], 5.0))
        await turns()
        assert not revoking.done(), "a running handler may end"
        held.gates["a1"].set()
        await revoking
        assert receiver.settled == [("a1", "accept")]
        assert held.entered == ["a1"] and receiver.session.lost
        await bench.stop()

    law(body)


COMPETING = Capabilities(settle="individual", lease="connection", order="publisher", order_competition=True)


@pytest.mark.parametrize("swallows", [False, True])
def test_a_handler_that_outlives_its_revocation_is_cancelled_where_order_holds_under_competition(
    swallows: bool,
) -> None:
    async def body() -> None:
        held, bench = Held(), Bench(ORDERED, capabilities=COMPETING)

        async def stubborn(message: Message[Any]) -> None:
            try:
                await held(message)
            except asyncio.CancelledError:
                if not swallows:
                    raise

        receiver = await bench.start(stubborn, concurrency=1)
        for id in ("a1", "a2"):
            receiver.give(id, key="a")
        await eventually(lambda: held.entered == ["a1"])
        await bench.consumer.on_revoke([receiver.session], 0.05)
        assert bench.consumer.idle, "it ended before the session was given up"
        assert bench.consumer.stats.handed_back == 1 and bench.consumer.stats.failed == 0
        receiver.session = type(receiver.session)("second assignment")
        held.gates["b1"].set()
        receiver.give("b1", key="b")
        await eventually(lambda: receiver.settled == [("b1", "accept")])
        await bench.stop()
        assert bench.stopped_by == []

    law(body)


def test_a_handler_that_outlives_its_revocation_runs_to_its_end_where_order_is_not_promised() -> None:
    async def body() -> None:
        held, bench = Held(), Bench()
        receiver = await bench.start(held)
        receiver.give("m1")
        await eventually(lambda: held.entered)
        await bench.consumer.on_revoke([receiver.session], 0.05)
        assert not bench.consumer.idle
        held.gates["m1"].set()
        await eventually(lambda: bench.consumer.idle)
        assert receiver.settled == [] and bench.consumer.stats.handed_back == 0
        await bench.stop()

    law(body)


def test_a_worker_that_waits_is_not_ended_by_the_revocation_of_what_it_ran_before() -> None:
    """The dead letter of what it refused is still on its way when its session goes."""

    async def body() -> None:
        held, bench = Held(), Bench(ORDERED, capabilities=COMPETING)
        bench.bury_error = ConnectError("no dead letters now")

        async def refusing(message: Message[Any]) -> None:
            await held(message)
            if message.id == "a1":
                raise Reject("no")

        receiver = await bench.start(refusing, concurrency=1)
        held.gates["a1"].set()
        receiver.give("a1", key="a")
        await eventually(lambda: bench.bury_tries)
        await bench.consumer.on_revoke([receiver.session], 0.05)
        receiver.session = type(receiver.session)("second assignment")
        held.gates["b1"].set()
        receiver.give("b1", key="b")
        await eventually(lambda: ("b1", "accept") in receiver.settled)
        await bench.stop()

    law(body)


def test_a_handler_in_a_thread_keeps_its_key_though_its_session_is_revoked() -> None:
    """A thread cannot be cancelled: its message must not start a second time beside it."""

    async def body() -> None:
        held, bench = Held(), Bench(ORDERED, capabilities=COMPETING)
        receiver = await bench.start(held, concurrency=2, blocking=True)
        receiver.give("a1", key="a")
        await eventually(lambda: held.entered == ["a1"])
        await bench.consumer.on_revoke([receiver.session], 0.02)
        receiver.session = type(receiver.session)("second assignment")
        receiver.give("a1", key="a")
        await asyncio.sleep(0.05)
        assert held.entered == ["a1"]
        held.gates["a1"].set()
        await eventually(lambda: receiver.settled == [("a1", "accept")])
        assert held.entered == ["a1"]
        await bench.stop()

    law(body)


def test_a_session_revoked_without_notice_is_lost_at_once() -> None:
    async def body() -> None:
        held, bench = Held(), Bench()
        receiver = await bench.start(held)
        receiver.give("m1")
        await eventually(lambda: held.entered)
        await bench.consumer.on_revoke([receiver.session], 0.0)
        held.gates["m1"].set()
        await eventually(lambda: bench.consumer.idle)
        assert receiver.settled == []
        await bench.stop()

    law(body)


def test_a_revoked_key_runs_again_for_its_new_session() -> None:
    async def body() -> None:
        held, bench = Held(), Bench(ORDERED)
        receiver = await bench.start(held, concurrency=2)
        for id in ("a1", "a2"):
            receiver.give(id, key="a")
        await eventually(lambda: held.entered == ["a1"])
        held.gates["a1"].set()
        held.gates["a2"].set()
        await bench.consumer.on_revoke([receiver.session], 1.0)
        receiver.session = type(receiver.session)("second assignment")
        receiver.give("a2", key="a")
        await eventually(lambda: ("a2", "accept") in receiver.settled)
        await bench.stop()

    law(body)


def test_a_handler_that_fails_while_its_consumer_stops_is_handed_back() -> None:
    """An adapter may say `closing` for its own stop, too: the message is then released, not merely forgotten."""

    async def body() -> None:
        failing = asyncio.Event()

        async def handle(message: Message[Any]) -> None:
            await failing.wait()
            raise RuntimeError("the gateway is down")

        bench = Bench()
        receiver = await bench.start(handle, concurrency=1)
        receiver.give("m1")
        await eventually(lambda: bool(bench.consumer._running))
        receiver.session.closing = True
        await bench.consumer.stop_intake()
        failing.set()
        await bench.stop()
        assert receiver.settled == [("m1", "release")]

    law(body)


def test_a_handler_that_fails_while_its_session_is_revoked_leaves_its_key_free() -> None:
    """Its message is the next owner's; held here for a retry, it would keep the lane for ever."""

    async def body() -> None:
        failing, ran = asyncio.Event(), []

        async def handle(message: Message[Any]) -> None:
            ran.append(message.id)
            if len(ran) == 1:
                await failing.wait()
                raise RuntimeError("the gateway is down")

        bench = Bench(ORDERED)
        receiver = await bench.start(handle, concurrency=2)
        receiver.give("a1", key="a")
        await eventually(lambda: ran == ["a1"])
        revoking = asyncio.create_task(bench.consumer.on_revoke([receiver.session], 5.0))
        await asyncio.sleep(0)
        failing.set()
        await revoking
        assert bench.consumer.held == 0 and bench.consumer.idle
        receiver.session = type(receiver.session)("second assignment")
        receiver.give("a1", key="a")
        await eventually(lambda: ("a1", "accept") in receiver.settled)
        await bench.stop()

    law(body)


# --- the end


def test_close_hands_back_what_has_not_started() -> None:
    async def body() -> None:
        held, bench = Held(), Bench()
        receiver = await bench.start(held)
        for id in ("m1", "m2", "m3"):
            receiver.give(id)
        await eventually(lambda: held.entered == ["m1"] and bench.consumer.stats.received == 3)
        held.gates["m1"].set()
        await bench.stop()
        assert sorted(receiver.settled) == [("m1", "accept"), ("m2", "release"), ("m3", "release")]
        assert held.entered == ["m1"] and receiver.closed == 1
        assert bench.consumer.stats.handed_back == 2

    law(body)


def test_close_of_an_ordered_consumer_leaves_handing_back_to_the_adapter() -> None:
    async def body() -> None:
        held, bench = Held(), Bench(ORDERED)
        receiver = await bench.start(held)
        receiver.give("a1", key="a")
        receiver.give("a2", key="a")
        await eventually(lambda: held.entered == ["a1"])
        held.gates["a1"].set()
        await bench.stop()
        assert receiver.settled == [("a1", "accept")]
        assert receiver.closed == 1

    law(body)


def test_close_sends_no_release_where_it_is_not_declared() -> None:
    async def body() -> None:
        bench = Bench(capabilities=Capabilities(settle="individual", lease="connection"))
        receiver = await bench.start()
        receiver.give("m1")
        await eventually(lambda: bench.consumer.stats.received)
        await bench.stop()
        assert receiver.settled == []

    law(body)


def test_a_running_handler_may_end_within_the_grace() -> None:
    async def body() -> None:
        held, bench = Held(), Bench()
        receiver = await bench.start(held)
        receiver.give("m1")
        await eventually(lambda: held.entered)
        asyncio.get_running_loop().call_later(0.03, held.gates["m1"].set)
        await bench.stop(grace_s=5)
        assert receiver.settled == [("m1", "accept")]

    law(body)


def test_a_handler_beyond_the_grace_is_cancelled_and_handed_back() -> None:
    async def body() -> None:
        held, bench = Held(), Bench()
        receiver = await bench.start(held)
        receiver.give("m1")
        await eventually(lambda: held.entered)
        await bench.stop(grace_s=0.05)
        assert receiver.settled == [("m1", "release")]

    law(body)


def test_a_handler_that_refuses_cancellation_is_abandoned_and_settles_nothing() -> None:
    async def body() -> None:
        entered, let_go = asyncio.Event(), asyncio.Event()

        async def stubborn(message: Message[Any]) -> None:
            entered.set()
            while not let_go.is_set():
                try:
                    await let_go.wait()
                except asyncio.CancelledError:
                    continue

        bench = Bench()
        receiver = await bench.start(stubborn)
        receiver.give("m1")
        await entered.wait()
        async with asyncio.timeout(4):
            await bench.stop(grace_s=0.05)
        let_go.set()
        await turns()
        assert receiver.settled == [("m1", "release")]

    law(body)


def test_close_is_bounded_when_the_broker_never_answers_a_settlement() -> None:
    async def body() -> None:
        bench = Bench()
        receiver = await bench.start(succeed)
        receiver.answers = lambda settlements: asyncio.get_running_loop().create_future()
        receiver.give("m1")
        await eventually(lambda: receiver.settled)
        async with asyncio.timeout(3):
            await bench.stop(grace_s=0.1)

    law(body)


def test_a_held_retry_is_handed_back_at_close() -> None:
    async def body() -> None:
        async def fail(message: Message[Any]) -> None:
            raise ConnectionError("down")

        bench = Bench(retry=Retry(2, "1h"))
        receiver = await bench.start(fail)
        receiver.give("m1")
        await eventually(lambda: bench.consumer.held == 1)
        await bench.stop()
        assert receiver.settled == [("m1", "release")]

    law(body)


# --- the verbs of a stream, on memory

QUEUE = Queue("work", bytes)


def with_stream(body: Callable[[Bus, Any], Awaitable[None]], **options: Any) -> None:
    async def run() -> None:
        async with memory() as bus, bus.consume(QUEUE, **options) as stream:
            await bus.publish(QUEUE, b"1", id="m1")
            await body(bus, stream)

    drive(run())


def test_a_second_settlement_raises_already_settled() -> None:
    async def body(bus: Bus, stream: Any) -> None:
        delivery = await stream.next(5)
        await delivery.ack()
        with pytest.raises(AlreadySettled, match="m1"):
            await delivery.ack()

    with_stream(body)


def test_a_settlement_after_a_lost_connection_raises_settle_lost() -> None:
    async def body(bus: Bus, stream: Any) -> None:
        delivery = await stream.next(5)
        bus.native("main").cut()  # type: ignore[attr-defined]
        await eventually(lambda: delivery.session.lost)
        with pytest.raises(SettleLost):
            await delivery.ack()
        again = await stream.next(5)
        assert again.id == "m1"
        await again.ack()

    with_stream(body)


def test_a_retried_delivery_comes_again_with_the_next_attempt() -> None:
    async def body(bus: Bus, stream: Any) -> None:
        delivery = await stream.next(5)
        await delivery.retry(0.01)
        with pytest.raises(UsageError, match="held"):
            await delivery.ack()
        again = await stream.next(5)
        assert again.attempt == 2
        await again.ack()

    with_stream(body)


def test_a_rejected_delivery_lies_in_the_dead_letters_with_its_provenance() -> None:
    async def body(bus: Bus, stream: Any) -> None:
        await (await stream.next(5)).reject("made of tin")
        async with bus.consume(QUEUE.dead_letters()) as graves:
            grave = await graves.next(5)
            assert grave is not None and grave.body == b"1" and grave.id == "m1"
            assert grave.provenance["reason"] == "rejected"
            assert grave.provenance["error"] == "made of tin"
            assert grave.provenance["source"] == "work"
            assert grave.headers == {}
            await grave.ack()

    with_stream(body)


def test_a_released_delivery_comes_again_at_once_with_the_first_attempt() -> None:
    async def body(bus: Bus, stream: Any) -> None:
        await (await stream.next(5)).release()
        again = await stream.next(5)
        assert (again.attempt, again.deliveries) == (1, 2)
        await again.ack()

    with_stream(body)


def test_release_is_refused_where_the_backend_has_none_and_the_delivery_stays_usable() -> None:
    async def body() -> None:
        async with Bus(f"memory://{fresh()}?release=none") as bus, bus.consume(QUEUE) as stream:
            await bus.publish(QUEUE, b"1")
            delivery = await stream.next(5)
            assert delivery is not None
            with pytest.raises(CapabilityError, match="release"):
                await delivery.release()
            await delivery.ack()

    law(body)


def test_no_more_than_the_window_is_unsettled() -> None:
    async def body() -> None:
        async with memory() as bus:
            for n in range(10):
                await bus.publish(QUEUE, b"%d" % n)
            async with bus.consume(QUEUE, window=3) as stream:
                first = await stream.take(10, 5)
                await eventually(lambda: bus.stats(QUEUE).received == 3)
                await turns()
                assert len(first) == 3 and await stream.next(0.02) is None
                await first[0].ack()
                assert await stream.next(5) is not None

    law(body)


def test_a_closed_stream_raises_closed_at_the_waiting_iterator() -> None:
    async def body() -> None:
        bus = memory()
        await bus.open()
        stream = bus.consume(QUEUE)
        await stream.__aenter__()
        waiting = asyncio.create_task(stream.__anext__())
        await turns()
        await bus.close()
        with pytest.raises(Closed):
            await waiting

    law(body)


def test_a_stream_is_entered_once() -> None:
    async def body() -> None:
        async with memory() as bus:
            stream = bus.consume(QUEUE)
            async with stream:
                pass
            with pytest.raises(UsageError):
                await stream.__aenter__()

    law(body)


def test_a_lost_delivery_of_a_batch_does_not_keep_the_others_unsettled() -> None:
    async def body() -> None:
        async with memory() as bus:
            for n in range(3):
                await bus.publish(QUEUE, b"%d" % n)
            async with bus.consume(QUEUE) as stream:
                batch = await stream.take(3, 5)
                await batch[0].ack()
                with pytest.raises(AlreadySettled):
                    await stream.ack(batch)
                assert bus.stats(QUEUE).settled == 3

    law(body)


def test_leaving_the_stream_hands_back_what_is_unsettled() -> None:
    async def body(bus: Bus, stream: Any) -> None:
        assert await stream.next(5) is not None
        await stream.__aexit__(None, None, None)
        async with bus.consume(QUEUE) as second:
            again = await second.next(5)
            assert again is not None and again.id == "m1"
            await again.ack()

    with_stream(body)


def test_many_are_settled_with_one_wait() -> None:
    async def body() -> None:
        async with memory() as bus, bus.consume(QUEUE) as stream:
            for n in range(5):
                await bus.publish(QUEUE, b"%d" % n)
            got: list[Any] = []
            while len(got) < 5:
                got += await stream.take(5, 5)
            await stream.ack(got)
            assert all(d.settled for d in got) and bus.stats(QUEUE).settled == 5

    law(body)


def test_a_handler_delivery_has_no_verbs() -> None:
    async def body() -> None:
        caught: list[BaseException] = []
        bus = memory()

        @bus.on(QUEUE)
        async def take(value: bytes, delivery: Delivery[bytes]) -> None:
            try:
                await delivery.ack()
            except UsageError as error:
                caught.append(error)

        async with bus, bus.consuming():
            await bus.publish(QUEUE, b"1")
            await eventually(lambda: caught)

    law(body)
