"""mq-bridge, a Rust engine behind blocking Python calls: batches of WINDOW, polls of PREFETCH, an `ack` of each poll.

Its `ack` settles a poll's messages one by one on NATS, ten a request on SQS, by one commit on Kafka. Where one message
goes after the other on Kafka it has no linger, as ours. A Route with a Python handler was tried in place of polls, in
batches of 10 to 500, on NATS, Kafka and SQS: no cheaper, and slower in latency on two of them.

On RabbitMQ it publishes confirmed, persistent and mandatory. It cannot consume there: its consumer declares the queue
as a classic one, `no_declare_queue` is its publisher's, and RabbitMQ refuses this for a quorum queue.

On ZeroMQ a queue is REQ and REP, one exchange a batch, the answer after the other process's ack; a signal is PUB and
SUB. All in JSON, which carries a batch in one frame: its raw formats, one frame per message, cost ten times as much.
Signals are on its backend `zmq`, since the other one dropped a third of them.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import closing
from pathlib import Path
from typing import Any, Final

from mq_bridge import Consumer, Publisher

from . import raw_nats, raw_sqs
from .job import PREFETCH, WARM_UP, WINDOW, Job, Sample, Stopwatch
from .peers import beside, ready

Endpoint = dict[str, dict[str, Any]]

_WAIT_MS: Final = 30_000
_GREETING: Final = b"?"
"""Of a signal, until its subscription is known to be there."""


def publish_one(job: Job) -> Sample:
    publisher, watch, body = Publisher.from_config(_output(job)), Stopwatch(), job.body
    for _ in range(WARM_UP // 10):
        publisher.send(body)
    watch.start()
    for _ in range(job.count):
        publisher.send(body)
    return watch.stop(job.count)


def publish_windowed(job: Job) -> Sample:
    """A `send_batch` per window."""
    return _windowed(Publisher.from_config(_output(job)), job)


def consume(job: Job) -> Sample:
    with closing(Consumer.from_config(_input(job))) as consumer:
        return _received(consumer, job)


def latency(job: Job) -> Sample:
    """Sent, then received: one after the other."""
    publisher, watch, body = Publisher.from_config(_output(job)), Stopwatch(), job.body
    with closing(Consumer.from_config(_input(job))) as consumer:

        def one() -> float:
            sent_s = time.perf_counter()
            publisher.send(body)
            _, token = consumer.poll_batch(1, _WAIT_MS)
            took_s = time.perf_counter() - sent_s
            assert token is not None
            consumer.ack(token)
            return took_s

        for _ in range(WARM_UP // 10):
            one()
        watch.start()
        return watch.stop(job.count, [one() for _ in range(job.count)])


def queue(job: Job) -> Sample:
    """A request per window, answered when the other process has settled its messages."""
    publisher = Publisher.from_config(_zeromq(job, "req", bind=True))
    with beside(job):
        return _windowed(publisher, job)


def peer_queue(job: Job) -> None:
    def handle(_: bytes) -> None: ...

    with Consumer.from_config(_zeromq(job, "rep")) as consumer:
        ready()
        while True:
            messages, token = consumer.poll_batch(WINDOW)
            for message in messages:
                handle(message.payload)
            if token is not None:
                consumer.ack(token)


def signal_send(job: Job) -> Sample:
    publisher = Publisher.from_config(_zeromq(job, "pub", bind=True))
    with beside(job):
        _greet(publisher, job)
        return _windowed(publisher, job)


def peer_signal_send(job: Job) -> None:
    with Consumer.from_config(_zeromq(job, "sub")) as consumer:
        ready()
        consumer.poll_batch(1)
        _greeted(job).touch()
        while True:
            consumer.poll_batch(WINDOW)
            consumer.commit()


def signal_receive(job: Job) -> Sample:
    with closing(Consumer.from_config(_zeromq(job, "sub", bind=True))) as consumer, beside(job):
        consumer.poll_batch(1, _WAIT_MS)
        _greeted(job).touch()
        return _received(consumer, job)


def peer_signal_receive(job: Job) -> None:
    publisher = Publisher.from_config(_zeromq(job, "pub"))
    ready()
    _greet(publisher, job)
    _send(publisher, job.body, job.count)
    time.sleep(60)  # until it is killed


def _received(consumer: Consumer, job: Job) -> Sample:
    """From the first message on, greetings ahead of it left out."""
    watch, seen = Stopwatch(), 0

    def handle(_: bytes) -> None:
        nonlocal seen
        seen += 1

    while seen < job.count:
        messages, token = consumer.poll_batch(PREFETCH, _WAIT_MS)
        assert token is not None, f"{seen} of {job.count} came"
        if not seen:
            messages = [message for message in messages if message.payload != _GREETING]
            if messages:
                watch.start()
        for message in messages:
            handle(message.payload)
        consumer.ack(token)
    return watch.stop(job.count)


def _windowed(publisher: Publisher, job: Job) -> Sample:
    watch = Stopwatch()
    _send(publisher, job.body, WARM_UP)
    watch.start()
    _send(publisher, job.body, job.count)
    return watch.stop(job.count)


def _send(publisher: Publisher, body: bytes, count: int) -> None:
    for start in range(0, count, WINDOW):
        publisher.send_batch([body] * min(WINDOW, count - start))


def _greet(publisher: Publisher, job: Job) -> None:
    """What PUB sends before a subscription reaches it is gone, and its socket does not tell when it has."""
    while not _greeted(job).exists():
        publisher.send(_GREETING)
        time.sleep(0.01)


def _greeted(job: Job) -> Path:
    return Path(job.url.partition("://")[2], f"{job.name}.greeted")


def _output(job: Job) -> Endpoint:
    if job.broker == "rabbitmq":
        return {"amqp": {"url": job.url, "queue": job.name, "no_declare_queue": True}}
    if job.broker == "nats":
        return {"nats": {"url": job.url, "stream": job.stream, "subject": job.subject}}
    if job.broker == "sqs":
        return _sqs(job)
    options = [] if job.work == "publish_windowed" else [["linger.ms", "0"]]
    url = job.url.partition("://")[2]
    return {"kafka": {"url": url, "topic": job.name, "create_topic": False, "producer_options": options}}


def _input(job: Job) -> Endpoint:
    if job.broker == "nats":
        asyncio.run(raw_nats.delete_durable(job))  # its consumer is its own, and a stream of this kind allows one
        return {"nats": {**_output(job)["nats"], "prefetch_count": PREFETCH}}
    if job.broker == "sqs":
        return _sqs(job)
    return {"kafka": {"url": job.url.partition("://")[2], "topic": job.name, "group_id": f"{job.name}:workers"}}


def _sqs(job: Job) -> Endpoint:
    access = raw_sqs.Access.of(job.url)
    url = raw_sqs.queue_url(raw_sqs.client(job.url), job)
    keys = {"access_key": access.key, "secret_key": access.secret}
    return {"aws": {"queue_url": url, "endpoint_url": access.endpoint, "region": access.region, **keys}}


def _zeromq(job: Job, kind: str, *, bind: bool = False) -> Endpoint:
    url = f"ipc://{job.url.partition('://')[2]}/{job.name}"
    backend = "omq" if kind in ("req", "rep") else "zmq"
    return {"zeromq": {"url": url, "socket_type": kind, "bind": bind, "format": "json", "backend": backend}}
