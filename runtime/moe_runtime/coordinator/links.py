"""What ranks measured of their links, put together: by scope, and from machine to machine where they are few."""

from collections.abc import Iterable, Mapping, Sequence

from moe_core.contract.base import three_digits
from moe_core.contract.links import MOST_PLACES, Link, Links, LinkSpeed, Scope


def links_of(place_of: Mapping[int, str], told: Mapping[int, Sequence[Link]]) -> Links | None:
    """place_of: the members' machines; told: by source. None before anybody measured. Links to ranks that are gone are
    left out. What two ranks can do is the mean of times, so that one slow pair is not lost among fast ones.
    """
    by_scope: dict[Scope, list[LinkSpeed]] = {}
    by_places: dict[tuple[str, str], list[LinkSpeed]] = {}
    for source, links in told.items():
        for link in links:
            if source not in place_of or link.rank not in place_of:
                continue
            here, there = place_of[source], place_of[link.rank]
            scope: Scope = "self" if link.rank == source else "host" if here == there else "network"
            by_scope.setdefault(scope, []).append(link)
            if scope != "self":
                by_places.setdefault((here, there), []).append(link)
    if not by_places:
        return None
    places = tuple(sorted(set(place_of.values())))
    if len(places) > MOST_PLACES:
        places = ()
    return Links(
        scopes={scope: _mean(by_scope[scope]) for scope in sorted(by_scope)},
        places=places,
        between=tuple(
            tuple(_mean(found) if (found := by_places.get((here, there))) else None for there in places)
            for here in places
        ),
    )


def _mean(speeds: Iterable[LinkSpeed]) -> LinkSpeed:
    found = list(speeds)
    per_byte = sum(1 / speed.bytes_per_s for speed in found) / len(found)
    latency = sum(speed.latency_us for speed in found) / len(found)
    return LinkSpeed(latency_us=three_digits(latency), bytes_per_s=three_digits(1 / per_byte))
