"""Flawed doubles of the memory adapter, one per class of bug: the suite must catch every one of them.

Each double is the honest adapter with one planted flaw, declares what the honest one declares, and
names the clauses that are meant to catch it. `messaging doubles` runs them; a survivor is a hole in
the suite, found before an adapter falls into it.
"""

from __future__ import annotations

from typing import Final

from . import contents, counting, history, order, publishing, settling, sharing
from .planting import Double

__all__ = ["DOUBLES", "Double", "double"]

DOUBLES: Final[tuple[Double, ...]] = (
    *settling.DOUBLES,
    *sharing.DOUBLES,
    *order.DOUBLES,
    *publishing.DOUBLES,
    *contents.DOUBLES,
    *history.DOUBLES,
    *counting.DOUBLES,
)


def double(name: str) -> Double:
    """The double called `name`. LookupError names all of them."""
    for found in DOUBLES:
        if found.name == name:
            return found
    raise LookupError(f"no double {name!r}; there are {', '.join(d.name for d in DOUBLES)}")
