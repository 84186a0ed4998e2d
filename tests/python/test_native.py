import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import csulora
from csulora import cores, native
from csulora.errors import BuildError, CsuloraError

TORCH = Path("/there/torch")
BUILD = r"in csulora's source tree: pip install .*CSULORA_TORCH_DIR=/there/torch \.$"


@pytest.fixture
def carries(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., None]:
    """Makes an installation that carries cores for these versions of torch, each a module without content."""

    def carry(*versions: str) -> None:
        for version in versions:
            (tmp_path / f"_core_{version.replace('.', '_')}.py").write_text(f"TORCH_VERSION = '{version}.0'\n")
        monkeypatch.setattr(csulora, "__path__", [str(tmp_path)])

    yield carry
    for name in [name for name in sys.modules if name.startswith("csulora._core_") and name != loaded()]:
        del sys.modules[name]


def loaded() -> str:
    return native._core.__name__


def test_the_core_in_use_fits_torch() -> None:
    assert cores.minor(native._core.TORCH_VERSION) == cores.minor(torch.__version__)
    assert cores.minor(torch.__version__) in cores.carried()


def test_cores_are_listed_lowest_first(carries: Callable[..., None], tmp_path: Path) -> None:
    (tmp_path / "_core.py").touch()
    (tmp_path / "_core_2_13.cpython-299-x86_64-linux-gnu.so").touch()  # of another Python
    carries("9.15", "9.9", "9.100")
    assert cores.carried() == ["9.9", "9.15", "9.100"]


@pytest.mark.parametrize("version", ["9.13.0", "9.13.1+cpu", "9.13.0+cu130", "9.13.0a0+git1"])
def test_a_core_fits_every_torch_of_its_minor_version(carries: Callable[..., None], version: str) -> None:
    carries("9.12", "9.13", "9.130")
    assert cores.load(version, TORCH).TORCH_VERSION == "9.13.0"


@pytest.mark.parametrize("version", ["9.12.1", "9.15.0", "8.13.0", "9.130.0"])
def test_any_other_torch_is_refused_with_what_mends_it(carries: Callable[..., None], version: str) -> None:
    carries("9.13", "9.14")
    message = (
        rf"carries a core for torch 9\.13 and 9\.14, but torch {version} is loaded; .*pip install 'torch==9\.14\.\*'; "
    )
    with pytest.raises(BuildError, match=message + ".*" + BUILD):
        cores.load(version, TORCH)


def test_sources_that_were_never_built_are_explained(carries: Callable[..., None]) -> None:
    carries()
    with pytest.raises(BuildError, match="core is not built; build it " + BUILD):
        cores.load("9.13.0", TORCH)


def test_a_core_that_does_not_load_is_explained(carries: Callable[..., None], tmp_path: Path) -> None:
    carries("9.13")
    (tmp_path / "_core_9_13.py").write_text("raise ImportError('undefined symbol')")
    with pytest.raises(BuildError, match=r"does not load \(undefined symbol\); build it " + BUILD):
        cores.load("9.13.0", TORCH)


def test_a_core_under_a_wrong_name_is_refused(carries: Callable[..., None], tmp_path: Path) -> None:
    carries("9.13")
    (tmp_path / "_core_9_13.py").write_text("TORCH_VERSION = '9.14.0'")
    with pytest.raises(BuildError, match=r"for torch 9\.13 was built against torch 9\.14\.0; build it " + BUILD):
        cores.load("9.13.0", TORCH)


def test_a_build_error_is_an_import_error_of_csuloras() -> None:
    assert issubclass(BuildError, ImportError)
    assert issubclass(BuildError, CsuloraError)


def test_what_needs_the_core_ends_with_the_message_under_another_torch() -> None:
    program = "import torch; torch.__version__ = '2.1.0'; from csulora import correct"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith("csulora.errors.BuildError: csulora carries a core for torch 2.")


@pytest.mark.parametrize("instructions", ["AVX512_CORE", "AVX2", "DEFAULT"])
def test_onednn_may_be_told_to_use_fewer_instructions(instructions: str) -> None:
    """It then makes no kernels for some products, which others have to take the place of."""
    program = (
        "import torch\n"
        "from csulora.native import _core\n"
        "moved = torch.randn(600, 500, generator=torch.Generator().manual_seed(0))\n"
        "options = _core.ExtractOptions()\n"
        "options.rank, options.tolerance, options.energy_tolerance = 4, 1e-4, 0\n"
        "found = _core.extract_subspace(torch.zeros_like(moved), moved, options)\n"
        "expected = torch.linalg.svdvals(moved.double())[:4]\n"
        "assert torch.allclose(found.s.double(), expected, rtol=1e-6), (found.s, expected)\n"
        "assert found.certificate.passes > 0\n"
    )
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": instructions}
    subprocess.run([sys.executable, "-c", program], env=environment, check=True)
