"""Directories of mlx-lm: what is plain LoRA is read and written as it means there, everything else is refused."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import csulora
import factories
import oracle
from csulora.errors import InputError, RefusedError
from tolerances import COMPUTED, STORED

RANK, SCALE = 4, 20.0
Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"

Config = dict[str, object]
Edit = Callable[[Config, dict[str, Tensor]], None]


def parameters(**changes: object) -> Config:
    return {"rank": RANK, "scale": SCALE, "dropout": 0.0} | changes


def save(directory: Path, edit: Edit | None = None, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Write an adapter, however wrong; return its tensors."""
    directory.mkdir()
    tensors = {}
    for i, (name, (rows, columns)) in enumerate(factories.SHAPES.items()):
        tensors[f"{name}.lora_a"] = factories.gaussian(columns, RANK, seed=i).to(dtype)
        tensors[f"{name}.lora_b"] = factories.gaussian(RANK, rows, seed=10 + i).to(dtype)
    config: Config = {
        "model": "mlx-community/tiny",
        "fine_tune_type": "lora",
        "num_layers": 16,
        "lora_parameters": parameters(),
        "optimizer_config": {"adam": {}},
        "iters": 100,
    }
    if edit:
        edit(config, tensors)
    (directory / "adapter_config.json").write_text(json.dumps(config))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, directory / "adapters.safetensors")
    return tensors


