"""A corrected adapter and its report: what follows, and what was touched."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

import csulora
import factories
from csulora.adapters.lora import REPORT_FILE
from csulora.adapters.peft.directory import WEIGHTS_FILE
from csulora.adapters.weights_files import CONFIG_FILE
from csulora.cli import app as cli
from csulora.cli import exit_codes
from csulora.correction.audit import Check
from csulora.errors import InputError, RefusedError
from csulora.serving.gate import Gate
from csulora.views.audit_table import audit_table

CSULORA = csulora.Policy.csulora()

pytestmark = pytest.mark.usefixtures("one_thread")

POLICIES = {
    "csulora": csulora.Policy.csulora(2.0),
    "project": csulora.Policy.project(rank="exact"),
    "overrides": csulora.Policy(
        overrides=(
            csulora.Override("*q_proj", penalties=(0.0, math.inf, 1.0)),
            csulora.Override("*", gains=(1.0, 0.5, 0.5, 0.0)),
        ),
        max_undo=1e6,
    ),
}


@pytest.fixture(scope="module")
def subspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("subspace") / "subspace.safetensors"
    factories.subspace().save(path)
    return path


@pytest.fixture
def original(tmp_path: Path) -> Path:
    return factories.save_adapter(tmp_path / "original", factories.SHAPES)


def corrected(original: Path, subspace: Path, out: Path, policy: csulora.Policy = CSULORA) -> Path:
    fixed, _ = csulora.correct(csulora.load_adapter(original), csulora.Subspace.open(subspace), policy)
    csulora.save_adapter(fixed, out)
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_what_correct_wrote_follows(policy: str, dtype: torch.dtype, subspace: Path, tmp_path: Path) -> None:
    original = factories.save_adapter(tmp_path / "original", factories.SHAPES, dtype=dtype)
    out = corrected(original, subspace, tmp_path / "out", POLICIES[policy])
    checks = csulora.audit(out, original, csulora.Subspace.open(subspace))
    what = ["content", "original", "subspace", "policy", "configuration", "update"]
    assert [check.what for check in checks] == what
    assert all(check.holds for check in checks)


def test_what_was_written_under_the_names_of_mlx_follows(tmp_path: Path) -> None:
    shapes = {"model.language_model.layers.0.self_attn.q_proj": (48, 48)}
    original = factories.save_adapter(tmp_path / "original", shapes)
    known = factories.subspace(shapes)
    fixed, _ = csulora.correct(csulora.load_adapter(original), known, CSULORA)
    csulora.save_adapter(fixed, tmp_path / "out", "mlx")
    assert all(check.holds for check in csulora.audit(tmp_path / "out", original, known))


def test_save_returns_what_the_report_states_and_load_finds(original: Path, subspace: Path, tmp_path: Path) -> None:
    fixed, _ = csulora.correct(
        csulora.load_adapter(original), csulora.Subspace.open(subspace), csulora.Policy.csulora()
    )
    sha256 = csulora.save_adapter(fixed, tmp_path / "out")
    report = json.loads((tmp_path / "out" / REPORT_FILE).read_text())
    assert sha256 == report["corrected_sha256"] == csulora.load_adapter(tmp_path / "out").sha256


def test_a_changed_entry_is_noticed(original: Path, subspace: Path, tmp_path: Path) -> None:
    out = corrected(original, subspace, tmp_path / "out")
    tensors = load_file(out / WEIGHTS_FILE)
    next(iter(tensors.values()))[0, 0] += 1
    save_file(tensors, out / WEIGHTS_FILE)
    assert [check.holds for check in csulora.audit(out)] == [False]


def test_a_report_with_the_hash_of_something_else_is_noticed_by_making_it_again(
    original: Path, subspace: Path, tmp_path: Path
) -> None:
    out = corrected(original, subspace, tmp_path / "out")
    tensors = load_file(out / WEIGHTS_FILE)
    next(iter(tensors.values())).mul_(1.01)
    save_file(tensors, out / WEIGHTS_FILE)
    report = json.loads((out / REPORT_FILE).read_text())
    report["corrected_sha256"] = csulora.load_adapter(out).sha256
    (out / REPORT_FILE).write_text(json.dumps(report))
    assert [check.holds for check in csulora.audit(out)] == [True]
    checks = csulora.audit(out, original, csulora.Subspace.open(subspace))
    assert [check.holds for check in checks] == [True] * 5 + [False]


def rewritten(out: Path, factor: float, scale: float, modules: csulora.Adapter) -> None:
    """Put an adapter's update into a corrected directory, B times a factor, under a scale, with a report to match."""
    tensors = {}
    for name, module in modules.modules.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = module.a.contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = module.folded().b * factor
    save_file(tensors, out / WEIGHTS_FILE, {"format": "pt"})
    config = json.loads((out / CONFIG_FILE).read_text())
    (out / CONFIG_FILE).write_text(json.dumps(config | {"lora_alpha": config["r"] * scale}))
    report = json.loads((out / REPORT_FILE).read_text())
    report["corrected_sha256"] = csulora.load_adapter(out).sha256
    (out / REPORT_FILE).write_text(json.dumps(report))


