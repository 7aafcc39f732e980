"""RabbitMQ for the contract kit: a container of each version, the native client, and the faults."""

from __future__ import annotations

import asyncio
import os
import socket
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, ClassVar, Final, TypeVar, cast

import pika
from pika.adapters.blocking_connection import BlockingChannel

from messaging_sdk import AuthError, ConnectError, Destination
from messaging_sdk.config import Address, parse_address
from messaging_sdk_contract import harness
from messaging_sdk_contract.harness import Environment, NativeMessage, Refusal
from messaging_sdk_contract.live import TlsFiles, make_tls, start_service
from messaging_sdk_contract.proxy import TcpProxy

from .options import SIGNALS, physical_name, queue_name
from .receiver import meta_of

T = TypeVar("T")

ENV_URL: Final = "MESSAGING_TEST_RABBITMQ_URL"
_SERVICES: Final = {"4.3": "rabbitmq43", "4.0": "rabbitmq40"}
_SECRET: Final = "not-the-password"
_POLL_S: Final = 0.02


class Harness(harness.ContainerHarness):
    """One RabbitMQ, in a container or at MESSAGING_TEST_RABBITMQ_URL (then nothing of it is stopped or killed)."""

    name: ClassVar[str] = "rabbitmq"
    profiles: ClassVar[Sequence[str]] = tuple(_SERVICES)
    faults: ClassVar[frozenset[harness.Fault]] = frozenset(
        ("cut", "subprocess") if ENV_URL in os.environ else ("cut", "restart", "kill", "subprocess")
    )
    settle_before_kill_s: float = 2.0

    def __init__(self, profile: str = "4.3") -> None:
        super().__init__("4.3" if profile == "default" else profile)
        self._address = Address("amqp")
        self._proxy: TcpProxy | None = None
        self._files: tempfile.TemporaryDirectory[str] | None = None

    def start(self) -> None:
        url = os.environ.get(ENV_URL)
        if url is not None:
            self._address = parse_address(url, ENV_URL)
        else:
            tls = make_tls()
            self._service = start_service(_SERVICES[self.profile], tls=tls)
            self._keep(tls)
            host, port = self._service.address(5672)
            self._address = Address("amqp", ((host, port),), "sdk", "sdk")
            self._service.wait_ready(self._probe)
        self._proxy = TcpProxy((self._address.host, self._address.port(5672)))

    def stop(self) -> None:
        if self._proxy is not None:
            self._proxy.close()
        if self._service is not None:
            with suppress(Exception):  # the engine may be gone; leftovers are removed by label
                self._service.remove()
        if self._files is not None:
            self._files.cleanup()

    def backend(self) -> Mapping[str, Any]:
        return self._at(self._address.port(5672))

    def fault_backend(self) -> Mapping[str, Any]:
        assert self._proxy is not None, "start() makes the proxy"
        return self._at(self._proxy.port, host="127.0.0.1")

    def tls_backend(self) -> Mapping[str, Any] | None:
        """The same broker by TLS; None at a URL of yours."""
        if self._service is None or self._files is None:
            return None
        host, port = self._service.address(5671)
        ca_file = str(Path(self._files.name, "ca.pem"))
        return self._at(port, host=host, scheme="amqps") | {"ca_file": ca_file}

    def environment(self) -> Environment:
        with self._channel() as channel:
            properties = cast(Any, channel.connection)._impl.server_properties
        server = f"{properties['product']} {properties['version']}"
        live = self._service
        return Environment(server, live.image, live.image_digest) if live else Environment(server)

    async def native_send(
        self, destination: Destination[Any], body: bytes, headers: Mapping[str, str], id: str | None
    ) -> None:
        name = physical_name(destination, None)
        exchange, key = (name, "") if destination.tag == "topic" else ("", name)
        exchange = exchange if destination.settles else SIGNALS
        properties = pika.BasicProperties(delivery_mode=2, message_id=id, headers=dict(headers))

        def send(channel: BlockingChannel) -> None:
            channel.confirm_delivery()
            channel.basic_publish(exchange, key, body, properties)

        await self._native(send)

    async def native_receive(
        self, destination: Destination[Any], group: str | None, count: int, wait_s: float
    ) -> list[NativeMessage]:
        def receive(channel: BlockingChannel) -> list[NativeMessage]:
            queue = queue_name(physical_name(destination, None), group)
            if not destination.settles:
                queue = channel.queue_declare("", exclusive=True).method.queue
                channel.queue_bind(queue, SIGNALS, physical_name(destination, None))
            found: list[NativeMessage] = []
            deadline = time.monotonic() + wait_s
            channel.basic_qos(prefetch_count=1)  # not basic.get, which single-active queues refuse
            arriving: Any = channel.consume(queue, inactivity_timeout=_POLL_S)
            for method, properties, body in arriving:
                if method is not None:
                    channel.basic_ack(method.delivery_tag)
                    headers = meta_of(b"".join(properties.encode())).headers
                    found.append(NativeMessage(body, headers, properties.message_id))
                if len(found) == count or time.monotonic() > deadline:
                    break
            channel.cancel()
            return found

        return await self._native(receive)

    async def depth(self, destination: Destination[Any], group: str | None) -> int | None:
        """Asks the queue's own state machine: what AMQP and `list_queues` report lacks unsettled ones or is 5 s old."""
        live = self._service
        if live is None or not destination.settles:
            return None
        queue = queue_name(physical_name(destination, None), group)
        asked = (
            f"case ra:member_overview({{'%2F_{queue}', node()}}) of "
            "{ok, O, _} -> maps:get(num_messages, maps:get(machine, O)); _ -> none end."
        )
        answer = await asyncio.to_thread(live.exec, "rabbitmqctl", "-q", "eval", asked)
        return int(answer) if answer.strip().isdigit() else None

    async def remove(self, destinations: Sequence[Destination[Any]]) -> None:
        def delete(channel: BlockingChannel) -> None:
            for destination in destinations:
                if not destination.settles:
                    continue
                name = physical_name(destination, None)
                is_topic = destination.tag == "topic"
                for group in destination.groups if is_topic else (None,):
                    channel.queue_delete(queue_name(name, group))
                if is_topic:
                    channel.exchange_delete(name)

        await self._native(delete)

    def refusals(self) -> Sequence[Refusal]:
        with socket.create_server(("127.0.0.1", 0)) as unused:
            closed = unused.getsockname()[1]
        here: dict[str, Any] = {"host": self._address.host, "port": self._address.port(5672)}
        found = [
            Refusal("nobody listens", self._at(closed, host="127.0.0.1"), ConnectError),
            Refusal("wrong password", self._at(**here, password=_SECRET), AuthError, _SECRET),
            Refusal("no such vhost", self._at(**here, path="/no-such-vhost"), AuthError),
        ]
        tls = self.tls_backend()
        if tls is not None:
            untrusted = {key: value for key, value in tls.items() if key != "ca_file"}
            found.append(Refusal("authority not trusted", untrusted, ConnectError))
        return found

    def needs_client(self) -> Sequence[str]:
        return ("pika",)

    async def cut(self) -> None:
        assert self._proxy is not None, "start() makes the proxy"
        self._proxy.cut()

    def _at(
        self, port: int, *, host: str = "", password: str = "", path: str = "", scheme: str = "amqp"
    ) -> dict[str, Any]:
        user = self._address.user or "guest"
        url = f"{scheme}://{user}@{host or self._address.host}:{port}{path or self._address.path}"
        return {"url": url, "password": password or self._address.password or "guest"}

    def _keep(self, tls: TlsFiles) -> None:
        self._files = tempfile.TemporaryDirectory(prefix="messaging-sdk-test-")
        Path(self._files.name, "ca.pem").write_bytes(tls.ca_pem)

    def _probe(self) -> None:
        """One message through a quorum queue: after a restart a queue may have no leader yet."""
        with self._channel() as channel:
            channel.confirm_delivery()
            channel.queue_declare("ready", durable=True, arguments={"x-queue-type": "quorum"})
            channel.basic_publish("", "ready", b"ready", mandatory=True)
            channel.queue_delete("ready")

    async def _native(self, work: Callable[[BlockingChannel], T]) -> T:
        def run() -> T:
            with self._channel() as channel:
                return work(channel)

        return await asyncio.to_thread(run)

    @contextmanager
    def _channel(self) -> Iterator[BlockingChannel]:
        address = self._address
        connection = pika.BlockingConnection(
            pika.ConnectionParameters(
                address.host,
                address.port(5672),
                address.path[1:] or "/",
                pika.PlainCredentials(address.user or "guest", address.password or "guest"),
                blocked_connection_timeout=10,
                socket_timeout=5,
                stack_timeout=10,
            )
        )
        try:
            yield connection.channel()
        finally:
            with suppress(Exception):  # a broken connection is closed already
                connection.close()
