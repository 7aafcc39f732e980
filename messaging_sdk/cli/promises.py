"""The table of what a bus's destinations are promised, printed before a program starts."""

from __future__ import annotations

from rich.table import Table

from ..bus import Bus
from ..destination import Destination


def promises_table(bus: Bus, title: str = "What is promised") -> Table:
    """One row per declared or handled destination."""
    table = Table(title=title, title_justify="left")
    for heading in ("destination", "on", "server", "an OK means", "survives", "comes back after", "emulated by us"):
        table.add_column(heading, overflow="fold")
    for promise in bus.promises():
        caps = bus.capabilities(promise.destination)
        back = {
            "none": "never: at most once",
            "timeout": f"{caps.lease_s:g} s, or at once if handed back",
            "membership": "the consumer left its group, or others joined it",
            "connection": "a lost connection, at once",
        }[caps.lease]
        table.add_row(
            describe(promise.destination),
            promise.backend,
            promise.server or promise.adapter,
            promise.ok_means.replace("_", " "),
            {"none": "nothing", "restart": "broker restart", "kill": "broker SIGKILL"}[caps.durable],
            back,
            ", ".join(promise.emulated) or "nothing",
        )
    return table


def describe(destination: Destination[object]) -> str:
    words = [type(destination).__name__, destination.name]
    if destination.ordered:
        words.append("(ordered)")
    if destination.groups:
        words.append(f"groups: {', '.join(destination.groups)}")
    return " ".join(words)
