"""What a run found: medians and ratios, as tables for a terminal and the README, and as JSON."""

from __future__ import annotations

import json
import os
import platform
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

from rich import box
from rich.console import Console
from rich.table import Table

from .job import Sample
from .plan import Row, Target, rows

DISTRIBUTIONS: Final = (
    "portable-messaging",
    "pika",
    "nats-py",
    "boto3",
    "confluent-kafka",
    "pyzmq",
    "faststream",
    "aio-pika",
    "kombu",
    "amqp",
    "mq-bridge",
    "pydantic",
    "pydantic-core",
)
TITLES: Final = {
    "publish_one": "publish, one at a time",
    "publish_windowed": "publish, windowed",
    "consume": "consume, settle each",
    "latency": "latency of one",
    "queue": "queue, settled by the other process",
    "signal_send": "signal, send",
    "signal_receive": "signal, receive",
}
CLIENTS: Final = {
    "usual": "client, usual",
    "best": "client, best",
    "ours": "ours, bytes",
    "ours_model": "ours, pydantic",
    "faststream": "FastStream",
    "kombu": "Kombu",
    "mq_bridge": "mq-bridge",
}
OTHERS: Final = tuple(client for client in CLIENTS if not client.startswith("ours"))
"""What a ratio can be to: a column each."""
BROKERS: Final = {
    "rabbitmq": "RabbitMQ",
    "nats": "NATS JetStream",
    "sqs": "SQS (ministack)",
    "kafka": "Kafka",
    "zeromq": "ZeroMQ (two processes)",
    "core": "core alone (a driver that does nothing)",
}

Key = tuple[str, str, int, str]


CLEAR: Final = 0.8
"""Share of the rounds that have to meet a target: a median alone calls noise a success."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """How ours did on one target: the median, and in how many rounds it was met."""

    target: Target
    value: float
    met_rounds: int
    rounds: int

    @property
    def met(self) -> bool:
        """The median meets it, and nearly every round does."""
        return self.target.is_met_by(self.value) and self.met_rounds >= CLEAR * self.rounds


@dataclass(slots=True)
class Report:
    """All samples of a run, and what they were measured on."""

    date: str
    rounds: int
    versions: Mapping[str, str]
    machine: dict[str, Any]
    seconds: float = 0.0
    samples: dict[Key, list[Sample]] = field(default_factory=dict)

    @classmethod
    def new(cls, rounds: int, brokers: Mapping[str, str]) -> Report:
        versions = {**brokers, "python": platform.python_version()} | {name: version(name) for name in DISTRIBUTIONS}
        machine: dict[str, Any] = {
            "processor": _processor(),
            "cores": os.cpu_count(),
            "system": platform.platform(),
            "load_before": round(os.getloadavg()[0], 2),
        }
        return cls(datetime.now(UTC).date().isoformat(), rounds, versions, machine)

    def add(self, row: Row, client: str, sample: Sample) -> None:
        self.samples.setdefault((row.broker, row.work, row.size, client), []).append(sample)

    def median(self, row: Row, client: str, measure: str) -> float | None:
        """Of `measure` (cpu_us, rate, p50_us) over the rounds; None where it was not measured."""
        samples = self.samples.get((row.broker, row.work, row.size, client), [])
        values = [value for value in (getattr(sample, measure) for sample in samples) if value is not None]
        return statistics.median(values) if values else None

    def ratio(self, row: Row, client: str, measure: str, to: str) -> float | None:
        """The median over the rounds of `client`'s `measure` by that of `to` in the same round."""
        mine = self.samples.get((row.broker, row.work, row.size, client), [])
        theirs = self.samples.get((row.broker, row.work, row.size, to), [])
        pairs = [(getattr(a, measure), getattr(b, measure)) for a, b in zip(mine, theirs, strict=True)] if mine else []
        return statistics.median(a / b for a, b in pairs) if pairs and None not in pairs[0] else None

    def judged(self, row: Row, client: str) -> list[Verdict]:
        """One per target of ours that was measured."""
        found = []
        for target in row.targets(client):
            mine = self.samples.get((*_key(row), client), [])
            theirs = self.samples.get((*_key(row), target.client), []) if target.client else mine
            if not mine or not theirs:
                continue
            values = [getattr(sample, target.measure) for sample in mine]
            if target.client:
                pairs = zip(values, theirs, strict=True)
                values = [value / getattr(sample, target.measure) for value, sample in pairs]
            found.append(Verdict(target, statistics.median(values), sum(map(target.is_met_by, values)), len(values)))
        return found

    def measured(self) -> Iterator[Row]:
        for broker in BROKERS:
            yield from (row for row in rows(broker) if any(key[:3] == _key(row) for key in self.samples))

    def end(self, seconds: float) -> None:
        """Note how long it took, and how busy the machine was: beyond its cores, others were running too."""
        self.seconds = round(seconds, 1)
        self.machine["load_after"] = round(os.getloadavg()[0], 2)

    def write(self, path: Path) -> None:
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(self._plain(), indent=1) + "\n")

    def _plain(self) -> dict[str, Any]:
        lines = []
        for row in self.measured():
            for client in row.clients:
                judged = self.judged(row, client) if client.startswith("ours") else []
                lines.append({
                    **asdict(row),
                    "client": client,
                    "median": {m: _round(self.median(row, client, m)) for m in ("cpu_us", "rate", "p50_us")},
                    "cpu_ratio": {c: _round(self.ratio(row, client, "cpu_us", c)) for c in row.clients if c != client},
                    "rate_ratio": {c: _round(self.ratio(row, client, "rate", c)) for c in row.clients if c != client},
                    "targets": [
                        {**asdict(v.target), "value": _round(v.value), "met_rounds": v.met_rounds, "met": v.met}
                        for v in judged
                    ],
                    "samples": [asdict(sample) for sample in self.samples[(*_key(row), client)]],
                })  # fmt: skip
        head = {n: getattr(self, n) for n in ("date", "rounds", "seconds", "versions", "machine")}
        return head | {"rows": lines}

    @classmethod
    def read(cls, path: Path) -> Report:
        plain = json.loads(path.read_text())
        report = cls(**{n: plain[n] for n in ("date", "rounds", "versions", "machine", "seconds")})
        for line in plain["rows"]:
            key = (line["broker"], line["work"], line["size"], line["client"])
            report.samples[key] = [Sample(**sample) for sample in line["samples"]]
        return report


