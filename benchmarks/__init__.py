"""Measures this SDK beside the raw clients and FastStream, in one run; see README.md."""
