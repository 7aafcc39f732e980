"""One program on every live backend by configuration alone: the same output, or a refusal naming what is missing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from messaging_sdk_contract.discovery import harness_class
from messaging_sdk_contract.harness import Harness

EXAMPLES = Path(__file__).parents[2] / "examples"
LIVE = (
    "rabbitmq/4.3",
    "nats/jetstream",
    "sqs/ministack",
    "kafka/classic",
    "kafka/kip848",
    "zeromq/tcp",
    "zeromq/ipc",
    "memory/default",
)
LIMIT_S = 120


def swapped(folder: Path, backends: Mapping[str, Any], routes: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    """Run the example as it is, beside a configuration of ours."""
    lines = ["[backends]", *(f"{name} = {inline(table)}" for name, table in backends.items())]
    lines += ["[routes]", *(f'"{pattern}" = "{name}"' for pattern, name in routes.items())]
    (folder / "swap.toml").write_text("\n".join(lines))
    (folder / "swap.py").write_text((EXAMPLES / "swap.py").read_text())
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MESSAGING_ENV")}
    return subprocess.run(
        [sys.executable, str(folder / "swap.py")],
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        env=environment,
        check=False,
    )


def inline(table: Mapping[str, Any]) -> str:
    """A TOML inline table; texts, numbers, booleans and lists of them are written as in JSON."""
    return "{ " + ", ".join(f"{key} = {json.dumps(value)}" for key, value in table.items()) + " }"


@contextmanager
def running(name: str) -> Iterator[Harness]:
    adapter, _, profile = name.partition("/")
    harness = harness_class(adapter)(profile)
    try:
        harness.start()
        yield harness
    finally:
        harness.stop()


@pytest.fixture(scope="module")
def expected() -> str:
    """What the example prints on memory, from its own configuration."""
    found = subprocess.run(
        [sys.executable, str(EXAMPLES / "swap.py")], capture_output=True, text=True, timeout=LIMIT_S, check=True
    )
    assert found.stdout.count("\n") == 6
    return found.stdout


@pytest.mark.parametrize("name", LIVE)
def test_the_example_prints_the_same_on(name: str, tmp_path: Path, expected: str) -> None:
    with running(name) as harness:
        settings = harness.settings()
        found = swapped(tmp_path, settings["backends"], settings["routes"])
    assert (found.returncode, found.stdout) == (0, expected), found.stderr


def test_the_example_is_refused_where_nothing_is_stored(tmp_path: Path) -> None:
    """A NATS server without JetStream: every unmet need in one line, and nothing was sent."""
    with running("nats/core") as harness:
        found = swapped(tmp_path, {"work": harness.backend()}, {"*": "work"})
    assert (found.returncode, found.stdout) == (1, "")
    assert found.stderr.startswith("refused, before anything was sent:")
    for destination in ("swap.placed", "swap.charge"):
        assert destination in found.stderr
    assert "Traceback" not in found.stderr


@pytest.mark.parametrize(("queues", "topics"), [("rabbitmq/4.3", "nats/jetstream"), ("sqs/ministack", "kafka/classic")])
def test_two_backends_in_one_process(queues: str, topics: str, tmp_path: Path, expected: str) -> None:
    with running(queues) as first, running(topics) as second:
        backends = {"work": first.backend(), "news": second.backend()}
        found = swapped(tmp_path, backends, {"*": "work", "swap.placed": "news"})
    assert (found.returncode, found.stdout) == (0, expected), found.stderr
