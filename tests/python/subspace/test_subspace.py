import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import factories
from csulora.errors import InputError
from csulora.subspace.subspace import Subspace

Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "subspace.safetensors"
    factories.subspace(dtype=torch.float16, aliases={"lm_head": Q}).save(file)
    return file


def rewrite(
    path: Path,
    change: Callable[[dict[str, Any]], object] = lambda document: None,
    tensors: dict[str, Tensor] | None = None,
) -> None:
    """Save a subspace file's tensors anew, some replaced, under metadata that ``change`` was let at."""
    with safe_open(path, "pt") as file:
        document = json.loads(file.metadata()["csulora"])
    stored = load_file(path) | (tensors or {})
    change(document)
    path.unlink()
    save_file(stored, path, {"csulora": json.dumps(document)})


def test_what_was_saved_is_what_is_opened(path: Path) -> None:
    made, opened = factories.subspace(dtype=torch.float16, aliases={"lm_head": Q}), Subspace.open(path)
    assert list(opened) == sorted(factories.SHAPES)
    for name, module in opened.items():
        assert torch.equal(module.u, made[name].u)
        assert torch.equal(module.s, made[name].s)
        assert torch.equal(module.v, made[name].v)
        assert module.record() == made[name].record()
        assert module.shape == factories.SHAPES[name]
    assert opened.provenance == made.provenance
    assert opened.to_dict() == made.to_dict()


def test_a_subspace_in_memory_has_the_sha256_of_its_file(path: Path) -> None:
    expected = hashlib.sha256(path.read_bytes()).hexdigest()
    assert Subspace.open(path).sha256 == expected
    assert factories.subspace(dtype=torch.float16, aliases={"lm_head": Q}).sha256 == expected


def test_saving_twice_gives_the_same_bytes(path: Path, tmp_path: Path) -> None:
    Subspace.open(path).save(tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == path.read_bytes()


def test_a_subspace_can_be_saved_over_itself(path: Path) -> None:
    before = path.read_bytes()
    Subspace.open(path).save(path)
    assert path.read_bytes() == before


def test_the_bytes_that_are_hashed_are_the_bytes_that_are_used(path: Path) -> None:
    replaced = Subspace.open(path)
    factories.subspace(seed=9).save(path)
    with pytest.raises(InputError, match="has changed since it was opened"):
        _ = replaced.sha256
    os.utime(path, ns=(0, 0))
    overwritten = Subspace.open(path)
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x01")
    with pytest.raises(InputError, match="has changed since it was opened"):
        _ = overwritten.sha256


def test_fingerprints_depend_on_names_and_hashes_alone() -> None:
    assert factories.subspace().fingerprints == factories.subspace(seed=5, rank=3).fingerprints
    assert factories.subspace().fingerprints["base"] != factories.subspace().fingerprints["aligned"]
    renamed = {f"x.{name}": shape for name, shape in factories.SHAPES.items()}
    assert factories.subspace(renamed).fingerprints != factories.subspace().fingerprints


def spoiled(tensor: Tensor, value: float) -> Tensor:
    spoiled = tensor.clone()
    spoiled.view(-1)[0] = value
    return spoiled


@pytest.mark.parametrize(
    ("factor", "spoil", "message"),
    [
        ("u", lambda u: spoiled(u, float("nan")), "columns of u are not orthonormal"),
        ("u", lambda u: spoiled(u, float("inf")), "columns of u are not orthonormal"),
        ("v", lambda v: 2 * v, "columns of v are not orthonormal"),
        ("v", lambda v: v[:, :1].expand_as(v).contiguous(), "columns of v are not orthonormal"),
        ("s", lambda s: s.flip(0), "positive and descending"),
        ("s", lambda s: -s, "positive and descending"),
        ("s", lambda s: spoiled(s, float("nan")), "positive and descending"),
    ],
)
def test_spoiled_values_never_reach_the_core(
    path: Path, factor: str, spoil: Callable[[Tensor], Tensor], message: str
) -> None:
    rewrite(path, tensors={f"{Q}.{factor}": spoil(load_file(path)[f"{Q}.{factor}"])})
    subspace = Subspace.open(path)
    with pytest.raises(InputError, match=rf"subspace\.safetensors: {Q}: .*{message}"):
        subspace.to_core(subspace)
    subspace.to_core(["model.layers.0.mlp.up_proj"])


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        (f"{Q}.u", torch.zeros(40, 5), "must agree on the number of directions"),
        (f"{Q}.u", torch.zeros(40), "must agree on the number of directions"),
        (f"{Q}.v", torch.zeros(40, 6, 1), "must agree on the number of directions"),
        (f"{Q}.s", torch.zeros(6, 1), "must agree on the number of directions"),
        (f"{Q}.s", torch.zeros(6).half(), "csulora stores none such"),
        (f"{Q}.u", torch.zeros(40, 6), "csulora stores none such"),
        (f"{Q}.u", torch.zeros(40, 6, dtype=torch.int16), "csulora stores none such"),
        ("other.u", torch.zeros(40, 6), "tensors that no module accounts for"),
    ],
)
def test_the_structure_is_checked_at_opening(path: Path, name: str, tensor: Tensor, message: str) -> None:
    rewrite(path, tensors={name: tensor})
    with pytest.raises(InputError, match=rf"subspace\.safetensors: .*{message}"):
        Subspace.open(path)


