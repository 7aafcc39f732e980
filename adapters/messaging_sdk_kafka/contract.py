"""Kafka for the contract kit: a container or a URL, the client itself as the foreign program, faults."""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, ClassVar, Final, Literal, TypeVar

from confluent_kafka import OFFSET_END, Consumer, KafkaException, Producer, TopicPartition
from confluent_kafka.admin import AdminClient

from messaging_sdk import AuthError, CapabilityError, ConnectError, Destination
from messaging_sdk.config import Address, parse_address
from messaging_sdk_contract import harness
from messaging_sdk_contract.harness import Environment, NativeMessage, Refusal
from messaging_sdk_contract.proxy import TcpProxy

from .options import group_id, topic_name
from .receiver import ahead_of, meta_of
from .sender import ID

if TYPE_CHECKING:
    from messaging_sdk_contract.live import LiveService

T = TypeVar("T")

ENV_URL: Final = "MESSAGING_TEST_KAFKA_URL"
_SECRET: Final = "not-the-passw0rd"
_LISTENERS: Final = "KAFKA_ADVERTISED_LISTENERS"
_SESSION_S: Final = 4.0  # short, since a killed member's partitions are waited for; as in server.properties
_REVOKE_S: Final = 3.0  # a consumer that was cut while its handler runs is waited for as long by its successor
_CUT_SEEN_S: Final = 0.1  # a reset is seen by a client's thread, and told by its next poll
_WAIT_S: Final = 10.0
_STOPPED_S: Final = 0.2  # a deleted topic's partitions take messages for a moment after it is known no more
_PARTITIONS: Final = 3  # a member each where three share; each costs the broker files, and time after a kill


