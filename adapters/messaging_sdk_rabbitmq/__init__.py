"""RabbitMQ behind messaging_sdk: quorum queues, fanout exchanges and transient signals over AMQP 0-9-1 (pika)."""

from .driver import Driver
from .options import DestinationOptions, Options

__all__ = ["DestinationOptions", "Driver", "Options"]
