"""This SDK on ZeroMQ: a Queue whose ok means settled by the other process, and a Signal."""

from __future__ import annotations

import asyncio

from messaging_sdk import Bus, Queue, Signal

from .job import CONCURRENCY, WINDOW, Job, Sample, Stopwatch
from .ours import published
from .peers import beside, ready


def queue(job: Job) -> Sample:
    """A windowed publish; each message is settled by a handler in the other process."""
    with beside(job):
        return published(job, Queue(job.name, bytes))


def peer_queue(job: Job) -> None:
    bus = Bus(job.url)

    @bus.on(Queue(job.name, bytes), concurrency=CONCURRENCY, on_failure="drop")
    async def handle(_: bytes) -> None: ...

    asyncio.run(_handling(bus))


def signal_send(job: Job) -> Sample:
    with beside(job):
        return published(job, Signal(job.name, bytes))


def peer_signal_send(job: Job) -> None:
    bus = Bus(job.url)

    @bus.on(Signal(job.name, bytes), concurrency=CONCURRENCY)
    async def handle(_: bytes) -> None: ...

    asyncio.run(_handling(bus))


def signal_receive(job: Job) -> Sample:
    """A handler."""

    async def main() -> Sample:
        watch, done, bus, seen = Stopwatch(), asyncio.Event(), Bus(job.url), 0

        @bus.on(Signal(job.name, bytes), concurrency=CONCURRENCY)
        async def handle(_: bytes) -> None:
            nonlocal seen
            if not seen:
                watch.start()
            seen += 1
            if seen == job.count:
                done.set()

        async with bus, bus.consuming():
            with beside(job):
                async with asyncio.timeout(60):
                    await done.wait()
                return watch.stop(job.count - 1)

    return asyncio.run(main())


def peer_signal_receive(job: Job) -> None:
    async def main() -> None:
        async with Bus(job.url) as bus, bus.publisher(Signal(job.name, bytes), window=WINDOW) as publisher:
            ready()
            for _ in range(job.count):
                await publisher.send(job.body)
            await publisher.flush()
            await asyncio.sleep(60)  # until it is killed

    asyncio.run(main())


async def _handling(bus: Bus) -> None:
    async with bus, bus.consuming():
        ready()
        await asyncio.Event().wait()
