"""Where there is no broker a measurement has two ends: the other one runs in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from .job import Job

_READY = "ready"


@contextmanager
def beside(job: Job) -> Iterator[None]:
    """Run the peer of `job` while the block runs; entered when it says that it is ready."""
    command = [sys.executable, "-m", "benchmarks.worker", "--peer", job.to_json()]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as peer:
        try:
            assert peer.stdout is not None
            assert peer.stdout.readline().strip() == _READY, "the peer did not start; its last words are above"
            yield
        finally:
            peer.kill()


def ready() -> None:
    """Said by the peer."""
    print(_READY, flush=True)
