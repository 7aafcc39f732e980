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
    ("rabbitmq", "kombu"): "with_kombu",
    ("sqs", "kombu"): "with_kombu",
    ("rabbitmq", "mq_bridge"): "with_mq_bridge",
    ("nats", "mq_bridge"): "with_mq_bridge",
    ("sqs", "mq_bridge"): "with_mq_bridge",
    ("kafka", "mq_bridge"): "with_mq_bridge",
    ("zeromq", "mq_bridge"): "with_mq_bridge",
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


def module_name(broker: str, client: str) -> str:
    return _MODULES.get((broker, client), "core_only" if broker == "core" else "ours")


def _module_of(job: Job) -> ModuleType:
    return importlib.import_module(f"benchmarks.{module_name(job.broker, job.client)}")


if __name__ == "__main__":
    main()
