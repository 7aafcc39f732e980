"""Laws of key lanes: of each key one delivery is out at a time, in the order of arrival, and none is lost."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from messaging_sdk import Delivery
from messaging_sdk.lanes import Lanes
from messaging_sdk.model import Session

SESSION = Session("s")


def delivery(id: str, key: str | None) -> Delivery[Any]:
    return Delivery(b"", id, key, session=SESSION)


def test_a_second_delivery_of_a_key_waits_for_the_first() -> None:
    lanes, first, second = Lanes(), delivery("1", "k"), delivery("2", "k")
    assert lanes.enter(first)
    assert not lanes.enter(second)
    assert lanes.leave(first) is second


def test_other_keys_do_not_wait() -> None:
    lanes = Lanes()
    assert lanes.enter(delivery("1", "a"))
    assert lanes.enter(delivery("2", "b"))


def test_messages_without_a_key_share_one_lane() -> None:
    lanes = Lanes()
    assert lanes.enter(delivery("1", None))
    assert not lanes.enter(delivery("2", None))


def test_a_key_that_is_done_leaves_nothing_behind() -> None:
    lanes, only = Lanes(), delivery("1", "k")
    lanes.enter(only)
    lanes.leave(only)
    assert not lanes._lanes
    assert lanes.enter(delivery("2", "k"))


@given(st.lists(st.tuples(st.sampled_from(["a", "b", "c", None]), st.integers(0, 99)), max_size=60))
def test_any_arrivals_and_endings_keep_one_out_per_key_in_order(steps: list[tuple[str | None, int]]) -> None:
    lanes = Lanes()
    out: list[Delivery[Any]] = []
    came: dict[str | None, list[str]] = defaultdict(list)
    ended: dict[str | None, list[str]] = defaultdict(list)

    def end(one: Delivery[Any]) -> None:
        out.remove(one)
        ended[one.key].append(one.id)
        follower = lanes.leave(one)
        if follower is not None:
            out.append(follower)

    for number, (key, pick) in enumerate(steps):
        arrived = delivery(str(number), key)
        came[key].append(arrived.id)
        if lanes.enter(arrived):
            out.append(arrived)
        keys = [d.key for d in out]
        assert len(keys) == len(set(keys))
        if pick % 2:
            end(out[pick % len(out)])
    while out:
        end(out[0])
    assert ended == came
    assert list(lanes.waiting()) == []
