import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import csulora
import factories
import oracle
from csulora.errors import NotAdjustedError
from csulora.policy.overrides import Directions, Override
from csulora.policy.policy import Policy
from tolerances import TRACES

NAME = "model.layers.0.self_attn.q_proj"
MODULES = {NAME: (48, 48), "model.layers.1.mlp.down_proj": (48, 64)}


@pytest.fixture(scope="module")
def subspace_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("subspace")
    csulora.extract(*factories.model_pair(directory), rank=4, dtype="f32", output=directory / "subspace.safetensors")
    return directory / "subspace.safetensors"


@pytest.fixture(scope="module")
def subspace(subspace_file: Path) -> csulora.Subspace:
    return csulora.Subspace.open(subspace_file)


def adapters(directory: Path) -> list[csulora.Adapter]:
    one = factories.save_adapter(directory / "one", MODULES, seed=1)
    # Other rank, scale and storage type, and one module only, under the name it has below the task head.
    two = factories.save_adapter(
        directory / "two",
        {NAME.removeprefix("model."): (48, 48)},
        rank=3,
        seed=9,
        dtype=torch.bfloat16,
        use_rslora=True,
    )
    return [csulora.load_adapter(one), csulora.load_adapter(two)]


def test_sum_is_that_of_the_updates(subspace: csulora.Subspace, tmp_path: Path) -> None:
    loaded = adapters(tmp_path)
    weights = [0.5, -2.0]

    _, report = csulora.correct(csulora.combine(loaded, subspace, weights), subspace, csulora.Policy.none())

    dense = torch.zeros(48, 48, dtype=torch.float64)
    for adapter, weight in zip(loaded, weights, strict=True):
        module = next(iter(adapter.modules.values()))
        dense += weight * oracle.update(module.b, module.a, module.scale)
    found = subspace[NAME]
    measured = {module.module: module for module in report.modules}[NAME]
    assert measured.rank == 7
    assert measured.norm == pytest.approx(float(dense.norm()), rel=TRACES)
    assert measured.energies == pytest.approx(oracle.split(dense, found.u, found.v).energies, abs=TRACES)
    assert measured.undo == pytest.approx(oracle.undo(dense, found.u, found.s, found.v), rel=1e-4)


def test_adapters_harmless_alone_are_refused_together(subspace_file: Path, tmp_path: Path) -> None:
    """Each undoes 0.3 of the alignment; the sum undoes 0.6, above a limit of 0.5."""
    subspace = csulora.Subspace.open(subspace_file)[NAME]
    paths = []
    for name in ("one", "two"):
        path = factories.save_adapter(tmp_path / name, {NAME: (48, 48)}, rank=4, lora_alpha=4)
        b, a = -0.3 * subspace.u.float() * subspace.s, subspace.v.float().t()
        prefix = f"base_model.model.{NAME}"
        factories.save_file(
            {f"{prefix}.lora_A.weight": a.contiguous(), f"{prefix}.lora_B.weight": b.contiguous()},
            path / "adapter_model.safetensors",
        )
        paths.append(str(path))
    options = ["--subspace", str(subspace_file), "--max-undo", "0.5", "--quiet"]

    def inspect(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "csulora", "inspect", *arguments, *options]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    assert inspect(paths[0]).returncode == 0
    refused = inspect(*paths)
    assert refused.returncode == 3
    assert "one + two" in refused.stderr
    assert "0.6" in refused.stderr
    halved = inspect(*paths, "--weights", "1,0.5", "--json", "-")
    assert halved.returncode == 0
    assert json.loads(halved.stdout)["modules"][0]["undo"] == pytest.approx(0.45, abs=1e-3)


@pytest.mark.parametrize("weights", [[1.0], [1.0, float("nan")]])
def test_weights_must_fit(weights: list[float], subspace: csulora.Subspace, tmp_path: Path) -> None:
    with pytest.raises(csulora.InputError, match="weights"):
        csulora.combine(adapters(tmp_path), subspace, weights)


def test_updates_of_one_module_must_have_one_shape(subspace: csulora.Subspace, tmp_path: Path) -> None:
    paths = [factories.save_adapter(tmp_path / name, {NAME: (size, 48)}) for name, size in (("a", 48), ("b", 24))]

    with pytest.raises(csulora.InputError, match="different models"):
        csulora.combine([csulora.load_adapter(path) for path in paths], subspace)


def test_a_sum_has_no_strength_and_nobody_is_told_to_find_one(tmp_path: Path, subspace: csulora.Subspace) -> None:
    one, two = adapters(tmp_path)
    carried = Policy.none(overrides=(Override("*", directions=Directions((1.0,), (1.0,), (1.0,))),))
    policy = carried.with_strength(one.sha256, 1.0).with_strength(two.sha256, 1.0)
    with pytest.raises(NotAdjustedError, match="this is a sum or in memory: correct each adapter from its own"):
        csulora.correct(csulora.combine([one, two], subspace), subspace, policy)
    with pytest.raises(NotAdjustedError, match="find its strength with `csulora adjust`"):
        csulora.correct(one, subspace, carried.with_strength(two.sha256, 1.0))
