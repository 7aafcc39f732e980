"""The whole suite in one process per kind of destination, each with a broker of its own.

A case waits far more than it works (leases, quiet windows, broker boots), so kinds side by side take a third of the
time; a broker each, because the fault cases kill theirs.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

POLL_S: Final = 0.2
PROGRESS_S: Final = 30.0  # a reader of a CI log should not wonder whether it hangs
LIMIT_S: Final = 3600.0  # three times and more of what a kind takes on two busy cores


def run_kinds(kinds: Sequence[str], arguments: Sequence[str], evidence: Path, at_once: int) -> int:
    """pytest once per kind, `at_once` at the same time; print each one's output when it ends.

    Returns the worst exit code.
    """
    with tempfile.TemporaryDirectory(prefix="messaging-contract-") as name:
        folder = Path(name)
        codes = _run(kinds, arguments, folder, evidence.stem, at_once)
        evidence.parent.mkdir(parents=True, exist_ok=True)
        parts = [_part(folder, kind) for kind in kinds]
        evidence.write_text("".join(part.read_text() for part in parts if part.exists()))
    return max(map(abs, codes.values()))  # a child ended by a signal has a negative code


def _part(folder: Path, kind: str) -> Path:
    return folder / f"{kind.replace('/', '-')}.jsonl"


def _log(folder: Path, kind: str) -> Path:
    return folder / f"{kind.replace('/', '-')}.log"


def _start(kind: str, arguments: Sequence[str], folder: Path) -> subprocess.Popen[bytes]:
    own = ["--messaging-kinds", kind, "--messaging-evidence", str(_part(folder, kind))]
    with _log(folder, kind).open("wb") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "pytest", "-q", "--no-header", *arguments, *own],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ | {"PYTHONUNBUFFERED": "1"},
        )


def _run(kinds: Sequence[str], arguments: Sequence[str], folder: Path, label: str, at_once: int) -> dict[str, int]:
    began, told = time.monotonic(), time.monotonic()
    waiting = list(kinds)
    children: dict[str, subprocess.Popen[bytes]] = {}
    codes: dict[str, int] = {}
    try:
        while len(codes) < len(kinds):
            while waiting and len(children) - len(codes) < at_once:
                kind = waiting.pop(0)
                children[kind] = _start(kind, arguments, folder)
            for kind, child in children.items():
                if kind not in codes and child.poll() is not None:
                    codes[kind] = child.returncode
                    said = _log(folder, kind).read_text(errors="replace")
                    # in one piece: another suite may be printing at the same time
                    print(f"\n== {label} {kind}: after {time.monotonic() - began:.0f} s\n{said}", flush=True)
            if time.monotonic() - told > PROGRESS_S and len(codes) < len(kinds):
                told = time.monotonic()
                left = ", ".join(k for k in kinds if k not in codes)
                print(f"   ... {label}: {told - began:.0f} s, to come: {left}", flush=True)
            if time.monotonic() - began > LIMIT_S:
                print(f"{label}: stopped after {LIMIT_S:.0f} s", flush=True)
                return {kind: codes.get(kind, 3) for kind in kinds}
            time.sleep(POLL_S)
        return codes
    finally:
        for child in children.values():
            if child.poll() is None:
                child.send_signal(signal.SIGINT)  # so that it removes its broker
