"""The brokers of a run: found by URL or started here; queues are made, filled and deleted on them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from tempfile import TemporaryDirectory
from typing import Final

from .job import Job

URLS: Final = {
    "rabbitmq": "MESSAGING_TEST_RABBITMQ_URL",
    "nats": "MESSAGING_TEST_NATS_URL",
    "sqs": "MESSAGING_TEST_SQS_URL",
    "kafka": "MESSAGING_TEST_KAFKA_URL",
}

_CONTAINERS: Final = {
    "rabbitmq": ("rabbitmq43", 5672, "amqp://sdk:sdk@{}:{}"),
    "sqs": ("ministack", 4566, "sqs://test:test@us-east-1/?endpoint=http://{}:{}"),
    "kafka": ("kafka", 9092, "kafka://{}:{}"),
}
"""Broker -> service of the compose file, its port, and a URL of ours."""


@dataclass(frozen=True, slots=True)
class Broker:
    """One broker that is ready."""

    name: str
    url: str
    version: str

    async def prepare(self, job: Job) -> None:
        """Make the job's queue by our provisioning, and for `consume` put its messages there.

        Those for the other clients are published by the raw one: our headers would cost them time that their users do
        not spend. FastStream needs a header, and Kombu on SQS an envelope of its own.
        """
        from . import ours

        if self.name == "zeromq":
            return
        if job.work == "consume" and job.client in ("ours", "ours_model", "faststream"):
            await ours.fill(job)
            return
        await ours.provision(job)
        if job.work != "consume":
            return
        if self.name == "nats":
            from . import raw_nats

            await raw_nats.fill(job)
        elif self.name == "sqs" and job.client == "kombu":
            from . import with_kombu

            with_kombu.fill(job)
        elif self.name == "sqs":
            from . import raw_sqs

            raw_sqs.fill(job)
        elif self.name == "kafka":
            from . import raw_kafka

            raw_kafka.fill(job)
        else:
            from . import raw_rabbitmq

            raw_rabbitmq.fill(job)

    async def remove(self, job: Job) -> None:
        """Delete the job's queue, whatever is in it."""
        if self.name == "zeromq":
            return
        if self.name == "nats":
            import nats

            client = await nats.connect(self.url)
            await client.jetstream().delete_stream(job.stream)
            await client.close()
        elif self.name == "sqs":
            from . import raw_sqs

            sqs = raw_sqs.client(self.url)
            sqs.delete_queue(QueueUrl=raw_sqs.queue_url(sqs, job))
        elif self.name == "kafka":
            from . import raw_kafka

            raw_kafka.remove(job)
        else:
            import pika

            with pika.BlockingConnection(pika.URLParameters(self.url)) as connection:
                connection.channel().queue_delete(job.name)


@contextmanager
def running(name: str) -> Iterator[Broker]:
    """The broker `name`, at the URL in the environment or started here and ended with the block.

    NATS is embedded as a child process, ZeroMQ is a directory where processes meet; RabbitMQ, Kafka, and ministack for
    SQS run in a container. Raises EngineMissing without an engine.
    """
    url = os.environ.get(URLS.get(name, ""))
    if name == "zeromq":
        with TemporaryDirectory(prefix="bench-") as directory:
            url = f"zeromq://{directory}"
            yield Broker(name, url, _version(url))
    elif url is not None:
        yield Broker(name, url, _version(url))
    elif name == "nats":
        from messaging_sdk.cli.demo import embedded_server

        with embedded_server() as url:
            yield Broker(name, url, _version(url))
    else:
        from messaging_sdk_contract.live import start_service

        recipe, port, address = _CONTAINERS[name]
        service = start_service(recipe)
        try:
            url = address.format(*service.address(port))
            service.wait_ready(lambda: _version(url))
            yield Broker(name, url, _version(url))
        finally:
            service.remove()


def _version(url: str) -> str:
    """What the live server says it is; raises what connecting raises."""
    import asyncio

    from . import ours

    return asyncio.run(ours.server_version(url))
