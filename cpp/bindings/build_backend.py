"""scikit-build-core, after finding the torch to compile against.

An isolated build would download a torch of its own, gigabytes of it, and the core might then not fit the torch that
runs it. So torch is no build requirement: it has to be there, also outside an isolated environment, or be named by
``--config-settings cmake.define.CSULORA_TORCH_DIR=DIRECTORY``. Otherwise the build ends before anything is fetched.
"""

from __future__ import annotations

import re
import sys
import sysconfig
import tomllib
from importlib.util import find_spec
from pathlib import Path
from typing import Any

_SETTING = "cmake.define.CSULORA_TORCH_DIR"
Settings = dict[str, Any]

_NO_TORCH = """
csulora is compiled against the torch that it runs with, and this environment has no torch.
torch is not downloaded here. Install torch first, then csulora:

    pip install torch==2.13.0
    pip install .

If torch is installed and was not found, name its directory:

    pip install --config-settings cmake.define.CSULORA_TORCH_DIR=.../site-packages/torch .
"""

_OTHER_TORCH = """
csulora needs {requirement}, and torch {version} is installed; pip would replace it.
torch is not downloaded here. Install a torch that fits first, then csulora:

    pip install '{requirement}'
    pip install .

To try csulora with torch {version} all the same:

    pip install --no-deps --config-settings cmake.define.CSULORA_TORCH_DIR={directory} .
"""

_NO_TOOLS = """
csulora is built with scikit-build-core, and this environment has none ({error}).
Install the tools first, or build with isolation:

    pip install scikit-build-core pybind11 cmake ninja
    pip install --no-build-isolation .
"""


try:
    from scikit_build_core import build
except ImportError as missing:
    sys.exit(_NO_TOOLS.format(error=missing))

# An archive of the sources needs no torch.
get_requires_for_build_sdist = build.get_requires_for_build_sdist
build_sdist = build.build_sdist


def get_requires_for_build_wheel(config_settings: Settings | None = None) -> list[str]:
    """Return what to install for a build; this comes before anything is downloaded."""
    return build.get_requires_for_build_wheel(_with_torch(config_settings))


def get_requires_for_build_editable(config_settings: Settings | None = None) -> list[str]:
    """Return what to install for a build; this comes before anything is downloaded."""
    return build.get_requires_for_build_editable(_with_torch(config_settings))


def prepare_metadata_for_build_wheel(metadata_directory: str, config_settings: Settings | None = None) -> str:
    """Say what the wheel will require; without isolation this comes first, before any of that is downloaded."""
    return build.prepare_metadata_for_build_wheel(metadata_directory, _with_torch(config_settings))


def prepare_metadata_for_build_editable(metadata_directory: str, config_settings: Settings | None = None) -> str:
    """Say what the wheel will require; without isolation this comes first, before any of that is downloaded."""
    return build.prepare_metadata_for_build_editable(metadata_directory, _with_torch(config_settings))


def build_wheel(directory: str, config_settings: Settings | None = None, metadata_directory: str | None = None) -> str:
    """Compile against the torch that was found."""
    return build.build_wheel(directory, _with_torch(config_settings), metadata_directory)


def build_editable(
    directory: str, config_settings: Settings | None = None, metadata_directory: str | None = None
) -> str:
    """Compile against the torch that was found."""
    return build.build_editable(directory, _with_torch(config_settings), metadata_directory)


def _with_torch(config_settings: Settings | None) -> Settings:
    """Add the directory of torch to the settings; end with what to do if there is none that fits."""
    settings = dict(config_settings or {})
    if _SETTING not in settings:
        directory = _torch_directory()
        if directory is None:
            sys.exit(_NO_TORCH)
        _check(directory)
        settings[_SETTING] = str(directory)
    return settings


def _torch_directory() -> Path | None:
    """Find torch here, or in the environment that pip installs into, which isolation only hides."""
    spec = find_spec("torch")
    outside = Path(sysconfig.get_path("platlib")) / "torch"
    found = [Path(place) for place in spec.submodule_search_locations or []] if spec else [outside]
    return next((directory for directory in found if (directory / "version.py").exists()), None)


def _check(directory: Path) -> None:
    """End unless torch is one that csulora's own requirements admit."""
    from packaging.requirements import Requirement  # scikit-build-core needs it too

    text = (directory / "version.py").read_text()
    (version,) = re.findall(r"^__version__ = '(.+)'", text, re.MULTILINE)
    project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
    requirement = next(found for found in map(Requirement, project["dependencies"]) if found.name == "torch")
    if not requirement.specifier.contains(version, prereleases=True):
        sys.exit(_OTHER_TORCH.format(requirement=requirement, version=version, directory=directory))
