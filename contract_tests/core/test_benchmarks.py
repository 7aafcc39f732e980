"""What `make bench` would find out only after minutes: a cell without code, a row without a target, a wrapped table."""

import io
from itertools import cycle
from pathlib import Path

import pytest
from rich.console import Console
from rich.text import Text

from benchmarks import __main__ as command
from benchmarks import plan, report, worker
from benchmarks.job import Sample
from benchmarks.plan import Row

ROWS = [row for broker in (*command.BROKERS, "core") for row in plan.rows(broker)]
CELLS = [(row, client) for row in ROWS for client in row.clients]
PACKAGE = Path(plan.__file__).parent


def full_report() -> report.Report:
    """Every cell measured, with wide numbers, and every target met in no round."""
    found = report.Report("2026-01-01", 5, {"python": "3.11"}, {"processor": "?", "cores": 2, "load_before": 1.0})
    seconds = cycle((0.0123, 1.234, 0.5, 0.02))
    for row, client in CELLS:
        for _ in range(found.rounds):
            wall_s = next(seconds)
            delay_us = 12_345.0 if row.work == "latency" else None
            found.add(row, client, Sample(3_000, wall_s, wall_s * 0.9, delay_us))
    return found


@pytest.mark.parametrize(("row", "client"), CELLS, ids=str)
def test_every_cell_has_its_code(row: Row, client: str) -> None:
    """Read, not imported: the peers are no part of the tests' environment."""
    name = worker.module_name(row.broker, client)
    words = set((PACKAGE / f"{name}.py").read_text().split())
    prefix = f"{client}_" if name.startswith("raw_") else ""
    asked = [prefix + row.work, *([f"peer_{row.work}"] if row.broker == "zeromq" else [])]
    assert all(f"{function}(job:" in words or function in words for function in asked)


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_no_peer_may_be_ahead_of_ours(row: Row) -> None:
    for client in (client for client in row.clients if client.startswith("ours")):
        targets = row.targets(client)
        assert {target.client for target in targets} <= {"", *row.clients}
        for peer in row.peers:
            (target,) = (target for target in targets if target.client == peer)
            assert (target.measure, target.limit) == ("p50_us" if row.work == "latency" else "rate", 1.0)


def test_a_target_stays_on_one_line_of_the_table() -> None:
    found, text = full_report(), io.StringIO()
    report.print_tables(found, Console(file=text, width=command.WIDTH))
    shown = {
        Text.from_markup(report._shown(verdict)).plain
        for row, client in CELLS
        if client.startswith("ours")
        for verdict in found.judged(row, client)
    }
    assert any("NOT met" in words for words in shown)
    assert [words for words in shown if words not in text.getvalue()] == []


def test_the_markdown_table_has_one_width() -> None:
    lines = [line for line in report.markdown(full_report()).splitlines() if line.startswith("|")]
    assert len(lines) > len(ROWS)
    assert len({line.count("|") for line in lines}) == 1
