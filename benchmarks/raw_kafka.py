"""confluent-kafka as its documentation shows it ("usual"), and with the header that a message id is ("best").

Produce with a callback and `poll(0)`, consume in batches with a handler call and a stored offset each, which a timer
commits; ours commits what was settled and waits for the answer.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing
from typing import Any, Final

from confluent_kafka import Consumer, Message, Producer
from confluent_kafka.admin import AdminClient

from .job import PREFETCH, WARM_UP, WINDOW, Job, Sample, Stopwatch

GROUP: Final = "workers"
Headers = list[tuple[str, str | bytes | None]]
HEADER: Final[Headers] = [("messaging-id", b"0123456789abcdef01234567")]
_WAIT_S: Final = 10.0


def servers(url: str) -> dict[str, Any]:
    """What a client needs for a URL of ours, `kafka://host:port`."""
    return {"bootstrap.servers": url.partition("://")[2]}


def usual_publish_one(job: Job) -> Sample:
    """One after the other, at the default linger of 5 ms."""
    return _one_at_a_time(job, Producer(servers(job.url)))


def best_publish_one(job: Job) -> Sample:
    """The same without linger."""
    return _one_at_a_time(job, Producer(servers(job.url) | {"linger.ms": 0}))


def _one_at_a_time(job: Job, producer: Producer) -> Sample:
    watch = Stopwatch()

    def one() -> None:
        producer.produce(job.name, job.body)
        assert producer.flush(_WAIT_S) == 0

    for _ in range(WARM_UP // 10):
        one()
    watch.start()
    for _ in range(job.count):
        one()
    return watch.stop(job.count)


def usual_publish_windowed(job: Job) -> Sample:
    return _windowed(job, [])


def best_publish_windowed(job: Job) -> Sample:
    """With a header, which ours cannot do without: it carries the message's id."""
    return _windowed(job, HEADER)


def _windowed(job: Job, headers: Headers) -> Sample:
    producer, watch = Producer(servers(job.url)), Stopwatch()
    _send(producer, job, WARM_UP, headers)
    watch.start()
    _send(producer, job, job.count, headers)
    return watch.stop(job.count)


def _send(producer: Producer, job: Job, count: int, headers: Headers) -> None:
    produce, poll, topic, body = producer.produce, producer.poll, job.name, job.body
    done = 0

    def report(error: object, _: Message) -> None:
        nonlocal done
        assert error is None
        done += 1

    for sent in range(count):
        while sent - done >= WINDOW:
            poll(_WAIT_S)
        if headers:
            produce(topic, body, on_delivery=report, headers=headers)
        else:
            produce(topic, body, on_delivery=report)
        poll(0)
    assert producer.flush(_WAIT_S) == 0 and done == count


def usual_consume(job: Job) -> Sample:
    seen = 0

    def handle(body: bytes | None) -> None:
        nonlocal seen
        seen += 1

    watch = Stopwatch()
    with closing(_consumer(job)) as consumer:
        left = job.count
        while left:
            records = consumer.consume(PREFETCH, 1)
            if records and left == job.count:
                watch.start()
            for record in records:
                assert record.error() is None
                handle(record.value())
                consumer.store_offsets(record)
            left -= len(records)
        assert seen == job.count
        consumer.commit(asynchronous=False)
        return watch.stop(job.count)


def usual_latency(job: Job) -> Sample:
    return _latency(job, Producer(servers(job.url)))


def best_latency(job: Job) -> Sample:
    """Without linger."""
    return _latency(job, Producer(servers(job.url) | {"linger.ms": 0}))


def _latency(job: Job, producer: Producer) -> Sample:
    watch = Stopwatch()
    with closing(_consumer(job)) as consumer:
        poll: Callable[[float], Message | None] = consumer.poll

        def one() -> float:
            sent_s = time.perf_counter()
            producer.produce(job.name, job.body)
            producer.flush(_WAIT_S)
            while (record := poll(0.1)) is None:
                pass
            took_s = time.perf_counter() - sent_s
            consumer.store_offsets(record)
            return took_s

        for _ in range(WARM_UP // 10):
            one()
        watch.start()
        return watch.stop(job.count, [one() for _ in range(job.count)])


def _consumer(job: Job) -> Consumer:
    group = {"group.id": f"{job.name}:{GROUP}", "enable.auto.offset.store": False, "auto.offset.reset": "earliest"}
    consumer = Consumer(servers(job.url) | group)
    consumer.subscribe([job.name])
    return consumer


def fill(job: Job) -> None:
    """Put the messages of `job` into its topic, without headers."""
    _send(Producer(servers(job.url)), job, job.count, [])


def remove(job: Job) -> None:
    admin = AdminClient(servers(job.url))
    for deleted in admin.delete_topics([job.name]).values():
        deleted.result(_WAIT_S)
