"""What the vLLM guard decides and keeps; vLLM itself is not needed for it (see tests/vllm for the rest)."""

import json
import math
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import csulora
import factories
from csulora.adapters.peft import directory as peft
from csulora.io.files import sha256_of_file
from csulora.serving.admission import Admission, Terms, refusal
from csulora.serving.gate import Gate
from csulora.serving.publication import check_published
from csulora.subspace.expert_layout import ExpertLayout

MODULES = {"model.layers.0.self_attn.q_proj": (48, 48), "model.layers.1.mlp.down_proj": (48, 64)}


@pytest.fixture(scope="module")
def subspace() -> csulora.Subspace:
    return factories.subspace(MODULES)


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "decisions.jsonl"


@pytest.fixture
def admission(subspace: csulora.Subspace, log: Path) -> Admission:
    return Admission(Gate.open(subspace, "csulora", decisions=log))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return factories.save_adapter(tmp_path / "adapter", MODULES, dtype=torch.float16)


def spoil(path: Path) -> None:
    tensors = load_file(path / "adapter_model.safetensors")
    next(iter(tensors.values()))[0, 0] = float("nan")
    save_file(tensors, path / "adapter_model.safetensors")


def decisions(log: Path) -> list[str]:
    return [json.loads(line)["verdict"] for line in log.read_text().splitlines()]


def grow(path: Path, factor: float) -> None:
    """Store the factors in float32, each times ``factor``."""
    tensors = load_file(path / "adapter_model.safetensors")
    save_file({name: tensor.float() * factor for name, tensor in tensors.items()}, path / "adapter_model.safetensors")


def admit(
    admission: Admission, path: Path, identity: str = "id", dtype: torch.dtype = torch.float32, reload: bool = False
) -> Path:
    return admission.admit(identity, lambda: path, Terms(dtype, 16), reload)


def test_published_is_what_is_corrected_in_float32_and_cast_once(
    admission: Admission, path: Path, subspace: csulora.Subspace
) -> None:
    directory = admit(admission, path, dtype=torch.bfloat16)

    grow(path, 1)
    expected, _ = csulora.correct(csulora.load_adapter(path), subspace, csulora.Policy.csulora())
    found = csulora.load_adapter(directory)
    for name in expected.modules:
        assert torch.equal(found.modules[name].b, expected.modules[name].b.bfloat16())
        assert torch.equal(found.modules[name].a, expected.modules[name].a.bfloat16())


def test_what_the_served_type_cannot_hold_is_refused(admission: Admission, path: Path, log: Path) -> None:
    grow(path, 1e7)

    with pytest.raises(csulora.RefusedError, match=r"too large for torch\.float16"):
        admit(admission, path, dtype=torch.float16)
    assert decisions(log) == ["refused"]


