"""A consumer or publisher in a process of its own, to be killed: `Worker` starts what `main` runs.

The process gets one JSON object on stdin and writes a ledger: one JSON line per event, appended and
fsynced BEFORE the delivery is settled (or after a publish returned), so that a SIGKILL at any moment
leaves a ledger that says at least what the broker was told.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, Literal, Self

from messaging_sdk import Bus, Destination, Queue, Signal, Topic, sync
from messaging_sdk.config import Settings, from_mapping

from .lab import Lab, eventually, key_before_colon

Mode = Literal["consume", "hold", "run", "publish", "fork"]
START_S: Final = 60.0
"""A process with two busy cores in its way imports and connects within this time."""


class Worker:
    """A child process of the case; a context manager that leaves no process and no file behind.

    Modes: "consume" notes and acks each delivery after `delay_s`; "hold" notes and never settles;
    "run" is `bus.run()` with a handler that notes start, sleeps `delay_s` and notes done; "publish"
    publishes b"<key>:<n>:<destination>" for n from `start` and notes each after publish returned; "fork"
    publishes before a fork, in its child, from a child with a bus that was not open, and in the parent again.
    """

    def __init__(
        self,
        lab: Lab,
        destination: Destination[Any],
        mode: Mode,
        *,
        group: str | None = None,
        delay_s: float = 0.0,
        window: int | None = None,
        keys: tuple[str, ...] = ("k0", "k1", "k2", "k3"),
        start: int = 0,
        count: int = 1_000_000,
        backend: Mapping[str, Any] | None = None,
    ) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="messaging-worker-")
        self._path = Path(self._folder.name, "ledger")
        self._errors = Path(self._folder.name, "stderr")
        self._path.touch()
        self._read = 0
        self._events: list[dict[str, Any]] = []
        self._spec = {
            "settings": lab.harness.settings(backend),
            "destination": {
                "tag": destination.tag,
                "name": destination.name,
                "ordered": destination.ordered,
                "groups": list(destination.groups),
            },
            "group": group if group is not None else (lab.group if mode != "publish" else None),
            "ledger": str(self._path),
            "mode": mode,
            "delay_s": delay_s,
            "window": window,
            "keys": list(keys),
            "start": start,
            "count": count,
        }

    def __enter__(self) -> Self:
        with self._errors.open("wb") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "messaging_sdk_contract.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=errors,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
            )
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(self._spec).encode())
        self._process.stdin.close()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self._folder.cleanup()

    def events(self, kind: str | None = None) -> list[dict[str, Any]]:
        """What the ledger says so far: dicts with `event`, `body`, `id`, `key`, `deliveries`, `at_s`."""
        with self._path.open("rb") as ledger:
            ledger.seek(self._read)
            while (line := ledger.readline()).endswith(b"\n"):  # the last one may be half written
                self._read += len(line)
                self._events.append(json.loads(line))
        return [e for e in self._events if kind is None or e["event"] == kind]

    def bodies(self, kind: str) -> list[bytes]:
        return [e["body"].encode("latin-1") for e in self.events(kind)]

    async def until(self, kind: str, count: int, wait_s: float = START_S) -> None:
        """Wait for `count` events of `kind`; fails at once when the process ends before that."""

        def there() -> bool:
            if len(self.events(kind)) >= count:
                return True
            code = self._process.poll()
            assert code is None, f"the worker ended with {code}: {self.complaint()}"
            return False

        await eventually(there, wait_s, f"{count} {kind!r} events of a worker {self.complaint()}")

    def complaint(self) -> str:
        """The end of what it wrote to stderr."""
        return self._errors.read_text(errors="replace")[-800:]

    def kill(self) -> None:
        """SIGKILL; returns when the process is gone."""
        self._process.kill()
        self._process.wait(10)

    def terminate(self) -> None:
        """SIGTERM."""
        self._process.send_signal(signal.SIGTERM)

    async def ended(self, wait_s: float = START_S) -> int:
        """Wait for its end; return the exit code."""
        await eventually(lambda: self._process.poll() is not None, wait_s, "the worker must end")
        return int(self._process.returncode)


# --- in the child process


class Ledger:
    def __init__(self, path: str) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def note(self, event: str, body: bytes, delivery: Any = None) -> None:
        line = {
            "event": event,
            "body": body.decode("latin-1"),
            "at_s": time.monotonic(),
            "id": getattr(delivery, "id", None),
            "key": getattr(delivery, "key", None),
            "deliveries": getattr(delivery, "deliveries", None),
        }
        os.write(self._file, json.dumps(line).encode() + b"\n")
        os.fsync(self._file)


def destination_of(spec: Mapping[str, Any]) -> Destination[Any]:
    name, ordered = spec["name"], spec["ordered"]
    key = key_before_colon if ordered else None
    if spec["tag"] == "queue":
        return Queue(name, bytes, key=key, ordered=ordered)
    if spec["tag"] == "topic":
        return Topic(name, bytes, key=key, ordered=ordered, groups=spec["groups"])
    return Signal(name, bytes)


async def consume(spec: Mapping[str, Any], bus: Bus, destination: Any, ledger: Ledger) -> None:
    bus.declare(destination)
    async with bus, bus.consume(destination, group=spec["group"], window=spec["window"]) as stream:
        ledger.note("ready", b"")
        async for delivery in stream:
            ledger.note("got", delivery.body, delivery)
            if spec["delay_s"]:
                await asyncio.sleep(spec["delay_s"])
            if spec["mode"] == "consume" and destination.settles:
                await delivery.ack()


async def publish(spec: Mapping[str, Any], bus: Bus, destination: Any, ledger: Ledger) -> None:
    bus.declare(destination)
    async with bus:
        for n in range(spec["start"], spec["start"] + spec["count"]):
            key = spec["keys"][n % len(spec["keys"])]
            body = f"{key}:{n}:{destination.name}".encode()
            await bus.publish(destination, body)
            ledger.note("published", body)
            if spec["delay_s"]:
                await asyncio.sleep(spec["delay_s"])


def run(spec: Mapping[str, Any], bus: Bus, destination: Any, ledger: Ledger) -> None:
    @bus.on(destination, group=spec["group"], concurrency=1, window=spec["window"])
    async def handle(value: bytes) -> None:
        ledger.note("start", value)
        await asyncio.sleep(spec["delay_s"])
        ledger.note("done", value)

    bus.run()


def fork(spec: Mapping[str, Any], settings: Settings, destination: Any, ledger: Ledger) -> None:
    """Publish on both sides of a fork, over an open bus and over one that is opened only in the child."""

    def note(who: str, bus: sync.Bus) -> None:
        body = f"{who}:0:{destination.name}".encode()
        bus.publish(destination, body)
        ledger.note("published", body)

    def once(who: str, bus: sync.Bus) -> None:
        note(who, bus)
        if not destination.settles:  # nobody confirms it: it must leave before the process does
            bus.close()

    def in_child(work: Callable[[], None]) -> None:
        child = os.fork()
        if child == 0:
            code = 1
            try:
                work()
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        _, status = os.waitpid(child, 0)
        if status:
            raise SystemExit(f"the forked child ended with status {status}")

    with sync.Bus(settings) as bus:
        unopened = sync.Bus(settings)
        note("before", bus)
        in_child(lambda: once("child", bus))
        in_child(lambda: once("unopened", unopened))
        note("parent", bus)


def main() -> None:
    spec = json.load(sys.stdin)
    settings = from_mapping(spec["settings"])
    bus, ledger = Bus(settings), Ledger(spec["ledger"])
    destination = destination_of(spec["destination"])
    if spec["mode"] == "fork":
        fork(spec, settings, destination, ledger)
        return
    if spec["mode"] == "run":
        run(spec, bus, destination, ledger)
        return
    work = publish if spec["mode"] == "publish" else consume
    with suppress(KeyboardInterrupt):
        asyncio.run(work(spec, bus, destination, ledger))


if __name__ == "__main__":
    main()
