"""What each sub-command takes and prints. The work is done elsewhere."""

from __future__ import annotations

import importlib
import logging
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console

from ..bus import Bus
from ..errors import MessagingError

app = typer.Typer(no_args_is_help=True, add_completion=False, help="One interface over real message brokers.")
_errors = Console(stderr=True)


def _fail(error: object) -> NoReturn:
    _errors.print(f"error: {error}", style="red", highlight=False, markup=False)
    raise typer.Exit(1)


@app.command()
def demo() -> None:
    """Run one order flow on memory and on an embedded NATS server, and compare what happened."""
    from .demo import run

    try:
        raise typer.Exit(run())
    except MessagingError as error:
        _fail(error)


@app.command()
def run(
    target: Annotated[str, typer.Argument(help="module:bus, as in shop.app:bus")],
    grace_s: Annotated[float, typer.Option(help="seconds that running handlers get to end")] = 10.0,
) -> None:
    """Run the handlers of a bus until SIGTERM or Ctrl-C, then stop gracefully."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    bus = _load(target)
    try:
        bus.run(grace_s)
    except MessagingError as error:
        _fail(error)


@app.command()
def check(target: Annotated[str, typer.Argument(help="module:bus")]) -> None:
    """Connect, check every need of the program, print what each destination is promised; exit 1 if one is unmet."""
    import asyncio

    from .promises import promises_table

    bus = _load(target)

    async def connect() -> None:
        async with bus:
            Console().print(promises_table(bus))

    try:
        asyncio.run(connect())
    except MessagingError as error:
        _fail(error)


def _load(target: str) -> Bus:
    module, separator, name = target.partition(":")
    if not separator:
        _fail(f"{target!r}: write module:bus, as in shop.app:bus")
    sys.path.insert(0, str(Path.cwd()))
    try:
        found: Any = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        _fail(f"{target!r} cannot be loaded: {error}")
    except MessagingError as error:
        _fail(error)
    inner = getattr(found, "_bus", found)  # a sync.Bus has the async one inside
    if not isinstance(inner, Bus):
        _fail(f"{target!r} is a {type(found).__name__}, not a Bus")
    return inner


def _kit() -> Any:
    try:
        return importlib.import_module("messaging_sdk_contract.commands")
    except ModuleNotFoundError as error:
        _fail(f"the contract kit needs {error.name!r}; run: pip install 'portable-messaging[contract]'")


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def contract(
    context: typer.Context,
    adapter: Annotated[
        str, typer.Argument(help="a harness name: memory, rabbitmq, sqs, kafka, nats, zeromq, or a third party's")
    ],
    profile: Annotated[
        str | None, typer.Option(help="one profile of the harness; default: its first; or 'all'")
    ] = None,
    cases: Annotated[str | None, typer.Option(help="only these, as in DEL-01,ACK")] = None,
    kinds: Annotated[str | None, typer.Option(help="only these, as in queue,topic/ordered")] = None,
    evidence: Annotated[Path | None, typer.Option(help="folder to write JSON lines to")] = None,
    propose: Annotated[bool, typer.Option(help="print the capabilities that were measured")] = False,
) -> None:
    """Run the contract suite against one adapter's live broker. Further arguments go to pytest."""
    raise typer.Exit(
        _kit().contract(
            adapter, profile=profile, cases=cases, kinds=kinds, evidence=evidence, propose=propose,
            pytest_args=context.args,
        )
    )  # fmt: skip


@app.command()
def doubles() -> None:
    """Show that the suite can fail: run it against flawed adapters, each of which it must catch."""
    raise typer.Exit(_kit().doubles())


@app.command()
def flips(
    adapter: Annotated[str, typer.Argument(help="a harness name")],
    profile: Annotated[str | None, typer.Option(help="one profile of the harness")] = None,
) -> None:
    """Show that no capability can be claimed wrongly: flip each, up and down; the suite must catch every one."""
    raise typer.Exit(_kit().flips(adapter, profile=profile))


@app.command()
def matrix(
    evidence: Annotated[Path, typer.Option(help="folder with JSON lines")] = Path("contract_tests/evidence"),
    format: Annotated[str, typer.Option(help="markdown or json")] = "markdown",
    why: Annotated[str | None, typer.Option(help="adapter:flag: the cases behind a cell")] = None,
) -> None:
    """Print the capability matrix made from evidence."""
    print(_kit().matrix(evidence, format=format, why=why))