def test_admitted_adapter_is_the_same_whatever_became_of_its_files(admission: Admission, path: Path) -> None:
    first = admit(admission, path)
    before = load_file(first / "adapter_model.safetensors")

    spoil(path)
    assert admit(admission, path) == first
    shutil.rmtree(path)
    assert admit(admission, path) == first
    assert admission.admit("id", lambda: pytest.fail("located again"), Terms(torch.float32, 16), reload=False) == first
    after = load_file(first / "adapter_model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_admitted_adapter_does_not_wait_for_uploads(
    admission: Admission, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is asked for in the event loop of vLLM's server."""
    slow = shutil.copytree(path, path.with_name("slow"))
    first = admit(admission, path)
    reading, answered, original = threading.Event(), threading.Event(), peft.read

    def read(directory: Path) -> csulora.Adapter:
        reading.set()
        assert answered.wait(60)
        return original(directory)

    monkeypatch.setattr("csulora.adapters.peft.directory.read", read)
    with ThreadPoolExecutor() as threads:
        uploaded = threads.submit(admit, admission, slow, "slow")
        assert reading.wait(60)
        again = threads.submit(admit, admission, path)
        try:
            assert again.result(10) == first
        finally:
            answered.set()
        assert uploaded.result(60) == first


def test_workers_load_what_the_front_end_decided_on(admission: Admission, path: Path) -> None:
    """The path of a request does not lead back to files that may be others by now."""
    directory = admit(admission, path)
    spoil(path)

    check_published(directory)
    with pytest.raises(csulora.RefusedError, match="did not check it"):
        check_published(path)


@pytest.mark.parametrize("name", ["adapter", "../adapter", "..", "."])
def test_workers_refuse_other_directories(admission: Admission, path: Path, name: str) -> None:
    home = admit(admission, path).parent
    shutil.copytree(path, home / "adapter")

    with pytest.raises(csulora.RefusedError):
        check_published(home / name)


def test_workers_refuse_a_home_that_others_can_write_to(path: Path, tmp_path: Path) -> None:
    home = tmp_path / "csulora-serving-other"
    home.mkdir()
    home.chmod(0o770)
    directory = path.rename(home / f"{'0' * 64}-float32")

    with pytest.raises(csulora.RefusedError, match="did not check it"):
        check_published(directory)
    home.chmod(0o700)
    check_published(directory)


@pytest.mark.parametrize("everything", [False, True])
def test_what_was_lost_is_made_again(admission: Admission, path: Path, everything: bool) -> None:
    directory = admit(admission, path)
    if everything:
        shutil.rmtree(directory.parent)
    else:
        (directory / "adapter_config.json").unlink()
    with pytest.raises(csulora.RefusedError):
        check_published(directory)

    assert admit(admission, path) == directory
    check_published(directory)


def test_what_was_lost_is_not_replaced_by_something_else(admission: Admission, path: Path) -> None:
    lost = admit(admission, path)
    shutil.rmtree(lost)
    grow(path, 0.5)

    with pytest.raises(csulora.RefusedError, match="changed since it was loaded"):
        admit(admission, path)
    other = admit(admission, path, reload=True)
    assert other != lost
    assert admit(admission, path) == other


def test_another_request_for_the_path_sees_the_files_as_they_are(admission: Admission, path: Path) -> None:
    admit(admission, path)
    spoil(path)

    with pytest.raises(csulora.InputError, match="NaN"):
        admit(admission, path, "other")


def test_reload_takes_new_files_and_refuses_bad_ones(admission: Admission, path: Path) -> None:
    first = admit(admission, path)
    shutil.rmtree(path)
    factories.save_adapter(path, MODULES, seed=9)

    second = admit(admission, path, reload=True)
    assert second != first
    spoil(path)
    with pytest.raises(csulora.InputError, match="NaN"):
        admit(admission, path, reload=True)
    assert admit(admission, path) == second
    check_published(first)  # a request that waits may still need it


def test_same_content_is_corrected_once(admission: Admission, path: Path, log: Path) -> None:
    copy = shutil.copytree(path, path.with_name("copy"))

    first = admit(admission, path)

    assert admit(admission, copy, "other") == first
    totals = [json.loads(line)["totals"] for line in log.read_text().splitlines()]
    assert [bool(total) for total in totals] == [True, False]  # the second time it was there


def test_verdict_is_asked_again_only_if_files_changed(admission: Admission, path: Path, log: Path) -> None:
    spoil(path)

    for identity in ("one", "two", "three"):
        with pytest.raises(csulora.InputError):
            admit(admission, path, identity)

    assert decisions(log) == ["invalid"]


def test_passing_failures_are_not_kept(subspace: csulora.Subspace, path: Path, tmp_path: Path) -> None:
    logs = tmp_path / "logs"
    logs.mkdir()
    admission = Admission(Gate.open(subspace, "csulora", decisions=logs / "decisions.jsonl"))
    shutil.rmtree(logs)

    with pytest.raises(csulora.InputError, match="cannot be logged"):
        admit(admission, path)
    logs.mkdir()
    assert admit(admission, path)


def test_a_deadline_is_a_passing_failure(admission: Admission, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = json.loads((path / "adapter_config.json").read_text())
    config["target_modules"] = "(.*a)*.*_proj"
    (path / "adapter_config.json").write_text(json.dumps(config))

    with monkeypatch.context() as busy:
        busy.setattr("csulora.adapters.peft.patterns._SECONDS", 0)
        with pytest.raises(csulora.RefusedError, match="too long to match"):
            admit(admission, path)
    assert admit(admission, path)


def test_rank_that_the_server_does_not_take_is_refused(subspace: csulora.Subspace, path: Path) -> None:
    admission = Admission(Gate.open(subspace, csulora.Policy(rank="exact")))

    with pytest.raises(csulora.RefusedError, match="rank 8"):
        admission.admit("id", lambda: path, Terms(torch.float32, 7), reload=False)
    admission.admit("id", lambda: path, Terms(torch.float32, 8), reload=False)


def test_leavings_of_killed_processes_are_removed(
    subspace: csulora.Subspace, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    dead = tmp_path / "csulora-serving-dead"
    dead.mkdir()
    (dead / ".lock").touch()
    living = Admission(Gate.open(subspace, "csulora"))
    directory = admit(living, path)
    other = Admission(Gate.open(subspace, "csulora"))

    assert not dead.exists()
    assert directory.is_dir()
    home = directory.parent
    del living
    assert not home.exists()
    assert len(list(tmp_path.glob("csulora-serving-*"))) == 1
    del other


def test_what_cannot_be_written_leaves_nothing(
    admission: Admission, path: Path, log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(adapter: csulora.Adapter, directory: Path) -> None:
        (directory / "adapter_config.json").write_text("{")
        raise OSError(28, "No space left on device")

    original = peft.write
    monkeypatch.setattr("csulora.adapters.peft.directory.write", write)
    with pytest.raises(OSError, match=r"No space left on device.*csulora-serving-") as failed:
        admit(admission, path)
    home = Path(failed.value.filename).parent
    assert [file.name for file in home.iterdir()] == [".lock"]
    monkeypatch.setattr("csulora.adapters.peft.directory.write", original)
    assert admit(admission, path).parent == home
    assert decisions(log) == ["failed", "corrected"]


def test_what_is_published_is_hashed_for_a_log_alone(
    admission: Admission, subspace: csulora.Subspace, path: Path, log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = admit(admission, path)
    outputs = json.loads(log.read_text())["outputs"]
    assert outputs == {str(file): sha256_of_file(file) for file in directory.iterdir()}

    monkeypatch.setattr("csulora.serving.publication.hashes_as_written", lambda *_: pytest.fail("hashed"))
    unlogged = Admission(Gate.open(subspace, "csulora"))
    assert admit(unlogged, path).is_dir()


def test_a_refusal_that_is_remembered_holds_nothing_of_the_upload(admission: Admission, path: Path) -> None:
    grow(path, math.inf)
    with pytest.raises(csulora.InputError) as refused:
        admit(admission, path)
    ((_, remembered),) = admission._outcomes.values()
    assert isinstance(remembered, csulora.InputError)
    assert str(remembered) == str(refused.value)
    assert remembered.__traceback__ is remembered.__context__ is remembered.__cause__ is None


def test_what_clients_are_told_begins_with_who_refuses(tmp_path: Path) -> None:
    assert refusal("adapter", csulora.RefusedError("adapter: no")) == "csulora: adapter: no"
    assert refusal("a\nb", OSError("gone")).startswith("csulora: a\\nb: could not be decided on")


def test_experts_are_published_as_the_server_reads_them(tmp_path: Path) -> None:
    names = [f"model.layers.0.mlp.experts.{i}" for i in (0, 1)]
    inward = {f"{name}.{projection}": (24, 16) for name in names for projection in ("gate_proj", "up_proj")}
    modules = inward | {f"{name}.down_proj": (16, 24) for name in names}
    found = factories.subspace(modules)
    known = csulora.Subspace(found, replace(found.provenance, experts=ExpertLayout(per_expert=True)))
    path = factories.save_adapter(tmp_path / "adapter", modules)
    admission = Admission(Gate.open(known, "csulora"))

    apart = admission.admit("a", lambda: path, Terms(torch.float32, 4, lambda: "per-expert"), reload=False)
    assert csulora.load_adapter(apart).modules.keys() == modules.keys()
    admission = Admission(Gate.open(known, "csulora"))
    with pytest.raises(csulora.RefusedError, match="rank 8 after correction, and the server takes 4; raise"):
        admission.admit("b", lambda: path, Terms(torch.float32, 4, lambda: "fused"), reload=False)
    fused = admission.admit("b", lambda: path, Terms(torch.float32, 8, lambda: "fused"), reload=False)
    assert {f"{name}.gate_up_proj" for name in names} < csulora.load_adapter(fused).modules.keys()
