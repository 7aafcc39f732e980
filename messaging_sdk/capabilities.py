"""What a backend promises for one destination, as values; and what a program needs of it.

A capability is a value, not a yes/no, so that the contract suite can measure it and compare: claiming more than is
measured fails, and so does claiming less. Third parties start from `Capabilities()`, which promises nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from enum import StrEnum
from typing import Any, Final, Literal

from .errors import Unmet

Settle = Literal["none", "individual"]
Release = Literal["none", "now", "delay"]
Lease = Literal["none", "timeout", "membership", "connection"]
Count = Literal["none", "flag", "exact"]
Order = Literal["none", "publisher"]
Compete = Literal["none", "standby", "round_robin", "demand"]
Groups = Literal["none", "live", "durable"]
Lag = Literal["none", "waiting", "unsettled"]
Confirm = Literal["none", "received", "stored", "settled"]
Durable = Literal["none", "restart", "kill"]
BatchMode = Literal["sequential", "entries", "atomic"]
OkMeans = Literal["buffer", "memory", "page_cache", "fsync", "quorum", "settled"]


class Level(StrEnum):
    """How a promise is kept."""

    NATIVE = "native"  # by the broker
    EMULATED = "emulated"  # by the adapter or core; printed at start, forbidden by emulation = "forbid"
    CONFIG = "config"  # not as configured; possible with the options that the note names
    BEST_EFFORT = "best effort"  # promised is nothing; the broker does it mostly, so that measuring it tells nothing
    NONE = "none"


@dataclass(frozen=True, slots=True, kw_only=True)
class HeaderRules:
    """Which user headers arrive exactly as they were sent; anything else is refused before any byte is sent.

    `charset` of values: "text" any str, "ascii" 0x20-0x7E, "field" ascii without leading or trailing blank.
    `names`: "text" any non-empty str, "token" letters, digits and !#$%&'*+-.^_`|~ only.
    """

    max_count: int
    max_bytes: int  # names and values of one message together, in UTF-8
    charset: Literal["text", "ascii", "field"] = "text"
    names: Literal["text", "token"] = "text"


@dataclass(frozen=True, slots=True, kw_only=True)
class Capabilities:
    """The promises for one destination on one backend. Each field is measured by the contract case CAP-01.<field>."""

    settle: Settle = "none"
    """individual: each delivery is settled alone, in any sequence, and a settled one never comes again."""
    release: Release = "none"
    """now: Disposition RELEASE(0) gives a delivery back at once; delay: after RELEASE(delay_s)."""
    lease: Lease = "none"
    """What brings an unsettled delivery of a dead consumer back: its lost connection (at once) or `lease_s`.
    membership: that of a group. A closed or cut consumer leaves at once, a killed one is noticed after a while; when
    another one joins, what waits may move to it, and what a handler runs is waited for, within the adapter's bound."""
    lease_s: float = 0.0
    """Length of a lease; 0 unless lease="timeout". Waits in tests derive from it."""
    hold_s: float = math.inf
    """Longest time a delivery may stay unsettled in a living consumer (extended leases included)."""
    count: Count = "none"
    """exact: `Delivery.deliveries` is 1, 2, 3...; flag: only `Delivery.redelivered` is known."""
    backlog: bool = False
    """A message published before the first consumer came waits for it: on the broker, or with confirm="settled" in its
    sender, whose publish waits as long."""
    order: Order = "none"
    """publisher: one consumer without failures sees one publisher's messages in the order they were accepted."""
    order_redelivery: bool = False
    """A delivery that comes back comes before later messages of its key."""
    order_competition: bool = False
    """Two consumers at once never run two messages of one key at the same time or out of order."""
    compete: Compete = "none"
    """none: a second consumer is refused; standby: one works, others take over when it goes;
    round_robin: they share the messages; demand: they share, and a frozen one holds no more than its window."""
    groups: Groups = "none"
    """durable: a declared group gets what was published while it was away; live: only while connected."""
    replay: bool = False
    """What a Topic stores can be read again, from its beginning, a time or a position, whatever its groups settled."""
    lag: Lag = "none"
    """What `Bus.lag` counts. waiting: what is stored and handed to no consumer; unsettled: that, and what is handed out
    and not settled."""
    confirm: Confirm = "none"
    """What a send's OK proves: stored as `ok_means` says, received by the broker, or nothing. settled: every consumer
    that gets a copy has settled it; until then the message lives in its sender, and dies with it unconfirmed."""
    route_error: bool = False
    """A message that no queue would take is REJECTED with NotFound instead of accepted."""
    durable: Durable = "none"
    """What confirmed messages survive: a graceful broker restart, or its SIGKILL. Power loss is never claimed."""
    dedup_s: float = 0.0
    """A message id sent again within this time is stored once; 0 = stored again."""
    batch: BatchMode = "sequential"
    """entries: one bad message of a batch is refused alone; atomic: all or none; sequential: the rest after it too."""
    ttl: bool = False
    """`ttl_s`: an expired message never arrives, an unexpired one does."""
    delay: bool = False
    """`delay_s`: a message arrives no sooner."""
    priority: int = 0
    """Number of priority levels (0 to n-1, higher first) that reorder a waiting backlog; 0 = none."""
    max_body: int = 0
    """Largest encoded body in bytes."""
    headers: HeaderRules | None = None
    """Which headers travel unaltered; None = no headers."""
    window: bool = False
    """A receiver never hands out more than its window of unsettled deliveries."""
    ok_means: OkMeans = "buffer"
    """Where a message is when its send says OK. Beyond page_cache it cannot be proven without cutting power: cited.
    settled: nowhere any more, it is done."""

    levels: Mapping[str, Level] = field(default_factory=dict)
    """Fields that are not NATIVE where they have a value; of those without one CONFIG for what an option would give,
    BEST_EFFORT for what happens mostly."""
    notes: Mapping[str, str] = field(default_factory=dict)
    """Per field: the reason, the limit, the option, the source of a broker fact."""

    def level(self, flag: str) -> Level:
        """What is declared in `levels`, else NATIVE if the flag promises anything, else NONE."""
        if flag in self.levels:
            return self.levels[flag]
        return Level.NATIVE if getattr(self, flag) not in NOTHING else Level.NONE

    def items(self) -> Iterator[tuple[str, Any]]:
        """Every flag with its value, in the order of declaration."""
        for name in FLAGS:
            yield name, getattr(self, name)


