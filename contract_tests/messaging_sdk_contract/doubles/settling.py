"""Flaws in settling: messages that vanish, come back, or stay away."""

from __future__ import annotations

import asyncio
import math
from asyncio import Future
from collections.abc import Sequence
from typing import Any, Final

from messaging_sdk import MessagingError
from messaging_sdk.memory import Entry, LeasedReceiver, MemoryReceiver, Store
from messaging_sdk.spi import Disposition

from .planting import Double, with_receiver, with_store


class AutoAck(Store):
    def take(self, receiver: MemoryReceiver, count: int) -> list[Entry]:
        taken = super().take(receiver, count)
        self.held.difference_update(taken)
        return taken

    def accept(self, receiver: MemoryReceiver, entry: Entry) -> bool:
        return True


class ReleaseDrops(Store):
    def release(self, receiver: MemoryReceiver, entry: Entry, delay_s: float) -> bool:
        self.held.discard(entry)
        return True


class ReleaseAtOnce(Store):
    def release(self, receiver: MemoryReceiver, entry: Entry, delay_s: float) -> bool:
        return super().release(receiver, entry, 0.0)


class AckedComesBack(Store):
    def accept(self, receiver: MemoryReceiver, entry: Entry) -> bool:
        accepted = super().accept(receiver, entry)

        def again() -> None:
            self.give_back(entry)
            self.offer()

        asyncio.get_running_loop().call_later(0.03, again)
        return accepted


class AckNoop(Store):
    def accept(self, receiver: MemoryReceiver, entry: Entry) -> bool:
        return entry in self.held


class AckForgottenOnDeath(Store):
    def accept(self, receiver: MemoryReceiver, entry: Entry) -> bool:
        accepted = super().accept(receiver, entry)
        if accepted:
            self.__dict__.setdefault("forgotten", []).append((receiver, entry))
        return accepted

    def leave(self, receiver: MemoryReceiver) -> None:
        for holder, entry in self.__dict__.pop("forgotten", []):
            if holder is receiver:
                self.give_back(entry)
        super().leave(receiver)


class CumulativeAck(Store):
    def accept(self, receiver: MemoryReceiver, entry: Entry) -> bool:
        for earlier in list(self.held):
            if earlier.holder is receiver and earlier.serial < entry.serial:
                self.held.discard(earlier)
        return super().accept(receiver, entry) or entry.holder is receiver


class LostWithItsConsumer(Store):
    def leave(self, receiver: MemoryReceiver) -> None:
        self.held = {e for e in self.held if e.holder is not receiver}
        super().leave(receiver)


class StuckWithItsConsumer(Store):
    def leave(self, receiver: MemoryReceiver) -> None:
        mine = {e for e in self.held if e.holder is receiver}
        self.held -= mine
        super().leave(receiver)
        self.held |= mine


class LeaseNeverExpires(Store):
    def take(self, receiver: MemoryReceiver, count: int) -> list[Entry]:
        taken = super().take(receiver, count)
        for entry in taken:
            entry.lease_end_s = math.inf
        return taken


class StaleAckDeletes(Store):
    def accept(self, receiver: MemoryReceiver, entry: Entry) -> bool:
        accepted = super().accept(receiver, entry)
        self.held.discard(entry)
        self.waiting = [e for e in self.waiting if e is not entry]
        return accepted


class MovedByANewcomer(Store):
    def join(self, receiver: MemoryReceiver) -> None:
        held = sorted(self.held, key=Entry.rank)
        super().join(receiver)
        for entry in held:
            self.give_back(entry)
        self.offer()


class CountForgotten(Store):
    def leave(self, receiver: MemoryReceiver) -> None:
        for entry in self.held:
            if entry.holder is receiver:
                entry.deliveries = 0
        super().leave(receiver)


class DurableNothing(Store):
    def restart(self, keep: bool) -> None:
        super().restart(False)


class ExtendIgnored(LeasedReceiver):
    def extend_batch(self, receipts: Sequence[Any]) -> None:
        """Says nothing, does nothing."""


