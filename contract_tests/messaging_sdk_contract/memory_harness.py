"""The harness of the memory adapter: a broker in this process, so every fault is a call."""

from __future__ import annotations

import asyncio
import itertools
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any, Final, cast

from messaging_sdk import ConfigError, Destination, memory
from messaging_sdk.memory_history import HISTORY
from messaging_sdk.model import Outgoing
from messaging_sdk.registry import driver_class

from . import harness as kit
from .harness import Environment, NativeMessage, Refusal

_starts: Final = itertools.count()

_PROFILES: Final[Mapping[str, str]] = {
    # 1 MiB instead of 16: the size ladder of every case would cost seconds.
    "default": "max_body=1048576",
    # A lease and a window short enough to wait for, and a broker that keeps what it has, and counts what waits.
    "lease": "max_body=1048576&lease=timeout&lease_s=0.8&dedup_s=1&durable=kill&ok_means=page_cache&lag=waiting",
    # The least that still offers a Queue and a Topic: the refusals are what is tested.
    "minimal": "max_body=1000&replay=false&lag=none&release=none&count=none&order=none&order_redelivery=false"
    "&order_competition=false&compete=round_robin&confirm=received&route_error=false&dedup_s=0"
    "&batch=sequential&ttl=false&delay=false&priority=0&window=false",
}
_EXTRA: Final[Mapping[str, str]] = {
    # So short that no retry fits: for CAP-01.hold_s alone.
    "hold": "max_body=1048576&hold_s=1.5",
    # Ok means that a consumer has settled it: for CAP-01.confirm and CAP-01.ok_means.
    "settled": "max_body=1048576&confirm=settled&ok_means=settled",
    "headerless": "max_body=1048576&headers=false",
}


class Harness(kit.Harness):
    """Memory, with as much or as little promised as the profile says."""

    name = "memory"
    profiles = tuple(_PROFILES)
    extra_profiles = tuple(_EXTRA)
    """For single cases and flips; no whole run."""
    faults = frozenset({"cut", "restart", "kill"})
    takeover_s = 2.0
    recovery_s = 10.0
    quiet_s = 0.05

    def start(self) -> None:
        self._name = f"contract-{os.getpid()}-{next(_starts)}"

    def stop(self) -> None:
        memory.forget([getattr(self, "_name", "")])

    def backend(self) -> Mapping[str, Any]:
        return {"url": f"memory://{self._name}?{self._switches}"}

    def fault_backend(self) -> Mapping[str, Any]:
        """The same broker; the "/" is how `cut` tells which connections are meant."""
        return {"url": f"memory://{self._name}/?{self._switches}"}

    @property
    def _switches(self) -> str:
        return {**_PROFILES, **_EXTRA}[self.profile]

    def environment(self) -> Environment:
        return Environment("in-process")

    @property
    def broker(self) -> memory.Broker:
        """What the driver class in use shares: a double may bring a broker of its own."""
        kind = getattr(driver_class("memory"), "broker_class", memory.Broker)
        return memory.broker(self._name, kind)

    async def native_send(
        self, destination: Destination[Any], body: bytes, headers: Mapping[str, str], id: str | None
    ) -> None:
        foreign = Outgoing(body, id or f"foreign-{next(_starts)}", None, headers)
        self.broker.route(destination, foreign)

    async def native_receive(
        self, destination: Destination[Any], group: str | None, count: int, wait_s: float
    ) -> list[NativeMessage]:
        found: list[NativeMessage] = []
        deadline = time.monotonic() + wait_s
        if destination.tag == "signal":
            listener = _Listener(found)
            self.broker.listeners.setdefault(destination.name, []).append(cast("Any", listener))
            while len(found) < count and time.monotonic() < deadline:  # noqa: ASYNC110  # as below
                await asyncio.sleep(0.01)
            return found
        while len(found) < count and time.monotonic() < deadline:
            store = self._store(destination, group)
            if store is not None:
                store.expire()
                while store.waiting and len(found) < count:
                    message = store.waiting.pop(0).message
                    found.append(NativeMessage(message.body, dict(message.headers), message.id))
            if len(found) < count:
                await asyncio.sleep(0.01)  # the broker has no event to wait for
        return found

    async def depth(self, destination: Destination[Any], group: str | None) -> int | None:
        store = self._store(destination, group)
        return len(store.waiting) + len(store.held) if store is not None else None

    def _store(self, destination: Destination[Any], group: str | None) -> memory.Store | None:
        if destination.tag == "queue":
            return self.broker.stores.get((destination.name, None))
        return self.broker.stores.get((f"topic {destination.name}", group))

    async def remove(self, destinations: Sequence[Destination[Any]]) -> None:
        for destination in destinations:
            names = {destination.name} if destination.tag == "queue" else {f"topic {destination.name}"}
            for key in [k for k in self.broker.stores if k[0] in names]:
                del self.broker.stores[key]
            if destination.tag == "topic":
                self.broker.topics.pop(f"topic {destination.name}", None)
                self.broker.histories.pop(destination.name, None)

    async def forget(self, destination: Destination[Any]) -> bool:
        self.broker.histories[destination.name].forget(HISTORY)
        return True

    def refusals(self) -> Sequence[Refusal]:
        secret = "pa55-in-memory"
        return (
            Refusal("an option that does not exist", {"url": "memory://x?relase=now"}, ConfigError),
            Refusal(
                "a user and password",
                {"url": f"memory://shop:{secret}@{self._name}"},
                ConfigError,
                secret,
            ),
        )

    async def cut(self) -> None:
        for driver in list(self.broker.connections):
            if driver.address.path == "/":
                driver.lose()

    async def restart(self) -> None:
        self.broker.restart()

    async def kill(self) -> None:
        self.broker.restart(kill=True)


class _Listener:
    """What a broker tells of a Signal, without the adapter's receiver."""

    group = None

    def __init__(self, found: list[NativeMessage]) -> None:
        self._found = found

    def overhear(self, message: Outgoing) -> None:
        self._found.append(NativeMessage(message.body, dict(message.headers), message.id))
