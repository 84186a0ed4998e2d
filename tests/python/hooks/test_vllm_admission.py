"""What the vLLM guard decides and keeps; vLLM itself is not needed for it (see tests/vllm for the rest)."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import csulora
import factories
from csulora.gate import Gate
from csulora.hooks.vllm.admission import Admission

MODULES = {"model.layers.0.self_attn.q_proj": (48, 48), "model.layers.1.mlp.down_proj": (48, 64)}


@pytest.fixture(scope="module")
def pack() -> csulora.Subspace:
    return factories.pack(MODULES)


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "decisions.jsonl"


@pytest.fixture
def admission(pack: csulora.Subspace, log: Path) -> Admission:
    return Admission(Gate.open(pack, decisions=log))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return factories.save_adapter(tmp_path / "adapter", MODULES, dtype=torch.float16)


def spoil(path: Path) -> None:
    tensors = load_file(path / "adapter_model.safetensors")
    next(iter(tensors.values()))[0, 0] = float("nan")
    save_file(tensors, path / "adapter_model.safetensors")


def decisions(log: Path) -> list[str]:
    return [json.loads(line)["verdict"] for line in log.read_text().splitlines()]


def test_worker_gets_what_is_corrected_in_float32_and_cast_once(
    admission: Admission, path: Path, pack: csulora.Subspace
) -> None:
    directory = admission.directory("id", path, torch.bfloat16, reload=False)

    raw = csulora.load_adapter(path)
    widened = factories.save_adapter(path.with_name("wide"), MODULES)
    save_file(
        {name: tensor.float() for name, tensor in load_file(path / "adapter_model.safetensors").items()},
        widened / "adapter_model.safetensors",
    )
    expected, _ = csulora.correct(csulora.load_adapter(widened), pack)
    found = csulora.load_adapter(directory)
    for name in raw.modules:
        assert torch.equal(found.modules[name].b, expected.modules[name].b.bfloat16())
        assert torch.equal(found.modules[name].a, expected.modules[name].a.bfloat16())


def test_what_the_served_type_cannot_hold_is_refused(admission: Admission, path: Path, log: Path) -> None:
    tensors = {name: tensor.float() * 1e7 for name, tensor in load_file(path / "adapter_model.safetensors").items()}
    save_file(tensors, path / "adapter_model.safetensors")

    with pytest.raises(csulora.RefusedError, match=r"too large for torch\.float16"):
        admission.check("id", path, torch.float16, 16, reload=False)
    with pytest.raises(csulora.RefusedError, match=r"too large for torch\.float16"):
        admission.directory("id", path, torch.float16, reload=False)
    assert decisions(log) == ["refused", "refused"]


def test_evicted_adapter_comes_back_the_same_whatever_became_of_its_files(admission: Admission, path: Path) -> None:
    admission.check("id", path, torch.float32, 16, reload=False)
    first = admission.directory("id", path, torch.float32, reload=False)
    before = load_file(first / "adapter_model.safetensors")
    spoil(path)

    admission.check("id", path, torch.float32, 16, reload=False)
    assert admission.directory("id", path, torch.float32, reload=False) == first
    shutil.rmtree(path)
    admission.check("id", path, torch.float32, 16, reload=False)
    again = load_file(admission.directory("id", path, torch.float32, reload=False) / "adapter_model.safetensors")
    assert before.keys() == again.keys()
    assert all(torch.equal(before[name], again[name]) for name in before)


def test_another_request_for_the_path_sees_the_files_as_they_are(admission: Admission, path: Path) -> None:
    admission.directory("id", path, torch.float32, reload=False)
    spoil(path)

    with pytest.raises(csulora.InputError, match="NaN"):
        admission.check("other", path, torch.float32, 16, reload=False)
    with pytest.raises(csulora.InputError, match="NaN"):
        admission.directory("other", path, torch.float32, reload=False)


def test_reload_takes_new_files_and_refuses_bad_ones(admission: Admission, path: Path) -> None:
    first = admission.directory("id", path, torch.float32, reload=False)
    shutil.rmtree(path)
    factories.save_adapter(path, MODULES, seed=9)

    second = admission.directory("id", path, torch.float32, reload=True)
    assert second != first
    spoil(path)
    with pytest.raises(csulora.InputError, match="NaN"):
        admission.check("id", path, torch.float32, 16, reload=True)
    assert admission.directory("id", path, torch.float32, reload=True) == second


def test_same_content_is_corrected_once(admission: Admission, path: Path, log: Path) -> None:
    copy = shutil.copytree(path, path.with_name("copy"))

    first = admission.directory("id", path, torch.float32, reload=False)

    assert admission.directory("other", copy, torch.float32, reload=False) == first
    assert decisions(log) == ["corrected"]


def test_verdict_is_asked_again_only_if_files_changed(admission: Admission, path: Path, log: Path) -> None:
    spoil(path)

    for identity in ("one", "two", "three"):
        with pytest.raises(csulora.InputError):
            admission.check(identity, path, torch.float32, 16, reload=False)

    assert decisions(log) == ["invalid"]


def test_rank_that_the_server_does_not_take_is_refused(pack: csulora.Subspace, path: Path) -> None:
    admission = Admission(Gate.open(pack, csulora.Policy(rank="exact")))

    with pytest.raises(csulora.RefusedError, match="rank 8"):
        admission.check("id", path, torch.float32, 7, reload=False)
    admission.check("id", path, torch.float32, 8, reload=False)


def test_leavings_of_killed_processes_are_removed(
    pack: csulora.Subspace, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    dead = tmp_path / "csulora-vllm-dead"
    dead.mkdir()
    (dead / ".lock").touch()
    living = Admission(Gate.open(pack))
    directory = living.directory("id", path, torch.float32, reload=False)
    other = Admission(Gate.open(pack))

    assert not dead.exists()
    assert directory.is_dir()
    home = directory.parent
    del living
    assert not home.exists()
    assert len(list(tmp_path.glob("csulora-vllm-*"))) == 1
    del other
