"""Key lanes: of each key one delivery is out at a time, in the order of arrival; other keys go on."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any

from .model import Delivery

NO_KEY = ""  # what unkeyed messages of an ordered destination share


class Lanes:
    """`enter` gives True if the delivery may run now; `leave` gives the next of its key, if one waits."""

    __slots__ = ("_lanes",)

    def __init__(self) -> None:
        # A key is present while one of it is out; its queue is made when a second one comes.
        self._lanes: dict[str, deque[Delivery[Any]] | None] = {}

    def enter(self, delivery: Delivery[Any]) -> bool:
        lanes = self._lanes
        key = delivery.key or NO_KEY
        if key not in lanes:
            lanes[key] = None
            return True
        waiting = lanes[key]
        if waiting is None:
            waiting = lanes[key] = deque()
        waiting.append(delivery)
        return False

    def leave(self, delivery: Delivery[Any]) -> Delivery[Any] | None:
        key = delivery.key or NO_KEY
        waiting = self._lanes[key]
        if waiting:
            return waiting.popleft()
        del self._lanes[key]
        return None

    def drain(self, delivery: Delivery[Any]) -> list[Delivery[Any]]:
        """Those that wait behind `delivery`, in order, taken out of its lane."""
        key = delivery.key or NO_KEY
        waiting = self._lanes.get(key)
        if not waiting:
            return []
        self._lanes[key] = None
        return list(waiting)

    def waiting(self) -> Iterator[Delivery[Any]]:
        for lane in self._lanes.values():
            if lane:
                yield from lane

    def clear(self) -> None:
        self._lanes.clear()
