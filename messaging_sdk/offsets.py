"""What a cumulative log may commit: the end of the settled prefix among the offsets that were delivered."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable


class OffsetLedger:
    """One shard (a partition, say) of one assignment. Belongs to one thread.

    An offset is delivered once, in ascending order, and settled once, in any sequence. Offsets that are never
    delivered (compacted, transaction markers) hold nothing back. At most one commit is under way: the next one begins
    at its completion and takes along all that was settled meanwhile, so commits follow at the server's own pace.
    """

    __slots__ = ("_committed", "_end", "_open", "_under_way", "_unsettled", "position")

    def __init__(self, position: int) -> None:
        """`position`: where the commit stands, so that nothing is committed before something was settled."""
        self.position = position
        """What may be committed: every delivered offset below it is settled. Never goes back."""
        self._committed = position
        self._under_way: int | None = None
        self._end = position
        self._open: deque[int] = deque()  # delivered, from the first unsettled one on
        self._unsettled: set[int] = set()

    @property
    def unsettled(self) -> int:
        """Deliveries without a settlement."""
        return len(self._unsettled)

    @property
    def gap(self) -> int:
        """Deliveries from the first unsettled one on, settled or not: what a crash repeats. An adapter bounds it."""
        return len(self._open)

    def deliver(self, offsets: Iterable[int]) -> None:
        """Note deliveries. Raises ValueError for one that is not above all before it; those ahead of it are noted."""
        for offset in offsets:
            if offset < self._end:
                raise ValueError(f"offset {offset} was delivered after offset {self._end - 1}")
            self._end = offset + 1
            self._unsettled.add(offset)
            self._open.append(offset)

    def settle(self, offset: int) -> bool:
        """Note a settlement; False if `offset` is not open here: settled before, or never delivered."""
        unsettled, open_ = self._unsettled, self._open
        if offset not in unsettled:
            return False
        unsettled.remove(offset)
        if open_[0] == offset:
            open_.popleft()
            while open_ and open_[0] not in unsettled:
                open_.popleft()
            self.position = open_[0] if open_ else self._end
        return True

    def begin_commit(self) -> int | None:
        """The position to commit now; None while a commit is under way or where there is nothing new."""
        if self._under_way is not None or self.position == self._committed:
            return None
        self._under_way = self.position
        return self.position

    def end_commit(self, *, stored: bool) -> None:
        """The commit that `begin_commit` began has ended. One that was not stored is due again, further on."""
        if stored and self._under_way is not None:
            self._committed = self._under_way
        self._under_way = None
