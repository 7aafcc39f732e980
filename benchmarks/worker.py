"""The process of one measurement: `python -m benchmarks.worker '<job>'` prints the sample as one JSON line."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from dataclasses import asdict
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
    ("rabbitmq", "faststream"): "with_faststream",
    ("nats", "faststream"): "with_faststream",
}


def main() -> None:
    job = Job.from_json(sys.argv[1])
    print(json.dumps(asdict(measuring(job)(job))))


def measuring(job: Job) -> Callable[[Job], Sample]:
    """The function that does `job`; only its client is imported."""
    name = _MODULES.get((job.broker, job.client), "core_only" if job.broker == "core" else "ours")
    module = importlib.import_module(f"benchmarks.{name}")
    prefix = f"{job.client}_" if name.startswith("raw_") else ""
    return cast("Callable[[Job], Sample]", getattr(module, prefix + job.work))


if __name__ == "__main__":
    main()
