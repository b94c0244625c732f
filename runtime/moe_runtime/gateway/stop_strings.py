"""Finding stop strings in a stream of text: what could be the start of one is held back until it is certain."""

from collections.abc import Sequence


class StopStrings:
    """Push text, get text that may be shown. After a stop string `is_found` is set and nothing more comes.

    >>> stops = StopStrings(["END"])
    >>> stops.push("go E"), stops.push("N"), stops.push("D on"), stops.is_found
    ('go ', '', '', True)
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.is_found = False

    def push(self, text: str) -> str:
        if self.is_found:
            return ""
        self._held += text
        first = min((at for stop in self._stops if (at := self._held.find(stop)) >= 0), default=-1)
        if first >= 0:
            shown, self._held, self.is_found = self._held[:first], "", True
            return shown
        keep = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        shown, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return shown

    def finish(self) -> str:
        """The text that was held back, once no more can come."""
        rest, self._held = self._held, ""
        return rest


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
