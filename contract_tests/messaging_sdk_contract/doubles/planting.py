"""Puts flawed parts into an otherwise honest memory driver."""

from __future__ import annotations

from dataclasses import dataclass

from messaging_sdk import memory
from messaging_sdk.memory_history import MemoryReader


@dataclass(frozen=True, slots=True)
class Double:
    """One planted flaw."""

    name: str
    bug: str
    """The class of bug, in one line."""
    clauses: tuple[str, ...]
    """What is meant to catch it; at least one of them must fail."""
    why: str
    """Why those clauses see it."""
    driver: type[memory.Driver]
    profile: str = "default"
    """The memory harness's profile in which the flaw can show."""


def with_store(flawed: type[memory.Store]) -> type[memory.Driver]:
    """A driver whose broker keeps its messages in `flawed` stores."""

    class FlawedBroker(memory.Broker):
        store_class = flawed

    return with_broker(FlawedBroker)


def with_broker(flawed: type[memory.Broker]) -> type[memory.Driver]:
    class FlawedDriver(memory.Driver):
        broker_class = flawed

    return FlawedDriver


def with_sender(flawed: type[memory.MemorySender]) -> type[memory.Driver]:
    class FlawedDriver(memory.Driver):
        sender_class = flawed

    return FlawedDriver


def with_reader(flawed: type[MemoryReader]) -> type[memory.Driver]:
    class FlawedDriver(memory.Driver):
        reader_class = flawed

    return FlawedDriver


def with_receiver(flawed: type[memory.MemoryReceiver]) -> type[memory.Driver]:
    """A driver whose receivers are `flawed`; with lease=timeout they can be extended, too."""

    class FlawedLeasedReceiver(flawed, memory.LeasedReceiver):  # type: ignore[misc, valid-type]
        pass

    class FlawedDriver(memory.Driver):
        receiver_class = flawed
        leased_receiver_class = FlawedLeasedReceiver

    return FlawedDriver
