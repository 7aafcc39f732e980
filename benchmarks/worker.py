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
from typing import Final, cast

from .job import Job, Sample

_MODULES: Final = {
    ("rabbitmq", "usual"): "raw_rabbitmq",
    ("rabbitmq", "best"): "raw_rabbitmq",
    ("nats", "usual"): "raw_nats",
    ("nats", "best"): "raw_nats",
    ("sqs", "usual"): "raw_sqs",
    ("kafka", "usual"): "raw_kafka",
    ("kafka", "best"): "raw_kafka",
    ("kafka", "faststream"): "with_faststream",
    ("zeromq", "usual"): "raw_zeromq",
    ("zeromq", "ours"): "ours_zeromq",
    ("rabbitmq", "faststream"): "with_faststream",
    ("nats", "faststream"): "with_faststream",
}


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


def _module_of(job: Job) -> ModuleType:
    name = _MODULES.get((job.broker, job.client), "core_only" if job.broker == "core" else "ours")
    return importlib.import_module(f"benchmarks.{name}")


if __name__ == "__main__":
    main()