def set_certificate(field: str, value: object) -> Callable[[dict[str, Any]], object]:
    return lambda document: document["modules"][Q]["certificate"].update({field: value})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(format=1), "subspace file format 1; this csulora reads format 2; make it again"),
        (lambda d: d.pop("format"), "subspace file format None"),
        (lambda d: d.pop("fingerprints"), "damaged"),
        (lambda d: d["fingerprints"].update(base="0" * 64), "contradict each other"),
        (lambda d: d["modules"][Q].update(base_sha256="0" * 64), "contradict each other"),
        (lambda d: d["modules"][Q].update(base_sha256=5), "damaged"),
        (lambda d: d["modules"][Q].update(base_sha256="\ud800"), "damaged"),
        (lambda d: d["modules"][Q].update(extra=5), "damaged"),
        (lambda d: d["modules"].pop(Q), "tensors that no module accounts for"),
        (lambda d: d["modules"].update(other=d["modules"][Q]), "other: a factor is missing"),
        (lambda d: d.update(modules=[]), "damaged"),
        (lambda d: d.update(modules={Q: None}), "damaged"),
        (lambda d: d.pop("aliases"), "damaged"),
        (lambda d: d.update(aliases=[]), "damaged"),
        (lambda d: d.update(aliases={"lm_head": ["x"]}), "damaged"),
        (lambda d: d.update(aliases={"lm_head": "x"}), "an alias names a module that the subspace file does not hold"),
        (lambda d: d.update(options=3), "damaged"),
        (lambda d: d.update(base=None), "damaged"),
        (lambda d: d.update(surprise=1), "damaged"),
        (set_certificate("captured_energy", "much"), "damaged"),
        (set_certificate("captured_energy", True), "damaged"),
        (set_certificate("captured_energy", float("nan")), "captured_energy is NaN; write a finite number"),
        (set_certificate("captured_energy", 10**400), "damaged"),
        (set_certificate("passes", 1.5), "damaged"),
        (set_certificate("surprise", 1), "damaged"),
    ],
)
def test_damaged_metadata_is_refused(path: Path, change: Callable[[dict[str, Any]], object], message: str) -> None:
    rewrite(path, change)
    with pytest.raises(InputError, match=rf"subspace\.safetensors: .*{message}"):
        Subspace.open(path)


def test_what_is_no_subspace_is_refused(tmp_path: Path, path: Path) -> None:
    save_file({"x": torch.zeros(2)}, tmp_path / "other")
    with pytest.raises(InputError, match="not a subspace file"):
        Subspace.open(tmp_path / "other")
    save_file({"x": torch.zeros(2)}, tmp_path / "other", {"csulora": "[]"})
    with pytest.raises(InputError, match="not a JSON object"):
        Subspace.open(tmp_path / "other")
    whole = path.read_bytes()
    for size in (0, 4, 1000, len(whole) - 1):
        (tmp_path / "cut").write_bytes(whole[:size])
        with pytest.raises(InputError, match=r"not a readable safetensors file.*cut off or damaged: copy it again, or"):
            Subspace.open(tmp_path / "cut")
    (tmp_path / "policy.toml").write_text("aligned = 0.5")
    with pytest.raises(InputError, match="not a subspace file, but of another format"):
        Subspace.open(tmp_path / "policy.toml")
    with pytest.raises(InputError, match="no such file; make a subspace file"):
        Subspace.open(tmp_path / "missing")
    with pytest.raises(InputError, match="is a directory; name a subspace file"):
        Subspace.open(tmp_path)


def test_a_module_that_alignment_did_not_move_has_no_directions(tmp_path: Path) -> None:
    subspace = factories.subspace(rank=0)
    subspace.save(tmp_path / "subspace")
    opened = Subspace.open(tmp_path / "subspace")
    assert opened[Q].rank == 0
    assert opened.to_core([Q])[0].u.shape == (40, 0)
