"""Measures this SDK beside the raw clients, FastStream, Kombu and mq-bridge, in one run; see README.md."""
