"""For users' unit tests: a bus on a broker of its own in memory, that may behave as another backend does."""

from __future__ import annotations

import asyncio
import itertools
from typing import Any, Final

from .bus import Bus

_numbers: Final = itertools.count(1)


def memory_bus(profile: str | None = None, **options: Any) -> Bus:
    """A Bus on a fresh in-process broker. `profile="rabbitmq"` gives that adapter's capabilities and refusals (its
    extra must be installed); `options` as for Bus()."""
    url = f"memory://test-{next(_numbers)}" + (f"?profile={profile}" if profile else "")
    return Bus(url, **options)


async def settled(bus: Bus, wait_s: float = 5.0) -> None:
    """Wait until this bus's handlers have nothing to do: all that arrived is settled and nothing is held.

    Raises TimeoutError after `wait_s`. What another program has published and not yet arrived is not seen.
    """
    async with asyncio.timeout(wait_s):
        quiet = 0
        while quiet < 3:  # an arrival may lie between the backend and the consumer for a turn or two of the loop
            await asyncio.sleep(0.005)
            quiet = quiet + 1 if bus.idle else 0
