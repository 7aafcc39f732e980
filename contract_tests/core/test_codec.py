"""Laws of codecs: what goes in comes out, a wrong type or body is refused, and no error quotes a value."""

from __future__ import annotations

import traceback
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, field_serializer

from messaging_sdk import DecodeError, InvalidMessage, UsageError
from messaging_sdk.codec import codec_of

SECRET = "S3CR3T"


class Order(BaseModel):
    id: str
    at: datetime | None = None
    lines: list[int] = []


class Sub(Order):
    extra: int = 1


@dataclass
class Line:
    sku: str
    count: int = 1


@given(st.binary())
def test_bytes_come_out_as_they_went_in(value: bytes) -> None:
    codec = codec_of(bytes)
    assert codec.decode(codec.encode(value)) == value


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_text_comes_out_as_it_went_in(value: str) -> None:
    codec = codec_of(str)
    assert codec.decode(codec.encode(value)) == value


@given(st.builds(Order, id=st.text(st.characters(exclude_categories=["Cs"])), lines=st.lists(st.integers(-9, 9))))
def test_models_come_out_as_they_went_in(value: Order) -> None:
    codec = codec_of(Order)
    assert codec.decode(codec.encode(value)) == value


@given(st.builds(Line, st.text(st.characters(exclude_categories=["Cs"])), st.integers(0, 9)))
def test_dataclasses_come_out_as_they_went_in(value: Line) -> None:
    codec = codec_of(Line)
    assert codec.decode(codec.encode(value)) == value


@pytest.mark.parametrize(("type_", "value"), [(int, 7), (list[int], [1, 2]), (dict[str, int], {"a": 1}), (float, 0.5)])
def test_other_types_that_json_can_carry_come_out_as_they_went_in(type_: Any, value: object) -> None:
    codec = codec_of(type_)
    assert codec.decode(codec.encode(value)) == value


@pytest.mark.parametrize("value", [bytearray(b"x"), memoryview(b"x")])
def test_mutable_buffers_become_bytes(value: Any) -> None:
    assert type(codec_of(bytes).encode(value)) is bytes


@pytest.mark.parametrize(
    ("type_", "value", "reason"),
    [
        (bytes, SECRET, "takes bytes, not str"),
        (str, SECRET.encode(), "takes str, not bytes"),
        (Order, {"id": SECRET}, "takes Order, not dict"),
        (Order, Line(SECRET), "takes Order, not Line"),
        (Line, Order(id=SECRET), "takes Line, not Order"),
        (int, SECRET, "takes int, not str"),
        (str, f"{SECRET}\ud800", "lone surrogate"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused_without_quoting_it(type_: Any, value: Any, reason: str) -> None:
    with pytest.raises(InvalidMessage, match=reason) as caught:
        codec_of(type_).encode(value)
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize("value", [["x"], {"a": 1}, "x"])
def test_a_value_of_the_wrong_generic_type_is_refused(value: Any) -> None:
    with pytest.raises(InvalidMessage):
        codec_of(list[int]).encode(value)


def test_a_subclass_of_the_model_is_taken() -> None:
    codec = codec_of(Order)
    assert codec.decode(codec.encode(Sub(id="o1"))).id == "o1"


def test_a_serializer_of_the_user_that_fails_is_an_invalid_message_without_the_value() -> None:
    class Bad(BaseModel):
        id: str

        @field_serializer("id")
        def no(self, value: str) -> str:
            raise ValueError(value)

    with pytest.raises(InvalidMessage, match="this Bad cannot be turned into JSON") as caught:
        codec_of(Bad).encode(Bad(id=SECRET))
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    ("type_", "body", "reason"),
    [
        (str, b"\xff" + SECRET.encode(), "body of 7 bytes is not UTF-8"),
        (Order, SECRET.encode(), "not a valid Order: body: json_invalid"),
        (Order, b'{"id": {"S3CR3T": 1}}', "not a valid Order: id: string_type"),
        (Order, b'{"identity": "S3CR3T"}', "id: missing"),
        (Line, b'{"sku": "S3CR3T", "count": "S3CR3T"}', "count: int_parsing"),
        (int, b'"S3CR3T"', "int_parsing"),
    ],
)
def test_a_body_that_does_not_fit_names_the_place_and_quotes_nothing(type_: Any, body: bytes, reason: str) -> None:
    with pytest.raises(DecodeError, match=reason) as caught:
        codec_of(type_).decode(body)
    assert SECRET not in "".join(traceback.format_exception(caught.value))


@given(st.binary())
def test_any_body_decodes_or_is_a_decode_error(body: bytes) -> None:
    for type_ in (bytes, str, Order, Line):
        with suppress(DecodeError):
            codec_of(type_).decode(body)  # type: ignore[arg-type]


def test_a_type_that_json_cannot_carry_is_refused_when_it_is_declared() -> None:
    class Socket:
        pass

    with pytest.raises(UsageError, match="Socket cannot be a message type"):
        codec_of(Socket)


@pytest.mark.parametrize(
    ("type_", "content_type"),
    [(bytes, "application/octet-stream"), (str, "text/plain; charset=utf-8"), (Order, "application/json")],
)
def test_the_content_type_tells_the_format(type_: Any, content_type: str) -> None:
    assert codec_of(type_).content_type == content_type
