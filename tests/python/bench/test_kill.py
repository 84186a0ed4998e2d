"""bench/stress/kill.py in small, and what the file system can do to a run besides ending it."""

import importlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
from safetensors.torch import load_file, save_file

import csulora
from csulora.cli import exit_codes
from csulora.errors import InputError

NOBODY = 65534


@pytest.fixture(scope="module")
def kill() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parents[3] / "bench" / "stress")
        return importlib.import_module("kill")


@pytest.fixture(scope="module")
def inputs(kill: ModuleType) -> Iterator[Path]:
    """Everything the operations read, where any user may read it."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        kill.make_inputs(Path(name))
        for path in Path(name).rglob("*"):
            path.chmod(0o755 if path.is_dir() else 0o644)
        yield Path(name)


@pytest.fixture
def out(inputs: Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=inputs) as name:
        os.chmod(name, 0o777)
        yield Path(name)


pytestmark = pytest.mark.usefixtures("one_thread")
OPERATIONS = ["extract", "correct", "export", "guard", "cache"]


@pytest.mark.parametrize("operation", OPERATIONS)
def test_what_is_killed_leaves_whole_outputs_or_none(
    operation: str, kill: ModuleType, inputs: Path, tmp_path: Path
) -> None:
    tally = kill.torture(kill.operations(inputs)[operation], tmp_path, 2, kill.random.Random(1))
    assert tally.kills == 2
    assert tally.lost == []


def outcome(operation: Callable[[Path], None], out: Path, user: int | None = None) -> tuple[int, str]:
    """Exit code and messages of an operation that a child process runs, as another user."""
    with tempfile.TemporaryFile() as messages:
        child = os.fork()
        if child == 0:
            code = 99
            try:
                sys.stderr = open(messages.fileno(), "w", buffering=1, closefd=False)  # noqa: SIM115 - the child ends
                if user is not None and os.getuid() == 0:
                    os.setgroups([])
                    os.setgid(user)
                    os.setuid(user)
                operation(out)
                code = 0
            except SystemExit as end:
                code = int(end.code or 0)
            except (csulora.CsuloraError, OSError) as error:
                print(error, file=sys.stderr)
                code = exit_codes.BAD_INPUT
            finally:
                os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        messages.seek(0)
        return code, messages.read().decode()


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_directory_that_cannot_be_written_is_one_clear_error(
    operation: str, kill: ModuleType, inputs: Path, out: Path
) -> None:
    out.chmod(0o555)
    code, message = outcome(kill.operations(inputs)[operation], out, NOBODY)
    assert code == exit_codes.BAD_INPUT
    assert message.count("\n") == 1
    assert "not writable" in message or "Permission denied" in message
    assert list(out.iterdir()) == []


@pytest.fixture
def full_disk(out: Path) -> Iterator[Path]:
    """A file system of 32 KiB."""
    disk = out / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=32k", "tmpfs", disk], check=False, capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here, which takes root: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", disk], check=True)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_full_disk_is_one_clear_error_and_nothing_half_written(
    operation: str, kill: ModuleType, inputs: Path, full_disk: Path
) -> None:
    code, message = outcome(kill.operations(inputs)[operation], full_disk)
    assert code == exit_codes.BAD_INPUT
    assert message.count("\n") == 1
    assert "No space left on device" in message
    found = kill.contents(full_disk)
    if operation == "guard":  # says beside the missing result why it is missing
        reasons = [json.loads(found.pop(name)) for name in list(found) if name.endswith(".refused.json")]
        assert all("No space left on device" in reason["reason"] for reason in reasons)
    assert found == {}
    assert [path for path in full_disk.rglob("*") if path.name.endswith(".csulora-tmp")] == []


def test_a_checkpoint_that_vanishes_ends_extraction_with_its_name(inputs: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    for file in ("config.json", "model.safetensors"):
        (base / file).write_bytes((inputs / "base" / file).read_bytes())

    def vanish(_module: str, _done: int, _total: int) -> None:
        (base / "model.safetensors").unlink(missing_ok=True)

    with pytest.raises(InputError, match=r"base/model\.safetensors: cannot read"):
        csulora.extract(base, inputs / "aligned", output=tmp_path / "subspace", rank=4, progress=vanish)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base"]


def test_a_subspace_that_is_replaced_after_it_was_opened_is_noticed(inputs: Path, tmp_path: Path) -> None:
    path = tmp_path / "subspace"
    path.write_bytes((inputs / "subspace.safetensors").read_bytes())
    subspace = csulora.Subspace.open(path)
    tensors = load_file(path)
    path.unlink()
    save_file(tensors, path)
    with pytest.raises(InputError, match="has changed since it was opened"):
        csulora.correct(csulora.load_adapter(inputs / "incoming" / "adapter-0"), subspace, csulora.Policy.csulora())