class Harness(harness.ContainerHarness):
    """One Kafka, with groups of the classic protocol or of KIP-848."""

    name: ClassVar[str] = "kafka"
    profiles: ClassVar[Sequence[str]] = ("classic", "kip848")
    faults: ClassVar[frozenset[harness.Fault]] = frozenset(
        ("subprocess",) if ENV_URL in os.environ else ("cut", "restart", "kill", "subprocess")
    )
    takeover_s: float = 2.5 * _SESSION_S
    settle_before_kill_s: float = 1.0
    quiet_s: float = 1.0  # a member's first fetch comes after joining, offsets and metadata
    at_once: ClassVar[int] = 4
    lanes: int = _PARTITIONS

    def __init__(self, profile: str = "classic") -> None:
        super().__init__("classic" if profile == "default" else profile)
        self._old: LiveService | None = None
        self._address = Address("kafka")
        self._proxy: TcpProxy | None = None
        self._admin: AdminClient | None = None  # one for the whole run: each has threads of its own

    def start(self) -> None:
        url = os.environ.get(ENV_URL)
        if url is not None:
            self._address = parse_address(url, ENV_URL)
            return
        from messaging_sdk_contract.live import start_service

        self._proxy = TcpProxy()
        told = (
            f"EXTERNAL://127.0.0.1:9092,PROXIED://127.0.0.1:{self._proxy.port},SASL://127.0.0.1:9095,"
            "INTERNAL://127.0.0.1:19092"
        )
        self._service = start_service("kafka", environment={_LISTENERS: told})
        self._proxy.target = self._service.address(9094)
        self._address = Address("kafka", (self._service.address(9092),))
        self._service.wait_ready(self._probe)

    def stop(self) -> None:
        self._admin = None
        if self._proxy is not None:
            self._proxy.close()
        for service in (self._service, self._old):
            if service is not None:
                with suppress(Exception):  # the engine may be gone; leftovers are removed by label
                    service.remove()

    def backend(self) -> Mapping[str, Any]:
        return self._at(str(self._address))

    def fault_backend(self) -> Mapping[str, Any]:
        return self._at(f"kafka://127.0.0.1:{self._proxy.port}") if self._proxy else self.backend()

    def environment(self) -> Environment:
        live = self._service
        if live is None:
            return Environment("Apache Kafka")
        jars = live.exec("sh", "-c", "ls /opt/kafka/libs").split()
        version = next(j for j in jars if j.startswith("kafka_2.13-")).removeprefix("kafka_2.13-").removesuffix(".jar")
        return Environment(f"Apache Kafka {version}", live.image, live.image_digest)

    async def native_send(
        self, destination: Destination[Any], body: bytes, headers: Mapping[str, str], id: str | None
    ) -> None:
        def send() -> None:
            producer = Producer(self._client() | {"message.max.bytes": 2_000_000})
            named: list[tuple[str, str | bytes | None]] = [*headers.items(), *([(ID, id)] if id else [])]
            producer.produce(topic_name(destination, None), body, headers=named)
            assert producer.flush(_WAIT_S) == 0, "the broker did not take the message"

        await asyncio.to_thread(send)

    async def native_receive(
        self, destination: Destination[Any], group: str | None, count: int, wait_s: float
    ) -> list[NativeMessage]:
        topic = topic_name(destination, None)

        def receive() -> list[NativeMessage]:
            name = group_id(topic, group) if destination.settles else f"native-{time.time_ns()}"
            start = "earliest" if destination.settles else "latest"
            consumer = Consumer(
                self._client() | {"group.id": name, "auto.offset.reset": start, "enable.auto.commit": False}
            )
            consumer.subscribe([topic])
            found: list[NativeMessage] = []
            deadline = time.monotonic() + wait_s + 3  # to join takes longer than to read
            while len(found) < count and time.monotonic() < deadline:
                record = consumer.poll(0.1)
                if record is not None and record.error() is None:
                    consumer.commit(message=record, asynchronous=False)
                    meta = meta_of(record)
                    plain = {n: v for n, v in meta.headers.items() if not n.startswith("messaging-")}
                    found.append(NativeMessage(record.value() or b"", plain, meta.id))
            consumer.close()
            return found

        return await asyncio.to_thread(receive)

    async def depth(self, destination: Destination[Any], group: str | None) -> int | None:
        """What lies behind the group's commit, less what the commit's note says is settled ahead of it."""
        if not destination.settles:
            return None
        topic = topic_name(destination, None)

        def count(admin: AdminClient) -> int:
            number = len(admin.list_topics(topic, timeout=_WAIT_S).topics[topic].partitions)
            depth = 0
            for at, end in _committed(self._client(), group_id(topic, group), topic, number):
                depth += end - max(0, at.offset) - len(ahead_of(at.offset, at.metadata))
            return depth

        return await self._native(count)

    async def remove(self, destinations: Sequence[Destination[Any]]) -> None:
        topics = sorted({topic_name(d, None) for d in destinations})  # one named twice crashes confluent-kafka 2.16.1

        def delete(admin: AdminClient) -> None:
            for gone in admin.delete_topics(topics, operation_timeout=5).values():
                with suppress(KafkaException):  # absent is fine
                    gone.result(_WAIT_S)
            end = time.monotonic() + _WAIT_S
            while time.monotonic() < end and not set(topics).isdisjoint(admin.list_topics(timeout=_WAIT_S).topics):
                time.sleep(0.02)
            time.sleep(_STOPPED_S)

        if not topics:
            return
        try:
            await self._native(delete)
        except TimeoutError:  # a client that lived through a kill may ask a controller that is no more
            self._admin = None
            await self._native(delete)

    async def forget(self, destination: Destination[Any]) -> bool:
        topic = topic_name(destination, None)

        def delete(admin: AdminClient) -> bool:
            number = len(admin.list_topics(topic, timeout=_WAIT_S).topics[topic].partitions)
            every = [TopicPartition(topic, n, OFFSET_END) for n in range(number)]
            return all(deleted.result(_WAIT_S) for deleted in admin.delete_records(every).values())

        return await self._native(delete)

    def refusals(self) -> Sequence[Refusal]:
        with socket.create_server(("127.0.0.1", 0)) as unused:
            closed = unused.getsockname()[1]
        found = [Refusal("nobody listens", self._at(f"kafka://127.0.0.1:{closed}"), ConnectError)]
        if self._service is None:
            return found
        host, port = self._service.address(9095)
        found += [
            Refusal("wrong password", self._at(f"kafka://sdk:{_SECRET}@{host}:{port}"), AuthError, _SECRET),
            Refusal("no TLS there", self._at(f"kafka+tls://sdk:{_SECRET}@{host}:{port}"), ConnectError, _SECRET),
        ]
        if self.profile == "kip848":
            host, port = self._without_protocol()
            found.append(Refusal("no KIP-848 there", self._at(f"kafka://{host}:{port}"), CapabilityError))
        return found

    def needs_client(self) -> Sequence[str]:
        return ("confluent_kafka",)

    async def cut(self) -> None:
        assert self._proxy is not None, "start() makes the proxy"
        await asyncio.to_thread(self._proxy.cut)
        await asyncio.sleep(_CUT_SEEN_S)

    def _at(self, url: str) -> dict[str, Any]:
        return {
            "url": url,
            "group_protocol": self.profile,
            "session_timeout_s": _SESSION_S,
            "revoke_timeout_s": _REVOKE_S,
            "partitions": _PARTITIONS,
        }

    def _without_protocol(self) -> tuple[str, int]:
        """A second broker, of a configuration that has classic groups only."""
        from messaging_sdk_contract.live import start_service

        if self._old is None:
            self._old = start_service("kafka", environment={"KAFKA_GROUP_COORDINATOR_REBALANCE_PROTOCOLS": "classic"})
            host, port = old = self._old.address(9092)
            self._old.wait_ready(lambda: _answers(f"{host}:{port}"))
            return old
        return self._old.address(9092)

    def _client(self) -> dict[str, Any]:
        return {
            "bootstrap.servers": f"{self._address.host}:{self._address.port(9092)}",
            "log_level": 0,
            "reconnect.backoff.max.ms": 200,
        }

    def _again(self, end: Literal["stop", "kill"]) -> None:
        self._admin = None
        super()._again(end)

    def _probe(self) -> None:
        """One answer of the group coordinator, which loads its offsets late, and one of each partition's leader."""
        admin = self._admin = self._admin or AdminClient(self._client())
        admin.list_topics(timeout=1)
        reader = Consumer(self._client() | {"group.id": "messaging-sdk-ready"})
        try:
            reader.committed([TopicPartition("messaging-sdk-ready", 0)], timeout=_WAIT_S)
            topics = admin.list_topics(timeout=1).topics
            ends = [TopicPartition(name, n, OFFSET_END) for name, topic in topics.items() for n in topic.partitions]
            for end in reader.offsets_for_times(ends, timeout=_WAIT_S) if ends else ():
                _whole(end)
        finally:
            reader.close()

    async def _native(self, work: Callable[[AdminClient], T]) -> T:
        admin = self._admin = self._admin or AdminClient(self._client())
        return await asyncio.to_thread(work, admin)


def _committed(client: Mapping[str, Any], group: str, topic: str, number: int) -> list[tuple[TopicPartition, int]]:
    """What the group has committed for each partition, and where that ends; asked again while one that was just made
    has no leader yet."""
    reader = Consumer({**client, "group.id": group, "enable.auto.commit": False})
    every = [TopicPartition(topic, n, OFFSET_END) for n in range(number)]
    deadline = time.monotonic() + _WAIT_S
    try:
        while True:
            try:
                found = reader.committed([TopicPartition(topic, n) for n in range(number)], timeout=_WAIT_S)
                return [
                    (at, _whole(end).offset)
                    for at, end in zip(found, reader.offsets_for_times(every, timeout=_WAIT_S), strict=True)
                ]
            except KafkaException:
                if time.monotonic() > deadline:
                    raise
            time.sleep(_STOPPED_S)
    finally:
        reader.close()


def _whole(partition: TopicPartition) -> TopicPartition:
    if partition.error is not None:
        raise KafkaException(partition.error)
    return partition


def _answers(address: str) -> None:
    AdminClient({"bootstrap.servers": address, "log_level": 0}).list_topics(timeout=2)