def dense(tensors: dict[str, Tensor], module: str, scale: float) -> Tensor:
    """(out, in) float64, as mlx-lm adds it: scale * (lora_a @ lora_b)^T."""
    return scale * (tensors[f"{module}.lora_a"].double() @ tensors[f"{module}.lora_b"].double()).T


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [SCALE, -2.5, 1e9, 0.0])
def test_the_update_is_the_scale_times_the_product(scale: float, dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = save(
        tmp_path / "adapter", lambda config, _: config.update(lora_parameters=parameters(scale=scale)), dtype
    )
    adapter = csulora.load_adapter(tmp_path / "adapter")
    assert adapter.format == "mlx"
    assert adapter.config["base_model_name_or_path"] == "mlx-community/tiny"
    for name, module in adapter.modules.items():
        expected = dense(tensors, name, scale)
        assert module.shape == expected.shape
        assert torch.allclose(oracle.update(module.b, module.a, module.scale), expected, rtol=1e-12)


@pytest.mark.parametrize("scale", [SCALE, -2.5, 1e9])
def test_a_correction_stays_with_mlx_and_has_scale_one(scale: float, tmp_path: Path) -> None:
    tensors = save(tmp_path / "adapter", lambda config, _: config.update(lora_parameters=parameters(scale=scale)))
    subspace, policy = factories.subspace(), csulora.Policy.csulora(3.0, rank="exact")
    fixed, _ = csulora.correct(csulora.load_adapter(tmp_path / "adapter"), subspace, policy)
    sha256 = csulora.save_adapter(fixed, tmp_path / "fixed")
    assert {path.name for path in (tmp_path / "fixed").iterdir()} == {
        "adapter_config.json",
        "adapters.safetensors",
        "csulora_report.json",
        "README.md",
    }
    assert "library_name: mlx\n" in (tmp_path / "fixed" / "README.md").read_text()
    config = json.loads((tmp_path / "fixed" / "adapter_config.json").read_text())
    assert config["lora_parameters"]["scale"] == 1.0
    written = load_file(tmp_path / "fixed" / "adapters.safetensors")
    for name in factories.SHAPES:
        update = dense(tensors, name, scale)
        expected = oracle.closest_safe_update(update, subspace[name].u, subspace[name].v, (0.0, 3.0, 3.0))
        tolerance = COMPUTED[torch.float32] + STORED[torch.float32]
        assert oracle.relative_error(dense(written, name, 1.0), expected) <= tolerance
    again = csulora.load_adapter(tmp_path / "fixed")
    assert again.sha256 == sha256
    checks = csulora.audit(tmp_path / "fixed", tmp_path / "adapter", subspace)
    assert all(check.holds for check in checks), checks


@pytest.mark.parametrize(("first", "second"), [("mlx", "peft"), ("peft", "mlx")])
def test_formats_convert_into_each_other(first: str, second: str, tmp_path: Path) -> None:
    adapter = factories.adapter()
    csulora.save_adapter(adapter, tmp_path / "one", first)  # type: ignore[arg-type]
    csulora.save_adapter(csulora.load_adapter(tmp_path / "one"), tmp_path / "two", second)  # type: ignore[arg-type]
    found = csulora.load_adapter(tmp_path / "two")
    assert found.format == second
    for name, module in adapter.modules.items():
        update, other = module.folded(), found.modules[name]
        assert torch.equal(update.b @ update.a, other.b @ other.a * other.scale)


def test_unlike_ranks_are_padded(tmp_path: Path) -> None:
    adapter = factories.adapter()
    smaller = csulora.LoraModule(*(torch.ones(40, 2), torch.ones(2, 40)))
    adapter.modules[Q] = smaller
    csulora.save_adapter(adapter, tmp_path / "mlx", "mlx")
    found = csulora.load_adapter(tmp_path / "mlx").modules[Q]
    assert found.rank == RANK
    assert torch.equal(found.b @ found.a, smaller.b @ smaller.a)


def test_a_model_that_also_sees_is_wrapped_as_mlx_lm_does(tmp_path: Path) -> None:
    module = "model.language_model.layers.0.self_attn.q_proj"
    csulora.save_adapter(factories.adapter({module: (40, 40)}), tmp_path / "mlx", "mlx")
    assert set(csulora.load_adapter(tmp_path / "mlx").modules) == {"language_model.model.layers.0.self_attn.q_proj"}


def configured(**changes: object) -> Edit:
    return lambda config, _: config.update(changes)


def scaled(**changes: object) -> Edit:
    return configured(lora_parameters=parameters(**changes))


def added(name: str, tensor: Tensor | None = None) -> Edit:
    return lambda _, tensors: tensors.update({name: torch.ones(4, 4) if tensor is None else tensor})


def removed(name: str) -> Edit:
    def edit(_: Config, tensors: dict[str, Tensor]) -> None:
        del tensors[name]

    return edit


REFUSED: dict[str, tuple[Edit, str]] = {
    "DoRA": (configured(fine_tune_type="dora"), "DoRA also rescales"),
    "DoRA's magnitude": (added(f"{Q}.m"), "it belongs to DoRA"),
    "a full fine-tune": (configured(fine_tune_type="full"), "whole weights were trained"),
    "another type": (configured(fine_tune_type="loha"), "csulora does not know it"),
    "a type that is no text": (configured(fine_tune_type=["lora"]), "csulora does not know it"),
    "unknown field": (configured(use_rslora=True), "'use_rslora'"),
    "unknown parameter": (scaled(rank_pattern={}), "lora_parameters.rank_pattern"),
    "a whole weight": (added(f"{Q}.weight"), "a whole weight was trained"),
    "a bias": (added(f"{Q}.bias"), "biases of the base model"),
    "a quantised weight": (added(f"{Q}.scales"), "quantised weight"),
    "quantised biases": (added(f"{Q}.biases"), "quantised weight"),
    "PEFT's names": (added(f"base_model.model.{Q}.lora_A.weight"), "one of PEFT's"),
    "a norm": (added("model.norm.lora_c"), "neither lora_a nor lora_b"),
    "an update in an update": (added(f"{Q}.lora_a.lora_b"), "neither lora_a nor lora_b"),
    "an embedding": (added("model.embed_tokens.lora_a"), "where embedding and head are tied"),
    "experts": (added(f"{Q}.lora_a", torch.ones(2, 4, 40)), "stacked experts"),
    "keys that do not name a module": (scaled(keys=["mlp.down_proj", "mlp.up_proj"]), "do not name"),
}
BAD: dict[str, tuple[Edit, str]] = {
    "older layers": (lambda config, _: config.update(lora_layers=config.pop("num_layers")), "rename it"),
    "no parameters": (configured(lora_parameters=None), "lora_parameters is None"),
    "no rank": (scaled(rank=None), "rank is None"),
    "rank zero": (scaled(rank=0), "rank is 0"),
    "rank true": (scaled(rank=True), "rank is True"),
    "another rank": (scaled(rank=5), "says rank 5"),
    "no scale": (scaled(scale=None), "scale is None"),
    "scale as text": (scaled(scale="20"), "scale is '20'"),
    "scale NaN": (scaled(scale=math.nan), "finite number"),
    "scale infinite": (scaled(scale=math.inf), "finite number"),
    "scale beyond float64": (scaled(scale=10**400), "finite number"),
    "keys as text": (scaled(keys="q_proj"), "a list of names"),
    "NaN": (lambda _, tensors: tensors.update({f"{Q}.lora_a": torch.full((40, 4), math.nan)}), "NaN or infinity"),
    "a missing factor": (removed(f"{Q}.lora_b"), "lora_b is missing"),
    "no tensor": (lambda _, tensors: tensors.clear(), "no factor"),
    "an integer": (lambda _, tensors: tensors.update({f"{Q}.lora_a": torch.ones(40, 4).int()}), "float64 is needed"),
}


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_is_not_plain_lora_is_refused_by_name(name: str, tmp_path: Path) -> None:
    edit, reason = REFUSED[name]
    save(tmp_path / "adapter", edit)
    with pytest.raises(RefusedError, match=reason):
        csulora.load_adapter(tmp_path / "adapter")


@pytest.mark.parametrize("name", sorted(BAD))
def test_what_is_malformed_is_a_bad_input(name: str, tmp_path: Path) -> None:
    edit, reason = BAD[name]
    save(tmp_path / "adapter", edit)
    with pytest.raises(InputError, match=reason):
        csulora.load_adapter(tmp_path / "adapter")


def test_a_scale_beyond_the_storage_type_is_a_bad_input(tmp_path: Path) -> None:
    save(tmp_path / "adapter", scaled(scale=1e300))
    adapter = csulora.load_adapter(tmp_path / "adapter")
    with pytest.raises(InputError, match="too large"):
        csulora.correct(adapter, factories.subspace(), csulora.Policy.csulora())
    with pytest.raises(InputError, match="does not fit"):
        csulora.save_adapter(adapter, tmp_path / "out")


def test_the_older_name_of_the_layers_can_be_changed(tmp_path: Path) -> None:
    save(tmp_path / "adapter", BAD["older layers"][0])
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(config.read_text().replace("lora_layers", "num_layers"))
    assert set(csulora.load_adapter(tmp_path / "adapter").modules) == set(factories.SHAPES)


def test_a_configuration_alone_is_told_and_the_advice_works(tmp_path: Path) -> None:
    save(tmp_path / "adapter")
    weights = tmp_path / "adapter" / "adapters.safetensors"
    checkpoint = weights.rename(weights.with_name("0000100_adapters.safetensors"))
    with pytest.raises(RefusedError, match=r"adapter of mlx-lm, whose weights are not there; .* may be renamed"):
        csulora.load_adapter(tmp_path / "adapter")
    checkpoint.rename(weights)
    csulora.load_adapter(tmp_path / "adapter")


def test_weights_that_mlx_lm_scales_are_refused(tmp_path: Path) -> None:
    layer = "model.layers.0"
    shapes = {f"{layer}.self_attn.q_proj": (40, 40), f"{layer}.mamba.in_proj": (40, 40)}
    save(tmp_path / "adapter", scaled(keys=None))
    with pytest.raises(RefusedError, match="Falcon-H1"):
        csulora.correct(csulora.load_adapter(tmp_path / "adapter"), factories.subspace(shapes), csulora.Policy.none())
    with pytest.raises(RefusedError, match="Falcon-H1"):
        csulora.save_adapter(factories.adapter(shapes), tmp_path / "out", "mlx")


def test_a_subspace_file_says_that_mlx_lm_scales_the_weights(tmp_path: Path) -> None:
    save(tmp_path / "adapter")
    subspace = factories.subspace()
    scaled_model = csulora.Subspace(subspace, replace(subspace.provenance, model_type="falcon_h1"))
    with pytest.raises(RefusedError, match="Falcon-H1"):
        csulora.correct(csulora.load_adapter(tmp_path / "adapter"), scaled_model, csulora.Policy.none())


def test_embeddings_are_not_written(tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match="tied"):
        csulora.save_adapter(factories.adapter({"model.embed_tokens": (40, 40)}), tmp_path / "out", "mlx")
    assert not (tmp_path / "out").exists()


def test_more_layers_than_the_configuration_says_are_refused(tmp_path: Path) -> None:
    """mlx-lm makes room in the last layers alone; it drops the others or raises, by its version."""

    def three_layers(config: Config, tensors: dict[str, Tensor]) -> None:
        config["num_layers"] = 2
        for name in list(tensors):
            for layer in (1, 2):
                tensors[name.replace("layers.0", f"layers.{layer}")] = tensors[name].clone()

    def named_whole(config: Config, tensors: dict[str, Tensor]) -> None:
        three_layers(config, tensors)
        config["lora_parameters"] = parameters(keys=sorted({name.rpartition(".")[0] for name in tensors}))

    save(tmp_path / "adapter", three_layers)
    with pytest.raises(RefusedError, match="set it to 3 if all were trained"):
        csulora.load_adapter(tmp_path / "adapter")
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(config.read_text().replace('"num_layers": 2', '"num_layers": 3'))
    assert len(csulora.load_adapter(tmp_path / "adapter").modules) == 9
    save(tmp_path / "whole", named_whole)
    assert len(csulora.load_adapter(tmp_path / "whole").modules) == 9


def test_experts_are_not_written_one_by_one(tmp_path: Path) -> None:
    adapter = factories.adapter({"model.layers.0.mlp.experts.0.up_proj": (40, 40)})
    with pytest.raises(RefusedError, match="--format peft"):
        csulora.save_adapter(adapter, tmp_path / "out", "mlx")
    csulora.save_adapter(adapter, tmp_path / "out", "peft")
