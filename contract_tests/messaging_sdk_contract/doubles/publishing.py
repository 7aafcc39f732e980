"""Flaws in sending: an ok that is none, and copies too many."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Sequence
from typing import Any, Final

from messaging_sdk import Capabilities, Destination, MessagingError, NotFound, Outcome
from messaging_sdk.memory import Broker, MemorySender, Store
from messaging_sdk.model import SENT, Outgoing
from messaging_sdk.spi import OnOutcomes, Outcomes

from .planting import Double, with_broker, with_sender


class DuplicatesAll(Broker):
    def store(self, store: Store, message: Outgoing) -> None:
        super().store(store, message)
        super().store(store, message)


class DuplicatesOneInFifty(Broker):
    def __init__(self) -> None:
        super().__init__()
        self.stored = itertools.count(1)

    def store(self, store: Store, message: Outgoing) -> None:
        super().store(store, message)
        if next(self.stored) % 50 == 0:
            super().store(store, message)


class ResendStoredTwice(Broker):
    def is_repeat(self, destination: Destination[Any], message: Outgoing, caps: Capabilities) -> bool:
        return False


class LosesOneInFifty(Broker):
    def __init__(self) -> None:
        super().__init__()
        self.stored = itertools.count(1)

    def store(self, store: Store, message: Outgoing) -> None:
        if next(self.stored) % 50:
            super().store(store, message)


class DeadLettersSwallowed(Broker):
    def route(self, destination: Destination[Any], message: Outgoing) -> None:
        if not destination.name.endswith(".dead"):
            super().route(destination, message)


class OkBeforeStored(MemorySender):
    def take(self, message: Outgoing) -> None:
        def late() -> None:
            if not self.lost:
                super(OkBeforeStored, self).take(message)

        self.driver.later(0.02, late)


class OkOnALostConnection(MemorySender):
    def send_batch(self, messages: Sequence[Outgoing], on_outcomes: OnOutcomes) -> None:
        if self.lost:
            on_outcomes([(index, SENT) for index in range(len(messages))])
        else:
            super().send_batch(messages, on_outcomes)


class CloseDoesNotFlush(MemorySender):
    """Confirms in windows, and says ok for the window that its close throws away."""

    def send_batch(self, messages: Sequence[Outgoing], on_outcomes: OnOutcomes) -> None:
        def store() -> None:
            if not self.lost:
                super(CloseDoesNotFlush, self).send_batch(messages, on_outcomes)

        asyncio.get_running_loop().call_later(0.02, store)
        on_outcomes([(index, SENT) for index in range(len(messages))])


class OkWhenHandedOver(MemorySender):
    """Claims that ok means settled, and says it when the message is on its way."""

    def take_until_settled(self, message: Outgoing, tell: Callable[[], None]) -> None:
        super().take_until_settled(message, lambda: None)
        asyncio.get_running_loop().call_soon(tell)


class UnroutableOk(MemorySender):
    def problem(self, message: Outgoing) -> MessagingError | None:
        found = super().problem(message)
        return None if isinstance(found, NotFound) else found


class PartialFailureHidden(MemorySender):
    def send_batch(self, messages: Sequence[Outgoing], on_outcomes: OnOutcomes) -> None:
        def all_ok(outcomes: Outcomes) -> None:
            some = any(result.outcome is Outcome.OK for _, result in outcomes)
            on_outcomes([(index, SENT) for index, _ in outcomes] if some else outcomes)

        super().send_batch(messages, all_ok)


class TtlIgnored(MemorySender):
    def take(self, message: Outgoing) -> None:
        message.ttl_s = None
        super().take(message)


class DelayRoundedDown(MemorySender):
    def take(self, message: Outgoing) -> None:
        if message.delay_s is not None:
            message.delay_s = float(int(message.delay_s))
        super().take(message)


class OptionIgnored(MemorySender):
    def problem(self, message: Outgoing) -> MessagingError | None:
        message.delay_s = message.ttl_s = message.priority = None
        return super().problem(message)


DOUBLES: Final = (
    Double("duplicates-all", "every message is stored twice", ("DEL-01",),
     "repeats are counted, never removed", with_broker(DuplicatesAll)),
    Double("duplicates-one-in-fifty", "some messages are stored twice", ("DEL-02",),
     "the multiset of arrivals is compared", with_broker(DuplicatesOneInFifty)),
    Double("loses-one-in-fifty", "some messages are confirmed and not stored", ("DEL-02",),
     "the multiset of arrivals is compared", with_broker(LosesOneInFifty)),
    Double("resend-stored-twice", "a resend with the same id is a second message", ("DEL-09", "CAP-01.dedup_s"),
     "the claimed window is tried", with_broker(ResendStoredTwice)),
    Double("dead-letters-swallowed", "a dead letter is confirmed and thrown away", ("RED-06", "RED-07"),
     "the dead-letter queue is read", with_broker(DeadLettersSwallowed)),
    Double("ok-before-stored", "ok is said before the message is stored", ("DEL-04", "CAP-01.confirm"),
     "the publisher dies right after the ok", with_sender(OkBeforeStored)),
    Double("ok-on-a-lost-connection", "an unknown outcome is reported as ok", ("DEL-08", "ORD-07"),
     "every ok must be found after a cut", with_sender(OkOnALostConnection)),
    Double("close-does-not-flush", "close drops what was accepted", ("DEL-07", "DEL-04"),
     "every ok must be found after the close", with_sender(CloseDoesNotFlush)),
    Double("ok-when-handed-over", "ok means settled, and comes before that", ("CAP-01.confirm", "CAP-01.ok_means"),
     "no outcome may come while a consumer holds the message", with_sender(OkWhenHandedOver), "settled"),
    Double("unroutable-ok", "a message that no queue takes is confirmed", ("DEL-05", "CAP-01.route_error"),
     "the destination is deleted behind the sender", with_sender(UnroutableOk)),
    Double("partial-failure-hidden", "a refused message in a batch is reported as ok", ("CAP-01.batch", "BAT-02"),
     "each element's outcome is compared with what arrived", with_sender(PartialFailureHidden)),
    Double("ttl-ignored", "expired messages arrive", ("CAP-01.ttl",),
     "one that expires is sent before the consumer comes", with_sender(TtlIgnored)),
    Double("delay-rounded-down", "delays are cut to whole seconds", ("CAP-01.delay",),
     "the floor of the delay is measured", with_sender(DelayRoundedDown)),
    Double("option-ignored", "an option that is not there is dropped in silence", ("CAP-01.ttl", "CAP-01.delay"),
     "a request that is not claimed must be refused", with_sender(OptionIgnored), "minimal"),
)  # fmt: skip
