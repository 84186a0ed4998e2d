from types import SimpleNamespace

import pytest
import torch

import csulora
from csulora.cli import doctor
from csulora.native import _core


def examined() -> dict[str, doctor.Finding]:
    return {finding.what: finding for finding in doctor.examine()}


def test_a_working_installation_passes() -> None:
    findings = examined()
    assert findings["csulora"].value == csulora.__version__
    assert torch.__version__ in findings["torch"].value
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

    names = ("ExtractOptions", "extract_subspace", "CorrectionTask", "LoraFactors", "Penalties")
    fake = SimpleNamespace(**{name: getattr(_core, name) for name in names}, correct=correct)
    monkeypatch.setattr(doctor, "_core", fake)
    finding = examined()["self-test"]
    assert finding.ok is False
    assert doctor.table([finding]).row_count == 1
