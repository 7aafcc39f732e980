"""nats-py on JetStream: as its documentation shows it ("usual"), and at its best by its public interface ("best")."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any, Final

import nats
from nats.js.api import ConsumerConfig

from .job import FETCH, WARM_UP, WINDOW, Job, Sample, Stopwatch

DURABLE: Final = "workers"
"""The pull consumer that our provisioning made, with explicit acks and without a limit of deliveries."""


def usual_publish_one(job: Job) -> Sample:
    async def main() -> Sample:
        client, watch, subject, body = await nats.connect(job.url), Stopwatch(), job.subject, job.body
        jetstream = client.jetstream()
        for _ in range(WARM_UP // 10):
            await jetstream.publish(subject, body)
        watch.start()
        for _ in range(job.count):
            await jetstream.publish(subject, body)
        sample = watch.stop(job.count)
        await client.close()
        return sample

    return asyncio.run(main())


def usual_publish_windowed(job: Job) -> Sample:
    """`publish_async`, which keeps the window itself."""

    async def main() -> Sample:
        client, watch, subject, body = await nats.connect(job.url), Stopwatch(), job.subject, job.body
        jetstream = client.jetstream(publish_async_max_pending=WINDOW)
        for _ in range(WARM_UP):
            await jetstream.publish_async(subject, body)
        await jetstream.publish_async_completed()
        watch.start()
        futures = [await jetstream.publish_async(subject, body) for _ in range(job.count)]
        await jetstream.publish_async_completed()
        sample = watch.stop(job.count)
        for future in futures:
            future.result()
        await client.close()
        return sample

    return asyncio.run(main())


def usual_consume(job: Job) -> Sample:
    """`fetch(100)`, an `ack` per message, which is not answered; ours waits for the server's answer to each."""

    async def main() -> Sample:
        client, watch = await nats.connect(job.url), Stopwatch()
        pulling = await client.jetstream().pull_subscribe_bind(DURABLE, job.stream)
        left = job.count
        while left:
            messages = await pulling.fetch(min(FETCH, left), timeout=5)
            if left == job.count:
                watch.start()
            for message in messages:
                await message.ack()
            left -= len(messages)
        await client.flush()
        sample = watch.stop(job.count)
        await client.close()
        return sample

    return asyncio.run(main())


def usual_latency(job: Job) -> Sample:
    """`fetch(1)` in a loop."""

    async def listen(client: Any, job: Job, arrive: Callable[[], None]) -> Callable[[], Awaitable[None]]:
        pulling = await client.jetstream().pull_subscribe_bind(DURABLE, job.stream)

        async def pull() -> None:
            while True:
                for message in await pulling.fetch(1, timeout=30):
                    arrive()
                    await message.ack()

        task = asyncio.create_task(pull())

        async def stop() -> None:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task

        return stop

    return asyncio.run(_latency(job, listen))


class Publisher:
    """`nc.publish` with a reply subject of our own, and one subscription that counts the acks of a whole window."""

    def __init__(self, client: Any, job: Job) -> None:
        self._client = client
        self._job = job
        self._inbox = client.new_inbox()
        self._unconfirmed = 0
        self._room = asyncio.Event()

    async def open(self) -> None:
        await self._client.subscribe(self._inbox, cb=self._confirmed)

    async def publish(self, count: int, window: int) -> None:
        """Publish `count` messages and wait for all their acks."""
        publish, subject, body, inbox = self._client.publish, self._job.subject, self._job.body, self._inbox
        for _ in range(count):
            while self._unconfirmed >= window:
                self._room.clear()
                await self._room.wait()
            self._unconfirmed += 1
            await publish(subject, body, reply=inbox)
        while self._unconfirmed:
            self._room.clear()
            await self._room.wait()

    async def _confirmed(self, message: Any) -> None:
        assert b'"error"' not in message.data, message.data
        self._unconfirmed -= 1
        self._room.set()


async def _published(job: Job, window: int, warm_up: int) -> Sample:
    client, watch = await nats.connect(job.url), Stopwatch()
    publisher = Publisher(client, job)
    await publisher.open()
    await publisher.publish(warm_up, window)
    watch.start()
    await publisher.publish(job.count, window)
    sample = watch.stop(job.count)
    await client.close()
    return sample


def best_publish_one(job: Job) -> Sample:
    return asyncio.run(_published(job, 1, WARM_UP // 10))


def best_publish_windowed(job: Job) -> Sample:
    return asyncio.run(_published(job, WINDOW, WARM_UP))


async def _push(client: Any, job: Job, take: Callable[[Any], Awaitable[None]]) -> None:
    """A push subscription; a stream of this kind allows one consumer, so the pull consumer goes first."""
    jetstream = client.jetstream()
    await jetstream.delete_consumer(job.stream, DURABLE)
    await jetstream.subscribe(
        job.subject, stream=job.stream, durable="pushed", cb=take, manual_ack=True, config=ConsumerConfig()
    )


def best_consume(job: Job) -> Sample:
    """A push subscription's callback, an `ack` per message, which is not answered."""

    async def main() -> Sample:
        client, watch, done = await nats.connect(job.url), Stopwatch(), asyncio.Event()
        seen = 0

        async def take(message: Any) -> None:
            nonlocal seen
            if not seen:
                watch.start()
            seen += 1
            await message.ack()
            if seen == job.count:
                done.set()

        await _push(client, job, take)
        await done.wait()
        await client.flush()
        sample = watch.stop(job.count)
        await client.close()
        return sample

    return asyncio.run(main())


def best_latency(job: Job) -> Sample:
    async def listen(client: Any, job: Job, arrive: Callable[[], None]) -> Callable[[], Awaitable[None]]:
        async def take(message: Any) -> None:
            arrive()
            await message.ack()

        async def stop() -> None:
            """The client's close ends it."""

        await _push(client, job, take)
        return stop

    return asyncio.run(_latency(job, listen))


Listen = Callable[[Any, Job, Callable[[], None]], Awaitable[Callable[[], Awaitable[None]]]]
"""(client, job, what to call on arrival): starts listening, returns what ends it."""


async def _latency(job: Job, listen: Listen) -> Sample:
    client, watch, arrived, subject, body = (
        await nats.connect(job.url),
        Stopwatch(),
        asyncio.Event(),
        job.subject,
        job.body,
    )
    jetstream = client.jetstream()
    arrived_s = 0.0

    def arrive() -> None:
        nonlocal arrived_s
        arrived_s = time.perf_counter()
        arrived.set()

    async def one() -> float:
        arrived.clear()
        sent_s = time.perf_counter()
        await jetstream.publish(subject, body)
        await arrived.wait()
        return arrived_s - sent_s

    stop = await listen(client, job, arrive)
    for _ in range(WARM_UP // 10):
        await one()
    watch.start()
    delays_s = [await one() for _ in range(job.count)]
    sample = watch.stop(job.count, delays_s)
    await stop()
    await client.close()
    return sample


async def delete_durable(job: Job) -> None:
    """Make room for another client's consumer."""
    client = await nats.connect(job.url)
    await client.jetstream().delete_consumer(job.stream, DURABLE)
    await client.close()


async def fill(job: Job) -> None:
    """Put the messages of `job` into its stream, as nats-py's users would: without headers."""
    if job.count:
        await _published(job, WINDOW, 0)
