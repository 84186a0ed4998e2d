"""How far a run is."""

from __future__ import annotations

from csulora.extraction.model_pair import Progress


class Counter:
    """Counts what is done, and tells it to a callback.

    Attributes:
        step: what a step of a fit counts.
        measurement: what a measurement counts.
    """

    def __init__(self, progress: Progress | None, total: int) -> None:
        """Count to ``total``."""
        self.done, self.total = 0, total
        self.step = self.measurement = 1
        self._progress = progress
        self._finished: set[str] = set()

    def tick(self, what: str, cost: int = 1) -> None:
        """Begin the next step of something, which counts ``cost``."""
        if self._progress:
            self._progress(what, self.done, self.total)
        self.done += cost

    def finish(self, fit: str, begun: int, cost: int) -> None:
        """Count the whole of a fit that began at ``begun``, also if it was there already."""
        if fit not in self._finished:  # one adapter's fit is asked for twice
            self._finished.add(fit)
            self.done = begun + cost
