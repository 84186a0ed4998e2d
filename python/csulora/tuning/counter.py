"""How far a run of `tune` is."""

from __future__ import annotations

from csulora.extraction.model_pair import Progress


class Counter:
    """Counts steps of fits and measurements, and tells them to a callback."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        """Count to ``total``."""
        self.done, self.total = 0, total
        self._progress = progress
        self._finished: set[str] = set()

    def tick(self, what: str) -> None:
        """Begin the next step of something."""
        if self._progress:
            self._progress(what, self.done, self.total)
        self.done += 1

    def finish(self, fit: str, begun: int, steps: int) -> None:
        """Count all steps of a fit that began at ``begun``, also if it ended early, or was there already."""
        if fit not in self._finished:  # one adapter's fit is asked for twice
            self._finished.add(fit)
            self.done = begun + steps
