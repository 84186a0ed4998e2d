from pathlib import Path

import pytest
import torch

import factories
from csulora.errors import InputError
from csulora.extraction.parts import Parts

Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "pack.safetensors"


def test_a_part_survives_until_the_next_run(output: Path) -> None:
    module = factories.pack(dtype=torch.float16)[Q]
    Parts(output, {"seed": 0}).save(Q, module)
    parts = Parts(output, {"seed": 0})
    assert parts.finished(Q)
    assert not parts.finished("other")
    loaded = parts.load(Q)
    assert torch.equal(loaded.u, module.u)
    assert torch.equal(loaded.s, module.s)
    assert torch.equal(loaded.v, module.v)
    assert loaded.record() == module.record()


def test_another_run_starts_afresh(output: Path) -> None:
    Parts(output, {"seed": 0}).save(Q, factories.pack()[Q])
    assert not Parts(output, {"seed": 1}).finished(Q)
    assert not Parts(output, {"seed": 0}).finished(Q)


def test_leaves_no_trace(output: Path) -> None:
    parts = Parts(output, {})
    parts.save(Q, factories.pack()[Q])
    assert parts.directory.is_dir()
    parts.remove()
    assert list(output.parent.iterdir()) == []
    parts.remove()


def test_leaves_no_trace_of_a_run_that_was_killed_while_it_opened(output: Path) -> None:
    directory = output.with_name("pack.safetensors.partial")
    directory.mkdir()
    (directory / "lock").touch()
    (directory / ".run.json.01234567.csulora-tmp").mkdir()
    Parts(output, {}).remove()
    assert list(output.parent.iterdir()) == []


@pytest.mark.parametrize("others", [("notes",), ("run.json", "notes")])
def test_somebody_elses_directory_is_left_alone(output: Path, others: tuple[str, ...]) -> None:
    directory = output.with_name("pack.safetensors.partial")
    directory.mkdir()
    for name in others:
        (directory / name).write_text("precious")
    with pytest.raises(InputError, match="holds notes, which csulora did not write"):
        Parts(output, {})
    assert {file.name: file.read_text() for file in directory.iterdir()} == dict.fromkeys(others, "precious")


@pytest.mark.parametrize("seed", [0, 1])
def test_one_run_at_a_time_writes_a_pack(output: Path, seed: int) -> None:
    with Parts(output, {"seed": 0}) as parts:
        parts.save(Q, factories.pack()[Q])
        with pytest.raises(InputError, match="another run is writing it"):
            Parts(output, {"seed": seed})
        assert parts.finished(Q)
    with Parts(output, {"seed": seed}) as parts:
        assert parts.finished(Q) == (seed == 0)


def test_an_output_that_cannot_be_written_is_refused_before_anything_is_computed(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is a directory"):
        Parts(tmp_path, {})
    with pytest.raises(InputError, match="no such directory"):
        Parts(tmp_path / "missing" / "pack", {})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damage", [b"", b"garbage"])
def test_a_damaged_part_is_no_part(output: Path, damage: bytes) -> None:
    parts = Parts(output, {})
    parts.save(Q, factories.pack()[Q])
    (file,) = (file for file in parts.directory.iterdir() if file.suffix == ".safetensors")
    file.write_bytes(damage)
    with pytest.raises(InputError, match=r"partial: cannot be continued \(.*\); remove it"):
        parts.load(Q)
