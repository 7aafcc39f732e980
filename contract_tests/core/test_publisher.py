"""Laws of publishing: what is refused before any byte, and the window of the fast path."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from _drive import drive, eventually, fresh, turns
from _scripted import memory, recording
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from messaging_sdk import (
    Bus,
    Capabilities,
    CapabilityError,
    ConnectionLost,
    DeadlineExceeded,
    HeaderRules,
    InvalidMessage,
    MessagingError,
    NotFound,
    Outcome,
    Queue,
    TooLarge,
    Topic,
    UsageError,
)
from messaging_sdk.capabilities import HeaderRules as Rules
from messaging_sdk.memory import MemorySender
from messaging_sdk.model import SENT, Outgoing, indeterminate, rejected
from messaging_sdk.publisher import header_problem
from messaging_sdk.spi import OnOutcomes

QUEUE = Queue("work", bytes)


class Order(BaseModel):
    id: str


def law(body: Callable[[], Awaitable[None]]) -> None:
    drive(body())  # type: ignore[arg-type]


# --- refused before any byte is sent, with the bus still usable

WITHOUT_OPTIONS = "ttl=false&delay=false&priority=0&headers=false&max_body=10"
REFUSED: list[tuple[dict[str, Any], type[MessagingError], str]] = [
    ({"value": "text"}, InvalidMessage, "takes bytes, not str"),
    ({"value": None}, InvalidMessage, "takes bytes, not NoneType"),
    ({"value": bytes(11)}, TooLarge, "has 11 bytes, backend 'main' takes 10"),
    ({"headers": {"a": "1"}}, InvalidMessage, "no headers"),
    ({"delay": 1}, CapabilityError, "delay"),
    ({"ttl": 1}, CapabilityError, "ttl"),
    ({"priority": 1}, CapabilityError, "priority"),
    ({"ttl": 0}, InvalidMessage, "ttl must be over 0"),
    ({"priority": -1}, InvalidMessage, "priority"),
    ({"priority": "high"}, InvalidMessage, "priority"),
    ({"id": ""}, InvalidMessage, "id must be"),
    ({"id": "x" * 201}, InvalidMessage, "id must be"),
    ({"id": "ü"}, InvalidMessage, "id must be"),
    ({"id": 7}, InvalidMessage, "id must be"),
    ({"correlation_id": "a\nb"}, InvalidMessage, "correlation_id must be"),
    ({"correlation_id": " a"}, InvalidMessage, "correlation_id must be"),
    ({"delay": "soon"}, MessagingError, "delay: not a duration"),
    ({"ttl": "soon"}, MessagingError, "ttl: not a duration"),
]


@pytest.mark.parametrize(("options", "kind", "reason"), REFUSED, ids=[str(r[0])[:40] for r in REFUSED])
def test_a_wrong_publish_is_refused_as_rejected_and_the_next_one_works(
    options: dict[str, Any], kind: type[MessagingError], reason: str
) -> None:
    async def body() -> None:
        async with Bus(f"memory://{fresh()}?{WITHOUT_OPTIONS}") as bus, bus.consume(QUEUE) as stream:
            with pytest.raises(kind, match=reason) as caught:
                await bus.publish(QUEUE, **({"value": b"x"} | options))
            assert caught.value.outcome is Outcome.REJECTED
            await bus.publish(QUEUE, b"next")
            found = await stream.next(5)
            assert found is not None and found.body == b"next"

    law(body)


def test_too_large_tells_size_and_limit() -> None:
    async def body() -> None:
        async with Bus(f"memory://{fresh()}?max_body=10") as bus:
            with pytest.raises(TooLarge) as caught:
                await bus.publish(QUEUE, bytes(11))
            assert (caught.value.size_bytes, caught.value.limit_bytes) == (11, 10)

    law(body)


def test_the_largest_body_that_is_allowed_passes() -> None:
    async def body() -> None:
        async with Bus(f"memory://{fresh()}?max_body=10") as bus:
            await bus.publish(QUEUE, bytes(10))

    law(body)


def test_an_empty_key_is_refused_as_rejected() -> None:
    keyed = Queue("keyed", Order, key="id")

    async def body() -> None:
        async with memory() as bus:
            with pytest.raises(InvalidMessage, match="key of this message is empty") as caught:
                await bus.publish(keyed, Order(id=""))
            assert caught.value.outcome is Outcome.REJECTED

    law(body)


def test_a_key_without_utf8_form_is_refused() -> None:
    keyed = Queue("keyed", bytes, key=lambda body: "\ud800")

    async def body() -> None:
        async with memory() as bus:
            with pytest.raises(InvalidMessage, match="key") as caught:
                await bus.publish(keyed, b"x")
            assert caught.value.outcome is Outcome.REJECTED

    law(body)


def test_something_else_than_a_destination_is_refused() -> None:
    async def body() -> None:
        async with memory() as bus:
            with pytest.raises(UsageError, match="not str"):
                await bus.publish("work", b"x")  # type: ignore[arg-type]

    law(body)


def test_a_mutable_body_is_copied_before_publish_returns() -> None:
    async def body() -> None:
        async with memory() as bus, bus.consume(QUEUE) as stream:
            buffer = bytearray(b"before")
            await bus.publish(QUEUE, buffer)  # type: ignore[arg-type]
            buffer[:] = b"after!"
            found = await stream.next(5)
            assert found is not None and found.body == b"before"

    law(body)


def test_ids_of_one_bus_differ_and_of_two_buses_too() -> None:
    async def body() -> None:
        async with memory() as one, memory() as two:
            ids = [(await bus.publish(QUEUE, b"")).id for bus in (one, two) for _ in range(50)]
            assert len(set(ids)) == 100

    law(body)


def test_a_topic_without_groups_accepts_and_keeps_nothing() -> None:
    async def body() -> None:
        async with memory() as bus:
            assert (await bus.publish(Topic("nobody", bytes), b"x")).id

    law(body)


# --- headers

TEXT, ASCII = Rules(max_count=3, max_bytes=20), Rules(max_count=9, max_bytes=99, charset="ascii")
FIELD = Rules(max_count=9, max_bytes=99, charset="field", names="token")


@pytest.mark.parametrize(
    ("name", "value", "rules", "reason"),
    [
        ("a", "1", None, "no headers"),
        ("a", 1, TEXT, "must be a str"),
        (1, "a", TEXT, "must be a str"),
        ("", "a", TEXT, "empty name"),
        ("messaging-key", "a", TEXT, "SDK's own"),
        ("Messaging-Key", "a", TEXT, "SDK's own"),
        ("a", "\ud800", TEXT, "lone surrogate"),
        ("a", "ü", ASCII, "printable ASCII"),
        ("a", "line\nbreak", ASCII, "printable ASCII"),
        ("a", " blank", FIELD, "outer blanks"),
        ("has blank", "a", FIELD, "alter or refuse"),
    ],
)
def test_a_header_that_would_not_arrive_as_it_is_has_a_problem(
    name: Any, value: Any, rules: HeaderRules | None, reason: str
) -> None:
    assert reason in header_problem(name, value, rules)


@pytest.mark.parametrize(
    ("name", "value", "rules"),
    [("a b", "ü\n", TEXT), ("ü", " x ", ASCII), ("x-token", "inner blank", FIELD), ("a", "", FIELD)],
)
def test_a_header_that_arrives_as_it_is_has_none(name: str, value: str, rules: HeaderRules) -> None:
    assert header_problem(name, value, rules) == ""


@given(st.text(), st.text(), st.sampled_from([TEXT, ASCII, FIELD]))
def test_what_passes_is_in_the_alphabet_that_the_rules_promise(name: str, value: str, rules: HeaderRules) -> None:
    if header_problem(name, value, rules):
        return
    name.encode(), value.encode()
    assert name and not name.lower().startswith("messaging-")
    assert rules.charset == "text" or (value.isascii() and (not value or value.isprintable()))
    assert rules.charset != "field" or value == value.strip()
    assert rules.names != "token" or (name.isascii() and " " not in name)


@pytest.mark.parametrize("headers", [{f"h{n}": "" for n in range(4)}, {"a": "x" * 20}, {"ü": "x" * 19}])
def test_too_many_headers_or_bytes_are_refused_with_both_limits(headers: dict[str, str]) -> None:
    def claims(destination: Any) -> Capabilities:
        from messaging_sdk.memory import DURABLE

        return Capabilities(**{**{f: getattr(DURABLE, f) for f, _ in DURABLE.items()}, "headers": TEXT})

    async def body() -> None:
        url, _ = recording(claims=claims)
        async with Bus(url) as bus:
            with pytest.raises(InvalidMessage, match="3 headers of 20 bytes"):
                await bus.publish(QUEUE, b"x", headers=headers)

    law(body)


def test_headers_are_copied_when_they_are_given() -> None:
    async def body() -> None:
        async with memory() as bus, bus.consume(QUEUE) as stream, bus.publisher(QUEUE) as publisher:
            headers = {"a": "1"}
            await publisher.send(b"x", headers=headers)
            headers["a"] = "2"
            found = await stream.next(5)
            assert found is not None and found.headers == {"a": "1"}

    law(body)


# --- the windowed publisher


class Slow(MemorySender):
    """Answers only when it is told to."""

    waiting: list[tuple[int, OnOutcomes]]

    def send_batch(self, messages: Any, on_outcomes: OnOutcomes) -> None:
        type(self).waiting.append((len(messages), on_outcomes))

    @classmethod
    def answer(cls) -> None:
        waiting, cls.waiting = cls.waiting, []
        for count, on_outcomes in waiting:
            on_outcomes([(i, SENT) for i in range(count)])


def slow() -> tuple[str, type[Slow]]:
    kind: type[Slow] = type("OneSlow", (Slow,), {"waiting": []})
    return recording(sender_class=kind)[0], kind


def test_a_publisher_waits_when_its_window_is_out_and_all_waiting_tasks_proceed() -> None:
    async def body() -> None:
        url, sender = slow()
        async with Bus(url) as bus, bus.publisher(QUEUE, window=2) as publisher:
            tasks = [asyncio.create_task(publisher.send(b"%d" % n)) for n in range(7)]
            await eventually(lambda: sum(count for count, _ in sender.waiting) == 2)
            await turns()
            assert sum(t.done() for t in tasks) == 2
            while not all(t.done() for t in tasks):
                sender.answer()
                await turns()
            flushing = asyncio.create_task(publisher.flush())
            while not flushing.done():
                sender.answer()
                await turns()
            assert publisher.sent == 7 and publisher.failed == []

    law(body)


def test_leaving_the_block_waits_for_every_outcome() -> None:
    async def body() -> None:
        async with memory() as bus:
            async with bus.publisher(QUEUE, window=3) as publisher:
                for n in range(100):
                    await publisher.send(b"%d" % n)
            assert (publisher.sent, publisher.failed) == (100, [])

    law(body)


def test_failures_are_listed_with_their_ids_and_outcomes() -> None:
    class Refusing(MemorySender):
        def send_batch(self, messages: Any, on_outcomes: OnOutcomes) -> None:
            results = {b"no": rejected(NotFound("no queue")), b"?": indeterminate(MessagingError("no answer"))}
            on_outcomes([(i, results.get(m.body, SENT)) for i, m in enumerate(messages)])

    async def body() -> None:
        url, _ = recording(sender_class=Refusing)
        async with Bus(url) as bus:
            async with bus.publisher(QUEUE) as publisher:
                ids = [await publisher.send(b) for b in (b"yes", b"no", b"?")]
            assert publisher.sent == 1
            assert [(f.id, f.error.outcome) for f in publisher.failed] == [
                (ids[1], "rejected"),
                (ids[2], "indeterminate"),
            ]

    law(body)


def test_send_keeps_the_order_of_its_calls() -> None:
    async def body() -> None:
        async with memory() as bus, bus.consume(QUEUE) as stream:
            async with bus.publisher(QUEUE, window=7) as publisher:
                for n in range(200):
                    await publisher.send(b"%d" % n)
            got: list[bytes] = []
            while len(got) < 200:
                taken = await stream.take(200, 5)
                got += [d.body for d in taken]
                await stream.ack(taken)
            assert got == [b"%d" % n for n in range(200)]

    law(body)


def test_a_publisher_refuses_what_publish_refuses_and_goes_on() -> None:
    async def body() -> None:
        async with memory() as bus:
            async with bus.publisher(QUEUE) as publisher:
                with pytest.raises(InvalidMessage):
                    await publisher.send("text")  # type: ignore[arg-type]
                await publisher.send(b"x")
            assert publisher.sent == 1

    law(body)


def test_a_publisher_is_used_inside_its_block_only() -> None:
    async def body() -> None:
        async with memory() as bus:
            publisher = bus.publisher(QUEUE)
            with pytest.raises(UsageError, match="async with"):
                await publisher.send(b"x")
            async with publisher:
                pass
            with pytest.raises(UsageError, match="async with"):
                await publisher.send(b"x")

    law(body)


@pytest.mark.parametrize("window", [0, -1, 1.5, "9"])
def test_a_window_that_is_no_whole_number_from_1_is_refused(window: Any) -> None:
    with pytest.raises(UsageError, match="window"):
        drive(asyncio.sleep(0, memory())).publisher(QUEUE, window=window)


def test_the_block_ends_by_the_timeout_when_nobody_answers() -> None:
    async def body() -> None:
        url, _ = slow()
        async with Bus(url) as bus:
            async with asyncio.timeout(3):
                async with bus.publisher(QUEUE, timeout_s=0.05) as publisher:
                    await publisher.send(b"x")
            assert [f.error.outcome for f in publisher.failed] == [Outcome.INDETERMINATE]
            await bus.close(0.2)

    law(body)


def test_publish_raises_deadline_exceeded_with_its_outcome() -> None:
    async def body() -> None:
        url, _ = slow()
        async with Bus(url) as bus:
            with pytest.raises(DeadlineExceeded) as caught:
                await bus.publish(QUEUE, b"x", timeout_s=0.05)
            assert caught.value.outcome is Outcome.INDETERMINATE
            await bus.close(0.2)

    law(body)


def test_a_publish_over_a_cut_connection_arrives_with_the_same_id() -> None:
    async def body() -> None:
        async with memory() as bus, bus.consume(QUEUE) as stream:
            await bus.publish(QUEUE, b"1")
            bus.native("main").cut()  # type: ignore[attr-defined]
            await bus.publish(QUEUE, b"2", id="second")
            ids: list[str] = []
            while "second" not in ids:
                found = await stream.next(5)
                assert found is not None
                ids.append(found.id)
                await found.ack()

    law(body)


def test_a_lost_connection_is_named_when_it_does_not_come_back() -> None:
    class Lost(MemorySender):
        def send_batch(self, messages: Any, on_outcomes: OnOutcomes) -> None:
            on_outcomes([(i, indeterminate(ConnectionLost("reset by peer"))) for i in range(len(messages))])

    async def body() -> None:
        url, _ = recording(sender_class=Lost)
        async with Bus(url) as bus:
            with pytest.raises(DeadlineExceeded) as caught:
                await bus.publish(QUEUE, b"x", timeout_s=0.05)
            assert caught.value.outcome is Outcome.INDETERMINATE
            await bus.close(0.2)

    law(body)


def test_an_outgoing_message_has_no_room_for_stray_attributes() -> None:
    with pytest.raises(AttributeError):
        Outgoing(b"", "m1").boby = b"typo"  # type: ignore[attr-defined]


@pytest.mark.parametrize("timeout_s", ["5s", True, 0, -1.0])
def test_a_timeout_that_is_no_number_of_seconds_is_refused_before_anything_is_sent(timeout_s: Any) -> None:
    async def publish() -> None:
        async with Bus(f"memory://timeout-{timeout_s}") as bus:
            with pytest.raises(UsageError, match="timeout_s"):
                await bus.publish(Queue("q", str), "x", timeout_s=timeout_s)
            assert (await bus.publish(Queue("q", str), "still usable")).id

    asyncio.run(publish())
    with pytest.raises(UsageError, match="timeout_s"):
        Bus("memory://x", timeout_s=timeout_s)


def test_headers_that_are_no_mapping_are_refused_before_anything_is_sent() -> None:
    async def publish() -> None:
        async with Bus("memory://headers-list") as bus:
            with pytest.raises(InvalidMessage, match="mapping") as caught:
                await bus.publish(Queue("q", str), "x", headers=[("a", "b")])  # type: ignore[arg-type]
            assert caught.value.outcome is Outcome.REJECTED

    asyncio.run(publish())


def test_needs_and_middleware_of_a_wrong_type_are_refused_by_the_bus() -> None:
    with pytest.raises(UsageError, match="Needs"):
        Bus("memory://x", needs={"durable": "kill"})  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="Middleware"):
        Bus("memory://x", middleware=[1])  # type: ignore[list-item]