def print_tables(report: Report, console: Console) -> None:
    """One table per broker, a line per row and client, then the versions and the count of targets."""
    for broker, title in BROKERS.items():
        found = [row for row in report.measured() if row.broker == broker]
        if found:
            console.print(_table(report, title, found))
    ours = [(row, client) for row in report.measured() for client in row.clients if client.startswith("ours")]
    verdicts = [verdict.met for row, client in ours for verdict in report.judged(row, client)]
    versions = ", ".join(v if n in BROKERS else f"{n} {v}" for n, v in report.versions.items())
    console.print(f"{versions}; {report.machine['processor']}, {report.machine['cores']} cores", highlight=False)
    machine, met = report.machine, sum(verdicts)
    load = f"{machine['load_before']:.1f} to {machine.get('load_after', '?')}"
    console.print(
        f"{report.rounds} rounds in {report.seconds:.0f} s, load {load}. "
        "Medians; ratios are taken within a round; met = by the median and by 4 of 5 rounds. "
        f"Targets: {met} met, {len(verdicts) - met} not met.",
        highlight=False,
    )
    if "note" in machine:
        console.print(machine["note"], style="red", highlight=False)


def _table(report: Report, title: str, found: list[Row]) -> Table:
    """A column of ratios per client that this broker has, so that it fits the terminal."""
    caption = "to ...: ratio of the CPU, ratio of the rate (in a latency row: of the p50)"
    table = Table(title=title, title_justify="left", caption=caption, caption_justify="left", box=box.SIMPLE_HEAD)
    table.pad_edge = False
    table.padding = (0, 1, 0, 0)
    table.add_column("", no_wrap=True)
    for name in ("CPU us", "rate /s", "p50 us"):
        table.add_column(name, justify="right", no_wrap=True)
    others = [client for client in OTHERS if any(client in row.clients for row in found)]
    for client in others:
        table.add_column(f"to\n{_short(client)}", justify="right", no_wrap=True)
    table.add_column("targets of ours")
    for row in found:
        table.add_row(f"[bold]{TITLES[row.work]}, {row.size} B[/bold]")
        for client in row.clients:
            judged = report.judged(row, client) if client.startswith("ours") else []
            table.add_row(
                f"  {CLIENTS[client]}",
                _number(report.median(row, client, "cpu_us"), 1),
                _number(report.median(row, client, "rate"), 0),
                _number(report.median(row, client, "p50_us"), 0),
                *(" ".join(_ratios(report, row, client, to)) for to in others),
                "\n".join(map(_shown, judged)),
            )
        table.add_section()
    return table