@pytest.mark.parametrize(("factor", "scale"), [(1.0, 100.0), (1.0, -1.0), (1e-30, 1e38)])
def test_another_scale_is_noticed(factor: float, scale: float, original: Path, subspace: Path, tmp_path: Path) -> None:
    out = corrected(original, subspace, tmp_path / "out")
    rewritten(out, factor, scale, csulora.load_adapter(out))
    checks = csulora.audit(out, original, csulora.Subspace.open(subspace))
    assert [check.holds for check in checks] == [True] * 4 + [False] * 2


def test_a_scale_hides_no_uncorrected_update(original: Path, subspace: Path, tmp_path: Path) -> None:
    out = corrected(original, subspace, tmp_path / "out", csulora.Policy.project())
    rewritten(out, 1e7, 1e-7, csulora.load_adapter(original))
    checks = csulora.audit(out, original, csulora.Subspace.open(subspace))
    assert [check.holds for check in checks] == [True] * 4 + [False] * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_module_that_is_kept_as_it_is_may_have_a_scale(dtype: torch.dtype, subspace: Path, tmp_path: Path) -> None:
    shapes = factories.SHAPES | {"lm_head": (40, 48)}
    original = factories.save_adapter(
        tmp_path / "original", shapes, dtype=dtype, rank_pattern={"lm_head": 4}, alpha_pattern={"lm_head": 0.01}
    )
    out = corrected(original, subspace, tmp_path / "out", csulora.Policy.csulora(1.0, keep_uncovered=("*",)))
    assert all(check.holds for check in csulora.audit(out, original, csulora.Subspace.open(subspace)))


def test_another_original_or_subspace_is_noticed(original: Path, subspace: Path, tmp_path: Path) -> None:
    out = corrected(original, subspace, tmp_path / "out")
    other = factories.save_adapter(tmp_path / "other", factories.SHAPES, seed=9)
    assert [check.holds for check in csulora.audit(out, other)] == [True, False]
    assert [check.holds for check in csulora.audit(out, None, factories.subspace(seed=9))] == [True, False]


def test_another_policy_than_stated_is_noticed(original: Path, subspace: Path, tmp_path: Path) -> None:
    out = corrected(original, subspace, tmp_path / "out", csulora.Policy.none())
    report = json.loads((out / REPORT_FILE).read_text())
    report["policy"]["off"] = "inf"
    (out / REPORT_FILE).write_text(json.dumps(report))
    last = csulora.audit(out, original, csulora.Subspace.open(subspace))[-1]
    assert (last.what, last.holds) == ("update", False)


