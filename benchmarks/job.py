"""What one measurement is: the order that a fresh process gets, the stopwatch it runs, the sample it prints."""

from __future__ import annotations

import json
import resource
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Final

from pydantic import BaseModel

WINDOW: Final = 2000
"""Most messages in flight of a windowed publish, for every client."""
PREFETCH: Final = 500
"""Most unsettled messages of a consumer, for every client: our default window."""
CONCURRENCY: Final = 64
"""Handlers of ours that run at once."""
FETCH: Final = 100
"""Messages per `fetch`, for every client that pulls by it."""
WARM_UP: Final = 500
"""Messages published before the clock starts: first calls fill caches and open what is opened late."""


@dataclass(frozen=True, slots=True)
class Job:
    """One measurement of `count` messages of `size` bytes by one client."""

    broker: str
    """rabbitmq, nats, sqs, kafka, zeromq or core."""
    work: str
    """publish_one, publish_windowed, consume or latency; on ZeroMQ queue, signal_send or signal_receive."""
    client: str
    """usual, best, ours, ours_model, faststream, kombu or mq_bridge."""
    size: int
    count: int
    url: str = ""
    name: str = ""
    """Of the queue, which exists and, for `consume`, holds `count` messages."""

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Job:
        return cls(**json.loads(text))

    @property
    def body(self) -> bytes:
        return b"x" * self.size

    @property
    def subject(self) -> str:
        """The queue's subject on NATS."""
        return f"queue.{self.name}"

    @property
    def stream(self) -> str:
        """The queue's stream on NATS."""
        return self.subject.replace(".", "__")


@dataclass(frozen=True, slots=True)
class Sample:
    """What one process measured. `cpu_s` is user and system time of all its threads between start and stop."""

    count: int
    wall_s: float
    cpu_s: float
    p50_us: float | None = None
    """Median time from the publish call to the handler's start; only of `latency`."""

    @property
    def cpu_us(self) -> float:
        return self.cpu_s / self.count * 1e6

    @property
    def rate(self) -> float:
        return self.count / self.wall_s


class Stopwatch:
    """`start` before the first measured message, `stop` after the last one's outcome."""

    def start(self) -> None:
        self._cpu_s = _cpu_s()
        self._wall_s = time.perf_counter()

    def stop(self, count: int, delays_s: Sequence[float] = ()) -> Sample:
        wall_s = time.perf_counter() - self._wall_s
        p50_us = statistics.median(delays_s) * 1e6 if delays_s else None
        return Sample(count, wall_s, _cpu_s() - self._cpu_s, p50_us)


def _cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


class Reading(BaseModel):
    """The pydantic model of the `ours_model` rows."""

    sensor: str
    at: int
    value: float
    valid: bool
    note: str = ""

    @classmethod
    def of_size(cls, size: int) -> Reading:
        """A reading whose JSON has exactly `size` bytes."""
        bare = cls(sensor="boiler-7", at=1_790_000_000, value=21.5, valid=True)
        return bare.model_copy(update={"note": "x" * (size - len(bare.model_dump_json()))})
