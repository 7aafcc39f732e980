"""Settings that every law shares."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

from messaging_sdk.retry import Backoff

# No deadline per example: a busy two-core machine makes one slow, and that says nothing about the law.
settings.register_profile("laws", deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("laws")

# Scripted connections heal at once; the doubling and the jitter of the real numbers have laws in test_retry.
Backoff.FIRST_S = 0.002