FLAGS: Final = tuple(f.name for f in fields(Capabilities) if f.name not in ("levels", "notes"))
NOTHING: Final = ("none", False, 0, None)

_RANKS: Final[Mapping[str, tuple[str, ...]]] = {
    "settle": ("none", "individual"),
    "release": ("none", "now", "delay"),
    "lease": ("none", "timeout", "membership", "connection"),
    "count": ("none", "flag", "exact"),
    "order": ("none", "publisher"),
    "compete": ("none", "standby", "round_robin", "demand"),
    "groups": ("none", "live", "durable"),
    "lag": ("none", "waiting", "unsettled"),
    "confirm": ("none", "received", "stored", "settled"),
    "durable": ("none", "restart", "kill"),
    "batch": ("sequential", "entries", "atomic"),
    "ok_means": ("buffer", "memory", "page_cache", "fsync", "quorum", "settled"),
}


def choices(flag: str) -> tuple[str, ...] | None:
    """The values of an enumerated flag from weakest to strongest; None for numbers, booleans and headers."""
    return _RANKS.get(flag)


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """What a program requires beyond what its use of a destination already implies; None = no requirement.

    `emulation="forbid"` refuses every promise that is kept by us instead of the broker.
    """

    confirm: Confirm | None = None
    durable: Durable | None = None
    ok_means: OkMeans | None = None
    count: Count | None = None
    dedup_s: float | None = None
    max_body: int | None = None
    hold_s: float | None = None
    emulation: Literal["allow", "forbid"] = "allow"

    def wanted(self) -> Iterator[tuple[str, Any]]:
        """Every stated need as (flag, value)."""
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name != "emulation" and value is not None:
                yield f.name, value


def meets(flag: str, have: Any, want: Any) -> bool:
    """Is the declared value `have` of `flag` at least `want`?"""
    ranks = _RANKS.get(flag)
    if ranks is not None:
        return ranks.index(have) >= ranks.index(want)
    return bool(have >= want)


def unmet(
    capabilities: Capabilities,
    wanted: Mapping[str, Any],
    *,
    destination: str,
    backend: str,
    forbid_emulation: bool = False,
    reasons: Mapping[str, str] | None = None,
) -> list[Unmet]:
    """Every flag of `wanted` that `capabilities` does not reach. `reasons` says per flag which use asks for it."""
    missing = []
    for flag, want in wanted.items():
        have = getattr(capabilities, flag)
        emulated = forbid_emulation and capabilities.level(flag) is Level.EMULATED
        if meets(flag, have, want) and not emulated:
            continue
        why = (reasons or {}).get(flag)
        need = f"{flag}={want!r}" + (f" ({why})" if why else "")
        note = capabilities.notes.get(flag)
        if emulated:
            remedy = f'emulation = "allow", or a backend whose {flag} is native (here: {note or "emulated"})'
        elif capabilities.level(flag) is Level.CONFIG and note:
            remedy = note
        else:
            remedy = f"a backend with {flag}>={want!r}; this one has {have!r}" + (f" ({note})" if note else "")
        missing.append(Unmet(destination, need, backend, remedy))
    return missing
