"""Laws of the RabbitMQ adapter's encoder: whatever a message's neighbours were, pika reads what was sent."""

from __future__ import annotations

from itertools import permutations

import pytest
from pika import frame

from messaging_sdk.model import Outgoing
from messaging_sdk_rabbitmq.sender import Encoder

MESSAGES = (
    Outgoing(b"x" * 10, "m1", content_type="text/plain", created_s=1_700_000_000.5),
    Outgoing(b"x" * 10, "m2"),
    Outgoing(b"", "m3", "key", {"a": "b"}, created_s=1_700_000_000.5),
    Outgoing(b"x" * 9000, "m4", correlation_id="c1", content_type="application/json"),
)


def read(blob: bytes) -> tuple[frame.Header, bytes]:
    """The content header and the body out of the frames of one message."""
    frames = []
    while blob:
        used, found = frame.decode_frame(blob)
        frames.append(found)
        blob = blob[used:]
    return frames[1], b"".join(f.fragment for f in frames[2:])


@pytest.mark.parametrize("order", list(permutations(range(len(MESSAGES)))))
def test_what_pika_reads_does_not_depend_on_the_message_before(order: tuple[int, ...]) -> None:
    encoder = Encoder("", "work", durable=True, mandatory=True, max_body=1 << 20)
    for message in (MESSAGES[n] for n in (*order, *order)):
        header, body = read(b"".join(encoder.encode(message)))
        properties = header.properties
        assert (properties.message_id, properties.content_type) == (message.id, message.content_type)
        assert (properties.correlation_id, properties.delivery_mode) == (message.correlation_id, 2)
        assert properties.timestamp == (int(message.created_s) or None)
        assert (header.body_size, body) == (len(message.body), message.body)
