import importlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import torch

import csulora
from csulora import native
from csulora.errors import BuildError, CsuloraError


@pytest.fixture
def reload(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], object]]:
    """Imports csulora.native anew, under whatever was patched; afterwards all is as it was."""
    yield lambda: importlib.reload(native)
    monkeypatch.undo()
    importlib.reload(native)


@pytest.mark.parametrize("loaded", ["2.13.0", "2.13.1+cpu", "2.13.0+cu130"])
def test_a_torch_of_the_same_minor_version_fits(loaded: str) -> None:
    native.check_torch("2.13.0", loaded)


@pytest.mark.parametrize("loaded", ["2.12.1", "2.14.0", "3.13.0", "2.130.0"])
def test_any_other_torch_is_refused_with_the_command_that_rebuilds(loaded: str) -> None:
    with pytest.raises(BuildError, match=rf"built for torch 2\.13\.0, but torch {loaded} is loaded; .*pip install"):
        native.check_torch("2.13.0", loaded)


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


def test_what_needs_the_core_ends_with_the_message_under_another_torch() -> None:
    program = "import torch; torch.__version__ = '2.1.0'; from csulora import correct"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith(
        "csulora.errors.BuildError: csulora's core was built for torch 2.13"
    )


@pytest.mark.parametrize("instructions", ["AVX512_CORE", "AVX2", "DEFAULT"])
def test_onednn_may_be_told_to_use_fewer_instructions(instructions: str) -> None:
    """It then makes no kernels for some products, which others have to take the place of."""
    program = (
        "import torch\n"
        "from csulora.native import _core\n"
        "moved = torch.randn(600, 500, generator=torch.Generator().manual_seed(0))\n"
        "options = _core.ExtractOptions()\n"
        "options.rank, options.tolerance = 4, 1e-4\n"
        "found = _core.extract_subspace(torch.zeros_like(moved), moved, options)\n"
        "expected = torch.linalg.svdvals(moved.double())[:4]\n"
        "assert torch.allclose(found.s.double(), expected, rtol=1e-6), (found.s, expected)\n"
        "assert found.certificate.passes > 0\n"
    )
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": instructions}
    subprocess.run([sys.executable, "-c", program], env=environment, check=True)
