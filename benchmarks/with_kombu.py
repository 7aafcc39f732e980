# mypy: disallow-untyped-calls=False
"""Kombu on the same works: a confirm or an answer per publish, an ack per message, its messages as they are.

On RabbitMQ with `confirm_publish`, persistent and mandatory, and `on_message`, which spares it the decoding. On SQS its
defaults (envelopes in base64, boto3), without the second that it sleeps by default after an empty poll. It can publish
one after the other only: no window on RabbitMQ, no batch requests on SQS, so that row is not measured. Latency has one
connection for both ends, so that a delivery can be handled while a confirm is waited for.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Final

from kombu.connection import Connection
from kombu.entity import Queue
from kombu.message import Message
from kombu.messaging import Consumer, Producer

from . import raw_sqs
from .job import PREFETCH, WARM_UP, Job, Sample, Stopwatch

_WAIT_S: Final = 30.0


def publish_one(job: Job) -> Sample:
    watch = Stopwatch()
    with _connection(job) as connection:
        publish = _publish(connection, job)
        for _ in range(WARM_UP // 10):
            publish()
        watch.start()
        for _ in range(job.count):
            publish()
        return watch.stop(job.count)


def consume(job: Job) -> Sample:
    """An ack per message, from the callback; on SQS each is a request."""
    watch, seen = Stopwatch(), 0

    def take(message: Message) -> None:
        nonlocal seen
        if not seen:
            watch.start()
        seen += 1
        message.ack()

    with _connection(job) as connection, _consumer(connection, job, take):
        while seen < job.count:
            connection.drain_events(timeout=_WAIT_S)
        return watch.stop(job.count)


def latency(job: Job) -> Sample:
    watch, arrived_s = Stopwatch(), 0.0

    def take(message: Message) -> None:
        nonlocal arrived_s
        arrived_s = time.perf_counter()
        message.ack()

    with _connection(job) as connection, _consumer(connection, job, take):
        publish = _publish(connection, job)

        def one() -> float:
            sent_s = time.perf_counter()
            publish()
            while arrived_s < sent_s:
                connection.drain_events(timeout=_WAIT_S)
            return arrived_s - sent_s

        for _ in range(WARM_UP // 10):
            one()
        watch.start()
        return watch.stop(job.count, [one() for _ in range(job.count)])


def fill(job: Job) -> None:
    """Put the messages of `job` into its queue on SQS, where it reads its own envelopes only."""
    with _connection(job) as connection:
        publish = _publish(connection, job)
        for _ in range(job.count):
            publish()


def _connection(job: Job) -> Connection:
    if job.broker == "rabbitmq":
        return Connection(job.url, transport_options={"confirm_publish": True})
    access = raw_sqs.Access.of(job.url)
    url = raw_sqs.queue_url(raw_sqs.client(job.url), job)
    options = {
        "region": access.region,
        "is_secure": access.endpoint.startswith("https:"),
        "predefined_queues": {job.name: {"url": url, "access_key_id": access.key, "secret_access_key": access.secret}},
        "wait_time_seconds": 1,
        "polling_interval": 0,
    }
    return Connection(f"sqs://{access.endpoint.partition('://')[2]}", transport_options=options)


def _publish(connection: Connection, job: Job) -> Callable[[], object]:
    publish, name, body = Producer(connection, auto_declare=False).publish, job.name, job.body
    if job.broker == "sqs":
        return lambda: publish(body, routing_key=name)
    return lambda: publish(body, routing_key=name, mandatory=True)


def _consumer(connection: Connection, job: Job, take: Callable[[Message], None]) -> Any:
    queue = Queue(job.name, no_declare=True)
    return Consumer(
        connection.channel(), [queue], on_message=take, prefetch_count=PREFETCH, auto_declare=False, no_ack=False
    )
