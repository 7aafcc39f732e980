"""Laws of registration: which functions are handlers, what they are given, and what is refused at once."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from functools import partial
from typing import Any

import pytest
from _drive import drive, eventually
from _scripted import memory
from pydantic import BaseModel

from messaging_sdk import Bus, Delivery, Handlers, Message, Queue, Reject, Retry, Signal, Topic, UsageError


class Order(BaseModel):
    id: str


class Other(BaseModel):
    id: str


QUEUE = Queue("orders", Order)
TOPIC = Topic("placed", Order, groups=["billing", "audit"])
SIGNAL = Signal("pulse", Order)


def law(body: Callable[[], Awaitable[None]]) -> None:
    drive(body())  # type: ignore[arg-type]


async def seen_by(register: Callable[[Bus, list[Any]], None], **options: Any) -> list[Any]:
    """What the handler that `register(bus, seen)` adds has noted after one order was published."""
    seen: list[Any] = []
    bus = memory(**options)
    register(bus, seen)
    async with bus, bus.consuming():
        await bus.publish(QUEUE, Order(id="o1"), id="m1")
        await eventually(lambda: bus.stats(QUEUE).settled == 1)
    return seen


# --- the right signatures


def test_a_handler_may_take_the_value_alone() -> None:
    def register(bus: Bus, seen: list[Any]) -> None:
        @bus.on(QUEUE)
        async def take(order: Order) -> None:
            seen.append(order)

    assert drive(seen_by(register)) == [Order(id="o1")]


def test_a_handler_may_take_the_delivery_too() -> None:
    def register(bus: Bus, seen: list[Any]) -> None:
        @bus.on(QUEUE)
        async def take(order: Order, delivery: Delivery[Order]) -> None:
            seen.append((order.id, delivery.id))

    assert drive(seen_by(register)) == [("o1", "m1")]


def test_an_unannotated_second_argument_named_delivery_gets_it() -> None:
    def register(bus: Bus, seen: list[Any]) -> None:
        @bus.on(QUEUE)
        async def take(order, delivery):  # type: ignore[no-untyped-def]
            seen.append(delivery.id)

    assert drive(seen_by(register)) == ["m1"]


def test_a_bound_method_may_be_a_handler() -> None:
    class Service:
        def __init__(self, seen: list[Any]) -> None:
            self.seen = seen

        async def take(self, order: Order) -> None:
            self.seen.append(order.id)

    assert drive(seen_by(lambda bus, seen: bus.on(QUEUE)(Service(seen).take) and None)) == ["o1"]


def test_a_partial_may_be_a_handler() -> None:
    async def take(order: Order, *, book: list[Any]) -> None:
        book.append(order.id)

    assert drive(seen_by(lambda bus, seen: bus.on(QUEUE)(partial(take, book=seen)) and None)) == ["o1"]


def test_an_object_with_an_async_call_may_be_a_handler() -> None:
    class Service:
        def __init__(self, seen: list[Any]) -> None:
            self.seen = seen

        async def __call__(self, order: Order) -> None:
            self.seen.append(threading.current_thread())

    assert drive(seen_by(lambda bus, seen: bus.on(QUEUE)(Service(seen)) and None)) == [threading.current_thread()]


def test_what_a_plain_function_gives_to_be_awaited_is_awaited_before_the_message_is_settled() -> None:
    def register(bus: Bus, seen: list[Any]) -> None:
        async def real(order: Order) -> None:
            seen.append(order.id)

        bus.on(QUEUE)(lambda order: real(order))  # the lambda is the point

    assert drive(seen_by(register)) == ["o1"]


def test_an_argument_with_a_default_needs_no_provider() -> None:
    def register(bus: Bus, seen: list[Any]) -> None:
        @bus.on(QUEUE)
        async def take(order: Order, limit: int = 7) -> None:
            seen.append(limit)

    assert drive(seen_by(register)) == [7]


def test_the_decorated_function_stays_what_it_was() -> None:
    async def take(order: Order) -> None: ...

    assert memory().on(QUEUE)(take) is take


def test_handlers_of_another_module_can_be_included() -> None:
    def register(bus: Bus, seen: list[Any]) -> None:
        module = Handlers()

        @module.on(QUEUE)
        async def take(order: Order) -> None:
            seen.append(order.id)

        bus.include(module)

    assert drive(seen_by(register)) == ["o1"]


# --- the wrong ones, each refused where it is written


def nothing() -> None: ...
def star(*args: Any) -> None: ...
def stars(order: Order, **named: Any) -> None: ...
def generator(order: Order) -> Iterator[int]:
    yield 1


async def async_generator(order: Order) -> AsyncIterator[int]:
    yield 1


async def wrong_type(order: Other) -> None: ...


@pytest.mark.parametrize(
    ("handler", "reason"),
    [
        (nothing, "takes no argument"),
        (star, r"\*args or \*\*kwargs"),
        (stars, r"\*args or \*\*kwargs"),
        (generator, "not a plain or async function"),
        (async_generator, "not a plain or async function"),
        (wrong_type, "takes a Other, but Queue.'orders'. carries Order"),
        (42, "not a plain or async function"),
        (max, "signature|args"),
    ],
)
def test_a_function_that_cannot_be_a_handler_is_refused_when_it_is_registered(handler: Any, reason: str) -> None:
    bus = memory()
    with pytest.raises(UsageError, match=reason):
        bus.on(QUEUE)(handler)
    assert bus.registrations == []


def test_a_signal_handler_may_not_ask_for_a_delivery() -> None:
    async def take(order: Order, delivery: Delivery[Order]) -> None: ...

    with pytest.raises(UsageError, match="nothing to settle"):
        memory().on(SIGNAL)(take)  # type: ignore[arg-type]


def test_a_signal_handler_may_ask_for_the_message() -> None:
    async def take(order: Order, message: Message[Order]) -> None: ...

    memory().on(SIGNAL)(take)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"concurrency": 0}, "concurrency"),
        ({"concurrency": "4"}, "concurrency"),
        ({"window": 0}, "window"),
        ({"window": 3, "concurrency": 4}, "window"),
        ({"on_failure": "dead-letter"}, "on_failure"),
        ({"settle": "never"}, "settle"),
        ({"retry": 3}, "Retry"),
        ({"group": "billing"}, "a Queue has no groups"),
        ({"max_deliveries": 0}, "max_deliveries"),
        ({"max_deliveries": "20"}, "max_deliveries"),
    ],
)
def test_a_wrong_option_of_on_is_refused_naming_it(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        memory().on(QUEUE, **options)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"window": 0}, "window"),
        ({"on_failure": "dead-letter"}, "on_failure"),
        ({"group": "billing"}, "a Queue has no groups"),
        ({"max_deliveries": 0}, "max_deliveries"),
    ],
)
def test_a_wrong_option_of_consume_is_refused_naming_it(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        memory().consume(QUEUE, **options)


def test_a_topic_needs_a_group_and_the_refusal_names_them() -> None:
    with pytest.raises(UsageError, match=r"\['billing', 'audit'\]"):
        memory().on(TOPIC)


def test_a_group_that_the_topic_does_not_declare_is_refused() -> None:
    with pytest.raises(UsageError, match="no group 'shipping'"):
        memory().on(TOPIC, group="shipping")


def test_settling_before_the_run_is_refused_on_an_ordered_destination() -> None:
    ordered = Queue("o", Order, key="id", ordered=True)
    with pytest.raises(UsageError, match="gives up the order"):
        memory().on(ordered, settle="before")


def test_something_else_than_a_destination_is_refused() -> None:
    with pytest.raises(UsageError, match="not str"):
        memory().on("orders")  # type: ignore[call-overload]


# --- provide


def test_a_named_argument_is_provided_anew_for_each_message() -> None:
    made: list[int] = []

    def session() -> int:
        made.append(len(made))
        return made[-1]

    async def body() -> None:
        seen: list[int] = []
        bus = memory(provide={"session": session})

        @bus.on(QUEUE)
        async def take(order: Order, session: int) -> None:
            seen.append(session)

        async with bus, bus.consuming():
            for _ in range(2):
                await bus.publish(QUEUE, Order(id="o"))
            await eventually(lambda: seen == [0, 1])

    law(body)


def test_an_async_provider_is_awaited() -> None:
    async def session() -> str:
        return "open"

    def register(bus: Bus, seen: list[Any]) -> None:
        @bus.on(QUEUE)
        async def take(order: Order, delivery: Delivery[Order], *, session: str) -> None:
            seen.append((delivery.id, session))

    assert drive(seen_by(register, provide={"session": session})) == [("m1", "open")]


def test_a_name_that_nobody_provides_is_refused_at_open_naming_what_is_offered() -> None:
    async def body() -> None:
        bus = memory(provide={"db": dict})

        @bus.on(QUEUE)
        async def take(order: Order, session: int) -> None: ...

        with pytest.raises(UsageError, match=r"\['session'\].*\['db'\]"):
            await bus.open()

    law(body)


# --- plain handlers


def test_a_plain_handler_runs_in_a_thread_and_the_loop_goes_on() -> None:
    async def body() -> None:
        bus, let_go, names = memory(), threading.Event(), []

        @bus.on(QUEUE)
        def take(order: Order) -> None:
            names.append(threading.current_thread().name)
            assert let_go.wait(5)

        async with bus, bus.consuming():
            await bus.publish(QUEUE, Order(id="o"))
            await eventually(lambda: names)
            let_go.set()  # only a loop that still turns gets here
            await eventually(lambda: bus.stats(QUEUE).settled == 1)
        assert names[0].startswith("messaging-handler")

    law(body)


def test_plain_handlers_run_as_many_at_a_time_as_asked() -> None:
    async def body() -> None:
        bus, meeting = memory(), threading.Barrier(3)

        @bus.on(QUEUE, concurrency=3)
        def take(order: Order) -> None:
            meeting.wait(5)

        async with bus, bus.consuming():
            for n in range(3):
                await bus.publish(QUEUE, Order(id=f"o{n}"))
            await eventually(lambda: bus.stats(QUEUE).settled == 3)

    law(body)


def test_a_plain_handler_that_raises_is_run_again() -> None:
    async def body() -> None:
        bus, attempts = memory(), []

        @bus.on(QUEUE, retry=Retry(3, "1ms"))
        def take(order: Order, delivery: Delivery[Order]) -> None:
            attempts.append(delivery.attempt)
            if delivery.attempt < 3:
                raise ConnectionError("down")

        async with bus, bus.consuming():
            await bus.publish(QUEUE, Order(id="o"))
            await eventually(lambda: bus.stats(QUEUE).settled == 1)
        assert attempts == [1, 2, 3]

    law(body)


# --- what a handler's publishes carry


def correlations(publish_in: str, first_correlation: str | None) -> tuple[str | None, str]:
    """(correlation id of what a handler published, id of the message it handled)."""

    async def body() -> tuple[str | None, str]:
        bus, child = memory(), Queue("child", bytes)

        @bus.on(QUEUE)
        async def take(order: Order) -> None:
            if publish_in == "task":
                await asyncio.create_task(bus.publish(child, b""))
            elif publish_in == "publisher":
                async with bus.publisher(child) as publisher:
                    await publisher.send(b"")
            else:
                await bus.publish(child, b"")

        async with bus, bus.consuming(), bus.consume(child) as stream:
            sent = await bus.publish(QUEUE, Order(id="o"), correlation_id=first_correlation)
            found = await stream.next(5)
            assert found is not None
            await found.ack()
            return found.correlation_id, sent.id

    return drive(body())


@pytest.mark.parametrize("way", ["handler", "task", "publisher"])
def test_the_correlation_id_flows_from_a_handler_to_what_it_publishes(way: str) -> None:
    assert correlations(way, "c-1")[0] == "c-1"


def test_without_a_correlation_id_the_id_of_the_handled_message_starts_one() -> None:
    found, handled = correlations("handler", None)
    assert found == handled


def test_a_publish_outside_of_handlers_has_no_correlation_id() -> None:
    async def body() -> None:
        queue = Queue("child", bytes)
        async with memory() as bus, bus.consume(queue) as stream:
            await bus.publish(queue, b"")
            found = await stream.next(5)
            assert found is not None and found.correlation_id is None

    law(body)


def test_a_foreign_id_that_cannot_travel_does_not_fail_what_the_handler_publishes() -> None:
    from messaging_sdk.model import Outgoing

    async def body() -> None:
        bus, child, foreign = memory(), Queue("child", bytes), Queue("foreign", bytes)

        @bus.on(foreign, on_failure="stop", retry=Retry(1))
        async def take(value: bytes) -> None:
            await bus.publish(child, b"")

        async with bus, bus.consuming():
            bus.native("main").route(foreign, Outgoing(b"", "naïve id"))  # type: ignore[attr-defined]
            await eventually(lambda: bus.stats(foreign).settled == 1)

    law(body)


def test_a_rejected_order_is_settled_and_buried_whole() -> None:
    async def body() -> None:
        bus = memory()

        @bus.on(QUEUE)
        async def take(order: Order) -> None:
            raise Reject("no such customer")

        async with bus, bus.consuming(), bus.consume(QUEUE.dead_letters()) as graves:
            await bus.publish(QUEUE, Order(id="o1"), headers={"tenant": "t1"}, correlation_id="c-1")
            grave = await graves.next(5)
            assert grave is not None
            assert Order.model_validate_json(grave.body) == Order(id="o1")
            assert (grave.headers, grave.correlation_id) == ({"tenant": "t1"}, "c-1")
            assert grave.provenance["attempts"] == "1"

    law(body)
