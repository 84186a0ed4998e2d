"""Builds from source: which torch they find, what they say if there is none, and what the archive of sources holds."""

import importlib.util
import subprocess
import sys
import sysconfig
import tarfile
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("scikit_build_core")

ROOT = Path(__file__).parents[2]
FILE = ROOT / "cpp" / "bindings" / "build_backend.py"
SETTING = "cmake.define.CSULORA_TORCH_DIR"


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("build_backend", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.chdir(ROOT)
    return module


@pytest.fixture
def outside(backend: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Where packages lie outside an isolated build; none can be imported."""
    monkeypatch.setattr(backend, "find_spec", lambda name: None)
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    return tmp_path / "torch"


def install(directory: Path, version: str) -> None:
    directory.mkdir()
    (directory / "version.py").write_text(f"from typing import Optional\n\n__version__ = '{version}'\ndebug = False\n")


def test_the_torch_of_the_environment_is_found(backend: ModuleType) -> None:
    directory = Path(backend._with_torch(None)[SETTING])
    assert (directory / "include" / "ATen" / "ATen.h").exists()


@pytest.mark.parametrize("version", ["2.13.0+cpu", "2.14.1+cu130", "2.15.0+cu132", "2.15.0a0+git1"])
def test_a_torch_that_isolation_hides_is_found(backend: ModuleType, outside: Path, version: str) -> None:
    install(outside, version)
    assert backend._with_torch({"build-dir": "there"}) == {"build-dir": "there", SETTING: str(outside)}


def test_without_torch_a_build_ends_with_what_to_do(backend: ModuleType, outside: Path) -> None:
    for build in (backend.get_requires_for_build_wheel, backend.get_requires_for_build_editable):
        with pytest.raises(SystemExit, match=r"no torch.\n.*not downloaded.*\n\n    pip install torch==2\.13\.0\n"):
            build()


@pytest.mark.parametrize("version", ["2.12.1", "2.16.0+cu140", "3.0.0"])
def test_a_torch_that_pip_would_replace_ends_a_build(backend: ModuleType, outside: Path, version: str) -> None:
    install(outside, version)
    with pytest.raises(SystemExit, match=f"needs torch<2.16,>=2.13, and torch {version.replace('+', '[+]')} is"):
        backend.get_requires_for_build_wheel()


def test_a_torch_that_is_named_is_taken_as_it_is(backend: ModuleType, outside: Path) -> None:
    assert backend._with_torch({SETTING: "elsewhere"}) == {SETTING: "elsewhere"}


def test_without_tools_a_build_ends_with_what_to_install() -> None:
    program = f"import sys, runpy; sys.modules['scikit_build_core'] = None; runpy.run_path({str(FILE)!r})"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "pip install scikit-build-core pybind11 cmake ninja" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_archive_of_sources_holds_what_a_build_needs(backend: ModuleType, tmp_path: Path) -> None:
    archive = tmp_path / backend.build_sdist(str(tmp_path))
    with tarfile.open(archive) as opened:
        held = {name.partition("/")[2] for name in opened.getnames()}
    tracked = subprocess.run(["git", "ls-files", "cpp", "python"], cwd=ROOT, capture_output=True, text=True, check=True)
    top = {"CHANGELOG.md", "CMakeLists.txt", "LICENSE", "PKG-INFO", "README.md", "pyproject.toml"}
    assert held == {*tracked.stdout.split(), *top} - {"python/conftest.py"}
    assert archive.stat().st_size < 500_000
