"""csulora's table of names agrees with transformers', and the names that it gives are those of real models."""

from pathlib import Path
from typing import Any

import pytest
import renamings as script
import torch
import transformers

import csulora
import factories
from csulora.errors import RefusedError
from csulora.models.checkpoint import Checkpoint
from csulora.models.renamings import names_in_memory
from csulora.models.resolver import Resolver
from expert_families import EXPERT_FAMILIES
from model_families import FAMILIES, built
from wrapper_families import WRAPPER_FAMILIES

MIXTRAL = {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"]}


def test_the_committed_table_is_the_scripts() -> None:
    committed = script.TABLE.read_text()
    if f'"transformers": "{transformers.__version__}"' not in committed:
        pytest.skip("the table is of another transformers")
    assert committed == script.text(), "run python .ci/renamings.py"


def linear_weights(model: Any) -> dict[str, torch.Tensor]:
    kinds = (torch.nn.Linear, transformers.Conv1D)
    return {name: module.weight for name, module in model.named_modules() if isinstance(module, kinds)}


# Of language models test_families compares each subspace with the module's own displacement.
RENAMED = (
    WRAPPER_FAMILIES | EXPERT_FAMILIES | {name: FAMILIES[name] for name in ("Nemotron-H", "GPT-NeoX", "Gemma 3n text")}
)


@pytest.mark.parametrize("name", RENAMED)
def test_every_linear_module_of_a_model_is_found_on_disk(name: str, tmp_path: Path) -> None:
    """By its values: transformers itself gave the file its names."""
    model = built(RENAMED[name])
    model.save_pretrained(tmp_path)
    checkpoint = Checkpoint.open(tmp_path)
    in_memory = {module: name for name, module in checkpoint.names_in_memory.items()}
    resolver = Resolver(checkpoint.weights, checkpoint.aliases, checkpoint.names_in_memory)
    for module, weight in linear_weights(model).items():
        found = resolver.resolve(module)
        assert found is not None, module
        assert found.is_alias or in_memory.get(found.module, found.module) == module
        matrix, _ = checkpoint.load(found.module)
        assert torch.equal(matrix, weight) or torch.equal(matrix, weight.t()), module


def test_an_adapter_of_a_router_is_corrected(tmp_path: Path) -> None:
    router = "model.layers.0.block_sparse_moe.gate"
    weights = {f"{router}.weight": factories.gaussian(24, 48, seed=1)}
    base = factories.save_checkpoint(tmp_path / "base", weights, MIXTRAL)
    aligned = factories.save_checkpoint(tmp_path / "aligned", factories.moved(weights), MIXTRAL)
    csulora.extract(base, aligned, rank=4, output=tmp_path / "subspace")
    subspace = csulora.Subspace.open(tmp_path / "subspace")
    assert subspace.names == {"model.layers.0.mlp.gate": router}

    for name in (router, "model.layers.0.mlp.gate"):
        adapter = csulora.load_adapter(factories.save_adapter(tmp_path / name, {name: (24, 48)}))
        fixed, report = csulora.correct(adapter, subspace, csulora.Policy.project())
        assert [module.module for module in report.measured] == list(fixed.modules) == [name]


def test_a_base_that_was_saved_under_the_names_in_memory_fits(tmp_path: Path) -> None:
    gates = ("model.layers.0.mlp.gate.weight", "model.layers.0.block_sparse_moe.gate.weight")
    weight = factories.gaussian(24, 48, seed=1)
    paths = [
        factories.save_checkpoint(tmp_path / str(i), {gate: weight + i * weight.flip(0)}, MIXTRAL)
        for i, gate in enumerate(gates)
    ]
    assert list(csulora.extract(paths[0], paths[1], rank=2)) == [gates[1].removesuffix(".weight")]
    assert list(csulora.extract(paths[1], paths[0], rank=2)) == [gates[0].removesuffix(".weight")]
    pattern = ["model.layers.*.mlp.gate"]  # as adapters name it
    assert list(csulora.extract(*paths, rank=2, modules=pattern)) == [gates[1].removesuffix(".weight")]


def test_one_name_of_two_weights_is_refused_with_both() -> None:
    both = ["model.layers.0.mlp.gate", "model.layers.0.block_sparse_moe.gate"]
    with pytest.raises(RefusedError, match=r"both model\.layers\.0\.mlp\.gate and model\.layers\.0\.block_sparse_moe"):
        names_in_memory(MIXTRAL, both)


def test_a_configuration_of_anything_else_renames_nothing() -> None:
    for config in ({}, {"model_type": "llama"}, {"model_type": 3, "architectures": "x", "text_config": []}):
        assert names_in_memory(config, ["model.layers.0.block_sparse_moe.gate"]) == {}
