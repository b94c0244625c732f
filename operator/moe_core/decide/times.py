"""Times between the brain (seconds since the Unix epoch) and status (RFC 3339 in whole seconds, as in Kubernetes)."""

from datetime import UTC, datetime


def rfc3339(seconds: float) -> str:
    """
    >>> rfc3339(0.9)
    '1970-01-01T00:00:00Z'
    """
    return datetime.fromtimestamp(int(seconds), tz=UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def seconds_of(text: object) -> float | None:
    """The reverse; None for anything that is not such a time."""
    if not isinstance(text, str):
        return None
    try:
        return datetime.fromisoformat(text).timestamp()
    except ValueError:
        return None
