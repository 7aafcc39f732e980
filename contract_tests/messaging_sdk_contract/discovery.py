"""Finds the harness of an adapter by the entry point group that third parties use too."""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import Final

from .harness import Harness

GROUP: Final = "messaging_sdk.harnesses"


class UnknownAdapter(LookupError):
    """No harness of that name is installed; the text says which are."""


def harness_names() -> list[str]:
    """Names of all adapters that an installed distribution has a harness for, sorted."""
    return sorted({point.name for point in entry_points(group=GROUP)})


def harness_class(adapter: str) -> type[Harness]:
    """The harness registered as `adapter`. Raises UnknownAdapter if there is none."""
    for point in entry_points(group=GROUP, name=adapter):
        found = point.load()
        if not (isinstance(found, type) and issubclass(found, Harness)):
            raise TypeError(f"entry point {adapter} = {point.value} is no Harness class")
        return found
    raise UnknownAdapter(
        f"no contract harness for {adapter!r}; there are: {', '.join(harness_names())}. An adapter "
        f'registers its own in pyproject.toml: [project.entry-points."{GROUP}"] {adapter} = '
        '"package.contract:Harness"'
    )


def checked_profile(harness: type[Harness], profile: str | None) -> str:
    """`profile` if the harness has it, its first one for None; LookupError otherwise."""
    if profile is None:
        return harness.profiles[0]
    known = all_profiles(harness)
    if profile not in known:
        raise LookupError(f"{harness.name} has no profile {profile!r}; it has {', '.join(known)}")
    return profile


def all_profiles(harness: type[Harness]) -> tuple[str, ...]:
    """Its profiles, and those meant for single cases only."""
    return (*harness.profiles, *getattr(harness, "extra_profiles", ()))
