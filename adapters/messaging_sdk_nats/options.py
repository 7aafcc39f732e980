"""What can be set: the keys of a `[backends.x]` table (or URL query) and of a `[destinations.y] nats` block."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from messaging_sdk.config import Seconds, TlsFiles


class Options(TlsFiles):
    """One NATS server or cluster. User and password belong into the URL."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    connect_timeout_s: Seconds = Field(5.0, gt=0)
    """Longest wait for a connection; nats-py alone was seen to try for 120 s."""
    ping_interval_s: Seconds = Field(10.0, gt=0)
    """A server that leaves two of these pings unanswered is given up."""
    ack_wait_s: Seconds = Field(30.0, ge=1)
    """The lease. Shorter: quicker take-over after a crash, more duplicates after a stall of the process."""
    duplicate_window_s: Seconds = Field(120.0, ge=0.1)
    """How long a stream remembers message ids; the server keeps them in memory."""
    topic_max_age_s: Seconds = Field(7 * 86400.0, ge=1)
    """How long a Topic keeps its messages: a group that is away for longer misses some."""
    storage: Literal["file", "memory"] = "file"
    replicas: int = Field(1, ge=1, le=5)
    signal_buffer: int = Field(65536, ge=1)
    """Messages that wait in a Signal listener; more are dropped and counted."""
    max_ack_pending: int = Field(1000, ge=1)
    """Ordered destinations only: most unsettled messages of a group; a new active member may buffer as many."""
    tls: bool = False
    """Ask for TLS with a `nats://` URL too; never falls back to plain text."""
    server_name: str | None = None
    """Name that the server's certificate must carry, if it is not the URL's host."""
    token: str | None = Field(None, repr=False)
    creds_file: str | None = None
    """A `.creds` file with JWT and nkey seed; needs nats-py[nkeys]."""


class DestinationOptions(BaseModel):
    """One stream. Limits that are not set are unlimited."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    address: str | None = Field(None, pattern=r"^[^\s.*>/\\]+(\.[^\s.*>/\\]+)*$")
    """The subject outright, instead of `queue.<name>`, `topic.<name>` or `signal.<name>`."""
    max_bytes: int | None = Field(None, ge=1)
    max_msgs: int | None = Field(None, ge=1)
    max_age_s: Seconds | None = Field(None, ge=1)
    """Older messages are removed, settled or not."""
    discard: Literal["old", "new"] | None = None
    """At a limit: refuse the new message (a Queue's default), or drop the oldest (a Topic's)."""
    retention: Literal["limits", "interest"] = "limits"
    """Topics: keep until a limit, or only until all groups have settled (the least disk, no history)."""
    replicas: int | None = Field(None, ge=1, le=5)
