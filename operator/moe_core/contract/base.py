"""The base of every value on the wire: frozen, closed, with one canonical encoding and one digest."""

import hashlib
import json
from typing import Self

from pydantic import BaseModel, ConfigDict, ValidationError

from moe_core.outcome import InvalidInput


class WireModel(BaseModel):
    """A frozen value with a canonical JSON form (sorted keys, no spaces), equal on both ends of the wire."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def canonical(self) -> str:
        """Canonical JSON: the same value always gives the same text."""
        return json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))

    @classmethod
    def parse(cls, text: str | bytes) -> Self:
        """Read one value. Raises InvalidInput naming the field and the value."""
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or "document"
            raise InvalidInput(f"{cls.__name__}.{where}: {first['msg']} (got {first['input']!r:.120})") from error


def three_digits(value: float) -> float:
    """What is told of a measurement: more would be news every time.

    >>> three_digits(123456.7)
    123000.0
    """
    return float(f"{value:.3g}")


def digest_of(text: str) -> str:
    """Sixteen hex digits of SHA-256: enough to tell maps and specs of one owner apart."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]
