"""Laws of the offset ledger: a commit never covers what is unsettled, and ends by covering all that is settled."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from messaging_sdk.offsets import OffsetLedger


def ledger(*offsets: int, position: int = 0) -> OffsetLedger:
    made = OffsetLedger(position)
    made.deliver(offsets)
    return made


def test_nothing_is_committed_before_something_was_settled() -> None:
    assert ledger(5, 6, position=5).begin_commit() is None


def test_a_hole_holds_the_commit_back_until_it_is_settled() -> None:
    log = ledger(0, 1, 2)
    assert log.settle(1)
    assert log.settle(2)
    assert log.begin_commit() is None
    assert log.settle(0)
    assert log.begin_commit() == 3


def test_offsets_that_were_never_delivered_hold_nothing_back() -> None:
    log = ledger(3, 7, 9, position=3)
    log.settle(3)
    assert log.position == 7
    log.settle(7)
    log.settle(9)
    assert log.position == 10


@pytest.mark.parametrize("offset", [1, 4, 99])
def test_what_is_not_open_cannot_be_settled(offset: int) -> None:
    log = ledger(1, 5)
    log.settle(1)
    assert not log.settle(offset)
    assert log.position == 5
    assert log.unsettled == 1


def test_an_offset_is_not_delivered_twice_or_backwards() -> None:
    log = ledger(4)
    with pytest.raises(ValueError, match="offset 4 was delivered after offset 4"):
        log.deliver([4])
    with pytest.raises(ValueError, match="offset 2"):
        ledger(position=3).deliver([2])


def test_the_next_commit_begins_when_the_last_has_ended_and_takes_all_settled_meanwhile() -> None:
    log = ledger(0, 1, 2)
    log.settle(0)
    assert log.begin_commit() == 1
    log.settle(1)
    log.settle(2)
    assert log.begin_commit() is None
    log.end_commit(stored=True)
    assert log.begin_commit() == 3
    log.end_commit(stored=True)
    assert log.begin_commit() is None


def test_a_commit_that_was_not_stored_is_due_again() -> None:
    log = ledger(0)
    log.settle(0)
    assert log.begin_commit() == 1
    log.end_commit(stored=False)
    assert log.begin_commit() == 1


def test_what_is_settled_ahead_is_told_and_makes_a_commit_due_where_it_is_noted() -> None:
    log = OffsetLedger(0, notes_ahead=True)
    log.deliver([0, 3, 4, 9])
    assert log.begin_commit() is None
    log.settle(4)
    log.settle(9)
    assert (log.begin_commit(), log.ahead(), log.span) == (0, [4, 9], 10)
    log.settle(0)
    log.end_commit(stored=True)
    assert (log.begin_commit(), log.ahead()) == (3, [4, 9])
    log.end_commit(stored=True)
    assert log.begin_commit() is None
    log.settle(3)
    assert (log.begin_commit(), log.ahead()) == (10, [])


def test_all_can_be_settled_at_once() -> None:
    log = ledger(0, 1, 4)
    log.settle(1)
    log.settle_all()
    assert (log.begin_commit(), log.unsettled, log.gap) == (5, 0, 0)
    assert not log.settle(4)


def test_the_gap_counts_what_a_crash_repeats() -> None:
    log = ledger(0, 1, 2, 3)
    for offset in (1, 2, 3):
        log.settle(offset)
    assert (log.unsettled, log.gap) == (1, 4)
    log.settle(0)
    assert (log.unsettled, log.gap) == (0, 0)


@given(
    steps=st.lists(st.integers(min_value=1, max_value=3), max_size=60),
    seed=st.integers(min_value=0),
    begin=st.integers(min_value=0, max_value=10),
)
def test_the_position_lies_behind_the_settled_prefix_and_covers_nothing_unsettled(
    steps: list[int], seed: int, begin: int
) -> None:
    """Against the definition, with deliveries and settlements interleaved and holes between the offsets."""
    choose, log, delivered, settled = random.Random(seed), OffsetLedger(begin), list[int](), set[int]()
    end = begin
    for step in steps:
        end += step
        log.deliver([end - 1])
        delivered.append(end - 1)
        for offset in choose.sample(delivered, choose.randint(0, len(delivered))):
            assert log.settle(offset) == (offset not in settled)
            settled.add(offset)
        left = [offset for offset in delivered if offset not in settled]
        prefix = delivered[: delivered.index(left[0])] if left else delivered
        assert (prefix[-1] + 1 if prefix else begin) <= log.position <= (left[0] if left else end)
        assert log.unsettled == len(left)
        assert log.gap == (len(delivered) - delivered.index(left[0]) if left else 0)
