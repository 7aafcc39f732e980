"""NATS: Queue and Topic on JetStream, Signal on core NATS, one connection for both."""

from .driver import Driver
from .options import DestinationOptions, Options

__all__ = ["DestinationOptions", "Driver", "Options"]
