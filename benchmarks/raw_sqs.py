"""boto3 on SQS as its documentation shows it ("usual"): batches of ten both ways, one request after the other."""

from __future__ import annotations

import time
from typing import Any, Final, NamedTuple
from urllib.parse import parse_qs, urlsplit

import boto3

from .job import WARM_UP, Job, Sample, Stopwatch

TEN: Final = 10
"""Entries of a batch request, at most."""


class Access(NamedTuple):
    """What a URL of ours says: `sqs://key:secret@region/?endpoint=...`."""

    key: str
    secret: str
    region: str
    endpoint: str

    @classmethod
    def of(cls, url: str) -> Access:
        parts = urlsplit(url)
        return cls(
            parts.username or "", parts.password or "", parts.hostname or "", parse_qs(parts.query)["endpoint"][0]
        )


def client(url: str) -> Any:
    """boto3's client for a URL of ours."""
    access = Access.of(url)
    session = boto3.session.Session(access.key, access.secret, region_name=access.region)
    return session.client("sqs", endpoint_url=access.endpoint)


def queue_url(sqs: Any, job: Job) -> str:
    found: str = sqs.get_queue_url(QueueName=job.name)["QueueUrl"]
    return found


def usual_publish_one(job: Job) -> Sample:
    sqs, watch, body = client(job.url), Stopwatch(), job.body.decode()
    url = queue_url(sqs, job)
    for _ in range(WARM_UP // 10):
        sqs.send_message(QueueUrl=url, MessageBody=body)
    watch.start()
    for _ in range(job.count):
        sqs.send_message(QueueUrl=url, MessageBody=body)
    return watch.stop(job.count)


def usual_publish_windowed(job: Job) -> Sample:
    sqs, watch = client(job.url), Stopwatch()
    _send(sqs, job, WARM_UP)
    watch.start()
    _send(sqs, job, job.count)
    return watch.stop(job.count)


def usual_consume(job: Job) -> Sample:
    sqs, watch = client(job.url), Stopwatch()
    url, left = queue_url(sqs, job), job.count
    while left:
        found = sqs.receive_message(QueueUrl=url, MaxNumberOfMessages=TEN, WaitTimeSeconds=1).get("Messages", ())
        if not found:
            continue
        if left == job.count:
            watch.start()
        handles = [{"Id": str(n), "ReceiptHandle": message["ReceiptHandle"]} for n, message in enumerate(found)]
        assert not sqs.delete_message_batch(QueueUrl=url, Entries=handles).get("Failed")
        left -= len(found)
    return watch.stop(job.count)


def usual_latency(job: Job) -> Sample:
    """Sent, then received: one after the other, which spares it the wake-up of a long poll that ours pays."""
    sqs, watch, body = client(job.url), Stopwatch(), job.body.decode()
    url = queue_url(sqs, job)

    def one() -> float:
        sent_s = time.perf_counter()
        sqs.send_message(QueueUrl=url, MessageBody=body)
        found = sqs.receive_message(QueueUrl=url, MaxNumberOfMessages=1, WaitTimeSeconds=1)["Messages"]
        took_s = time.perf_counter() - sent_s
        sqs.delete_message(QueueUrl=url, ReceiptHandle=found[0]["ReceiptHandle"])
        return took_s

    for _ in range(WARM_UP // 10):
        one()
    watch.start()
    return watch.stop(job.count, [one() for _ in range(job.count)])


def fill(job: Job) -> None:
    """Put the messages of `job` into its queue, as boto3's users would: without attributes."""
    _send(client(job.url), job, job.count)


def _send(sqs: Any, job: Job, count: int) -> None:
    url, body = queue_url(sqs, job), job.body.decode()
    for start in range(0, count, TEN):
        entries = [{"Id": str(n), "MessageBody": body} for n in range(min(TEN, count - start))]
        assert not sqs.send_message_batch(QueueUrl=url, Entries=entries).get("Failed")
