"""pika: as its documentation shows it ("usual"), and at its best by its public interface ("best").

All of them: quorum queue, persistent, mandatory, confirms.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any, Final

import pika
from pika.adapters.asyncio_connection import AsyncioConnection
from pika.adapters.select_connection import SelectConnection

from .job import PREFETCH, WARM_UP, WINDOW, Job, Sample, Stopwatch

PERSISTENT: Final = pika.BasicProperties(delivery_mode=2)
ACK_EVERY: Final = 100
"""Messages per `ack(multiple=True)`: fewer calls than that gained nothing."""


class Publisher:
    """One future per message, resolved by the confirm's tag, as in pika's asynchronous publisher example."""

    def __init__(self, channel: Any, job: Job) -> None:
        self._channel = channel
        self._name = job.name
        self._body = job.body
        self._loop = asyncio.get_running_loop()
        self._waiting: dict[int, asyncio.Future[None]] = {}
        self._tag = 0

    async def open(self) -> None:
        selected = self._loop.create_future()
        self._channel.confirm_delivery(self._confirmed, callback=selected.set_result)
        await selected

    def publish(self) -> asyncio.Future[None]:
        self._tag += 1
        future = self._waiting[self._tag] = self._loop.create_future()
        self._channel.basic_publish("", self._name, self._body, PERSISTENT, mandatory=True)
        return future

    def _confirmed(self, frame: Any) -> None:
        assert isinstance(frame.method, pika.spec.Basic.Ack), "the broker refused a message"
        tag = frame.method.delivery_tag
        if not frame.method.multiple:
            self._waiting.pop(tag).set_result(None)
            return
        for waiting in list(self._waiting):
            if waiting > tag:
                break
            self._waiting.pop(waiting).set_result(None)


async def _connected(url: str) -> Any:
    opened = asyncio.get_running_loop().create_future()
    AsyncioConnection(
        pika.URLParameters(url),
        on_open_callback=opened.set_result,
        on_open_error_callback=lambda _, error: opened.set_exception(error),
    )
    return await opened


async def _channel(connection: Any) -> Any:
    opened = asyncio.get_running_loop().create_future()
    connection.channel(on_open_callback=opened.set_result)
    return await opened


async def _publisher(job: Job) -> Publisher:
    publisher = Publisher(await _channel(await _connected(job.url)), job)
    await publisher.open()
    return publisher


def usual_publish_one(job: Job) -> Sample:
    async def main() -> Sample:
        publisher, watch = await _publisher(job), Stopwatch()
        for _ in range(WARM_UP // 10):
            await publisher.publish()
        watch.start()
        for _ in range(job.count):
            await publisher.publish()
        return watch.stop(job.count)

    return asyncio.run(main())


def usual_publish_windowed(job: Job) -> Sample:
    """A gather per window."""

    async def main() -> Sample:
        publisher, watch = await _publisher(job), Stopwatch()
        await asyncio.gather(*[publisher.publish() for _ in range(WARM_UP)])
        watch.start()
        for start in range(0, job.count, WINDOW):
            await asyncio.gather(*[publisher.publish() for _ in range(min(WINDOW, job.count - start))])
        return watch.stop(job.count)

    return asyncio.run(main())


def usual_consume(job: Job) -> Sample:
    """An ack per message, from the callback."""

    def settle(channel: Any, tag: int, _: int) -> None:
        channel.basic_ack(tag)

    return _consume(job, settle)


def best_consume(job: Job) -> Sample:
    """One ack per 100."""

    def settle(channel: Any, tag: int, seen: int) -> None:
        if seen % ACK_EVERY == 0 or seen == job.count:
            channel.basic_ack(tag, multiple=True)

    return _consume(job, settle)


def _consume(job: Job, settle: Callable[[Any, int, int], None]) -> Sample:
    async def main() -> Sample:
        channel, watch, done = await _channel(await _connected(job.url)), Stopwatch(), asyncio.Event()
        seen = 0

        def take(channel: Any, method: Any, _properties: Any, _body: bytes) -> None:
            nonlocal seen
            if not seen:
                watch.start()
            seen += 1
            settle(channel, method.delivery_tag, seen)
            if seen == job.count:
                done.set()

        channel.basic_qos(prefetch_count=PREFETCH)
        channel.basic_consume(job.name, take)
        await done.wait()
        return watch.stop(job.count)

    return asyncio.run(main())


def usual_latency(job: Job) -> Sample:
    """A connection to publish and one to consume, as RabbitMQ's documentation advises."""

    async def main() -> Sample:
        publisher, watch, arrived = await _publisher(job), Stopwatch(), asyncio.Event()
        consuming = await _channel(await _connected(job.url))
        arrived_s = 0.0

        def take(channel: Any, method: Any, _properties: Any, _body: bytes) -> None:
            nonlocal arrived_s
            arrived_s = time.perf_counter()
            channel.basic_ack(method.delivery_tag)
            arrived.set()

        async def one() -> float:
            arrived.clear()
            sent_s = time.perf_counter()
            await publisher.publish()
            await arrived.wait()
            return arrived_s - sent_s

        consuming.basic_qos(prefetch_count=PREFETCH)
        consuming.basic_consume(job.name, take)
        for _ in range(WARM_UP // 10):
            await one()
        watch.start()
        delays_s = [await one() for _ in range(job.count)]
        return watch.stop(job.count, delays_s)

    return asyncio.run(main())


class Windowed:
    """SelectConnection's own loop and callbacks, no future: publishes while fewer than `window` are unconfirmed."""

    def __init__(self, job: Job, window: int, warm_up: int) -> None:
        self._job = job
        self._window = window
        self._warm_up = warm_up
        self._watch = Stopwatch()
        self._sample: Sample | None = None
        self._low = 0  # all tags up to here are confirmed, and these above it:
        self._early: set[int] = set()
        self._connection = SelectConnection(pika.URLParameters(job.url), on_open_callback=self._opened)

    def run(self) -> Sample:
        self._connection.ioloop.start()
        assert self._sample is not None
        return self._sample

    def _opened(self, connection: Any) -> None:
        connection.channel(on_open_callback=self._select)

    def _select(self, channel: Any) -> None:
        self._channel = channel
        channel.confirm_delivery(self._confirmed, callback=lambda _: self._begin())

    def _begin(self) -> None:
        if not self._warm_up:
            self._watch.start()
        self._unsent = self._unconfirmed = self._warm_up or self._job.count
        self._top_up()

    def _confirmed(self, frame: Any) -> None:
        assert isinstance(frame.method, pika.spec.Basic.Ack), "the broker refused a message"
        tag = frame.method.delivery_tag
        if frame.method.multiple:
            known = {early for early in self._early if early <= tag}
            self._early -= known
            self._unconfirmed -= tag - self._low - len(known)
            self._low = tag
        else:
            self._unconfirmed -= 1
            if tag == self._low + 1:
                self._low = tag
            else:
                self._early.add(tag)
        if self._unsent:
            self._top_up()
        elif not self._unconfirmed:
            self._finish()

    def _top_up(self) -> None:
        publish, name, body = self._channel.basic_publish, self._job.name, self._job.body
        free = min(self._unsent, self._window - (self._unconfirmed - self._unsent))
        for _ in range(free):
            publish("", name, body, PERSISTENT, mandatory=True)
        self._unsent -= free

    def _finish(self) -> None:
        if self._warm_up:
            self._warm_up = 0
            self._begin()
        else:
            self._sample = self._watch.stop(self._job.count)
            self._connection.ioloop.stop()


def best_publish_one(job: Job) -> Sample:
    """The next publish from the last one's confirm callback."""
    return Windowed(job, 1, WARM_UP // 10).run()


def best_publish_windowed(job: Job) -> Sample:
    return Windowed(job, WINDOW, WARM_UP).run()


def fill(job: Job) -> None:
    """Put the messages of `job` into its queue, as pika's users would: no properties but the delivery mode."""
    if job.count:
        Windowed(job, WINDOW, 0).run()


best_latency = usual_latency
