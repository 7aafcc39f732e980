"""What a cumulative log may commit: the end of the settled prefix among the offsets that were delivered, and, where the
log takes a note beside it, what is settled ahead of that.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable


class OffsetLedger:
    """One shard (a partition, say) of one assignment. Belongs to one thread.

    An offset is delivered once, in ascending order, and settled once, in any sequence. Offsets that are never
    delivered (compacted, transaction markers) hold nothing back. At most one commit is under way: the next one begins
    at its completion and takes along all that was settled meanwhile, so commits follow at the server's own pace.
    """

    __slots__ = ("_committed", "_end", "_notes_ahead", "_open", "_settled", "_under_way", "_unsettled", "position")

    def __init__(self, position: int, *, notes_ahead: bool = False) -> None:
        """`position`: where the commit stands, so that nothing is committed before something was settled.

        `notes_ahead`: a commit carries `ahead` too, so one is due after each settlement, not only when the prefix grew.
        """
        self.position = position
        """What may be committed: every delivered offset below it is settled. Never goes back."""
        self._notes_ahead = notes_ahead
        self._settled = 0
        self._committed = 0 if notes_ahead else position  # what `_state` was when a commit was stored
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

    @property
    def span(self) -> int:
        """Offsets from `position` to the last delivered one: how far a note of `ahead` reaches."""
        return self._end - self.position

    def ahead(self) -> list[int]:
        """Settled offsets above `position`, ascending: what a commit of it alone forgets."""
        if len(self._open) == len(self._unsettled):
            return []
        return [offset for offset in self._open if offset not in self._unsettled]

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
        self._settled += 1
        if open_[0] == offset:
            open_.popleft()
            while open_ and open_[0] not in unsettled:
                open_.popleft()
            self.position = open_[0] if open_ else self._end
        return True

    def settle_all(self) -> None:
        """Note that every delivery so far is settled."""
        self._settled += len(self._unsettled)
        self._unsettled.clear()
        self._open.clear()
        self.position = self._end

    def begin_commit(self) -> int | None:
        """The position to commit now; None while a commit is under way or where there is nothing new."""
        if self._under_way is not None or self._state == self._committed:
            return None
        self._under_way = self._state
        return self.position

    def end_commit(self, *, stored: bool) -> None:
        """The commit that `begin_commit` began has ended. One that was not stored is due again, further on."""
        if stored and self._under_way is not None:
            self._committed = self._under_way
        self._under_way = None

    @property
    def _state(self) -> int:
        return self._settled if self._notes_ahead else self.position
