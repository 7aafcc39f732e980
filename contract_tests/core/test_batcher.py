"""Laws of the way to a Sender: three outcomes, order, batches, deadlines, and an end in every state."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from _drive import drive, eventually, turns
from _scripted import ScriptedSender, Taken, Wire, keep
from hypothesis import given
from hypothesis import strategies as st

from messaging_sdk import (
    Closed,
    ConnectError,
    ConnectionLost,
    DeadlineExceeded,
    MessagingError,
    NotFound,
    Outcome,
)
from messaging_sdk.batcher import Batcher
from messaging_sdk.model import SENT, Outgoing, SendResult, indeterminate, rejected


class Post:
    """A batcher, what was submitted to it, and what became of that."""

    def __init__(self, wire: Wire) -> None:
        self.wire = wire
        self.batcher = Batcher("post", wire.open_sender)
        self.futures: list[asyncio.Future[SendResult]] = []

    def submit(self, id: str, body: bytes = b"x", within_s: float = 5.0) -> asyncio.Future[SendResult]:
        loop = asyncio.get_running_loop()
        message = Outgoing(body, id)
        message.waiter = future = loop.create_future()
        message.deadline_s = loop.time() + within_s
        self.futures.append(future)
        self.batcher.submit(message)
        return future

    async def connect(self) -> None:
        """Have a sender, so that what follows is handed over at once."""
        on_batch, self.wire.on_batch = self.wire.on_batch, lambda sender, taken: taken.ok()
        await self.submit("hello")
        self.wire.taken.clear()
        self.futures.clear()
        self.wire.on_batch = on_batch

    async def close(self, timeout_s: float = 0.5) -> int:
        return await self.batcher.close(timeout_s, Closed("closed by the test"))


def law(body: Callable[[], Awaitable[None]]) -> None:
    drive(body())  # type: ignore[arg-type]


def test_an_accepted_message_is_ok() -> None:
    async def body() -> None:
        post = Post(Wire())
        assert (await post.submit("a")).outcome is Outcome.OK
        await post.close()

    law(body)


def test_a_refused_message_is_rejected_alone() -> None:
    def refuse_b(sender: ScriptedSender, taken: Taken) -> None:
        taken.answer({i: rejected(NotFound("no queue")) if m.id == "b" else SENT for i, m in enumerate(taken.messages)})

    async def body() -> None:
        post = Post(Wire(refuse_b))
        results = await asyncio.gather(*(post.submit(i) for i in "abc"))
        assert [r.outcome for r in results] == ["ok", "rejected", "ok"]
        assert isinstance(results[1].error, NotFound)
        await post.close()

    law(body)


def test_what_a_lost_connection_left_unsure_is_sent_again_in_order_with_the_same_ids() -> None:
    async def body() -> None:
        wire = Wire(keep, max_batch=2)
        post = Post(wire)
        await post.connect()
        futures = [post.submit(i) for i in "abcdef"]
        await eventually(lambda: sum(len(t) for t in wire.ids) == 3, "two batches are out")
        first, second = wire.taken
        wire.on_batch = lambda sender, taken: taken.ok()
        second.lose()  # out of order: the later batch is known first
        first.answer({0: SENT} if len(first.messages) > 1 else {})
        wire.senders[0].lost = True
        first.lose()
        results = await asyncio.gather(*futures)
        assert {r.outcome for r in results} == {Outcome.OK}
        resent = [i for ids in wire.ids[2:] for i in ids]
        assert resent == [i for i in "abcdef" if not (i == "a" and len(first.messages) > 1)]
        await post.close()

    law(body)


def test_a_batch_that_was_not_taken_goes_over_the_next_connection_in_order() -> None:
    def refuse_once(sender: ScriptedSender, taken: Taken) -> None:
        if sender is sender.wire.senders[0]:
            raise ConnectionLost("cut")
        taken.ok()

    async def body() -> None:
        wire = Wire(refuse_once)
        post = Post(wire)
        results = await asyncio.gather(*(post.submit(i) for i in "abc"))
        assert {r.outcome for r in results} == {Outcome.OK}
        assert [i for ids in wire.ids for i in ids] == ["a", "b", "c"]
        assert len(wire.senders) == 2
        await post.close()

    law(body)


def test_a_deadline_after_hand_over_is_indeterminate() -> None:
    async def body() -> None:
        post = Post(Wire(keep))
        await post.connect()
        result = await post.submit("a", within_s=0.03)
        assert result.outcome is Outcome.INDETERMINATE
        assert isinstance(result.error, DeadlineExceeded) and result.error.outcome is Outcome.INDETERMINATE
        await post.close(0.05)

    law(body)


class KeepingSender(ScriptedSender):
    """Keeps what it takes; all but "away" never leaves it."""

    def withdraw(self, messages: Any) -> Any:
        return [m for m in messages if m.id != "away"]


async def keeping() -> tuple[Post, list[Taken]]:
    wire = Wire(keep)

    async def open_sender() -> ScriptedSender:
        sender = KeepingSender(wire)
        wire.senders.append(sender)
        return sender

    wire.open_sender = open_sender  # type: ignore[method-assign]
    post = Post(wire)
    await post.connect()
    return post, wire.taken


def test_what_a_sender_withdraws_at_the_deadline_is_rejected_and_the_rest_indeterminate() -> None:
    async def body() -> None:
        post, taken = await keeping()
        away, here = post.submit("away", within_s=0.05), post.submit("here", within_s=0.05)
        assert (await away).outcome is Outcome.INDETERMINATE
        result = await here
        assert (result.outcome, type(result.error)) == (Outcome.REJECTED, DeadlineExceeded)
        for batch in taken:  # reported afterwards, as any
            batch.answer({i: rejected(NotFound("too late")) for i in sorted(batch.open)})
        await post.batcher.flush()
        assert await post.close() == 0

    law(body)


def test_what_a_sender_withdraws_at_close_is_rejected_and_the_rest_indeterminate() -> None:
    async def body() -> None:
        post, _ = await keeping()
        away, here = post.submit("away"), post.submit("here")
        await turns()
        await post.close(0.05)
        assert (await away).outcome is Outcome.INDETERMINATE
        assert ((await here).outcome, type((await here).error)) == (Outcome.REJECTED, Closed)

    law(body)


def test_a_deadline_before_hand_over_is_rejected() -> None:
    async def body() -> None:
        wire = Wire()
        wire.gate.clear()  # no connection comes to be
        post = Post(wire)
        result = await post.submit("a", within_s=0.03)
        assert result.outcome is Outcome.REJECTED
        assert isinstance(result.error, DeadlineExceeded) and result.error.outcome is Outcome.REJECTED
        await post.close(0.05)

    law(body)


def test_a_deadline_while_waiting_to_be_sent_again_is_indeterminate() -> None:
    async def body() -> None:
        wire = Wire(keep)
        post = Post(wire)
        await post.connect()
        future = post.submit("a", within_s=0.05)
        wire.gate.clear()
        wire.senders[0].lose()
        result = await future
        assert result.outcome is Outcome.INDETERMINATE
        assert isinstance(result.error, DeadlineExceeded)
        await post.close(0.05)

    law(body)


def test_a_deadline_after_a_batch_was_not_taken_is_rejected() -> None:
    def refuse(sender: ScriptedSender, taken: Taken) -> None:
        sender.wire.gate.clear()
        raise ConnectionLost("cut")

    async def body() -> None:
        post = Post(Wire(refuse))
        assert (await post.submit("a", within_s=0.05)).outcome is Outcome.REJECTED
        await post.close(0.05)

    law(body)


def test_the_deadline_of_one_message_does_not_touch_another() -> None:
    async def body() -> None:
        wire = Wire(keep)
        post = Post(wire)
        await post.connect()
        late = post.submit("late", within_s=0.03)
        early = post.submit("early", within_s=5)
        assert (await late).outcome is Outcome.INDETERMINATE
        assert not early.done()
        await eventually(lambda: len(wire.taken) == 2, "the second message is out")
        wire.taken[1].ok()
        assert (await early).outcome is Outcome.OK
        await post.close(0.05)

    law(body)


def test_an_outcome_that_comes_after_the_deadline_changes_nothing() -> None:
    async def body() -> None:
        wire = Wire(keep)
        post = Post(wire)
        await post.connect()
        result = await post.submit("a", within_s=0.02)
        wire.taken[0].ok()
        assert result.outcome is Outcome.INDETERMINATE
        wire.on_batch = lambda sender, taken: taken.ok()
        assert (await post.submit("b")).outcome is Outcome.OK
        assert await post.close() == 0

    law(body)


def test_close_is_bounded_when_the_broker_never_answers_and_says_indeterminate() -> None:
    async def body() -> None:
        wire = Wire(keep)
        wire.close_hangs = True
        post = Post(wire)
        await post.connect()
        futures = [post.submit(i) for i in "abc"]
        await turns()
        async with asyncio.timeout(2):
            left = await post.close(0.05)
        assert left == 3
        results = await asyncio.gather(*futures)
        assert [r.outcome for r in results] == ["indeterminate"] * 3
        assert all(isinstance(r.error, Closed) for r in results)

    law(body)


def test_close_says_rejected_of_what_was_never_handed_over() -> None:
    async def body() -> None:
        wire = Wire()
        wire.gate.clear()
        post = Post(wire)
        future = post.submit("a")
        async with asyncio.timeout(2):
            await post.close(0.05)
        assert (await future).outcome is Outcome.REJECTED

    law(body)


def test_close_waits_for_outcomes_that_come_in_time() -> None:
    async def body() -> None:
        wire = Wire(keep)
        post = Post(wire)
        await post.connect()
        future = post.submit("a")
        asyncio.get_running_loop().call_later(0.03, wire.taken[0].ok)
        assert await post.close(5) == 0
        assert (await future).outcome is Outcome.OK
        assert wire.closes == 1

    law(body)


def test_what_is_submitted_after_close_is_rejected() -> None:
    async def body() -> None:
        post = Post(Wire())
        await post.submit("a")
        await post.close()
        result = await post.submit("b")
        assert result.outcome is Outcome.REJECTED and isinstance(result.error, Closed)

    law(body)


def test_a_publish_cancelled_before_hand_over_sends_nothing() -> None:
    async def body() -> None:
        wire = Wire()
        wire.gate.clear()
        post = Post(wire)
        futures = [post.submit(i) for i in "abc"]
        futures[1].cancel()
        wire.gate.set()
        await asyncio.gather(futures[0], futures[2])
        assert wire.ids == [["a", "c"]]
        await post.close()

    law(body)


def test_a_lone_publish_cancelled_before_hand_over_sends_nothing() -> None:
    async def body() -> None:
        wire = Wire()
        wire.gate.clear()
        post = Post(wire)
        post.submit("a").cancel()
        wire.gate.set()
        await eventually(lambda: wire.senders, "a sender is open")
        await post.submit("b")
        assert wire.ids == [["b"]]
        await post.close()

    law(body)


def test_a_batch_has_no_more_messages_than_the_sender_takes() -> None:
    async def body() -> None:
        wire = Wire(max_batch=3)
        post = Post(wire)
        await asyncio.gather(*(post.submit(f"m{n}") for n in range(10)))
        assert max(map(len, wire.ids)) == 3
        assert [i for ids in wire.ids for i in ids] == [f"m{n}" for n in range(10)]
        await post.close()

    law(body)


def test_a_batch_has_no_more_bytes_than_the_sender_takes() -> None:
    async def body() -> None:
        wire = Wire(max_batch_bytes=100)
        post = Post(wire)
        await asyncio.gather(*(post.submit(f"m{n}", bytes(40)) for n in range(7)))
        assert [len(ids) for ids in wire.ids] == [2, 2, 2, 1]
        await post.close()

    law(body)


def test_a_message_over_the_byte_limit_travels_alone() -> None:
    async def body() -> None:
        wire = Wire(max_batch_bytes=100)
        post = Post(wire)
        sizes = {"a": 10, "big": 1000, "b": 10}
        await asyncio.gather(*(post.submit(i, bytes(n)) for i, n in sizes.items()))
        assert wire.ids == [["a"], ["big"], ["b"]]
        await post.close()

    law(body)


def test_what_queued_up_behind_a_flight_goes_as_one_batch() -> None:
    async def body() -> None:
        wire = Wire(keep, max_in_flight=1)
        post = Post(wire)
        await post.connect()
        for n in range(50):
            post.submit(f"m{n}")
        assert wire.ids == [["m0"]]
        wire.on_batch = lambda sender, taken: taken.ok()
        wire.taken[0].ok()
        await asyncio.gather(*post.futures)
        assert [len(ids) for ids in wire.ids] == [1, 49]
        await post.close()

    law(body)


def test_no_more_batches_are_out_than_the_sender_allows() -> None:
    async def body() -> None:
        wire = Wire(keep, max_batch=5, max_in_flight=2)
        post = Post(wire)
        await post.connect()
        for n in range(100):
            post.submit(f"m{n}")
        answered = 0
        while not all(f.done() for f in post.futures):
            await eventually(lambda: len(wire.taken) > answered, "another batch is out")  # noqa: B023
            assert sum(bool(t.open) for t in wire.taken) <= 2
            wire.taken[answered].ok()
            answered += 1
        assert len(wire.taken) - answered == 0
        assert [i for ids in wire.ids for i in ids] == [f"m{n}" for n in range(100)]
        await post.close()

    law(body)


def test_a_loop_that_never_suspends_still_flushes_by_batches() -> None:
    async def body() -> None:
        wire = Wire(keep, max_batch=4)
        post = Post(wire)
        await post.connect()
        for n in range(9):
            post.submit(f"m{n}")
        assert len(wire.taken) == 2, "a second batch must leave without a turn of the loop"
        for taken in wire.taken:
            taken.ok()
        wire.on_batch = lambda sender, taken: taken.ok()
        await post.close()

    law(body)


def test_an_adapter_that_fails_to_take_a_batch_shows_at_every_publish_of_it() -> None:
    def broken(sender: ScriptedSender, taken: Taken) -> None:
        raise RuntimeError("a bug")

    async def body() -> None:
        wire = Wire(broken)
        post = Post(wire)
        results = await asyncio.gather(*(post.submit(i) for i in "ab"))
        assert {r.outcome for r in results} == {Outcome.INDETERMINATE}
        assert all(isinstance(r.error and r.error.__cause__, RuntimeError) for r in results)
        wire.on_batch = lambda sender, taken: taken.ok()
        assert (await post.submit("c")).outcome is Outcome.OK
        await post.close()

    law(body)


def test_an_adapter_that_fails_to_open_shows_at_every_waiting_publish() -> None:
    async def body() -> None:
        wire = Wire()
        wire.refusals.append(RuntimeError("a bug"))
        post = Post(wire)
        results = await asyncio.gather(*(post.submit(i) for i in "ab"))
        assert {r.outcome for r in results} == {Outcome.REJECTED}
        assert "a bug" in str(results[0].error)
        await post.close()

    law(body)


def test_a_refusal_that_will_not_heal_rejects_at_once_with_an_error_of_ones_own() -> None:
    async def body() -> None:
        wire = Wire()
        wire.refusals.append(NotFound("the queue is gone"))
        post = Post(wire)
        first, second = await asyncio.gather(post.submit("a"), post.submit("b"))
        assert (first.outcome, second.outcome) == ("rejected", "rejected")
        assert isinstance(first.error, NotFound) and first.error is not second.error
        assert wire.openings == 1
        await post.close()

    law(body)


def test_opening_is_tried_again_until_it_works() -> None:
    async def body() -> None:
        wire = Wire()
        wire.refusals.extend([ConnectError("nobody answers"), ConnectionLost("cut while opening")])
        post = Post(wire)
        assert (await post.submit("a")).outcome is Outcome.OK
        assert wire.openings == 3
        await post.close()

    law(body)


def test_the_deadline_error_tells_why_no_connection_came() -> None:
    async def body() -> None:
        wire = Wire()
        wire.refusals.extend(ConnectError("nobody listens at mq:5672") for _ in range(99))
        post = Post(wire)
        result = await post.submit("a", within_s=0.05)
        assert "nobody listens at mq:5672" in str(result.error)
        assert isinstance(result.error and result.error.__cause__, ConnectError)
        await post.close(0.05)

    law(body)


def test_a_rejected_message_is_never_sent_again_even_if_transient() -> None:
    def full(sender: ScriptedSender, taken: Taken) -> None:
        taken.answer({i: rejected(MessagingError("full", transient=True)) for i in range(len(taken.messages))})

    async def body() -> None:
        wire = Wire(full)
        post = Post(wire)
        result = await post.submit("a")
        assert result.error is not None and result.error.transient
        assert wire.ids == [["a"]]
        await post.close()

    law(body)


def test_an_unsure_outcome_that_no_lost_connection_caused_goes_to_the_caller() -> None:
    def unsure(sender: ScriptedSender, taken: Taken) -> None:
        taken.answer({i: indeterminate(MessagingError("no answer")) for i in range(len(taken.messages))})

    async def body() -> None:
        wire = Wire(unsure)
        post = Post(wire)
        assert (await post.submit("a")).outcome is Outcome.INDETERMINATE
        assert wire.ids == [["a"]]
        await post.close()

    law(body)


def test_a_deep_backlog_is_sent_without_one_call_inside_another() -> None:
    async def body() -> None:
        wire = Wire(max_batch=1)
        wire.gate.clear()
        post = Post(wire)
        for n in range(3000):
            post.submit(f"m{n}")
        wire.gate.set()
        results = await asyncio.gather(*post.futures)
        assert {r.outcome for r in results} == {Outcome.OK}
        assert len(wire.taken) == 3000
        await post.close()

    law(body)


def test_cancelled_publishes_do_not_keep_a_flush_waiting() -> None:
    async def body() -> None:
        wire = Wire(keep, max_in_flight=1)
        post = Post(wire)
        await post.connect()
        post.submit("out")
        for n in range(3):
            post.submit(f"m{n}").cancel()
        wire.taken[0].ok()
        async with asyncio.timeout(2):
            await post.batcher.flush()
        assert wire.ids == [["out"]]

    law(body)


STEPS = st.lists(st.sampled_from(["ok", "hold", "reject", "lose", "not taken"]), max_size=12)


@given(STEPS, st.integers(1, 25), st.integers(1, 4), st.integers(1, 3))
def test_whatever_connections_do_each_message_ends_once_and_acceptance_keeps_the_order(  # noqa: C901
    steps: list[str], count: int, max_batch: int, max_in_flight: int
) -> None:
    accepted: list[str] = []
    refused: set[str] = set()
    script = iter(steps)

    def accept(taken: Taken) -> None:
        accepted.extend(taken.messages[i].id for i in sorted(taken.open))
        taken.ok()

    def act(sender: ScriptedSender, taken: Taken) -> None:
        step = next(script, "ok")
        if step == "not taken":
            sender.lost = True
            for earlier in sender.open:
                earlier.lose()
            raise ConnectionLost("cut")
        if step == "hold":
            return
        for earlier in sender.open:  # a broker answers in order
            accept(earlier)
        if step == "ok":
            accept(taken)
        elif step == "reject":
            refused.add(taken.messages[0].id)
            taken.answer({0: rejected(NotFound("no"))})
            accept(taken)
        else:
            sender.lost = True
            taken.lose()

    async def release_what_is_held(wire: Wire, done: Callable[[], bool]) -> None:
        while not done():
            await turns(5)
            for sender in list(wire.senders):
                for taken in list(sender.open):
                    if taken.open:
                        accept(taken)

    async def body() -> None:
        wire = Wire(act, max_batch=max_batch, max_in_flight=max_in_flight)
        post = Post(wire)
        ids = [f"m{n}" for n in range(count)]
        futures = [post.submit(i) for i in ids]
        await release_what_is_held(wire, lambda: all(f.done() for f in futures))
        results: list[Any] = [f.result().outcome for f in futures]
        assert [i for i, r in zip(ids, results, strict=True) if r is Outcome.OK] == accepted
        assert {i for i, r in zip(ids, results, strict=True) if r is Outcome.REJECTED} == refused
        assert await post.close() == 0

    law(body)
