"""One program, any backend: the broker is chosen by `MESSAGING_ENV` (see swap.toml), never by the code.

python examples/swap.py                           # memory
MESSAGING_ENV=nats python examples/swap.py        # a NATS server on its usual port
MESSAGING_ENV=rabbitmq python examples/swap.py    # a RabbitMQ on its usual port
MESSAGING_ENV=sqs python examples/swap.py         # an SQS server on its usual port (ElasticMQ), or the real one
MESSAGING_ENV=kafka python examples/swap.py       # a Kafka on its usual port
MESSAGING_ENV=zeromq python examples/swap.py      # no broker at all
MESSAGING_ENV=both python examples/swap.py        # two brokers at once: the Queue on one, the Topic on the other
"""

import asyncio
import sys
from pathlib import Path

from pydantic import BaseModel

from messaging_sdk import Bus, CapabilityError, Delivery, MessagingError, Queue, Retry, Topic
from messaging_sdk.testing import settled


class Order(BaseModel):
    order_id: str
    customer: str
    amount: int


placed = Topic("swap.placed", Order, groups=["audit"])
charge = Queue("swap.charge", Order, key="customer", ordered=True)
bus = Bus.from_config(Path(__file__).with_name("swap.toml"))
done: list[str] = []


@bus.on(charge, concurrency=8, retry=Retry(3, "50ms"))
async def take(order: Order, delivery: Delivery[Order]) -> None:
    if order.order_id == "o1" and delivery.attempt == 1:
        raise ConnectionError("the gateway is down for a moment")
    done.append(f"{order.customer}: charged {order.amount} for {order.order_id} at attempt {delivery.attempt}")


@bus.on(placed, group="audit")
async def audit(order: Order) -> None:
    done.append(f"audit: {order.order_id}")


async def main() -> None:
    async with bus, bus.consuming():
        for number, customer in enumerate(["ann", "bob", "ann"], start=1):
            order = Order(order_id=f"o{number}", customer=customer, amount=10 * number)
            await bus.publish(placed, order)
            await bus.publish(charge, order)
        async with asyncio.timeout(30):
            while len(done) < 6:
                await settled(bus)
    print(*sorted(done), sep="\n")


if __name__ == "__main__":
    try:
        asyncio.run(main())
    except CapabilityError as refusal:
        sys.exit(f"refused, before anything was sent: {refusal}")
    except MessagingError as error:
        sys.exit(f"error: {error}")