def _shown(verdict: Verdict) -> str:
    """Its value is the ratio, or the median, that the line shows."""
    target = verdict.target
    what = {"cpu_us": "CPU", "rate": "rate", "p50_us": "p50"}[target.measure]
    answer = "[green]met[/green]" if verdict.met else "[red]NOT met[/red]"
    return f"{what} {_asked(target)}: {answer} {verdict.met_rounds}/{verdict.rounds}"


def _asked(target: Target) -> str:
    if not target.client:
        return str(target)
    limit = str(target) if target.limit != 1 else str(target).split()[0]
    return f"{limit} {_short(target.client)}"


def _short(client: str) -> str:
    return CLIENTS[client].removeprefix("client, ")


def _ratios(report: Report, row: Row, client: str, to: str) -> list[str]:
    """Of the CPU, and of what the row is about; at most four characters each."""
    pace = "p50_us" if row.work == "latency" else "rate"
    values = [report.ratio(row, client, m, to) for m in ("cpu_us", pace)] if to in row.clients and to != client else []
    return [f"{value:.{2 if value < 10 else 1 if value < 99 else 0}f}" for value in values if value is not None]


def markdown(report: Report) -> str:
    """The README's table: a line per row, ours beside the others."""
    brokers = ", ".join(
        report.versions[n] for n in ("rabbitmq", "nats", "sqs", "kafka", "zeromq") if n in report.versions
    )
    clients = ", ".join(
        f"{n} {report.versions[n]}"
        for n in ("pika", "nats-py", "boto3", "confluent-kafka", "pyzmq", "faststream", "kombu", "mq-bridge")
        if n in report.versions
    )
    others = [client for client in OTHERS if any(key[3] == client for key in report.samples)]
    heads = ["", "ours, CPU us", "rate", *(f"to {CLIENTS[client]}" for client in others), "targets"]
    lines = [
        *([f"**{report.machine['note']}**", ""] if "note" in report.machine else []),
        f"Measured {report.date}: {brokers}, {clients}, Python {report.versions['python']}, "
        f"{report.machine['processor']} with {report.machine['cores']} cores; medians of {report.rounds} rounds. "
        "*to ...*: ratio of the CPU, ratio of the rate (of the p50 for latency).",
        "",
        f"| {' | '.join(heads)} |",
        f"|{'---|' * len(heads)}",
    ]
    for row in report.measured():
        for client in (c for c in row.clients if c.startswith("ours")):
            lines.append(_line(report, row, client, others))
    return "\n".join(lines)


def _line(report: Report, row: Row, client: str, others: Sequence[str]) -> str:
    p50_us = report.median(row, client, "p50_us")
    kind = ", pydantic" if client == "ours_model" else ""
    cells = [
        f"{BROKERS[row.broker].partition(' (')[0]}: {TITLES[row.work]}, {row.size} B{kind}",
        _number(report.median(row, client, "cpu_us"), 1),
        f"p50 {p50_us:,.0f} us" if p50_us is not None else f"{_number(report.median(row, client, 'rate'), 0)}/s",
        *(", ".join(f"{ratio}x" for ratio in _ratios(report, row, client, to)) for to in others),
        "; ".join(
            f"{_asked(v.target)} {'met' if v.met else '**not met**'} ({v.met_rounds}/{v.rounds})"
            for v in report.judged(row, client)
        ),
    ]
    return f"| {' | '.join(cells)} |"


def _key(row: Row) -> tuple[str, str, int]:
    return row.broker, row.work, row.size


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:,.{digits}f}"


def _round(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


def _processor() -> str:
    with open("/proc/cpuinfo") as lines:
        return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "?")
