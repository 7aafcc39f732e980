"""Which rows are measured, with how many messages, and what is asked of ours."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from .job import Job

SIZES: Final = (100, 1024)
ROUNDS: Final = 5
QUICK_ROUNDS: Final = 1
QUICK_SIZES: Final = (100,)
WORKS: Final = ("publish_one", "publish_windowed", "consume", "latency")
PEER_WORKS: Final = ("queue", "signal_send", "signal_receive")
"""Without a broker: between two processes, of which one is measured."""
MODEL_WORKS: Final = ("publish_windowed", "consume")
"""A pydantic model changes nothing else: its cost is per message, the other works' is the round trip."""

PEERS: Final[Mapping[str, Mapping[str, tuple[str, ...]]]] = {
    "faststream": {"rabbitmq": WORKS, "nats": WORKS, "kafka": WORKS},
    "kombu": dict.fromkeys(("rabbitmq", "sqs"), ("publish_one", "consume", "latency")),
    "mq_bridge": {
        "rabbitmq": ("publish_one", "publish_windowed"),
        **dict.fromkeys(("nats", "kafka", "sqs"), WORKS),
        "zeromq": PEER_WORKS,
    },
}
"""Other libraries -> broker -> the works that each can do as the row asks; README.md says what is missing and why."""

_COUNTS: Final[Mapping[tuple[str, str], Mapping[str, int]]] = {
    ("rabbitmq", "publish_one"): {"": 400},
    ("rabbitmq", "publish_windowed"): {"": 6_000, "ours": 15_000, "ours_model": 15_000, "faststream": 1_500},
    ("rabbitmq", "consume"): {"": 6_000, "ours": 15_000, "ours_model": 15_000, "faststream": 1_500, "kombu": 1_500},
    ("rabbitmq", "latency"): {"": 200},
    ("nats", "publish_one"): {"": 800},
    ("nats", "publish_windowed"): {
        "": 10_000,
        "ours": 30_000,
        "ours_model": 30_000,
        "faststream": 3_000,
        "mq_bridge": 20_000,
    },
    ("nats", "consume"): {"": 6_000, "ours": 30_000, "ours_model": 30_000, "faststream": 3_000, "mq_bridge": 20_000},
    ("nats", "latency"): {"": 300},
    ("kafka", "publish_one"): {"": 400},
    ("kafka", "publish_windowed"): {
        "": 100_000,
        "ours": 60_000,
        "ours_model": 60_000,
        "faststream": 3_000,
        "mq_bridge": 40_000,
    },
    ("kafka", "consume"): {"": 100_000, "ours": 60_000, "ours_model": 60_000, "faststream": 1_500},
    ("kafka", "latency"): {"": 200, "mq_bridge": 100},
    ("sqs", "publish_one"): {"": 200, "kombu": 100},
    ("sqs", "publish_windowed"): {"": 2_000},
    ("sqs", "consume"): {"": 2_000, "kombu": 150},
    ("sqs", "latency"): {"": 50},
    ("zeromq", "queue"): {"": 10_000, "ours": 60_000, "mq_bridge": 120_000},
    ("zeromq", "signal_send"): {"": 20_000, "ours": 60_000, "mq_bridge": 120_000},
    ("zeromq", "signal_receive"): {"": 20_000, "ours": 60_000, "mq_bridge": 120_000},
    ("core", "publish_windowed"): {"": 60_000},
    ("core", "consume"): {"": 60_000},
}
"""Messages per measurement, so that each takes 0.2 to 0.5 s on an idle machine."""


@dataclass(frozen=True, slots=True)
class Target:
    """What `measure` of ours has to be at most (or at least): its ratio to `client`'s, or itself where that is ""."""

    measure: Literal["cpu_us", "rate", "p50_us"]
    client: str
    limit: float

    @property
    def at_least(self) -> bool:
        return self.measure == "rate"

    def is_met_by(self, value: float) -> bool:
        return value >= self.limit if self.at_least else value <= self.limit

    def __str__(self) -> str:
        unit = "x" if self.client else "/s" if self.measure == "rate" else " us"
        return f"{'>=' if self.at_least else '<='} {self.limit:,g}{unit}"


@dataclass(frozen=True, slots=True)
class Row:
    """One work at one size on one broker, by all clients."""

    broker: str
    work: str
    size: int

    @property
    def clients(self) -> tuple[str, ...]:
        if self.broker == "core":
            return ("ours", "ours_model")
        if self.broker in ("sqs", "zeromq"):  # the client's best is what its users write
            return ("usual", "ours", *self.peers)
        best = ("best",) if (self.broker, self.work) != ("kafka", "consume") else ()  # read with headers as without
        model = ("ours_model",) if self.work in MODEL_WORKS else ()
        return ("usual", *best, "ours", *model, *self.peers)

    @property
    def peers(self) -> tuple[str, ...]:
        return tuple(peer for peer, able in PEERS.items() if self.work in able.get(self.broker, ()))

    def job(self, client: str, url: str, name: str) -> Job:
        counts = _COUNTS[self.broker, self.work]
        return Job(self.broker, self.work, client, self.size, counts.get(client, counts[""]), url, name)

    def targets(self, client: str) -> tuple[Target, ...]:
        """What is asked of `client`, one of ours: the aims of the issue, and no peer ahead."""
        if self.broker == "core":
            return (Target("cpu_us", "", 2.5 if client == "ours" else 5.0),)
        pace: Literal["p50_us", "rate"] = "p50_us" if self.work == "latency" else "rate"
        return *self._aims(client), *(Target(pace, peer, 1.0) for peer in self.peers)

    def _aims(self, client: str) -> tuple[Target, ...]:
        if self.broker in ("sqs", "zeromq"):
            asked = _RATES.get((self.broker, self.work))
            return (Target("rate", *asked),) if asked else ()
        if client == "ours_model":
            return ()
        if self.work == "latency":
            return (Target("p50_us", "usual", 1.25),)
        if self.work == "publish_one":
            return (Target("rate", "usual", 0.9),)
        if self.broker == "kafka":
            return _KAFKA[self.work]
        return (Target("cpu_us", "usual", _CPU_LIMITS[self.broker, self.work]),)


_RATES: Final = {
    ("sqs", "publish_windowed"): ("usual", 0.95),
    ("sqs", "consume"): ("usual", 0.95),
    ("zeromq", "queue"): ("", 450_000),
    ("zeromq", "signal_send"): ("usual", 3.0),
    ("zeromq", "signal_receive"): ("usual", 8.0),
}
_CPU_LIMITS: Final = {
    ("rabbitmq", "publish_windowed"): 0.25,
    ("rabbitmq", "consume"): 0.8,
    ("nats", "publish_windowed"): 0.25,
    ("nats", "consume"): 0.2,
}
_KAFKA: Final = {
    "publish_windowed": (Target("rate", "usual", 0.6), Target("rate", "best", 0.5)),
    "consume": (Target("rate", "usual", 0.7),),
}


def rows(broker: str, sizes: Sequence[int] = SIZES) -> Iterator[Row]:
    """The rows of `broker`, which may be "core"."""
    if broker == "core":
        yield from (Row("core", work, 100) for work in MODEL_WORKS)
        return
    for size in sizes:
        for work in PEER_WORKS if broker == "zeromq" else WORKS:
            yield Row(broker, work, size)
