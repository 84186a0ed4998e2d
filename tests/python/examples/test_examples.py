import os
import subprocess
import sys
from pathlib import Path

import pytest

import csulora

ROOT = Path(__file__).parents[3]
EXAMPLES = ROOT / "examples"
FIXTURE = ROOT / "bench" / "efficacy" / "fixture"
BASE, ALIGNED, ADAPTER = (FIXTURE / name for name in ("base", "aligned", "adapter"))
POLICIES = sorted((EXAMPLES / "policies").glob("*.toml"))


def run(script: str, *arguments: str | Path) -> str:
    command = [sys.executable, str(EXAMPLES / script), *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def corrected(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("examples") / "corrected"
    assert "undo" in run("correct.py", BASE, ALIGNED, ADAPTER, out)
    return out


@pytest.fixture(scope="module")
def subspace(corrected: Path) -> Path:
    return corrected.with_name("corrected.subspace.safetensors")


def test_correct_writes_an_adapter(corrected: Path) -> None:
    assert csulora.load_adapter(corrected).modules


def test_presets_are_compared(subspace: Path) -> None:
    lines = run("compare_presets.py", subspace, ADAPTER).splitlines()
    assert [line.split()[0] for line in lines] == ["preset", "none", "csulora", "project", "protect"]


def test_a_sum_is_measured(subspace: Path, corrected: Path) -> None:
    lines = run("sum_of_adapters.py", subspace, ADAPTER, corrected).splitlines()
    assert lines[-1].startswith("adapter + corrected: total undo")


def test_a_corrected_adapter_is_audited(subspace: Path, corrected: Path) -> None:
    assert "FAILS" not in run("audit.py", corrected, ADAPTER, subspace)


def test_peft_gets_the_corrected_adapter(subspace: Path) -> None:
    pytest.importorskip("peft")
    assert run("peft_guard.py", ALIGNED, ADAPTER, subspace) == "loaded corrected: default\n"


def test_a_gguf_file_is_written(subspace: Path, tmp_path: Path) -> None:
    out = tmp_path / "corrected.gguf"
    assert str(out) in run("to_gguf.py", ALIGNED, ADAPTER, subspace, out)
    assert csulora.load_adapter(out, ALIGNED).modules


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.stem)
def test_a_policy_file_corrects(policy: Path, subspace: Path) -> None:
    _, report = csulora.correct(
        csulora.load_adapter(ADAPTER), csulora.Subspace.open(subspace), csulora.Policy.load(policy)
    )
    assert report.totals.relative_change > 0


def test_every_example_is_listed() -> None:
    listed = (EXAMPLES / "README.md").read_text()
    assert all(f"`{file.relative_to(EXAMPLES)}`" in listed for file in [*EXAMPLES.glob("*.py"), *POLICIES])
