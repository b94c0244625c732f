"""What the ranks of a running group have measured of themselves, as it stands in a status: written from what they tell,
and read again by whoever plans for the group from its file (`moerator plan`, `moerator explain`).
"""

import json
from collections.abc import Mapping
from typing import Annotated, Any, Self

from pydantic import ConfigDict, Field
from pydantic.alias_generators import to_camel

from moe_core.contract.base import WireModel, three_digits
from moe_core.contract.exchange import RuntimeState
from moe_core.contract.links import Links, LinkSpeed, Positive, Scope
from moe_core.decide.crew import active_uids
from moe_core.decide.speeds import speeds_of, told_speeds
from moe_core.outcome import InvalidInput

FIELDS = ("links", "pace")
_LONGEST_S = 1e6
"""A pod may tell any number; a status holds those that a float can in another unit."""


class _StatusModel(WireModel):
    model_config = ConfigDict(frozen=True, extra="forbid", alias_generator=to_camel, populate_by_name=True)


class LinkStatus(_StatusModel):
    latency_microseconds: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    bytes_per_second: Positive


class Pace(_StatusModel):
    """How long a rank takes for one token at one expert; ranks that are not about as fast as most, in percent of it."""

    nanoseconds_per_pick: Positive
    ranks_percent: dict[Annotated[int, Field(ge=0)], Annotated[int, Field(gt=0)]] = Field(default_factory=dict)


class Measured(_StatusModel):
    links: dict[Scope, LinkStatus] = Field(default_factory=dict)
    pace: Pace | None = None

    @classmethod
    def of_runtime(cls, runtime: RuntimeState) -> Self:
        links = {} if runtime.links is None else runtime.links.scopes
        active = active_uids(runtime)
        known = {s.rank: s.seconds_per_pick for s in runtime.ranks if s.seconds_per_pick > 0 and s.pod_uid in active}
        speeds = speeds_of(known, max(known, default=-1) + 1)
        return cls(
            links={
                scope: LinkStatus(
                    latency_microseconds=speed.latency_us, bytes_per_second=max(round(speed.bytes_per_s), 1)
                )
                for scope, speed in sorted(links.items())
            },
            pace=None
            if runtime.seconds_per_pick <= 0
            else Pace(
                nanoseconds_per_pick=three_digits(min(runtime.seconds_per_pick, _LONGEST_S) * 1e9),
                ranks_percent={rank: round(100 * speed) for rank, speed in enumerate(speeds) if speed != 1},
            ),
        )

    @classmethod
    def of_status(cls, status: Mapping[str, Any]) -> Self:
        """Raises InvalidInput that names the field."""
        try:
            return cls.parse(json.dumps({field: status[field] for field in FIELDS if field in status}, default=str))
        except InvalidInput as error:
            raise InvalidInput(f"status: {error}") from error

    def as_status(self) -> dict[str, Any]:
        return self.model_dump(mode="json", by_alias=True, exclude_defaults=True)

    @property
    def seconds_per_pick(self) -> float | None:
        return None if self.pace is None else self.pace.nanoseconds_per_pick / 1e9

    def speeds(self, num_ranks: int) -> tuple[float, ...]:
        """[R] in parts of most ranks' speed."""
        percent = {} if self.pace is None else self.pace.ranks_percent
        return tuple(percent.get(rank, 100) / 100 for rank in range(num_ranks))

    def between(self) -> Links | None:
        """By scope: a status does not tell machines apart."""
        if not self.links:
            return None
        return Links(
            scopes={
                scope: LinkSpeed(latency_us=speed.latency_microseconds, bytes_per_s=speed.bytes_per_second)
                for scope, speed in self.links.items()
            }
        )

    def told(self) -> str:
        """In one line; nothing where nothing was measured.

        >>> Measured(pace=Pace(nanoseconds_per_pick=250, ranks_percent={2: 25})).told()
        '250 ns for a token at an expert; rank 2 is 0.25 times as fast as most'
        """
        parts = [
            f"{scope} {speed.latency_microseconds:g} us, {speed.bytes_per_second / 1e6:.3g} MB/s"
            for scope, speed in self.links.items()
        ]
        if self.pace is not None:
            parts.append(f"{self.pace.nanoseconds_per_pick:g} ns for a token at an expert")
            if unlike := told_speeds(self.speeds(max(self.pace.ranks_percent, default=-1) + 1)):
                parts.append(unlike)
        return "; ".join(parts)
