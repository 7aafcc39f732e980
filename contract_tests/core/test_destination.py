"""Laws of destinations: the naming rule, the key, the groups, and equality by what they were made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from messaging_sdk import InvalidDestination, InvalidMessage, Queue, Signal, Topic, UsageError


class Order(BaseModel):
    id: str
    number: int = 0


@dataclass
class Line:
    sku: str


@pytest.mark.parametrize("name", ["a", "orders", "orders.placed", "a-b_c.d1", "0", "x" * 200])
def test_a_name_of_words_joined_by_dots_is_allowed(name: str) -> None:
    assert Queue(name, bytes).name == name


WRONG = ["", ".", "a.", ".a", "a..b", "_a", "a_", "a__b", "-a", "a-", "a b", "a/b", "ä", "a\n", "a*", "x" * 201, "a._b"]


@pytest.mark.parametrize("name", WRONG)
def test_any_other_name_is_refused_quoting_it_and_the_rule(name: str) -> None:
    with pytest.raises(InvalidDestination, match="words of letters") as caught:
        Queue(name, bytes)
    assert repr(name[:80]) in str(caught.value)


@pytest.mark.parametrize("group", WRONG)
def test_group_names_follow_the_same_rule(group: str) -> None:
    with pytest.raises(InvalidDestination, match="group name"):
        Topic("t", bytes, groups=[group])


@pytest.mark.parametrize("name", [None, 7, b"orders"])
def test_a_name_that_is_no_text_is_refused(name: Any) -> None:
    with pytest.raises(InvalidDestination, match="must be a str"):
        Queue(name, bytes)


@given(st.text(max_size=30))
def test_an_allowed_name_can_be_written_with_two_underscores_for_each_dot_and_read_back(name: str) -> None:
    try:
        Queue(name, bytes)
    except InvalidDestination:
        return
    assert name.replace(".", "__").replace("__", ".") == name


# --- order and key


def test_ordered_needs_a_key() -> None:
    with pytest.raises(UsageError, match="needs key="):
        Queue("q", Order, ordered=True)


def test_a_key_that_is_no_field_of_the_model_is_refused_naming_the_fields() -> None:
    with pytest.raises(UsageError, match=r"Order has no field 'order_id'; it has \['id', 'number'\]"):
        Queue("q", Order, key="order_id")


def test_a_key_that_is_no_field_of_the_dataclass_is_refused() -> None:
    with pytest.raises(UsageError, match=r"it has \['sku'\]"):
        Topic("t", Line, key="id")


@pytest.mark.parametrize("type_", [bytes, str, int, dict[str, str]])
def test_a_field_name_as_key_of_a_type_without_fields_is_refused(type_: Any) -> None:
    with pytest.raises(UsageError, match="callable"):
        Queue("q", type_, key="id")


@pytest.mark.parametrize("key", [7, ["id"], b"id"])
def test_a_key_that_is_neither_field_nor_callable_is_refused(key: Any) -> None:
    with pytest.raises(UsageError, match="field name or a callable"):
        Queue("q", Order, key=key)


def test_a_key_is_read_from_the_field() -> None:
    assert Queue("q", Order, key="id").key_of(Order(id="o1")) == "o1"


def test_a_key_may_be_computed() -> None:
    assert Queue("q", bytes, key=lambda body: body.decode()[:1]).key_of(b"xyz") == "x"


def test_a_key_that_is_no_text_becomes_text() -> None:
    assert Queue("q", Order, key="number").key_of(Order(id="o1", number=7)) == "7"


def test_zero_is_a_key_like_any_other() -> None:
    assert Queue("q", Order, key="number").key_of(Order(id="o1", number=0)) == "0"


@pytest.mark.parametrize("empty", [None, ""])
def test_an_empty_key_is_refused(empty: Any) -> None:
    with pytest.raises(InvalidMessage, match="empty"):
        Queue("q", bytes, key=lambda body: empty).key_of(b"x")


def test_without_a_key_there_is_none() -> None:
    assert Queue("q", bytes).key_of(b"x") is None


# --- groups and dead letters


def test_a_group_named_twice_is_refused() -> None:
    with pytest.raises(UsageError, match="named twice"):
        Topic("t", bytes, groups=["a", "a"])


def test_groups_given_as_one_string_are_refused() -> None:
    with pytest.raises(UsageError, match="must be a list of names"):
        Topic("t", bytes, groups="abc")


def test_dead_letters_are_a_queue_of_bytes_named_after_it() -> None:
    assert Queue("work", Order).dead_letters() == Queue("work.dead", bytes)
    assert Topic("t", Order, groups=["g"]).dead_letters("g") == Queue("t.g.dead", bytes)


def test_dead_letters_of_a_group_that_is_not_declared_are_refused() -> None:
    with pytest.raises(UsageError, match=r"no group 'h'; it declares \['g'\]"):
        Topic("t", bytes, groups=["g"]).dead_letters("h")


# --- equality


def test_destinations_are_equal_by_what_they_were_made_of() -> None:
    one, other = Queue("q", Order, key="id"), Queue("q", Order, key="id")
    assert one == other and hash(one) == hash(other)


@pytest.mark.parametrize(
    "other",
    [Queue("r", Order), Queue("q", Line), Queue("q", Order, key="id"), Topic("q", Order), Signal("q", Order), "q"],
)
def test_any_difference_makes_them_unequal(other: object) -> None:
    assert Queue("q", Order) != other


def test_a_signal_has_no_settlement_and_the_others_do() -> None:
    assert (Queue.settles, Topic.settles, Signal.settles) == (True, True, False)
