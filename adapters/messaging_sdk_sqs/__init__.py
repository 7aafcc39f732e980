"""Amazon SQS: Queue on standard and FIFO queues, Topic on a queue per group, by SNS or by one copy for each."""

from .driver import Driver
from .options import DestinationOptions, Options

__all__ = ["DestinationOptions", "Driver", "Options"]
