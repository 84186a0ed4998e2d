import importlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import torch

import csulora
from csulora import core
from csulora.errors import BuildError, CsuloraError


@pytest.fixture
def reload(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], object]]:
    """Imports csulora.core anew, under whatever was patched; afterwards all is as it was."""
    yield lambda: importlib.reload(core)
    monkeypatch.undo()
    importlib.reload(core)


@pytest.mark.parametrize("loaded", ["2.13.0", "2.13.1+cpu", "2.13.0+cu130"])
def test_a_torch_of_the_same_minor_version_fits(loaded: str) -> None:
    core.check_torch("2.13.0", loaded)


@pytest.mark.parametrize("loaded", ["2.12.1", "2.14.0", "3.13.0", "2.130.0"])
def test_any_other_torch_is_refused_with_the_command_that_rebuilds(loaded: str) -> None:
    with pytest.raises(BuildError, match=rf"built for torch 2\.13\.0, but torch {loaded} is loaded; .*pip install"):
        core.check_torch("2.13.0", loaded)


def test_the_check_comes_before_the_core_is_loaded(
    monkeypatch: pytest.MonkeyPatch, reload: Callable[[], object]
) -> None:
    monkeypatch.setitem(sys.modules, "csulora._build_info", SimpleNamespace(CUDA=False, TORCH_VERSION="1.0.0"))
    monkeypatch.setitem(sys.modules, "csulora._core", None)
    with pytest.raises(BuildError, match=rf"built for torch 1\.0\.0, but torch {torch.__version__.split('+')[0]}"):
        reload()


def test_a_core_that_does_not_load_is_explained(monkeypatch: pytest.MonkeyPatch, reload: Callable[[], object]) -> None:
    monkeypatch.delattr(csulora, "_core")
    monkeypatch.setitem(sys.modules, "csulora._core", None)
    with pytest.raises(BuildError, match=r"core does not load \(.*\); rebuild csulora: pip install"):
        reload()


def test_sources_that_were_never_built_are_explained(
    monkeypatch: pytest.MonkeyPatch, reload: Callable[[], object]
) -> None:
    monkeypatch.setitem(sys.modules, "csulora._build_info", None)
    with pytest.raises(BuildError, match="core is not built; build csulora: pip install"):
        reload()


def test_a_build_error_is_an_import_error_of_csuloras() -> None:
    assert issubclass(BuildError, ImportError)
    assert issubclass(BuildError, CsuloraError)


def test_importing_csulora_with_another_torch_ends_with_the_message() -> None:
    program = "import torch; torch.__version__ = '2.1.0'; import csulora"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith(
        "csulora.errors.BuildError: csulora's core was built for torch 2.13"
    )
