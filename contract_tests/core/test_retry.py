"""Laws of the retry policy and of the back-off between attempts to reopen."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from messaging_sdk import ConfigError, Retry, UsageError
from messaging_sdk.retry import Backoff

POLICIES = st.builds(
    Retry,
    st.integers(1, 50),
    st.floats(0, 100),
    factor=st.floats(1, 10),
    max=st.floats(0, 1000),
    jitter=st.floats(0, 0.99),
)


def test_delays_grow_by_the_factor_up_to_the_maximum() -> None:
    policy = Retry(6, "1s", factor=3, max="20s", jitter=0)
    assert [policy.wait_s(n) for n in (1, 2, 3, 4, 5)] == [1, 3, 9, 20, 20]


@given(POLICIES)
def test_the_sum_of_all_waits_never_exceeds_the_announced_total(policy: Retry) -> None:
    waited = sum(policy.wait_s(n) for n in range(1, policy.attempts))
    assert waited <= policy.total_s() * (1 + 1e-9)


@given(POLICIES, st.integers(1, 100_000))
def test_no_wait_is_negative_or_over_the_jittered_maximum(policy: Retry, attempt: int) -> None:
    assert 0 <= policy.wait_s(attempt) <= policy.max_s * (1 + policy.jitter)


def test_one_attempt_means_no_delay_to_hold_for() -> None:
    assert Retry(1, "1h").total_s() == 0


@pytest.mark.parametrize("attempts", [0, -1, 1.5, "3", None])
def test_attempts_that_are_no_whole_number_from_1_are_refused(attempts: Any) -> None:
    with pytest.raises(UsageError, match="attempts"):
        Retry(attempts)


@pytest.mark.parametrize("wrong", [{"factor": 0.5}, {"jitter": 1.0}, {"jitter": -0.1}])
def test_a_factor_below_1_or_a_jitter_out_of_range_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(UsageError, match="factor must be >= 1 and jitter"):
        Retry(3, 1, **wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("wrong", ["soon", "1 fortnight", -1, "-1s"])
def test_a_delay_that_is_no_duration_is_refused(wrong: Any) -> None:
    with pytest.raises(ConfigError, match=r"Retry\.delay"):
        Retry(3, wrong)


def test_policies_are_values() -> None:
    assert Retry(3, "1s") == Retry(3, 1.0)


def test_reopening_waits_double_up_to_the_last_and_are_spread() -> None:
    random.seed(1)
    backoff = Backoff()
    for step in range(20):
        full = min(Backoff.FIRST_S * 2**step, Backoff.LAST_S)
        assert full / 2 <= backoff.wait_s() <= full
    backoff.reset()
    assert backoff.wait_s() <= Backoff.FIRST_S
