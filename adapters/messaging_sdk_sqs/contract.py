"""The contract kit's way to SQS: two servers in containers or the real one, boto3 as the foreign client, faults."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import socket
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from typing import Any, ClassVar, Final
from urllib.parse import parse_qsl, urlsplit

import boto3
from botocore.config import Config
from botocore.exceptions import ClientError

from messaging_sdk import AuthError, ConfigError, ConnectError, Destination
from messaging_sdk_contract import harness
from messaging_sdk_contract.harness import Environment, Fault, NativeMessage, Refusal
from messaging_sdk_contract.proxy import TcpProxy

from .options import DestinationOptions, physical_name

URL: Final = "MESSAGING_TEST_SQS_URL"
LEASE_S: Final = 5  # short, since lease cases wait for it; below it a busy machine loses leases
SERVERS: Final = {"elasticmq": "ElasticMQ 1.7.1", "ministack": "ministack 1.5.33"}
"""As the recipes pin them: neither server tells its version."""
PORTS: Final = {"elasticmq": 9324, "ministack": 4566}
SECRET: Final = "n0t-the-secret-key"
REQUEST_WAIT_S: Final = 1.0  # a receiver polls at once again; a sender may have nothing to send
CUT_SEEN_S: Final = 0.02  # a reset shows in a client's thread at its next turn, not before


class Harness(harness.ContainerHarness):
    """ElasticMQ (topics by fanout), ministack (topics by SNS), or what MESSAGING_TEST_SQS_URL names ("aws")."""

    name: ClassVar[str] = "sqs"
    profiles: ClassVar[Sequence[str]] = ("elasticmq", "ministack", *(["aws"] if URL in os.environ else []))
    at_once: ClassVar[int] = 4  # ElasticMQ's JVM keeps a core busy for seconds; a Signal is refused at once anyway
    faults: ClassVar[frozenset[Fault]] = frozenset({"cut", "restart", "kill", "subprocess"})

    def __init__(self, profile: str = "elasticmq") -> None:
        super().__init__("elasticmq" if profile == "default" else profile)
        self._proxy: TcpProxy | None = None
        if self.profile == "aws":
            self.faults = frozenset({"subprocess"})  # type: ignore[misc]  # per instance

    def start(self) -> None:
        if self.profile == "aws":
            return
        from messaging_sdk_contract.live import start_service

        self._service = start_service(self.profile)
        self._service.wait_ready(self._probe)
        self._proxy = TcpProxy(self._service.address(PORTS[self.profile]))

    def stop(self) -> None:
        if self._proxy is not None:
            self._proxy.close()
        if self._service is not None:
            with suppress(Exception):  # the engine may be gone; leftovers are removed by label
                self._service.remove()

    def backend(self) -> Mapping[str, Any]:
        if self._service is None:
            return {"url": os.environ[URL], "visibility_timeout_s": LEASE_S}
        return self._at(*self._service.address(PORTS[self.profile]))

    def fault_backend(self) -> Mapping[str, Any]:
        return self._at("127.0.0.1", self._proxy.port) if self._proxy else self.backend()

    def _at(self, host: str, port: int) -> dict[str, Any]:
        return {
            "url": "sqs://test:test@us-east-1/sdk-",
            "endpoint": f"http://{host}:{port}",
            "visibility_timeout_s": LEASE_S,
            "topics": "sns" if self.profile == "ministack" else "fanout",
        }

    def environment(self) -> Environment:
        if self._service is None:
            return Environment("Amazon SQS")
        return Environment(SERVERS[self.profile], self._service.image, self._service.image_digest)

    async def native_send(
        self, destination: Destination[Any], body: bytes, headers: Mapping[str, str], id: str | None
    ) -> None:
        attributes: Any = {name: {"DataType": "String", "StringValue": value} for name, value in headers.items()}
        text = _as_text(body)
        if text is None:  # what README.md asks of a foreign program
            how = "empty" if not body else "base64"
            attributes["messaging"] = {"DataType": "String", "StringValue": f'{{"enc":"{how}"}}'}
            text = base64.b64encode(body).decode() or "-"
        entry: dict[str, Any] = {"MessageAttributes": attributes}
        if destination.ordered:
            entry |= {"MessageGroupId": text.partition(":")[0][:100] or "-"}
            entry |= {"MessageDeduplicationId": id or f"n{time.monotonic_ns()}"}

        def send() -> None:
            if self._by_sns(destination):
                self._sns.publish(TopicArn=self._topic(destination), Message=text, **entry)
                return
            for group in destination.groups if destination.tag == "topic" else [None]:
                self._sqs.send_message(QueueUrl=self._queue(destination, group), MessageBody=text, **entry)

        await asyncio.to_thread(send)

    async def native_receive(
        self, destination: Destination[Any], group: str | None, count: int, wait_s: float
    ) -> list[NativeMessage]:
        def receive() -> list[NativeMessage]:
            url, found, deadline = self._queue(destination, group), list[NativeMessage](), time.monotonic() + wait_s
            while len(found) < count and time.monotonic() < deadline:
                answer = self._sqs.receive_message(
                    QueueUrl=url, MaxNumberOfMessages=1, WaitTimeSeconds=1, MessageAttributeNames=["All"]
                )
                for message in answer.get("Messages", ()):
                    self._sqs.delete_message(QueueUrl=url, ReceiptHandle=message["ReceiptHandle"])
                    found.append(_native(message))
            return found

        return await asyncio.to_thread(receive)

    async def depth(self, destination: Destination[Any], group: str | None) -> int | None:
        if self._service is None:
            return None  # the real service's counts are approximate, and late

        def count() -> int:
            url = self._queue(destination, group)
            found = self._sqs.get_queue_attributes(QueueUrl=url, AttributeNames=["All"])["Attributes"]
            kinds = ("", "NotVisible", "Delayed")
            return sum(int(found.get(f"ApproximateNumberOfMessages{kind}", 0)) for kind in kinds)

        return await asyncio.to_thread(count)

    async def remove(self, destinations: Sequence[Destination[Any]]) -> None:
        def delete() -> None:
            for destination in destinations:
                if not destination.settles:
                    continue
                if self._by_sns(destination):
                    with suppress(ClientError):
                        self._sns.delete_topic(TopicArn=self._topic(destination))
                for group in destination.groups if destination.tag == "topic" else [None]:
                    with suppress(ClientError):  # absent
                        self._sqs.delete_queue(QueueUrl=self._queue(destination, group))

        await asyncio.to_thread(delete)

    def refusals(self) -> Sequence[Refusal]:
        with socket.create_server(("127.0.0.1", 0)) as free:
            closed = free.getsockname()[1]
        here = dict(self.backend())
        keys = "" if self.profile == "aws" else f"test:{SECRET}@"
        found = [
            Refusal(
                "nobody listens",
                {"url": f"sqs://test:{SECRET}@us-east-1/", "endpoint": f"http://127.0.0.1:{closed}"},
                ConnectError,
                SECRET,
            ),
            Refusal("no such profile", here | {"url": "sqs://us-east-1/", "profile": "no-such-profile"}, ConfigError),
            Refusal("no such region", here | {"url": f"sqs://{keys}us_east_1/"}, ConfigError, SECRET),
        ]
        if self.profile == "aws":
            url = f"sqs://AKIAIOSFODNN7EXAMPLE:{SECRET}@{urlsplit(os.environ[URL]).hostname}/"
            found.append(Refusal("a key that does not exist", here | {"url": url}, AuthError, SECRET))
        return found

    def needs_client(self) -> Sequence[str]:
        return ("boto3", "botocore")

    async def cut(self) -> None:
        """Between two requests a client has nothing to lose and nothing to notice, so wait for one under way."""
        await asyncio.to_thread(self._cut_a_request)
        await asyncio.sleep(CUT_SEEN_S)

    def _cut_a_request(self) -> None:
        assert self._proxy is not None
        deadline = time.monotonic() + REQUEST_WAIT_S
        while not self._proxy.cut(if_asked=True):
            if time.monotonic() > deadline:
                self._proxy.cut()
                return
            time.sleep(0.001)

    # the native client

    def _probe(self) -> None:
        self._sqs.list_queues(MaxResults=1)

    @cached_property
    def _sqs(self) -> Any:
        return self._client("sqs")

    @cached_property
    def _sns(self) -> Any:
        return self._client("sns")

    def _client(self, service: Any) -> Any:
        backend = self.backend()
        url = urlsplit(backend["url"])
        options = {**backend, **dict(parse_qsl(url.query))}
        config = Config(connect_timeout=2, read_timeout=10, retries={"total_max_attempts": 1})
        return boto3.session.Session(url.username, url.password, region_name=url.hostname or None).client(
            service, endpoint_url=options.get("endpoint"), config=config
        )

    def _by_sns(self, destination: Destination[Any]) -> bool:
        backend = self.backend()
        chosen = dict(parse_qsl(urlsplit(backend["url"]).query)).get("topics") or backend.get("topics")
        return destination.tag == "topic" and chosen == "sns"

    def _physical(self, destination: Destination[Any], group: str | None) -> str:
        prefix = urlsplit(self.backend()["url"]).path[1:]
        return physical_name(prefix, destination, DestinationOptions.model_validate({}), group)

    def _queue(self, destination: Destination[Any], group: str | None) -> str:
        url: str = self._sqs.get_queue_url(QueueName=self._physical(destination, group))["QueueUrl"]
        return url

    def _topic(self, destination: Destination[Any]) -> str:
        arn: str = self._sns.create_topic(
            Name=self._physical(destination, None), Attributes={"FifoTopic": "true"} if destination.ordered else {}
        )["TopicArn"]  # creating what exists finds it
        return arn


def _as_text(body: bytes) -> str | None:
    try:
        text = body.decode()
    except UnicodeDecodeError:
        return None
    return text if text and text.isprintable() else None


def _native(message: Mapping[str, Any]) -> NativeMessage:
    """As a program sees it that knows README.md's one attribute."""
    attributes = {n: v.get("StringValue", "") for n, v in message.get("MessageAttributes", {}).items()}
    about = json.loads(attributes.pop("messaging", "{}"))
    body = base64.b64decode(message["Body"]) if about.get("enc") == "base64" else message["Body"].encode()
    return NativeMessage(body, attributes | about.get("headers", {}), about.get("id") or message["MessageId"])