@pytest.mark.parametrize("text", ["{}", '{"corrected_sha256": 1}', "[]"])
def test_other_reports_are_bad_inputs(text: str, original: Path, subspace: Path, tmp_path: Path) -> None:
    out = corrected(original, subspace, tmp_path / "out")
    (out / REPORT_FILE).write_text(text)
    with pytest.raises(InputError, match=REPORT_FILE):
        csulora.audit(out)


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["csulora", *map(str, arguments)])
    try:
        cli.main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def test_command_line(
    original: Path, subspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = corrected(original, subspace, tmp_path / "out")
    assert run(monkeypatch, "verify", out, original, subspace) == 0
    assert "follows from its original" in capsys.readouterr().out
    assert run(monkeypatch, "verify", out, "--json", "-") == 0
    assert json.loads(capsys.readouterr().out)["checks"][0]["holds"] is True
    assert run(monkeypatch, "verify", out, original) == 2
    for policy, code in (("csulora", 0), ("protect", exit_codes.REFUSED)):
        assert run(monkeypatch, "verify", out, original, subspace, "--policy", policy) == code
    (out / WEIGHTS_FILE).write_bytes((original / WEIGHTS_FILE).read_bytes())
    assert run(monkeypatch, "verify", out) == exit_codes.REFUSED
    assert "content" in capsys.readouterr().err


# A subspace file that is pinned


def test_a_pinned_subspace_is_the_only_one_that_opens(subspace: Path) -> None:
    sha256 = csulora.Subspace.open(subspace).sha256
    assert csulora.Subspace.open(subspace, sha256.upper()).sha256 == sha256
    with pytest.raises(RefusedError, match="another subspace file"):
        csulora.Subspace.open(subspace, "0" * 64)


def test_a_subspace_is_pinned_by_option_or_variable(
    original: Path, subspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ("correct", original, "--subspace", subspace, "-o", tmp_path / "out", "--policy", "none", "--quiet")
    assert run(monkeypatch, *command, "--subspace-sha256", "0" * 64) == exit_codes.REFUSED
    assert not (tmp_path / "out").exists()
    monkeypatch.setenv("CSULORA_SUBSPACE_SHA256", "0" * 64)
    assert run(monkeypatch, *command) == exit_codes.REFUSED
    (tmp_path / "in").mkdir()
    guard = ("guard", tmp_path / "in", tmp_path / "guarded", "--subspace", subspace, "--policy", "none")
    assert run(monkeypatch, *guard) == exit_codes.REFUSED
    monkeypatch.setenv("CSULORA_SUBSPACE_SHA256", csulora.Subspace.open(subspace).sha256)
    assert run(monkeypatch, *command) == 0


def test_a_gate_from_the_environment_is_pinned(subspace: Path) -> None:
    variables = {"CSULORA_SUBSPACE": str(subspace), "CSULORA_POLICY": "none", "CSULORA_SUBSPACE_SHA256": "0" * 64}
    with pytest.raises(RefusedError, match="another subspace file"):
        Gate.from_environment(variables)


def test_a_configuration_with_more_than_csulora_writes_does_not_follow(
    original: Path, subspace: Path, tmp_path: Path
) -> None:
    out = corrected(original, subspace, tmp_path / "out")
    file = out / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"lora_dropout": 0.5, "auto_mapping": {"a": "b"}}))
    report = out / "csulora_report.json"
    sha256 = csulora.load_adapter(out).sha256
    report.write_text(json.dumps(json.loads(report.read_text()) | {"corrected_sha256": sha256}))
    checks = {check.what: check for check in csulora.audit(out, original, csulora.Subspace.open(subspace))}
    assert checks["content"].holds
    assert checks["update"].holds
    assert not checks["configuration"].holds
    assert checks["configuration"].found == "differs in auto_mapping, lora_dropout"


def test_the_policy_is_shown_and_compared(original: Path, subspace: Path, tmp_path: Path) -> None:
    """A report that states a policy which keeps everything is true of the original."""
    out = corrected(original, subspace, tmp_path / "out", csulora.Policy.none())
    known = csulora.Subspace.open(subspace)
    for policy, holds in ((None, True), (csulora.Policy.none(), True), (csulora.Policy.csulora(), False)):
        (check,) = [check for check in csulora.audit(out, original, known, None, policy) if check.what == "policy"]
        assert check.holds == holds
        assert isinstance(check.stated, dict)
        assert check.stated["partial"] == 0.0


def test_the_table_fits_a_terminal(original: Path, subspace: Path, tmp_path: Path) -> None:
    """Hashes are short and the policy takes one line, until one of them does not hold."""
    out = corrected(original, subspace, tmp_path / "out", csulora.Policy.project())
    known, other = csulora.Subspace.open(subspace), factories.save_adapter(tmp_path / "other", factories.SHAPES, seed=9)
    held = printed(csulora.audit(out, original, known))
    assert f"content       yes   {csulora.load_adapter(out).sha256[:12]}\n" in held
    assert "policy        yes   aligned=0, partial=inf, off=inf, rank=keep\n" in held
    assert len(held.splitlines()) == 2 + 6 + 1  # the last sentence is as long as a module's name
    failed = printed(csulora.audit(out, other, known))
    assert f"  stated {csulora.load_adapter(original).sha256}\n" in failed
    assert f"  found  {csulora.load_adapter(other).sha256}\n" in failed
    assert "  differ in partial, off\n" in printed(csulora.audit(out, original, known, None, csulora.Policy.none()))


def printed(checks: list[Check]) -> str:
    console = Console(width=80)
    with console.capture() as capture:
        console.print(audit_table(checks))
    lines = capture.get().splitlines()
    assert max(map(len, lines)) <= 80
    return "".join(f"{line.rstrip()}\n" for line in lines)


@pytest.mark.parametrize("overrides", [5, True, 1.5, "x", {"a": 1}])
def test_a_reports_overrides_are_a_list(overrides: object, original: Path, subspace: Path, tmp_path: Path) -> None:
    out = corrected(original, subspace, tmp_path / "out")
    report = json.loads((out / "csulora_report.json").read_text())
    report["policy"]["overrides"] = overrides
    (out / "csulora_report.json").write_text(json.dumps(report))
    with pytest.raises(csulora.InputError, match="overrides must be a list"):
        csulora.audit(out, original, csulora.Subspace.open(subspace))
