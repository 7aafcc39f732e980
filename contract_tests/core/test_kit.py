"""The kit itself: evidence lines, the matrix made of them, flips, driving, and pytest as users have it."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from messaging_sdk import Capabilities, HeaderRules
from messaging_sdk.capabilities import FLAGS
from messaging_sdk_contract import Kind
from messaging_sdk_contract.discovery import UnknownAdapter, checked_profile, harness_class
from messaging_sdk_contract.driving import CaseTimeout, drive
from messaging_sdk_contract.evidence import Evidence, read, suite_hash, write
from messaging_sdk_contract.flips import alternatives, parse_flip
from messaging_sdk_contract.lab import refusal_of
from messaging_sdk_contract.matrix import Column, Matrix, State, as_json, fold, markdown, why
from messaging_sdk_contract.memory_harness import Harness

NOW = datetime(2026, 11, 23, tzinfo=UTC)
COLUMN = Column("shop", "default", "Shop 1.0", "queue")


def line(case: str = "CAP-01.count", **changes: Any) -> Evidence:
    values: dict[str, Any] = {
        "case": case,
        "kind": "queue",
        "outcome": "pass",
        "flags": {"count": "exact"},
        "measured": {"value": "exact"},
        "adapter": "shop",
        "profile": "default",
        "server": "Shop 1.0",
        "sdk": "0.1.0",
        "client": "shop-client 1.0",
        "suite": "sha256:now",
        "seed": 1,
        "started": NOW.isoformat(),
        "duration_s": 0.1,
    }
    return Evidence(**(values | changes))


def folded(*lines: Evidence) -> Matrix:
    return fold(lines, now=NOW, suite="sha256:now")


def state(*lines: Evidence) -> State:
    return folded(*lines)[COLUMN]["count"].state


# --- evidence ------------------------------------------------------------------------------------


def test_an_evidence_line_is_one_json_object_and_reads_back(tmp_path: Path) -> None:
    rules = HeaderRules(max_count=3, max_bytes=9)
    made = line(flags={"headers": rules, "hold_s": float("inf")}, reason="größer\nals")
    text = made.line()
    assert "\n" not in text
    raw = json.loads(text)
    assert raw["flags"]["hold_s"] == "unlimited"
    assert raw["flags"]["headers"]["max_count"] == 3
    file = tmp_path / "new" / "shop-default.jsonl"
    write(file, [made, line()])
    assert [e.case for e in read(file)] == ["CAP-01.count"] * 2


def test_a_broken_evidence_file_is_named_with_its_line(tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    file.write_text(line().line() + '\n{"case": 1}\n')
    with pytest.raises(ValueError, match=r"x\.jsonl, line 2"):
        read(file)


# --- matrix --------------------------------------------------------------------------------------


def test_a_cell_is_yes_only_if_its_case_passed() -> None:
    assert state(line()) is State.YES
    assert state(line(outcome="pass_negative", flags={"count": "none"})) is State.NO
    assert state(line("RED-02")) is State.UNVERIFIED
    assert state(line(outcome="not_run", reason="no server")) is State.UNVERIFIED


def test_the_weakest_evidence_of_a_cell_wins() -> None:
    assert state(line(), line("RED-02", outcome="fail")) is State.CONTRADICTED
    assert state(line(), line("RED-02", suite="sha256:old")) is State.STALE
    assert state(line(), line("RED-02", outcome="not_run")) is State.YES


def test_old_evidence_is_stale() -> None:
    old = (NOW - timedelta(days=91)).isoformat()
    assert state(line(started=old)) is State.STALE
    assert state(line(suite="sha256:old")) is State.STALE


def test_a_server_is_never_merged_with_another() -> None:
    assert len(folded(line(), line(server="Shop 2.0"), line(kind="topic"))) == 3


def test_the_matrix_reads_as_markdown_and_json_and_says_why() -> None:
    matrix = folded(line(), line("RED-02", outcome="fail", reason="1, 1, 1"))
    text = markdown(matrix)
    assert "**shop** / default (Shop 1.0), measured 2026-11-23" in text
    assert "| count | exact ✗ |" in text
    assert json.loads(as_json(matrix))[0]["flags"]["count"]["state"] == "contradicted"
    assert "RED-02" in why(matrix, "shop", "count") and "1, 1, 1" in why(matrix, "shop", "count")
    with pytest.raises(LookupError):
        why(matrix, "shop", "ttl")


# --- flips ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flag", "value", "expected"),
    [
        ("count", "flag", ["none", "exact"]),
        ("ttl", True, ["false"]),
        ("dedup_s", 0.5, ["0.25", "1"]),
        ("dedup_s", 0.0, ["0.3"]),
        ("max_body", 1000, ["500", "2000"]),
        ("hold_s", float("inf"), ["1"]),
        ("headers", None, ["100/8192"]),
    ],
)
def test_a_flip_goes_to_the_neighbours(flag: str, value: Any, expected: list[str]) -> None:
    assert alternatives(flag, value) == expected


@pytest.mark.parametrize("flag", FLAGS)
def test_every_flag_can_be_flipped_and_the_flip_be_parsed(flag: str) -> None:
    for value in alternatives(flag, getattr(Capabilities(), flag)):
        assert parse_flip(f"{flag}={value}")[0] == flag


def test_a_wrong_flip_names_the_flags() -> None:
    with pytest.raises(ValueError, match="lease_s"):
        parse_flip("leese=1")


# --- lab, discovery, driving ---------------------------------------------------------------------


def test_a_kind_is_refused_for_the_flag_that_is_missing() -> None:
    enough = Capabilities(settle="individual", lease="timeout", confirm="stored", backlog=True)
    assert refusal_of(enough, Kind("queue")) == ""
    assert "order='publisher'" in refusal_of(enough, Kind("queue/ordered"))
    assert "groups='durable'" in refusal_of(enough, Kind("topic"))
    assert refusal_of(Capabilities(), Kind("signal")) == ""
    assert refusal_of(Capabilities(notes={"tag": "no store"}), Kind("signal")) == "no store"


def test_an_unknown_adapter_or_profile_names_those_that_there_are() -> None:
    with pytest.raises(UnknownAdapter, match="memory"):
        harness_class("carrier-pigeon")
    with pytest.raises(LookupError, match="minimal"):
        checked_profile(Harness, "4.3")
    assert checked_profile(Harness, None) == "default"


def test_a_case_that_hangs_ends_at_its_limit_and_shows_where() -> None:
    async def stuck() -> None:
        await asyncio.Event().wait()

    with pytest.raises(CaseTimeout, match="stuck"):
        drive(stuck(), limit_s=0.05)


def test_tasks_left_behind_are_cancelled_and_errors_nobody_fetched_are_told() -> None:
    told: list[str] = []
    cleaned: list[bool] = []

    async def failing() -> None:
        raise ValueError("lost")

    async def main() -> str:
        asyncio.get_running_loop().create_task(asyncio.sleep(60))
        asyncio.get_running_loop().create_task(failing())
        await asyncio.sleep(0)
        return "done"

    async def cleanup() -> None:
        cleaned.append(True)

    assert drive(main(), limit_s=5, cleanup=cleanup, complain=told.append) == "done"
    assert cleaned == [True]
    assert any("lost" in text for text in told)


# --- pytest, as a user has it ----------------------------------------------------------------------


def run_pytest(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "messaging_sdk_contract.plugin", *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_the_kit_runs_under_a_hostile_configuration(tmp_path: Path) -> None:
    (tmp_path / "pytest.ini").write_text(
        "[pytest]\nfilterwarnings = error\naddopts = --strict-markers --strict-config\n"
    )
    file = tmp_path / "memory.jsonl"
    suite = ["--pyargs", "messaging_sdk_contract.suites.test_delivery", "-k", "del_01 or del_06"]
    done = run_pytest(tmp_path, *suite, "--messaging-adapter", "memory", "--messaging-evidence", str(file))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "10 passed" in done.stdout.splitlines()[-1]
    assert "live cases memory default (in-process): 10" in done.stdout
    lines = read(file)
    assert {(e.case, e.outcome, e.suite) for e in lines} == {
        ("DEL-01", "pass", suite_hash()),
        ("DEL-06", "pass", suite_hash()),
    }


def test_without_an_adapter_the_cases_are_skipped_with_the_reason(tmp_path: Path) -> None:
    done = run_pytest(tmp_path, "--pyargs", "messaging_sdk_contract.suites.test_batches", "-rs")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "no --messaging-adapter given" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--messaging-adapter", "pigeon"], "no contract harness for 'pigeon'"),
        (["--messaging-adapter", "memory", "--messaging-profile", "4.3"], "has no profile '4.3'"),
        (["--messaging-adapter", "memory", "--messaging-cases", "XYZ-99"], "no case matches XYZ-99"),
    ],
)
def test_wrong_options_are_named(tmp_path: Path, arguments: list[str], text: str) -> None:
    done = run_pytest(tmp_path, "--pyargs", "messaging_sdk_contract.suites.test_batches", *arguments)
    assert done.returncode == 4
    assert text in done.stdout + done.stderr
