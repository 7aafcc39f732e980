"""Core's own share per message: this SDK on a driver that has no broker and does next to nothing.

The deliveries are made before the clock starts, since making them is the adapter's work. What is measured includes
the caller's `await send(...)` loop and the handler's own call.
"""

from __future__ import annotations

import asyncio
import gc
import math
from collections.abc import Sequence
from typing import Any, ClassVar, Final

from messaging_sdk import Capabilities, Destination, registry, spi
from messaging_sdk.errors import MessagingError
from messaging_sdk.model import SENT, Delivery, Outgoing, Session

from . import ours
from .job import Job, Reading, Sample

URL: Final = "nothing://here"
_ACCEPTED: Final[spi.Outcomes] = tuple((index, SENT) for index in range(spi.Sender.max_batch))


class Driver(spi.Driver):
    """Accepts every message one turn of the loop later; hands out `backlog`."""

    name: ClassVar[str] = "nothing"
    client: ClassVar[str] = "portable-messaging"
    backlog: ClassVar[list[Delivery[Any]]] = []

    def capabilities(self, destination: Destination[Any]) -> Capabilities:
        return Capabilities(
            settle="individual", lease="connection", backlog=True, confirm="stored", max_body=1 << 20, hold_s=math.inf
        )

    def check(self, destination: Destination[Any]) -> None:
        """Every name will do."""

    async def open(self) -> None:
        """There is nothing to connect to."""

    async def provision(self, destinations: Sequence[Destination[Any]], mode: spi.Provision) -> None:
        """There is nothing to make."""

    async def open_sender(self, destination: Destination[Any]) -> spi.Sender:
        return Sender()

    async def open_receiver(
        self, destination: Destination[Any], group: str | None, window: int, on_revoke: spi.OnRevoke
    ) -> spi.Receiver:
        return Receiver(self.backlog, window)

    async def close(self) -> None:
        """There is nothing to disconnect."""


class Sender(spi.Sender):
    def send_batch(self, messages: Sequence[Outgoing], on_outcomes: spi.OnOutcomes) -> None:
        asyncio.get_running_loop().call_soon(on_outcomes, _ACCEPTED[: len(messages)])

    async def close(self) -> None:
        """Nothing is open."""


class Receiver(spi.Receiver):
    """Keeps the window: hands out no more than that before they are settled, from the end of `backlog`."""

    def __init__(self, backlog: list[Delivery[Any]], window: int) -> None:
        self._backlog = backlog
        self._free = window
        self._waiter: asyncio.Future[None] | None = None

    async def receive_batch(self, max_deliveries: int) -> list[Delivery[Any]]:
        while not (self._free and self._backlog):
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        found = self._backlog[-min(max_deliveries, self._free) :]
        del self._backlog[-len(found) :]  # held any longer, the decoded models would burden the garbage collector
        self._free -= len(found)
        return found

    def settle_batch(
        self, settlements: Sequence[tuple[Any, spi.Disposition]]
    ) -> asyncio.Future[Sequence[tuple[int, MessagingError]]] | None:
        self._free += len(settlements)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
        return None

    async def stop(self) -> None:
        """There is nothing to hand back."""

    async def close(self) -> None:
        """Nothing is open."""


def publish_windowed(job: Job) -> Sample:
    registry.register("nothing", Driver)
    return ours.publish_windowed(job)


def consume(job: Job) -> Sample:
    registry.register("nothing", Driver)
    body, session = job.body, Session("bench")
    if job.client == "ours_model":
        body = Reading.of_size(job.size).model_dump_json().encode()
    Driver.backlog.extend(Delivery(body, f"bench-{n}", receipt=n, session=session) for n in range(job.count))
    gc.freeze()  # they would be looked at in each full collection, which no real receiver's would
    return ours.consume(job)
