"""FastStream on the same works: persistent, confirmed, an ack per message when its handler returns, logging off.

Types are read and validated as by default. On NATS it pulls, as FastStream itself advises, and lets the policy ack
without `max_workers` (what was fetched runs at once): that was its cheapest form tried with default typing.
`apply_types=False` was cheaper still (216 against 352 us, one run under load) and is not used. On RabbitMQ no other
form was tried.
Annotations of handlers stay real types here, because FastStream reads them at run time.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

from faststream import AckPolicy

from .job import FETCH, PREFETCH, WARM_UP, WINDOW, Job, Sample, Stopwatch

Handler = Callable[[], None]


def _broker(job: Job, handler: Handler | None = None) -> Any:
    return {"rabbitmq": _rabbitmq, "nats": _nats, "kafka": _kafka}[job.broker](job, handler)


def _rabbitmq(job: Job, handler: Handler | None) -> Any:
    from faststream.rabbit import Channel, RabbitBroker, RabbitQueue

    broker = RabbitBroker(job.url, logger=None, default_channel=Channel(prefetch_count=PREFETCH))
    if handler is not None:

        @broker.subscriber(RabbitQueue(job.name, declare=False), ack_policy=AckPolicy.NACK_ON_ERROR)
        async def handle(body: bytes) -> None:
            handler()

    return broker


def _nats(job: Job, handler: Handler | None) -> Any:
    from faststream.nats import JStream, NatsBroker, PullSub

    broker = NatsBroker(job.url, logger=None)
    if handler is not None:

        @broker.subscriber(
            job.subject,
            stream=JStream(job.stream, declare=False),
            durable="workers",
            pull_sub=PullSub(batch_size=1 if job.work == "latency" else FETCH),
            ack_policy=AckPolicy.NACK_ON_ERROR,
        )
        async def handle(body: bytes) -> None:
            handler()

    return broker


def _kafka(job: Job, handler: Handler | None) -> Any:
    """On confluent-kafka, as ours is."""
    from faststream.confluent import KafkaBroker

    broker = KafkaBroker(job.url.partition("://")[2], logger=None)
    if handler is not None:

        @broker.subscriber(
            job.name, group_id=f"{job.name}:workers", auto_offset_reset="earliest", ack_policy=AckPolicy.NACK_ON_ERROR
        )
        async def handle(body: bytes) -> None:
            handler()

    return broker


def _publish(broker: Any, job: Job) -> Callable[[], Awaitable[object]]:
    publish, body = broker.publish, job.body
    if job.broker == "rabbitmq":
        return lambda: publish(body, queue=job.name, persist=True)
    if job.broker == "kafka":
        return lambda: publish(body, topic=job.name)
    # Its timeout is 0.5 s by default, which a full window needs at times.
    return lambda: publish(body, subject=job.subject, stream=job.stream, timeout=30)


async def _gathered(publish: Callable[[], Awaitable[object]], count: int) -> None:
    """FastStream has no window of its own."""
    for start in range(0, count, WINDOW):
        calls: Iterable[Awaitable[object]] = [publish() for _ in range(min(WINDOW, count - start))]
        await asyncio.gather(*calls)


def publish_one(job: Job) -> Sample:
    async def main() -> Sample:
        watch = Stopwatch()
        async with _broker(job) as broker:
            publish = _publish(broker, job)
            for _ in range(WARM_UP // 10):
                await publish()
            watch.start()
            for _ in range(job.count):
                await publish()
            return watch.stop(job.count)

    return asyncio.run(main())


def publish_windowed(job: Job) -> Sample:
    """A gather per window."""

    async def main() -> Sample:
        watch = Stopwatch()
        async with _broker(job) as broker:
            publish = _publish(broker, job)
            await _gathered(publish, WARM_UP)
            watch.start()
            await _gathered(publish, job.count)
            return watch.stop(job.count)

    return asyncio.run(main())


def consume(job: Job) -> Sample:
    async def main() -> Sample:
        watch, done = Stopwatch(), asyncio.Event()
        seen = 0

        def handle() -> None:
            nonlocal seen
            if not seen:
                watch.start()
            seen += 1
            if seen == job.count:
                done.set()

        async with _broker(job, handle) as broker:
            await broker.start()
            await done.wait()
            return watch.stop(job.count)

    return asyncio.run(main())


def latency(job: Job) -> Sample:
    async def main() -> Sample:
        watch, arrived = Stopwatch(), asyncio.Event()
        arrived_s = 0.0

        def handle() -> None:
            nonlocal arrived_s
            arrived_s = time.perf_counter()
            arrived.set()

        async def one(publish: Callable[[], Awaitable[object]]) -> float:
            arrived.clear()
            sent_s = time.perf_counter()
            await publish()
            await arrived.wait()
            return arrived_s - sent_s

        async with _broker(job, handle) as broker:
            await broker.start()
            publish = _publish(broker, job)
            for _ in range(WARM_UP // 10):
                await one(publish)
            watch.start()
            delays_s = [await one(publish) for _ in range(job.count)]
            return watch.stop(job.count, delays_s)

    return asyncio.run(main())
