"""Apache Kafka: Queue and Topic on consumer groups, Signal without acks, all on topics with partitions."""

from .driver import Driver
from .options import DestinationOptions, Options

__all__ = ["DestinationOptions", "Driver", "Options"]
