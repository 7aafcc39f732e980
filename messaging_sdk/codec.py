"""How a destination's type becomes bytes and back: bytes and str as they are, everything else JSON by pydantic."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, Generic, TypeVar, cast

from pydantic import BaseModel, TypeAdapter, ValidationError

from .errors import DecodeError, InvalidMessage, UsageError

T = TypeVar("T")


class Codec(Generic[T]):
    """`encode(value) -> bytes` raises InvalidMessage on a wrong type; `decode(body) -> value` raises DecodeError.

    Neither quotes the value: it may be confidential.
    """

    __slots__ = ("content_type", "decode", "encode")

    def __init__(self, content_type: str, encode: Callable[[T], bytes], decode: Callable[[bytes], T]) -> None:
        self.content_type: Final = content_type
        self.encode: Final = encode
        self.decode: Final = decode


def codec_of(type_: type[T]) -> Codec[T]:
    """The codec of `type_`. Raises UsageError for a type that pydantic cannot handle, when the destination is made."""
    if type_ is bytes:
        return cast("Codec[T]", Codec("application/octet-stream", _encode_bytes, bytes))
    if type_ is str:
        return cast("Codec[T]", Codec("text/plain; charset=utf-8", _encode_str, _decode_str))
    return _json_codec(type_)


def _encode_bytes(value: bytes) -> bytes:
    if type(value) is bytes:
        return value
    if isinstance(value, (bytes, bytearray, memoryview)):
        return bytes(value)
    raise _wrong_type("bytes", value)


def _encode_str(value: str) -> bytes:
    if not isinstance(value, str):
        raise _wrong_type("str", value)
    try:
        return value.encode()
    except UnicodeEncodeError as error:
        raise InvalidMessage("this str holds a lone surrogate and has no UTF-8 form") from error


def _decode_str(body: bytes) -> str:
    try:
        return body.decode()
    except UnicodeDecodeError:
        raise DecodeError(f"body of {len(body)} bytes is not UTF-8 text") from None


def _json_codec(type_: type[T]) -> Codec[T]:
    name = getattr(type_, "__name__", repr(type_))
    validate: Callable[[bytes], T]
    if isinstance(type_, type) and issubclass(type_, BaseModel):
        # The validator and serializer pydantic itself calls: half the cost of model_validate_json / model_dump_json.
        validate = cast("Callable[[bytes], T]", type_.__pydantic_validator__.validate_json)
        to_json: Callable[..., bytes] = type_.__pydantic_serializer__.to_json
    else:
        try:
            adapter = TypeAdapter(type_)
            validate, to_json = adapter.validate_json, adapter.dump_json
        except Exception as error:  # pydantic raises several kinds for types it cannot handle
            raise UsageError(
                f"{name} cannot be a message type: use bytes, str, a pydantic model or a dataclass ({error})"
            ) from error
    plain = isinstance(type_, type)

    def encode(value: T) -> bytes:
        if plain and not isinstance(value, type_):
            raise _wrong_type(name, value)
        try:
            if plain:
                return to_json(value)
            # No instance check is possible: pydantic must refuse, which costs 4 us; else it sends and quotes the value.
            return to_json(value, warnings="error")
        except Exception as error:  # a model's own serializer may raise anything
            raise InvalidMessage(f"this {name} cannot be turned into JSON: {type(error).__name__}") from error

    def decode(body: bytes) -> T:
        try:
            return validate(body)
        except ValidationError as error:
            raise DecodeError(f"body of {len(body)} bytes is not a valid {name}: {_places(error)}") from None

    return Codec("application/json", encode, decode)


def _places(error: ValidationError) -> str:
    shown = error.errors(include_url=False, include_context=False, include_input=False)[:3]
    return "; ".join(f"{'.'.join(str(p) for p in e['loc']) or 'body'}: {e['type']}" for e in shown)


def _wrong_type(wanted: str, value: Any) -> InvalidMessage:
    return InvalidMessage(f"this destination takes {wanted}, not {type(value).__name__}; nothing was sent")
