"""Laws of middleware: the first is outermost, either side may be left out, and a refusal sends nothing."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from _drive import drive, eventually
from _scripted import memory

from messaging_sdk import Destination, InvalidMessage, Message, Middleware, Queue, Retry
from messaging_sdk.model import Outgoing
from messaging_sdk.pipeline import Call

QUEUE = Queue("work", str)


class Named(Middleware):
    def __init__(self, name: str, log: list[str]) -> None:
        self.name = name
        self.log = log

    def publish(self, destination: Destination[Any], message: Outgoing) -> Outgoing:
        self.log.append(f"{self.name} publishes to {destination.name}")
        return message

    async def handle(self, destination: Destination[Any], message: Message[Any], call: Call) -> None:
        self.log.append(f"{self.name} in")
        try:
            await call(message)
        finally:
            self.log.append(f"{self.name} out")


def law(body: Callable[[], Awaitable[None]]) -> None:
    drive(body())  # type: ignore[arg-type]


def test_the_first_middleware_is_the_outermost_on_both_sides() -> None:
    async def body() -> None:
        log: list[str] = []
        bus = memory(middleware=[Named("outer", log), Named("inner", log)])

        @bus.on(QUEUE)
        async def take(value: str) -> None:
            log.append(value)

        async with bus, bus.consuming():
            await bus.publish(QUEUE, "handler")
            await eventually(lambda: bus.stats(QUEUE).settled == 1)
        assert log == [
            "outer publishes to work", "inner publishes to work",
            "outer in", "inner in", "handler", "inner out", "outer out",
        ]  # fmt: skip

    law(body)


def test_a_publish_middleware_may_change_the_message() -> None:
    class Stamp(Middleware):
        def publish(self, destination: Destination[Any], message: Outgoing) -> Outgoing:
            message.headers = {**message.headers, "stamp": "1"}
            return message

    async def body() -> None:
        async with memory(middleware=[Stamp()]) as bus, bus.consume(QUEUE) as stream:
            await bus.publish(QUEUE, "x", headers={"own": "2"})
            found = await stream.next(5)
            assert found is not None and found.headers == {"own": "2", "stamp": "1"}

    law(body)


def test_a_publish_middleware_that_raises_sends_nothing() -> None:
    class No(Middleware):
        def publish(self, destination: Destination[Any], message: Outgoing) -> Outgoing:
            raise InvalidMessage("not today")

    async def body() -> None:
        async with memory(middleware=[No()]) as bus, bus.consume(QUEUE) as stream:
            with pytest.raises(InvalidMessage, match="not today"):
                await bus.publish(QUEUE, "x")
            assert await stream.next(0.02) is None

    law(body)


def test_an_exception_of_a_handle_middleware_is_a_failed_run() -> None:
    class FailOnce(Middleware):
        runs = 0

        async def handle(self, destination: Destination[Any], message: Message[Any], call: Call) -> None:
            self.runs += 1
            if self.runs == 1:
                raise ConnectionError("down")
            await call(message)

    async def body() -> None:
        layer, seen = FailOnce(), []
        bus = memory(middleware=[layer])

        @bus.on(QUEUE, retry=Retry(2, "1ms"))
        async def take(value: str) -> None:
            seen.append(value)

        async with bus, bus.consuming():
            await bus.publish(QUEUE, "x")
            await eventually(lambda: seen == ["x"])
        assert layer.runs == 2

    law(body)


def test_a_handle_middleware_sees_the_value_decoded() -> None:
    class Look(Middleware):
        def __init__(self) -> None:
            self.seen: list[Any] = []

        async def handle(self, destination: Destination[Any], message: Message[Any], call: Call) -> None:
            self.seen.append((destination.name, message.data))
            await call(message)

    async def body() -> None:
        layer = Look()
        bus = memory(middleware=[layer])

        @bus.on(QUEUE)
        async def take(value: str) -> None: ...

        async with bus, bus.consuming():
            await bus.publish(QUEUE, "x")
            await eventually(lambda: layer.seen == [("work", "x")])

    law(body)