class LostSettlementHidden(MemoryReceiver):
    def settle_batch(
        self, settlements: Sequence[tuple[Any, Disposition]]
    ) -> Future[Sequence[tuple[int, MessagingError]]] | None:
        super().settle_batch(settlements)
        return None


class LossUnnoticed(MemoryReceiver):
    async def receive_batch(self, max_deliveries: int) -> list[Any]:
        while True:
            found = [] if self.session.lost else self.poll(max_deliveries)
            if found:
                return found
            self.waiter = self.loop.create_future()
            await self.waiter


class PollsOnAfterStop(MemoryReceiver):
    async def stop(self) -> None:
        await super().stop()
        self._poller = self.loop.create_task(self._poll_on())

    async def _poll_on(self) -> None:
        for _ in range(4):
            await asyncio.sleep(0.03)
            if self.store is not None:
                for entry in self.store.take(self, 500):
                    self.store.release(self, entry, 0.0)


DOUBLES: Final = (
    Double("auto-ack", "settles on receive instead of on ack", ("ACK-02", "ACK-03"),
     "what a dead consumer had in hand must come back", with_store(AutoAck)),
    Double("release-drops", "a released message is thrown away", ("CAP-08", "RED-01"),
     "it must come back", with_store(ReleaseDrops)),
    Double("release-delay-ignored", "a delayed release comes back at once", ("CAP-01.release",),
     "the delay is measured", with_store(ReleaseAtOnce)),
    Double("acked-comes-back", "a settled message is delivered again a little later", ("ACK-01",),
     "silence is waited for and proven by a sentinel", with_store(AckedComesBack)),
    Double("ack-no-op", "an ack does nothing", ("ACK-01",),
     "settlement is looked at from a new connection after a death", with_store(AckNoop)),
    Double("ack-forgotten-on-death", "acks are undone when their connection dies", ("ACK-01", "ACK-12"),
     "settlement is looked at from a new connection after a death", with_store(AckForgottenOnDeath)),
    Double("cumulative-ack", "an ack settles all earlier ones too", ("ACK-09",),
     "the last of three is settled, the others must come back", with_store(CumulativeAck)),
    Double("lost-with-its-consumer", "what a dead consumer held is lost", ("ACK-02", "GRP-05"),
     "it must come back", with_store(LostWithItsConsumer)),
    Double("stuck-with-its-consumer", "what a dead consumer held stays with it", ("ACK-02", "FLT-02"),
     "another consumer must get it", with_store(StuckWithItsConsumer)),
    Double("lease-never-expires", "a frozen consumer keeps its messages for ever", ("ACK-04",),
     "after the declared lease another consumer must get them", with_store(LeaseNeverExpires), "lease"),
    Double("extend-ignored", "a lease runs out though it is extended", ("ACK-05",),
     "a long handler must keep its message", with_receiver(ExtendIgnored), "lease"),
    Double("stale-ack-deletes", "an ack that is answered as too late deletes the message all the same", ("ACK-06",),
     "what SettleLost says is ours no more must come again", with_store(StaleAckDeletes), "lease"),
    Double("lost-settlement-hidden", "an ack that came too late looks like one that counted", ("ACK-06",),
     "SettleLost must be raised", with_receiver(LostSettlementHidden), "lease"),
    Double("moved-by-a-newcomer", "a consumer that joins gets what a connected one holds", ("ACK-04", "ACK-05"),
     "a newcomer joins while one is held, and must not get it", with_store(MovedByANewcomer)),
    Double("count-forgotten", "the delivery count starts anew when a consumer dies", ("RED-02", "RED-09"),
     "the count is read after deaths", with_store(CountForgotten)),
    Double("durable-nothing", "confirmed messages are gone after a restart", ("FLT-04", "FLT-05"),
     "the ledger of confirmed messages must be there", with_store(DurableNothing), "lease"),
    Double("loss-unnoticed", "an idle receiver never notices its lost connection", ("FLT-01",),
     "a message after the cut must arrive", with_receiver(LossUnnoticed)),
    Double("polls-on-after-stop", "a stopped receiver fetches again what was handed back, and returns it", ("LIF-03",),
     "a stop may cost a waiting message one delivery", with_receiver(PollsOnAfterStop)),
)  # fmt: skip
