import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import csulora
from csulora.cli import doctor
from csulora.cores import minor
from csulora.native import _core


def examined() -> dict[str, doctor.Finding]:
    return {finding.what: finding for finding in doctor.examine()}


def test_a_working_installation_passes() -> None:
    findings = examined()
    assert findings["csulora"].value == csulora.__version__
    assert findings["torch"].value == torch.__version__
    assert findings["core"] == doctor.Finding("core", f"built for torch {_core.TORCH_VERSION}", True)
    assert minor(torch.__version__) in findings["cores carried"].value
    assert findings["self-test"].ok is True
    assert not any(finding.ok is False for finding in findings.values())


def test_hosts_are_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    assert examined()["peft"].value[0].isdigit()
    monkeypatch.setattr(doctor, "_HOSTS", ("no-such-host",))
    assert examined()["no-such-host"] == doctor.Finding("no-such-host", "not installed", None)


@pytest.mark.parametrize(
    "wrong",
    [{"undo": 0.0}, {"undo": float("nan")}, {"factors": _core.LoraFactors(torch.ones(64, 1), torch.ones(1, 64))}],
)
def test_a_core_that_computes_nonsense_fails(monkeypatch: pytest.MonkeyPatch, wrong: dict[str, object]) -> None:
    def correct(tasks: list[_core.CorrectionTask]) -> list[SimpleNamespace]:
        (result,) = _core.correct(tasks)
        return [SimpleNamespace(**{"undo": result.undo, "factors": result.factors} | wrong)]

    names = (
        "ExtractOptions",
        "extract_subspace",
        "CorrectionTask",
        "LoraFactors",
        "Penalties",
        "CUDA",
        "TORCH_VERSION",
    )
    fake = SimpleNamespace(**{name: getattr(_core, name) for name in names}, correct=correct)
    monkeypatch.setattr("csulora.native._core", fake)
    finding = examined()["self-test"]
    assert finding.ok is False
    assert doctor.table([finding]).row_count == 1


WITHOUT_TORCH = "import sys; sys.modules['torch'] = None"
OTHER_TORCH = "import sys, torch; torch.__version__ = '2.1.0'"


@pytest.mark.parametrize(
    ("before", "found"),
    [(WITHOUT_TORCH, "install it: pip install 'torch"), (OTHER_TORCH, "but torch 2.1.0 is loaded")],
)
def test_what_is_missing_is_reported_with_what_mends_it(before: str, found: str) -> None:
    done = doctors(before, "doctor")
    assert done.returncode == 4
    assert found in done.stdout
    assert "WRONG" in done.stdout
    assert "does not work" in done.stdout
    assert done.stderr == ""


def doctors(before: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    code = f"{before}; sys.argv = ['csulora', *{arguments!r}]; from csulora.cli.app import main; main()"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


COMMANDS = ["extract", "verify", "inspect", "correct", "tune", "guard", "vllm-serve", "export", "doctor"]


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], *([name, "--help"] for name in COMMANDS)])
def test_help_needs_no_torch(arguments: list[str]) -> None:
    done = doctors(WITHOUT_TORCH, *arguments)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    "arguments",
    [
        ["no-such-command"],
        ["extract", "a", "b"],
        ["extract", "a", "b", "-o", "c", "--rank", "4", "--energy", "0.5"],
        ["inspect", "a", "--policy", "p"],
        ["correct", "a", "--subspace", "s", "-o", "o", "--uncovered", "some"],
        ["verify", "a", "b"],
    ],
)
def test_usage_errors_need_no_torch(arguments: list[str]) -> None:
    assert doctors(WITHOUT_TORCH, *arguments).returncode == 2
