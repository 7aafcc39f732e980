"""The contract kit's way to NATS: containers or a URL, nats-py as the foreign client, faults."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import threading
from collections.abc import Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any, ClassVar, Final
from urllib.parse import urlsplit

import nats
from nats.aio.client import Client
from nats.js.errors import NotFoundError

from messaging_sdk import AuthError, ConnectError, Destination
from messaging_sdk_contract import harness
from messaging_sdk_contract.harness import Environment, Fault, NativeMessage, Refusal
from messaging_sdk_contract.proxy import TcpProxy

from .driver import GROUP, QUEUE_DURABLE

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from messaging_sdk_contract.live import LiveService

URL: Final = "MESSAGING_TEST_NATS_URL"
SECRET: Final = "n0t-the-passw0rd"
LEASE_S: Final = 2.0  # short, since lease cases wait for it; below it a busy machine loses leases
CUT_SEEN_S: Final = 0.02  # a reset shows in a client's event loop at its next turn, not before
STRIPPED_INFO: Final = b'INFO {"server_id":"x","version":"2.15.0","max_payload":1048576,"headers":true}\r\n'


class Harness(harness.ContainerHarness):
    """NATS with JetStream (profile "jetstream") or without ("core")."""

    name: ClassVar[str] = "nats"
    profiles: ClassVar[Sequence[str]] = ("jetstream", "core")
    faults: ClassVar[frozenset[Fault]] = frozenset({"cut", "restart", "kill", "subprocess"})

    def __init__(self, profile: str = "jetstream") -> None:
        super().__init__(profile)
        self._secured: LiveService | None = None
        self._url = os.environ.get(URL, "")
        self._proxy: TcpProxy | None = None
        self._stripper: socket.socket | None = None

    def start(self) -> None:
        if self._url:
            self.faults = frozenset({"cut", "subprocess"})  # type: ignore[misc]  # per instance
        else:
            from messaging_sdk_contract.live import start_service

            self._service = start_service("nats" if self.profile == "jetstream" else "nats-core")
            self._secured = start_service("nats", command=["-c", "/etc/nats/auth.conf"])
            self._url = "nats://{}:{}".format(*self._service.address(4222))
            self._service.wait_ready(self._probe)
            secured = "nats://sdk:sdk@{}:{}".format(*self._secured.address(4222))
            self._secured.wait_ready(lambda: asyncio.run(_works(secured, jetstream=True)))
        parts = urlsplit(self._url)
        self._proxy = TcpProxy((parts.hostname or "127.0.0.1", parts.port or 4222))
        self._stripper = socket.create_server(("127.0.0.1", 0))
        threading.Thread(target=_strip, args=(self._stripper,), daemon=True).start()

    def stop(self) -> None:
        for closing in (self._proxy, self._stripper):
            if closing is not None:
                closing.close()
        for service in (self._service, self._secured):
            if service is not None:
                with suppress(Exception):
                    service.remove()

    def backend(self) -> Mapping[str, Any]:
        return {"url": self._url, "ack_wait_s": LEASE_S}

    def fault_backend(self) -> Mapping[str, Any]:
        assert self._proxy is not None
        credentials = urlsplit(self._url).netloc.rpartition("@")[0]
        at = f"{credentials}@" if credentials else ""
        return {"url": f"nats://{at}127.0.0.1:{self._proxy.port}", "ack_wait_s": LEASE_S}

    def environment(self) -> Environment:
        version = asyncio.run(_works(self._url, jetstream=False))
        if self._service is None:
            return Environment(f"NATS {version}")
        return Environment(f"NATS {version}", self._service.image, self._service.image_digest)

    async def native_send(
        self, destination: Destination[Any], body: bytes, headers: Mapping[str, str], id: str | None
    ) -> None:
        named = {**headers, **({"Nats-Msg-Id": id} if id else {})}
        async with _client(self._url) as client:
            if destination.settles:
                await client.jetstream().publish(_subject(destination), body, headers=named or None)
            else:
                await client.publish(_subject(destination), body, headers=named or None)
                await client.flush()

    async def native_receive(
        self, destination: Destination[Any], group: str | None, count: int, wait_s: float
    ) -> list[NativeMessage]:
        async with _client(self._url) as client:
            inbox = client.new_inbox() if destination.settles else _subject(destination)
            sub = await client.subscribe(inbox)
            if destination.settles:
                pull: dict[str, Any] = {"batch": count, "expires": round(wait_s * 1e9)}
                pull |= {"group": GROUP} if destination.ordered else {}
                path = f"{_stream(destination)}.{_durable(group)}"
                next_subject = f"$JS.API.CONSUMER.MSG.NEXT.{path}"
                await client.publish(next_subject, json.dumps(pull).encode(), reply=inbox)
            found: list[NativeMessage] = []
            with suppress(TimeoutError):
                async with asyncio.timeout(wait_s + 0.5):
                    while len(found) < count:
                        message = await sub.next_msg(timeout=None)
                        if destination.settles and "Status" in (message.headers or {}):
                            break
                        if destination.settles:
                            await client.request(message.reply, b"+ACK", timeout=5)
                        found.append(_native(message.data, message.headers or {}))
            return found

    async def depth(self, destination: Destination[Any], group: str | None) -> int | None:
        if not destination.settles:
            return None
        async with _client(self._url) as client:
            durable = _durable(group)
            found = await client.jetstream().consumer_info(_stream(destination), durable)
            return (found.num_pending or 0) + (found.num_ack_pending or 0)

    async def remove(self, destinations: Sequence[Destination[Any]]) -> None:
        if self.profile != "jetstream":
            return
        async with _client(self._url) as client:
            for destination in destinations:
                if destination.settles:
                    with suppress(NotFoundError):
                        await client.jetstream().delete_stream(_stream(destination))

    async def forget(self, destination: Destination[Any]) -> bool:
        async with _client(self._url) as client:
            return bool(await client.jetstream().purge_stream(_stream(destination)))

    def refusals(self) -> Sequence[Refusal]:
        with socket.create_server(("127.0.0.1", 0)) as free:
            closed = free.getsockname()[1]
        assert self._stripper is not None
        stripper = self._stripper.getsockname()[1]
        found = [
            Refusal("nobody listens", {"url": f"nats://127.0.0.1:{closed}"}, ConnectError),
            Refusal(
                "a server that strips TLS",
                {"url": f"nats+tls://shop:{SECRET}@127.0.0.1:{stripper}"},
                ConnectError,
                SECRET,
            ),
        ]
        if self._secured is not None:
            host, port = self._secured.address(4222)
            url = f"nats://sdk:{SECRET}@{host}:{port}"
            found.append(Refusal("a wrong password", {"url": url}, AuthError, SECRET))
        return found

    def needs_client(self) -> Sequence[str]:
        return ("nats",)

    async def cut(self) -> None:
        assert self._proxy is not None
        await asyncio.to_thread(self._proxy.cut)
        await asyncio.sleep(CUT_SEEN_S)

    def _probe(self) -> None:
        asyncio.run(_works(self._url, jetstream=self.profile == "jetstream"))


def _strip(listener: socket.socket) -> None:
    """A server that announces no TLS, whatever was asked for, and takes what it is sent."""
    with suppress(OSError):
        while True:
            connection, _ = listener.accept()
            connection.sendall(STRIPPED_INFO)
            connection.settimeout(1)
            with suppress(OSError):
                connection.recv(4096)
            connection.close()


async def _works(url: str, *, jetstream: bool) -> str:
    """The server's version, once it answers (with JetStream: once that does)."""
    async with _client(url) as client:
        if jetstream:
            await client.jetstream().account_info()
        return str(client.connected_server_version).removeprefix("<nats server v").rstrip(">")


@asynccontextmanager
async def _client(url: str) -> AsyncIterator[Client]:
    client = await nats.connect(
        url, allow_reconnect=False, connect_timeout=2, max_reconnect_attempts=1, error_cb=_silent
    )
    try:
        yield client
    finally:
        await client.close()


async def _silent(error: Exception) -> None:
    """nats-py logs every error otherwise; all of them are raised, too."""


def _native(body: bytes, headers: Mapping[str, str]) -> NativeMessage:
    plain = {k: v for k, v in headers.items() if not k.startswith(("Nats-", "messaging-"))}
    return NativeMessage(body, plain, headers.get("Nats-Msg-Id"))


def _subject(destination: Destination[Any]) -> str:
    return f"{destination.tag}.{destination.name}"


def _stream(destination: Destination[Any]) -> str:
    return _subject(destination).replace(".", "__")


def _durable(group: str | None) -> str:
    return group.replace(".", "__") if group else QUEUE_DURABLE
