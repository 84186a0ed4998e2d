from pathlib import Path

import pytest
import torch

import factories
from csulora.errors import InputError
from csulora.extraction.partial_run import PartialRun

Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "subspace.safetensors"


def test_a_module_survives_until_the_next_run(output: Path) -> None:
    module = factories.subspace(dtype=torch.float16)[Q]
    PartialRun.create(output, {"seed": 0}).save({Q: module})
    partial_run = PartialRun.create(output, {"seed": 0})
    assert partial_run.finished(Q)
    assert not partial_run.finished("other")
    loaded = partial_run.load()[Q]
    assert torch.equal(loaded.u, module.u)
    assert torch.equal(loaded.s, module.s)
    assert torch.equal(loaded.v, module.v)
    assert loaded.record() == module.record()


def test_another_run_starts_afresh(output: Path) -> None:
    PartialRun.create(output, {"seed": 0}).save({Q: factories.subspace()[Q]})
    assert not PartialRun.create(output, {"seed": 1}).finished(Q)
    assert not PartialRun.create(output, {"seed": 0}).finished(Q)


def test_leaves_no_trace(output: Path) -> None:
    partial_run = PartialRun.create(output, {})
    partial_run.save({Q: factories.subspace()[Q]})
    assert partial_run.directory.is_dir()
    partial_run.remove()
    assert list(output.parent.iterdir()) == []
    partial_run.remove()


def test_leaves_no_trace_of_a_run_that_was_killed_while_it_opened(output: Path) -> None:
    directory = output.with_name("subspace.safetensors.partial")
    directory.mkdir()
    (directory / "lock").touch()
    (directory / ".run.json.01234567.csulora-tmp").mkdir()
    PartialRun.create(output, {}).remove()
    assert list(output.parent.iterdir()) == []


@pytest.mark.parametrize("others", [("notes",), ("run.json", "notes")])
def test_somebody_elses_directory_is_left_alone(output: Path, others: tuple[str, ...]) -> None:
    directory = output.with_name("subspace.safetensors.partial")
    directory.mkdir()
    for name in others:
        (directory / name).write_text("precious")
    with pytest.raises(InputError, match="holds notes, which csulora did not write"):
        PartialRun.create(output, {})
    assert {file.name: file.read_text() for file in directory.iterdir()} == dict.fromkeys(others, "precious")


@pytest.mark.parametrize("seed", [0, 1])
def test_one_run_at_a_time_writes_a_subspace(output: Path, seed: int) -> None:
    with PartialRun.create(output, {"seed": 0}) as partial_run:
        partial_run.save({Q: factories.subspace()[Q]})
        with pytest.raises(InputError, match="another run is writing it"):
            PartialRun.create(output, {"seed": seed})
        assert partial_run.finished(Q)
    with PartialRun.create(output, {"seed": seed}) as partial_run:
        assert partial_run.finished(Q) == (seed == 0)


def test_an_output_that_cannot_be_written_is_refused_before_anything_is_computed(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is a directory"):
        PartialRun.create(tmp_path, {})
    with pytest.raises(InputError, match="no such directory"):
        PartialRun.create(tmp_path / "missing" / "subspace", {})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damage", [b"", b"garbage"])
def test_a_damaged_module_is_not_continued(output: Path, damage: bytes) -> None:
    partial_run = PartialRun.create(output, {})
    partial_run.save({Q: factories.subspace()[Q]})
    (file,) = (file for file in partial_run.directory.iterdir() if file.suffix == ".safetensors")
    file.write_bytes(damage)
    with pytest.raises(InputError, match=r"partial: cannot be continued \(.*\); remove it"):
        partial_run.load()[Q]


@pytest.mark.parametrize("run", ['{"seed": 0}', '{"format": 1, "seed": 0}', "garbage"])
def test_a_run_of_another_format_is_not_continued(output: Path, run: str) -> None:
    directory = output.with_name("subspace.safetensors.partial")
    directory.mkdir()
    (directory / "run.json").write_text(run)
    with pytest.raises(InputError, match="partial run of another format than 3; remove it and extract again"):
        PartialRun.create(output, {"seed": 0})
    assert (directory / "run.json").read_text() == run
