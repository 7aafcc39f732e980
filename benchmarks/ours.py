"""This SDK: the same four works, on a Queue of bytes or of a pydantic model."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

from messaging_sdk import Bus, Destination, Queue
from messaging_sdk.config import from_url
from messaging_sdk.registry import make_driver

from .job import CONCURRENCY, WARM_UP, WINDOW, Job, Reading, Sample, Stopwatch


def publish_one(job: Job) -> Sample:
    """`await bus.publish(...)`, one after the other."""

    async def main() -> Sample:
        queue, value, watch = _queue(job), _value(job), Stopwatch()
        async with Bus(job.url) as bus:
            for _ in range(WARM_UP // 10):
                await bus.publish(queue, value)
            watch.start()
            for _ in range(job.count):
                await bus.publish(queue, value)
            return watch.stop(job.count)

    return asyncio.run(main())


def publish_windowed(job: Job) -> Sample:
    """`bus.publisher(...)` with a window."""
    return published(job, _queue(job))


def published(job: Job, destination: Destination[Any]) -> Sample:
    """A windowed publish to `destination`; the clock stops at the last outcome."""

    async def main() -> Sample:
        value, watch = _value(job), Stopwatch()
        async with Bus(job.url) as bus, bus.publisher(destination, window=WINDOW) as publisher:
            for _ in range(WARM_UP):
                await publisher.send(value)
            await publisher.flush()
            watch.start()
            for _ in range(job.count):
                await publisher.send(value)
            await publisher.flush()
            sample = watch.stop(job.count)
        assert publisher.sent == WARM_UP + job.count, publisher.failed[:1]
        return sample

    return asyncio.run(main())


def consume(job: Job) -> Sample:
    """A handler; the clock stops when every settlement is answered."""

    async def main() -> Sample:
        queue, watch, done = _queue(job), Stopwatch(), asyncio.Event()
        seen = 0

        async def handle(_: object) -> None:
            nonlocal seen
            if not seen:
                watch.start()
            seen += 1
            if seen == job.count:
                done.set()

        bus = Bus(job.url)
        bus.on(queue, concurrency=CONCURRENCY, on_failure="drop")(handle)
        async with bus, bus.consuming():
            await done.wait()
            await _until(lambda: bus.idle)
            return watch.stop(job.count)

    return asyncio.run(main())


def latency(job: Job) -> Sample:
    """One message at a time; the next one only after the last one's confirm and handler."""

    async def main() -> Sample:
        queue, value, watch, arrived = _queue(job), _value(job), Stopwatch(), asyncio.Event()
        arrived_s = 0.0

        async def handle(_: object) -> None:
            nonlocal arrived_s
            arrived_s = time.perf_counter()
            arrived.set()

        async def one(bus: Bus) -> float:
            arrived.clear()
            sent_s = time.perf_counter()
            await bus.publish(queue, value)
            await arrived.wait()
            return arrived_s - sent_s

        bus = Bus(job.url)
        bus.on(queue, concurrency=CONCURRENCY, on_failure="drop")(handle)
        async with bus, bus.consuming():
            for _ in range(WARM_UP // 10):
                await one(bus)
            watch.start()
            delays_s = [await one(bus) for _ in range(job.count)]
            return watch.stop(job.count, delays_s)

    return asyncio.run(main())


async def fill(job: Job) -> None:
    """Make the queue of `job` and put its messages there."""
    is_model = job.client == "ours_model"
    body = Reading.of_size(job.size).model_dump_json().encode() if is_model else job.body
    # Without it FastStream would try to read each body as JSON.
    headers = {"content-type": "application/octet-stream"} if job.client == "faststream" else None
    async with Bus(job.url) as bus, bus.publisher(Queue(job.name, bytes), window=WINDOW) as publisher:
        for _ in range(job.count):
            await publisher.send(body, headers=headers)
    assert publisher.sent == job.count, publisher.failed[:1]


async def provision(job: Job) -> None:
    """Make the queue of `job`."""
    bus = Bus(job.url)
    bus.declare(Queue(job.name, bytes))
    async with bus:
        return


async def server_version(url: str) -> str:
    """What the live server says it is; raises what connecting raises."""
    settings = from_url(url)
    (backend,) = settings.backends.values()
    driver = make_driver(backend, settings)
    try:
        await driver.open()
        return driver.server()
    finally:
        await driver.close()


def _queue(job: Job) -> Queue[Any]:
    return Queue(job.name, Reading if job.client == "ours_model" else bytes)


def _value(job: Job) -> Any:
    return Reading.of_size(job.size) if job.client == "ours_model" else job.body


async def _until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110  # a few times per run; a hook would cost on the hot path
        await asyncio.sleep(0.0005)
