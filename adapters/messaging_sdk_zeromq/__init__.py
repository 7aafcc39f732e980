"""ZeroMQ: no broker. Consumers bind, senders connect; Queue and Topic by a credit-and-ack protocol of our own."""

from .driver import Driver
from .options import DestinationOptions, Options

__all__ = ["DestinationOptions", "Driver", "Options"]
