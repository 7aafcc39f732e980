"""The process of one measurement: `python -m benchmarks.worker '<job>'` prints the sample as one JSON line.

With `--peer` it is the other end of one that has no broker.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from types import ModuleType
from typing import cast

from .job import Job, Sample
from .plan import PEERS


def main() -> None:
    *flags, text = sys.argv[1:]
    job = Job.from_json(text)
    if flags:
        _module_of(job).__dict__[f"peer_{job.work}"](job)
    else:
        print(json.dumps(asdict(measuring(job)(job))))


def measuring(job: Job) -> Callable[[Job], Sample]:
    """The function that does `job`; only its client is imported."""
    module = _module_of(job)
    prefix = f"{job.client}_" if "raw_" in module.__name__ else ""
    return cast("Callable[[Job], Sample]", getattr(module, prefix + job.work))


def module_name(broker: str, client: str) -> str:
    if client in PEERS:
        return f"with_{client}"
    if client in ("usual", "best"):
        return f"raw_{broker}"
    return {"core": "core_only", "zeromq": "ours_zeromq"}.get(broker, "ours")


def _module_of(job: Job) -> ModuleType:
    return importlib.import_module(f"benchmarks.{module_name(job.broker, job.client)}")


if __name__ == "__main__":
    main()
