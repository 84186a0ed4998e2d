"""Extraction by several processes, as torchrun starts them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import csulora
import factories
from csulora.errors import InputError
from csulora.extraction.distributed import Processes

COSTS = st.dictionaries(st.text(min_size=1), st.integers(1, 1000), max_size=30)
LAST = "model.layers.1.self_attn.v_proj"
LIMIT = 600  # seconds: a run that takes longer hangs


@given(COSTS, st.integers(1, 5))
def test_shares_are_a_partition_and_no_process_has_more_than_it_must(costs: dict[str, int], size: int) -> None:
    shares = [Processes(index, size).share(costs) for index in range(size)]
    assert sorted(name for share in shares for name in share) == sorted(costs)
    for share in shares:
        assert share == [name for name in costs if name in share]
    loads = [sum(costs[name] for name in share) for share in shares]
    # Graham 1969: the process that got the last of the largest load had the least before.
    assert max(loads) <= sum(costs.values()) / size + max(costs.values(), default=0)


def torchrun(processes: int, *command: str, threads: int = 1) -> subprocess.CompletedProcess[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes), *command]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    return subprocess.run(launcher, capture_output=True, text=True, timeout=LIMIT, env=environment, check=False)


def extract_alone(models: tuple[Path, Path], output: Path) -> bytes:
    command = [sys.executable, "-m", "csulora", "extract", *map(str, models), "-o", str(output), "--rank", "4", "-q"]
    subprocess.run(command, timeout=LIMIT, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True)
    return output.read_bytes()


def extract_shared(models: tuple[Path, Path], output: Path, processes: int) -> subprocess.CompletedProcess[str]:
    return torchrun(processes, "-m", "csulora", "extract", *map(str, models), "-o", str(output), "--rank", "4")


@pytest.fixture
def models(tmp_path: Path) -> tuple[Path, Path]:
    return factories.model_pair(tmp_path)


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_many_processes_write_the_subspace_that_one_writes(
    tmp_path: Path, models: tuple[Path, Path], processes: int
) -> None:
    run = extract_shared(models, tmp_path / "shared", processes)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("14 modules, sha256") == 1
    assert (tmp_path / "shared").read_bytes() == extract_alone(models, tmp_path / "alone")
    assert not list(tmp_path.glob("*.partial"))


# Runs the command line on process 1 with the extraction of one module replaced by what the test says.
PATCHED = """
import os, signal, sys, torch
from csulora.cli import app as cli
from csulora.extraction import extract as extraction
extract_module = extraction._extract_module
extracted = []
def patched(loaded, *options):
    if os.environ["RANK"] == "1":
        {fault}
    extracted.append(loaded.name)
    return extract_module(loaded, *options)
extraction._extract_module = patched
cli.main()
"""


@pytest.fixture
def run_with_fault(tmp_path: Path, models: tuple[Path, Path]) -> object:
    def run(fault: str, processes: int) -> subprocess.CompletedProcess[str]:
        script = tmp_path / "patched.py"
        script.write_text(PATCHED.format(fault=fault))
        return torchrun(
            processes, str(script), "extract", *map(str, models), "-o", str(tmp_path / "subspace"), "--rank", "4"
        )

    return run


@pytest.mark.parametrize("processes", [2, 3])
@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("if len(extracted) == 2: os.kill(os.getpid(), signal.SIGKILL)", "SIGKILL"),
        ("if len(extracted) == 2: raise MemoryError('no memory for this matrix')", "no memory for this matrix"),
    ],
)
def test_a_process_that_dies_ends_the_run_with_its_reason_and_the_run_resumes(
    tmp_path: Path, models: tuple[Path, Path], run_with_fault: object, processes: int, fault: str, reason: str
) -> None:
    run = run_with_fault(fault, processes)
    assert run.returncode != 0
    assert reason in run.stderr
    assert not (tmp_path / "subspace").exists()
    finished = {file: file.stat().st_ino for file in (tmp_path / "subspace.partial").glob("*.safetensors")}
    assert 2 <= len(finished) < 14

    assert extract_shared(models, tmp_path / "subspace", 2).returncode == 0
    assert (tmp_path / "subspace").read_bytes() == extract_alone(models, tmp_path / "alone")


def test_what_other_processes_left_is_not_computed_again(
    tmp_path: Path, models: tuple[Path, Path], run_with_fault: object
) -> None:
    run_with_fault("os.kill(os.getpid(), signal.SIGKILL)", 2)
    left = len(list((tmp_path / "subspace.partial").glob("*.safetensors")))
    again = run_with_fault("sys.stderr.write('computed here\\n')", 2)
    assert again.returncode == 0, again.stderr
    assert again.stderr.count("computed here") <= (14 - left + 1) // 2


def test_bad_values_are_named_by_the_process_that_meets_them(tmp_path: Path) -> None:
    weights = factories.llama_weights()
    moved = factories.moved(weights)
    moved[f"{LAST}.weight"][3, 5] = float("nan")
    models = factories.save_checkpoint(tmp_path / "base", weights), factories.save_checkpoint(tmp_path / "bad", moved)
    run = extract_shared(models, tmp_path / "subspace", 2)
    assert run.returncode != 0
    assert f"csulora: error: {LAST}: base or aligned holds NaN" in run.stderr


def test_processes_that_would_compute_unlike_are_refused(tmp_path: Path, models: tuple[Path, Path]) -> None:
    script = tmp_path / "threads.py"
    script.write_text(
        "import os, torch; from csulora.cli import app as cli\n"
        "torch.set_num_threads(1 + int(os.environ['RANK']))\n"
        "cli.main()\n"
    )
    run = torchrun(2, str(script), "extract", *map(str, models), "-o", str(tmp_path / "subspace"))
    assert run.returncode != 0
    assert "threads is 2 on process 1 and 1 on the first" in run.stderr


def test_processes_need_a_file_to_meet(models: tuple[Path, Path]) -> None:
    with pytest.raises(InputError, match="name an output"):
        csulora.extract(*models, processes=Processes(0, 2))
