"""The operator's own metrics (DESIGN: `moerator_*`), on a registry of its own so that tests can make many."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest


class Metrics:
    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._duration = Histogram(
            "moerator_reconcile_duration_seconds", "Length of one reconcile cycle.", ["kind"], registry=self.registry
        )
        self._total = Counter("moerator_reconcile", "Reconcile cycles.", ["kind"], registry=self.registry)
        self._errors = Counter("moerator_reconcile_errors", "Cycles that failed.", ["kind"], registry=self.registry)
        self.resources = Gauge("moerator_resources", "Custom resources seen.", ["kind"], registry=self.registry)
        self.is_leader = Gauge("moerator_leader", "1 while this process holds the lease.", registry=self.registry)

    @contextmanager
    def cycle(self, kind: str) -> Iterator[None]:
        start = time.monotonic()
        try:
            yield
        finally:
            self._total.labels(kind).inc()
            self._duration.labels(kind).observe(time.monotonic() - start)

    def count_error(self, kind: str) -> None:
        self._errors.labels(kind).inc()

    def exposition(self) -> bytes:
        """The text that a scrape of /metrics gets."""
        return generate_latest(self.registry)
