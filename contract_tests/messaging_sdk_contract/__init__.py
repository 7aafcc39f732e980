"""The contract kit: what every adapter promises, as cases that run against a live backend.

An adapter's author writes a `Harness`, registers it under `messaging_sdk.harnesses`, and runs
`messaging contract <adapter>`, or pytest with `-p messaging_sdk_contract.plugin`.
"""

from .cases import ALL, ORDERED, QUEUES, SETTLED, TOPICS, Case, case
from .harness import Environment, Fault, Harness, NativeMessage, Refusal
from .lab import KINDS, Arrival, Kind, Lab, NotRun, eventually
from .proxy import TcpProxy

__all__ = [
    "ALL",
    "KINDS",
    "ORDERED",
    "QUEUES",
    "SETTLED",
    "TOPICS",
    "Arrival",
    "Case",
    "Environment",
    "Fault",
    "Harness",
    "Kind",
    "Lab",
    "NativeMessage",
    "NotRun",
    "Refusal",
    "TcpProxy",
    "case",
    "eventually",
]
