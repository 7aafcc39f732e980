"""`python -m benchmarks`: measure, print the table, write results/<date>.json and results/latest.json."""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Final

from rich.console import Console

from . import plan
from .brokers import Broker, running
from .job import Job, Sample
from .report import Report, markdown, print_tables

RESULTS: Final = Path(__file__).parent / "results"
BROKERS: Final = ["rabbitmq", "nats", "sqs", "kafka", "zeromq"]
WIDTH: Final = 150
"""Columns of the table; a narrower terminal wraps its lines instead of cutting the numbers."""
WAIT_S: Final = 120.0
"""A measurement takes about 1 s; one that has not ended by then hangs."""


def main() -> None:
    asked = _arguments()
    if asked.markdown:
        print(markdown(Report.read(RESULTS / "latest.json")))
        return
    console = Console(width=max(WIDTH, Console().width))
    brokers = [asked.only] if asked.only else BROKERS
    rounds = asked.rounds or (plan.QUICK_ROUNDS if asked.quick else plan.ROUNDS)
    began_s = time.monotonic()
    with ExitStack() as stack:
        live = [stack.enter_context(running(name)) for name in brokers]
        report = Report.new(rounds, {broker.name: broker.version for broker in live})
        _measure(report, live, rounds, plan.QUICK_SIZES if asked.quick else plan.SIZES)
    report.end(time.monotonic() - began_s)
    if not (asked.quick or asked.only):  # before the tables: whatever goes wrong there, the samples are kept
        for path in (RESULTS / f"{report.date}.json", RESULTS / "latest.json"):
            report.write(path)
            console.print(f"written: {path}", highlight=False)
    print_tables(report, console)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--only", choices=BROKERS, help="one broker (nothing is written)")
    parser.add_argument(
        "--quick", action="store_true", help="one round of 100 B, for a first look (nothing is written)"
    )
    parser.add_argument("--rounds", type=int, help=f"instead of {plan.ROUNDS}")
    parser.add_argument("--markdown", action="store_true", help="print the README's table from results/latest.json")
    return parser.parse_args()


def _measure(report: Report, live: list[Broker], rounds: int, sizes: Sequence[int]) -> None:
    """Every client of a row right after the other, in another sequence each round."""
    rows = [(row, broker) for broker in live for row in plan.rows(broker.name, sizes)]
    core = [(row, None) for row in plan.rows("core")]
    for number, name in zip(range(rounds), _names(), strict=False):
        for at, (row, broker) in enumerate([*core, *rows]):
            clients = row.clients[number % len(row.clients) :] + row.clients[: number % len(row.clients)]
            for client in clients:
                _say(f"round {number + 1} of {rounds}, row {at + 1} of {len(core) + len(rows)}")
                url = "nothing://here" if broker is None else broker.url
                job = row.job(client, url, f"{name}-{at}-{client.replace('_', '-')}")
                report.add(row, client, _one(job) if broker is None else _on(broker, job))
    _say("")


def _on(broker: Broker, job: Job) -> Sample:
    try:
        asyncio.run(broker.prepare(job))
        return _one(job)
    finally:
        asyncio.run(broker.remove(job))


def _one(job: Job) -> Sample:
    command = [sys.executable, "-m", "benchmarks.worker", job.to_json()]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=WAIT_S, check=False)
    if done.returncode != 0:
        sys.exit(f"the measurement {job.to_json()} failed; its last words are above")
    return Sample(**json.loads(done.stdout))


def _names() -> Iterator[str]:
    """Names that no other run uses."""
    return (f"bench-{os.getpid()}-{time.time_ns():x}-{number}" for number in itertools.count())


def _say(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
