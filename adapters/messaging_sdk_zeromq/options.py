"""What can be set: the keys of a `[backends.x]` table (or URL query) and of a `[destinations.y] zeromq` block."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, model_validator
from zmq.utils import z85

from messaging_sdk.config import Seconds

Endpoint = Annotated[str, StringConstraints(pattern=r"^tcp://[^\s/;]+:\d+$")]


def _curve_key(text: str) -> str:
    try:
        fits = len(text) == 40 and len(z85.decode(text.encode("ascii"))) == 32
    except Exception:
        fits = False
    if not fits:
        raise ValueError("no CURVE key: 40 characters as `zmq.curve_keypair()` makes them")
    return text


CurveKey = Annotated[str, AfterValidator(_curve_key)]


class Options(BaseModel):
    """One network of processes that speak with each other directly."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    silence_s: Seconds = Field(3.0, ge=0.5)
    """A peer that answers no ping for so long is given up; what it held goes to others. A closed connection shows at
    once."""
    max_held: int = Field(100_000, ge=1)
    """Messages that one sender holds unsettled for each group; more are rejected with Backpressure."""
    max_held_bytes: int = Field(256 << 20, ge=1)
    """The same in bytes of bodies."""
    signal_buffer: int = Field(65_536, ge=1)
    """Messages that wait in a Signal listener; more are dropped and counted."""
    signal_frames: int = Field(1000, ge=1)
    """Frames (of up to 500 messages) that libzmq keeps for a listener that does not read; more are dropped."""
    linger_s: Seconds = Field(1.0, ge=0)
    """How long a closing process still pushes out settlements and signals that are written but not sent."""
    curve_public: CurveKey | None = None
    """This process's CURVE key pair; both or none. With it nothing is ever sent or taken in clear."""
    curve_secret: CurveKey | None = Field(None, repr=False)
    curve_consumer: CurveKey | None = None
    """Senders: the public key that a consumer must prove to have."""
    curve_senders: tuple[CurveKey, ...] = ()
    """Consumers: the public keys that are let in."""

    @model_validator(mode="after")
    def _curve_is_whole(self) -> Options:
        if (self.curve_public is None) != (self.curve_secret is None):
            raise ValueError("curve_public and curve_secret go together")
        if self.curve_public is None and (self.curve_consumer or self.curve_senders):
            raise ValueError("curve_consumer and curve_senders need curve_public and curve_secret")
        if self.curve_public is not None and not (self.curve_consumer or self.curve_senders):
            raise ValueError("CURVE needs curve_consumer (to send) or curve_senders (to consume), or both")
        return self


class DestinationOptions(BaseModel):
    """Where its consumers listen, in place of a rendezvous directory."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    consumers: tuple[Endpoint, ...] = ()
    """A Queue's workers or a Signal's listeners: each binds the first of these that is its own and free."""
    groups: dict[str, tuple[Endpoint, ...]] = {}
    """A Topic's groups, each with the endpoints of its members."""
