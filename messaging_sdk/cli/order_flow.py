"""The demo's program: an order flow that does not know which broker it runs on.

A Topic with two groups, an ordered Queue, a Signal; one charge that fails twice and then succeeds, one that is
rejected, one body that nobody can decode. What happened to each message is written to a ledger.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel

from ..bus import Bus
from ..destination import Queue, Signal, Topic
from ..errors import Reject
from ..model import Delivery
from ..retry import Retry


class Order(BaseModel):
    order_id: str
    customer_id: str
    amount: int


class Charge(BaseModel):
    order_id: str
    customer_id: str
    amount: int


class Pulse(BaseModel):
    host: str


PLACED = Topic("orders.placed", Order, key="order_id", groups=["billing", "audit"])
CHARGE = Queue("billing.charge", Charge, key="customer_id", ordered=True)
PULSE = Signal("host.pulse", Pulse)

ORDERS = (
    Order(order_id="o1", customer_id="ann", amount=10),
    Order(order_id="o2", customer_id="bob", amount=20),
    Order(order_id="o3", customer_id="ann", amount=30),  # its charge fails twice
    Order(order_id="o4", customer_id="bob", amount=-5),  # its charge is rejected
    Order(order_id="o5", customer_id="ann", amount=50),  # must wait for o3
)
NOT_A_CHARGE = b'{"order_id": 6'
EXPECTED = 2 * len(ORDERS) + len(ORDERS) + 1 + 1  # both groups, the charges, the undecodable one, the pulse


@dataclass
class Ledger:
    """What happened, in the order it happened; `rows` are (message, where, what)."""

    rows: list[tuple[str, str, str]] = field(default_factory=list)
    complete: asyncio.Event = field(default_factory=asyncio.Event)

    def note(self, message: str, where: str, what: str) -> None:
        self.rows.append((message, where, what))
        if len(self.rows) >= EXPECTED:
            self.complete.set()

    def comparable(self) -> list[tuple[str, str, str]]:
        """Rows without the accidents of timing between unrelated messages."""
        return sorted(self.rows)

    def charged(self, customer_id: str) -> list[str]:
        """The order ids charged to one customer, in the order of their success: a promise of the ordered queue."""
        mine = {o.order_id for o in ORDERS if o.customer_id == customer_id}
        return [m for m, where, what in self.rows if where == "charge" and what.startswith("done") and m in mine]


async def order_flow(config: Mapping[str, Any] | str, wait_s: float = 30.0) -> tuple[Ledger, Bus]:
    """Run the whole flow on whatever `config` says; return its ledger and the (closed) bus."""
    bus = Bus(config)
    ledger = Ledger()

    @bus.on(PLACED, group="billing", concurrency=4)
    async def bill(order: Order) -> None:
        ledger.note(order.order_id, "billing", "got it")

    @bus.on(PLACED, group="audit")
    async def audit(order: Order) -> None:
        ledger.note(order.order_id, "audit", "got it")

    @bus.on(CHARGE, concurrency=8, retry=Retry(3, "50ms"))
    async def take(charge: Charge, delivery: Delivery[Charge]) -> None:
        if charge.amount <= 0:
            raise Reject("amount must be positive")
        if charge.order_id == "o3" and delivery.attempt < 3:
            raise ConnectionError("the payment gateway is down")
        ledger.note(charge.order_id, "charge", f"done at attempt {delivery.attempt}")

    @bus.on(PULSE)
    async def listen(pulse: Pulse) -> None:
        ledger.note(pulse.host, "pulse", "heard")

    async with bus, bus.consuming():
        for order in ORDERS:
            await bus.publish(PLACED, order)
            await bus.publish(CHARGE, Charge(**order.model_dump()))
        foreign = Queue(CHARGE.name, bytes, key=lambda body: "ann", ordered=True)
        await bus.publish(foreign, NOT_A_CHARGE)
        await bus.publish(PULSE, Pulse(host="h1"))
        async with bus.consume(CHARGE.dead_letters()) as graves:
            for _ in range(2):
                grave = await graves.next(wait_s)
                if grave is not None:
                    name = "o4" if b"o4" in grave.body else "(not JSON)"
                    ledger.note(name, "charge", f"dead letter: {grave.provenance['reason']}")
                    await grave.ack()
        async with asyncio.timeout(wait_s):
            await ledger.complete.wait()
    return ledger, bus
