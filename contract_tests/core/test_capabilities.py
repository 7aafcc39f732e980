"""Laws of capabilities: values that compare, needs that are met or named with what would meet them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from messaging_sdk import Capabilities, Level, Needs
from messaging_sdk.capabilities import FLAGS, choices, meets, unmet

ENUMERATED = [flag for flag in FLAGS if choices(flag)]


def test_a_third_party_starts_from_promising_nothing() -> None:
    weakest = {flag: (choices(flag) or (False,))[0] for flag in FLAGS}
    promised = [flag for flag, value in Capabilities().items() if value not in (weakest[flag], None)]
    assert promised == ["hold_s"]  # no limit is known, so none is stated


@pytest.mark.parametrize("flag", ENUMERATED)
def test_a_value_meets_itself_and_all_weaker_ones_and_no_stronger(flag: str) -> None:
    ranks = choices(flag)
    assert ranks is not None
    table = [[meets(flag, have, want) for want in ranks] for have in ranks]
    assert table == [[w <= h for w in range(len(ranks))] for h in range(len(ranks))]


@pytest.mark.parametrize("flag", ENUMERATED)
def test_the_default_of_an_enumerated_flag_is_its_weakest_value(flag: str) -> None:
    assert getattr(Capabilities(), flag) == (choices(flag) or ("?",))[0]


@pytest.mark.parametrize(
    ("flag", "have", "want", "met"),
    [
        ("backlog", True, True, True),
        ("backlog", False, True, False),
        ("dedup_s", 120.0, 60.0, True),
        ("dedup_s", 0.0, 60.0, False),
        ("max_body", 10, 11, False),
        ("priority", 10, 10, True),
        ("hold_s", float("inf"), 1e9, True),
    ],
)
def test_numbers_and_yes_or_no_compare_by_size(flag: str, have: Any, want: Any, met: bool) -> None:
    assert meets(flag, have, want) is met


def missing(capabilities: Capabilities, **options: Any) -> list[str]:
    wanted = options.pop("wanted", {"delay": True})
    return [str(u) for u in unmet(capabilities, wanted, destination="orders", backend="'work' (fake)", **options)]


def test_what_is_met_is_not_listed() -> None:
    assert missing(Capabilities(delay=True)) == []


def test_an_unmet_need_names_destination_need_backend_and_remedy() -> None:
    (text,) = missing(Capabilities(notes={"delay": "needs a plugin"}))
    assert text == (
        "'orders' needs delay=True; backend 'work' (fake) does not have it. "
        "Would be met by: a backend with delay>=True; this one has False (needs a plugin)"
    )


def test_an_option_that_would_meet_it_is_the_remedy() -> None:
    capabilities = Capabilities(levels={"durable": Level.CONFIG}, notes={"durable": 'storage = "file"'})
    (text,) = missing(capabilities, wanted={"durable": "restart"})
    assert text.endswith('Would be met by: storage = "file"')


def test_the_use_that_asks_for_it_is_told() -> None:
    (text,) = missing(Capabilities(), reasons={"delay": "publish(delay=)"})
    assert "delay=True (publish(delay=))" in text


def test_every_unmet_need_is_listed() -> None:
    assert len(missing(Capabilities(), wanted={"delay": True, "ttl": True, "dedup_s": 5.0, "order": "none"})) == 3


def test_an_emulated_promise_is_unmet_where_emulation_is_forbidden() -> None:
    emulated = Capabilities(delay=True, levels={"delay": Level.EMULATED}, notes={"delay": "held by us"})
    assert missing(emulated) == []
    (text,) = missing(emulated, forbid_emulation=True)
    assert 'emulation = "allow"' in text and "held by us" in text


def test_the_level_follows_from_the_value_unless_it_is_declared() -> None:
    capabilities = Capabilities(ttl=True, delay=True, levels={"delay": Level.EMULATED, "count": Level.CONFIG})
    levels = [capabilities.level(f) for f in ("ttl", "delay", "count", "priority")]
    assert levels == [Level.NATIVE, Level.EMULATED, Level.CONFIG, Level.NONE]


def test_needs_that_are_not_stated_ask_for_nothing() -> None:
    assert list(Needs().wanted()) == []
    assert dict(Needs(dedup_s=1.0, durable="kill").wanted()) == {"dedup_s": 1.0, "durable": "kill"}


def test_every_need_is_a_flag_of_the_same_name() -> None:
    stated = Needs(
        confirm="stored", durable="kill", ok_means="fsync", count="exact", dedup_s=1.0, max_body=1, hold_s=1.0
    )
    assert {name for name, _ in stated.wanted()} <= set(FLAGS)


def test_capabilities_are_frozen_values() -> None:
    one = Capabilities(ttl=True)
    assert one == replace(Capabilities(), ttl=True)
    with pytest.raises(AttributeError):
        one.ttl = False  # type: ignore[misc]
