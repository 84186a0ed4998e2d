"""Every route by which PEFT and transformers load an adapter: corrected as the command line corrects it, or refused."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from peft.utils import hotswap
from peft.utils.hotswap import hotswap_adapter
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM
from transformers.core_model_loading import WeightRenaming

import csulora
import factories
import tiny_model
from csulora.hooks import peft as hook
from csulora.hooks.peft.base_models import BaseModels
from csulora.hooks.signature import check_signature
from tolerances import STORED
from zoo import llama_of_pairs as llama

# PEFT's own use of a deprecated attribute of transformers.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

MODULES = {
    "model.layers.0.self_attn.q_proj": (48, 48),
    "model.layers.1.self_attn.k_proj": (24, 48),
    "model.layers.0.mlp.gate_proj": (64, 48),
    "model.layers.1.mlp.down_proj": (48, 64),
}
POLICY = csulora.Policy.csulora(3.0)


@pytest.fixture(scope="module")
def subspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("subspace")
    base, aligned = factories.model_pair(directory)
    csulora.extract(base, aligned, rank=4, output=directory / "subspace.safetensors")
    return directory / "subspace.safetensors"


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    settings = {"target_modules": list(MODULES), "alpha_pattern": {"mlp.gate_proj": 5}, "use_rslora": True}
    return factories.save_adapter(tmp_path_factory.mktemp("adapters") / "adapter", MODULES, **settings)


@pytest.fixture(scope="module")
def corrected(adapter: Path, subspace: Path) -> Path:
    """What the command line makes of the adapter."""
    policy, output = adapter.with_name("policy.toml"), adapter.with_name("corrected")
    POLICY.save(policy)
    command = ["correct", adapter, "--subspace", subspace, "-o", output, "--policy", policy, "--quiet"]
    subprocess.run([sys.executable, "-m", "csulora", *map(str, command)], check=True)
    return output


@pytest.fixture
def poisoned(tmp_path: Path) -> Path:
    """An adapter that PEFT would load: one of its weights is NaN."""
    directory = factories.save_adapter(tmp_path / "poisoned", MODULES, target_modules=list(MODULES))
    tensors = load_file(directory / "adapter_model.safetensors")
    next(iter(tensors.values()))[0, 0] = float("nan")
    save_file(tensors, directory / "adapter_model.safetensors")
    return directory


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(12).reshape(1, 12)).logits


def from_pretrained(path: Path) -> torch.nn.Module:
    return PeftModel.from_pretrained(llama(), path)


def load_adapter(path: Path) -> torch.nn.Module:
    model = get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj"]), "other")
    model.load_adapter(path, "new")
    model.set_adapter("new")
    return model.eval()


def hotswapped(path: Path) -> torch.nn.Module:
    names = [name.removeprefix("model.") for name in MODULES]
    # A regular expression, as hot swapping wants the same modules: these four and no others.
    config = LoraConfig(r=4, lora_alpha=4, target_modules=f".*({'|'.join(names)})", use_rslora=False)
    model = get_peft_model(llama(), config).eval()
    hotswap_adapter(model, str(path), "default", torch_device="cpu")
    return model


def transformers_load_adapter(path: Path) -> torch.nn.Module:
    model = llama()
    model.load_adapter(str(path))
    return model.eval()


def auto_model(path: Path) -> torch.nn.Module:
    return peft.PeftMixedModel.from_pretrained(llama(), path)


ROUTES = [from_pretrained, load_adapter, hotswapped, transformers_load_adapter, auto_model]


def assert_same_update(found: torch.nn.Module, wanted: torch.nn.Module) -> None:
    without = logits(llama())
    difference, size = logits(found) - logits(wanted), logits(wanted) - without
    assert size.norm() > 1e-3
    # The logits pass the update on with a factor of order one.
    assert difference.norm() <= 10 * STORED[torch.float32] * logits(wanted).norm()


@pytest.mark.parametrize("route", ROUTES)
def test_guard_loads_what_the_command_line_writes(
    route: Callable[[Path], torch.nn.Module], adapter: Path, corrected: Path, subspace: Path
) -> None:
    plain = route(corrected)
    with hook.guard(subspace, POLICY):
        guarded = route(adapter)

    assert_same_update(guarded, plain)
    raw = PeftModel.from_pretrained(llama(), adapter)
    assert (logits(guarded) - logits(raw)).norm() > 0.01 * logits(raw).norm()


def test_transformers_from_pretrained_is_guarded(
    adapter: Path, corrected: Path, subspace: Path, tmp_path: Path
) -> None:
    llama().save_pretrained(tmp_path / "model")
    for directory in (adapter, corrected):
        file = shutil.copytree(directory, tmp_path / directory.name) / "adapter_config.json"
        settings = json.loads(file.read_text()) | {"base_model_name_or_path": str(tmp_path / "model")}
        file.write_text(json.dumps(settings))

    with hook.guard(subspace, POLICY, base_models=[str(tmp_path / "model")]):
        guarded = LlamaForCausalLM.from_pretrained(tmp_path / adapter.name)

    assert_same_update(guarded, LlamaForCausalLM.from_pretrained(tmp_path / corrected.name))


def hook_load(path: Path) -> torch.nn.Module:
    return hook.load(llama(), path, csulora.Subspace.open(path.with_name("subspace.safetensors")), POLICY)[0]


@pytest.mark.filterwarnings("ignore:Found missing adapter keys")
@pytest.mark.parametrize("route", [from_pretrained, load_adapter, auto_model, hook_load])
def test_modules_that_a_file_leaves_out_stay_as_they_are(
    route: Callable[[Path], torch.nn.Module], subspace: Path, tmp_path: Path
) -> None:
    """The rank is one from which on PEFT is spared random values: no unset memory may stand in their place."""
    modules = {"model.layers.0.self_attn.q_proj": (48, 48)}
    incomplete = factories.save_adapter(tmp_path / "incomplete", modules, rank=400, target_modules=["q_proj", "v_proj"])
    shutil.copy(subspace, tmp_path)
    fixed, _ = csulora.correct(csulora.load_adapter(incomplete), csulora.Subspace.open(subspace), POLICY)
    csulora.save_adapter(fixed, tmp_path / "fixed")
    plain = from_pretrained(tmp_path / "fixed")

    with hook.guard(subspace, POLICY):
        guarded = route(incomplete)

    assert not [name for name, parameter in guarded.named_parameters() if parameter.is_meta]
    assert_same_update(guarded, plain)


def test_a_load_that_fails_leaves_no_memory_unset(subspace: Path, tmp_path: Path) -> None:
    """Factors for a linear layer, where the model has an embedding; and factors that the model has no room for."""
    modules = {"model.layers.0.self_attn.q_proj": (48, 48), "model.embed_tokens": (40, 48), "lm_head": (7, 7)}
    adapter = factories.save_adapter(tmp_path / "adapter", modules, rank=600, target_modules=list(modules))
    model = llama()

    with (
        hook.guard(subspace, csulora.Policy.csulora(3.0, keep_uncovered=("*",))),
        pytest.raises(RuntimeError, match="size"),
    ):
        PeftModel.from_pretrained(model, adapter)

    assert not [name for name, parameter in model.named_parameters() if parameter.is_meta]


def test_options_given_by_position(subspace: Path, tmp_path: Path) -> None:
    modules = {"model.layers.0.self_attn.q_proj": (48, 48)}
    large = factories.save_adapter(tmp_path / "large", modules, rank=400, target_modules=list(modules))
    model = get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj"]), "other")

    with hook.guard(subspace, POLICY):
        model.load_adapter(large, "large", False, "cpu", True, False, False)

    assert list(model.peft_config) == ["other", "large"]


def test_transformers_from_pretrained_loads_the_revision_that_is_asked_for(
    adapter: Path, corrected: Path, subspace: Path, tmp_path: Path
) -> None:
    """``adapter`` lies in the hub's cache as revision v1, beside another one as main."""
    llama().save_pretrained(tmp_path / "model")
    other = factories.save_adapter(tmp_path / "other", MODULES, seed=7, target_modules=list(MODULES))
    repository = tmp_path / "hub" / "models--org--adapter"
    (repository / "refs").mkdir(parents=True)
    for revision, commit, source in (("main", "a" * 40, other), ("v1", "b" * 40, adapter)):
        (repository / "refs" / revision).write_text(commit)
        file = shutil.copytree(source, repository / "snapshots" / commit) / "adapter_config.json"
        settings = json.loads(file.read_text()) | {"base_model_name_or_path": str(tmp_path / "model")}
        file.write_text(json.dumps(settings))

    with hook.guard(subspace, POLICY, base_models=[str(tmp_path / "model")]):
        guarded = LlamaForCausalLM.from_pretrained("org/adapter", revision="v1", cache_dir=tmp_path / "hub")

    assert_same_update(guarded, from_pretrained(corrected))


def parameters(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(
    "load",
    [
        lambda model, path: PeftModel.from_pretrained(model.base_model.model, path),
        lambda model, path: model.load_adapter(path, "new"),
        lambda model, path: hotswap_adapter(model, str(path), "default", torch_device="cpu"),
        lambda model, path: model.base_model.model.load_adapter(str(path), "new"),
    ],
)
def test_refused_adapter_leaves_the_model_as_it_was(load: Callable, poisoned: Path, subspace: Path) -> None:
    model = get_peft_model(llama(), LoraConfig(r=4, target_modules=["q_proj"]))
    before = parameters(model)

    with hook.guard(subspace, POLICY), pytest.raises(csulora.InputError, match="NaN"):
        load(model, poisoned)

    after = parameters(model)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert list(model.peft_config) == ["default"]


def test_policy_limit_refuses(adapter: Path, subspace: Path) -> None:
    with hook.guard(subspace, csulora.Policy(max_undo=-1e9)), pytest.raises(csulora.RefusedError, match="undoes"):
        from_pretrained(adapter)


def test_explicit_load(adapter: Path, corrected: Path, subspace: Path) -> None:
    wrapped, report = hook.load(llama(), adapter, subspace, POLICY)

    assert_same_update(wrapped, from_pretrained(corrected))
    assert report.subspace_sha256 == csulora.Subspace.open(subspace).sha256
    again, _ = hook.load(wrapped, adapter, subspace, POLICY, adapter_name="second")
    assert again is wrapped
    again.set_adapter("second")
    assert_same_update(again, from_pretrained(corrected))


def test_explicit_load_within_a_guard_corrects_once(adapter: Path, corrected: Path, subspace: Path) -> None:
    with hook.guard(subspace, POLICY):
        wrapped, _ = hook.load(llama(), adapter, subspace, POLICY)

    assert_same_update(wrapped, from_pretrained(corrected))


def test_correct_model_adds_an_adapter_and_leaves_the_old(adapter: Path, corrected: Path, subspace: Path) -> None:
    model = PeftModel.from_pretrained(llama(), adapter)
    raw = logits(model)

    report = hook.correct_model(model, "default", "safe", subspace, POLICY)

    assert torch.equal(logits(model), raw)
    model.set_adapter("safe")
    assert_same_update(model, from_pretrained(corrected))
    assert len(report.measured) == len(MODULES)


@pytest.mark.parametrize(("old", "new"), [("absent", "safe"), ("default", "default")])
def test_correct_model_checks_names(old: str, new: str, adapter: Path, subspace: Path) -> None:
    model = PeftModel.from_pretrained(llama(), adapter)

    with pytest.raises(csulora.InputError, match="adapter"):
        hook.correct_model(model, old, new, subspace, "csulora")


def test_weights_and_configurations_from_memory_are_refused(adapter: Path, corrected: Path, subspace: Path) -> None:
    model = from_pretrained(corrected)
    config = LoraConfig.from_pretrained(adapter)
    weights = load_file(adapter / "adapter_model.safetensors")

    with hook.guard(subspace, POLICY):
        with pytest.raises(csulora.RefusedError, match="memory"):
            llama().load_adapter(peft_config=config, adapter_state_dict=weights)
        with pytest.raises(csulora.RefusedError, match="memory"):
            hotswap.hotswap_adapter_from_state_dict(model, weights, "default", config)
        with pytest.raises(csulora.RefusedError, match="own config"):
            PeftModel.from_pretrained(llama(), adapter, config=config)


ELSEWHERE = {r"layers\.0\.self_attn\.q_proj": "layers.1.self_attn.q_proj"}


@pytest.mark.parametrize(
    "load",
    [
        lambda model, path: PeftModel.from_pretrained(model, path, key_mapping=ELSEWHERE),
        lambda model, path: peft.PeftMixedModel.from_pretrained(model, path, key_mapping=ELSEWHERE),
        lambda model, path: get_peft_model(model, LoraConfig(target_modules=["q_proj"])).load_adapter(
            path, "new", False, None, True, False, False, ELSEWHERE
        ),
        lambda model, path: hotswap.load_peft_weights(path, key_mapping=ELSEWHERE),
        lambda model, path: model.load_adapter(
            str(path), weight_mapping=[WeightRenaming(*pair) for pair in ELSEWHERE.items()]
        ),
        lambda model, path: LlamaForCausalLM.from_pretrained(path, key_mapping=ELSEWHERE),
    ],
)
def test_mappings_of_names_are_refused(load: Callable, adapter: Path, subspace: Path, tmp_path: Path) -> None:
    """They would add a corrected update to a module it was not corrected for."""
    llama().save_pretrained(tmp_path / "model")
    file = shutil.copytree(adapter, tmp_path / "adapter") / "adapter_config.json"
    settings = json.loads(file.read_text()) | {"base_model_name_or_path": str(tmp_path / "model")}
    file.write_text(json.dumps(settings))

    guard = hook.guard(subspace, POLICY, base_models=[str(tmp_path / "model")])
    with guard, pytest.raises(csulora.RefusedError, match=r"pass no (key|weight)_mapping"):
        load(llama(), tmp_path / "adapter")


def test_explicit_load_takes_nothing_that_overrides(adapter: Path, subspace: Path) -> None:
    for override in ({"config": LoraConfig(r=4, lora_alpha=400)}, {"key_mapping": ELSEWHERE}):
        with pytest.raises(csulora.RefusedError, match="pass no"):
            hook.load(llama(), adapter, subspace, POLICY, **override)


@pytest.mark.parametrize("module", ["peft", "peft.utils", "peft.utils.save_and_load", "peft.tuners.cartridge.utils"])
def test_other_readers_of_weights_are_refused(module: str, adapter: Path, subspace: Path) -> None:
    reader = pytest.importorskip(module).load_peft_weights

    with hook.guard(subspace, POLICY), pytest.raises(csulora.RefusedError, match="does not cover"):
        sys.modules[module].load_peft_weights(str(adapter), device="cpu")

    assert sys.modules[module].load_peft_weights is reader


def test_a_name_that_is_taken_is_not_loaded_over(adapter: Path, subspace: Path) -> None:
    model = PeftModel.from_pretrained(llama(), adapter)

    with hook.guard(subspace, POLICY), pytest.raises(csulora.InputError, match="already"):
        model.load_adapter(adapter, "default")


def test_transformers_swaps_in_what_the_guard_corrected(adapter: Path, corrected: Path, subspace: Path) -> None:
    other = factories.save_adapter(adapter.with_name("other"), MODULES, seed=7, target_modules=list(MODULES))
    model = llama()

    with hook.guard(subspace, POLICY):
        model.load_adapter(str(other), "default")
        model.load_adapter(str(adapter), "default", hotswap=True)

    assert_same_update(model.eval(), from_pretrained(corrected))


@pytest.mark.filterwarnings("ignore:`lora_bias=True`")
@pytest.mark.parametrize(
    "settings", [{"lora_alpha": 400}, {"target_modules": [*MODULES, "v_proj"]}, {"use_dora": True}, {"lora_bias": True}]
)
def test_transformers_swaps_nothing_in_for_another_kind_of_adapter(
    settings: dict, adapter: Path, subspace: Path
) -> None:
    config = LoraConfig(**({"r": 4, "lora_alpha": 4, "target_modules": list(MODULES)} | settings))
    model = llama()
    inject_adapter_in_model(config, model, "default")
    before = parameters(model)

    with hook.guard(subspace, POLICY), pytest.raises(csulora.RefusedError, match="delete it first"):
        model.load_adapter(str(adapter), "default", hotswap=True)

    assert all(torch.equal(parameter, before[name]) for name, parameter in parameters(model).items())


AUTOMATIC = [
    lambda path: peft.AutoPeftModelForCausalLM.from_pretrained(str(path)),
    lambda path: transformers.AutoModelForCausalLM.from_pretrained(str(path)),
    lambda path: LlamaForCausalLM.from_pretrained(str(path)),
    lambda path: transformers.pipeline("text-generation", model=str(path), tokenizer=object()).model,
]


def naming(adapter: Path, place: Path, **settings: object) -> Path:
    """A copy of the adapter whose configuration says something else of its base model."""
    file = shutil.copytree(adapter, place) / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"task_type": "CAUSAL_LM"} | settings))
    return place


@pytest.mark.parametrize("load", AUTOMATIC[:3])
def test_a_base_model_that_was_allowed_is_loaded_with_the_corrected_adapter(
    load: Callable, adapter: Path, corrected: Path, subspace: Path, tmp_path: Path
) -> None:
    llama().save_pretrained(tmp_path / "model")
    path = naming(adapter, tmp_path / "upload", base_model_name_or_path=str(tmp_path / "model"))
    with hook.guard(subspace, POLICY, base_models=[str(tmp_path / "model")]):
        guarded = load(path)
    assert_same_update(guarded, from_pretrained(corrected))


@pytest.mark.parametrize("load", AUTOMATIC)
@pytest.mark.parametrize("allowed", [(), ("org/other",)])
def test_an_adapter_does_not_choose_the_base_model(
    load: Callable, allowed: tuple[str, ...], adapter: Path, subspace: Path, tmp_path: Path
) -> None:
    llama().save_pretrained(tmp_path / "model")
    path = naming(adapter, tmp_path / "upload", base_model_name_or_path=str(tmp_path / "model"))
    with hook.guard(subspace, POLICY, base_models=allowed), pytest.raises(csulora.RefusedError, match="base_models"):
        load(path)


def test_an_adapter_does_not_choose_the_revision_of_its_base_model(
    adapter: Path, subspace: Path, tmp_path: Path
) -> None:
    model = str(tmp_path / "model")
    path = naming(adapter, tmp_path / "upload", base_model_name_or_path=model, revision="refs/pr/1")
    with (
        hook.guard(subspace, POLICY, base_models=[model]),
        pytest.raises(csulora.RefusedError, match=r"revision 'refs/pr/1'.*base_models"),
    ):
        peft.AutoPeftModelForCausalLM.from_pretrained(str(path))


@pytest.mark.parametrize("load", AUTOMATIC[1:])
def test_transformers_does_not_drop_a_revision_that_was_allowed(
    load: Callable, adapter: Path, subspace: Path, tmp_path: Path
) -> None:
    llama().save_pretrained(tmp_path / "model")
    path = naming(adapter, tmp_path / "upload", base_model_name_or_path=str(tmp_path / "model"), revision="v2")
    with (
        hook.guard(subspace, POLICY, base_models=[f"{tmp_path / 'model'}@v2"]),
        pytest.raises(csulora.RefusedError, match=r"revision 'v2' of .*, which transformers ignores; load "),
    ):
        load(path)


@pytest.mark.parametrize("slashes", [("", ""), ("/", ""), ("", "/")])
def test_a_base_model_may_be_a_path_or_end_in_a_slash(slashes: tuple[str, str], subspace: Path, tmp_path: Path) -> None:
    allowed, named = (f"{tmp_path / 'model'}{slash}" for slash in slashes)
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": ["q"], "base_model_name_or_path": named}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    for names in ([allowed], [Path(allowed)]):
        with closing(BaseModels(names)) as base_models:
            assert base_models.check(tmp_path / "adapter_config.json")["base_model_name_or_path"] == named


@pytest.mark.parametrize("names", ["org/name", Path("org/name"), [None], [3]])
def test_base_models_are_a_list_of_names(names: Any, subspace: Path) -> None:
    with (
        pytest.raises(csulora.InputError, match=r"it must be a list of names"),
        hook.guard(subspace, POLICY, None, names),
    ):
        pass
    with hook.guard(subspace, POLICY):  # the one before is not active any more
        pass


def test_a_subfolder_with_a_model_in_it_changes_nothing(adapter: Path, subspace: Path, tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "model")
    path = naming(adapter, tmp_path / "upload" / "sub", base_model_name_or_path=str(tmp_path / "model"))
    shutil.copy(tmp_path / "model" / "config.json", path)
    with hook.guard(subspace, POLICY), pytest.raises(csulora.RefusedError, match="base_models"):
        transformers.AutoModelForCausalLM.from_pretrained(path.parent, adapter_kwargs={"subfolder": "sub"})


def test_the_programs_own_model_with_an_adapter_beside_it_is_loaded(
    adapter: Path, corrected: Path, subspace: Path, tmp_path: Path
) -> None:
    path = naming(adapter, tmp_path / "both", base_model_name_or_path="somebody/else")
    llama().save_pretrained(path)
    with hook.guard(subspace, POLICY, base_models=[str(path)]):
        guarded = transformers.AutoModelForCausalLM.from_pretrained(str(path))
    assert_same_update(guarded, from_pretrained(corrected))


@pytest.mark.parametrize("load", AUTOMATIC[1:])
def test_an_upload_does_not_bring_its_own_model(load: Callable, adapter: Path, subspace: Path, tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "model")
    path = naming(adapter, tmp_path / "upload", base_model_name_or_path=str(tmp_path / "model"))
    llama().save_pretrained(path)
    with (
        hook.guard(subspace, POLICY, base_models=[str(tmp_path / "model")]),
        pytest.raises(csulora.RefusedError, match="holds a model beside the adapter"),
    ):
        load(path)


def test_a_model_that_appears_beside_an_adapter_meanwhile_is_not_loaded(
    adapter: Path, subspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    llama().save_pretrained(tmp_path / "model")
    path = naming(adapter, tmp_path / "upload", base_model_name_or_path=str(tmp_path / "model"))
    checked = BaseModels.check

    def check(self: BaseModels, file: Path) -> dict[str, object]:
        found = checked(self, file)
        torch.manual_seed(99)
        LlamaForCausalLM(llama().config).save_pretrained(path)
        return found

    monkeypatch.setattr(BaseModels, "check", check)
    with hook.guard(subspace, POLICY, base_models=[str(tmp_path / "model")]):
        model = transformers.AutoModelForCausalLM.from_pretrained(str(path))
    weight = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(model.state_dict()[weight], llama().state_dict()[weight])


def test_a_tokenizer_beside_an_adapter_changes_no_embedding(adapter: Path, subspace: Path, tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "model")
    path = naming(adapter, tmp_path / "upload", base_model_name_or_path=str(tmp_path / "model"))
    tokenizer = tiny_model.tokenizer()
    tokenizer.add_tokens([f"more{count}" for count in range(500)])
    tokenizer.save_pretrained(path)
    with hook.guard(subspace, POLICY, base_models=[str(tmp_path / "model")]):
        model = peft.AutoPeftModelForCausalLM.from_pretrained(str(path))
    assert model.get_input_embeddings().weight.shape == llama().get_input_embeddings().weight.shape


def test_x_lora_leaves_the_model_as_it_was(adapter: Path, subspace: Path, tmp_path: Path) -> None:
    path = naming(adapter, tmp_path / "upload", init_lora_weights="pissa")
    model = llama()
    model.config.use_cache = False
    before = parameters(model)
    mixture = peft.XLoraConfig(task_type="CAUSAL_LM", hidden_size=48, adapters={"0": str(path)})
    with hook.guard(subspace, POLICY), pytest.raises(csulora.RefusedError, match="X-LoRA"):
        get_peft_model(model, mixture)
    assert all(torch.equal(before[name], after) for name, after in parameters(model).items())


def test_a_hot_swap_that_failed_opens_no_door(adapter: Path, subspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = from_pretrained(adapter)
    raw = hotswap.load_peft_weights(str(adapter), device="cpu")
    config = LoraConfig.from_pretrained(str(adapter))
    insert = hotswap._insert_adapter_name_into_state_dict
    in_memory = insert(raw, adapter_name="default", parameter_prefix="lora_")

    def fail(*arguments: object, **options: object) -> None:
        raise RuntimeError("no memory")

    with hook.guard(subspace, POLICY):
        with monkeypatch.context() as broken:
            broken.setattr(hotswap, "_insert_adapter_name_into_state_dict", fail)
            with pytest.raises(RuntimeError, match="no memory"):
                hotswap_adapter(model, str(adapter), "default", torch_device="cpu")
        with pytest.raises(csulora.RefusedError, match="not from memory"):
            hotswap.hotswap_adapter_from_state_dict(model, in_memory, "default", config)
        mixed = insert(hotswap.load_peft_weights(str(adapter), device="cpu"), "default", "lora_")
        mixed[min(mixed)] = in_memory[min(mixed)]
        with pytest.raises(csulora.RefusedError, match="not from memory"):
            hotswap.hotswap_adapter_from_state_dict(model, mixed, "default", config)


def test_weights_of_an_earlier_guard_are_not_swapped_in(adapter: Path, subspace: Path) -> None:
    model = from_pretrained(adapter)
    config = LoraConfig.from_pretrained(str(adapter))
    insert = hotswap._insert_adapter_name_into_state_dict
    with hook.guard(subspace, csulora.Policy.none()):
        lenient = insert(hotswap.load_peft_weights(str(adapter), device="cpu"), "default", "lora_")
    with hook.guard(subspace, POLICY), pytest.raises(csulora.RefusedError, match="not from memory"):
        hotswap.hotswap_adapter_from_state_dict(model, lenient, "default", config)


def test_a_load_that_the_host_could_not_finish_is_logged_as_failed(
    adapter: Path, subspace: Path, tmp_path: Path
) -> None:
    log = tmp_path / "decisions.jsonl"
    with hook.guard(subspace, POLICY, log), pytest.raises(SafetensorError):
        PeftModel.from_pretrained(llama(), adapter, torch_device=[])
    assert [json.loads(line)["verdict"] for line in log.read_text().splitlines()] == ["failed"]


def test_guards_do_not_nest_and_everything_is_restored(adapter: Path, subspace: Path) -> None:
    before = [PeftModel.load_adapter, PeftModel.from_pretrained.__func__, hotswap.load_peft_weights]

    with hook.guard(subspace, POLICY), pytest.raises(csulora.InputError, match="nested"), hook.guard(subspace, POLICY):
        pass

    assert before == [PeftModel.load_adapter, PeftModel.from_pretrained.__func__, hotswap.load_peft_weights]
    with hook.guard(subspace, POLICY):
        from_pretrained(adapter)


def test_unknown_host_signature_is_an_error(subspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PeftModel, "load_adapter", lambda self, where, name: None)

    with pytest.raises(csulora.HostError, match="where, name"), hook.guard(subspace, POLICY):
        pass
    with pytest.raises(csulora.HostError, match="takes"):
        check_signature(from_pretrained, "other")


def test_decisions_are_logged(adapter: Path, poisoned: Path, subspace: Path, tmp_path: Path) -> None:
    log = tmp_path / "decisions.jsonl"

    with hook.guard(subspace, POLICY, log):
        from_pretrained(adapter)
        with pytest.raises(csulora.InputError):
            from_pretrained(poisoned)

    good, bad = map(json.loads, log.read_text().splitlines())
    assert (good["verdict"], bad["verdict"]) == ("corrected", "invalid")
    assert good["adapter_sha256"] == csulora.load_adapter(adapter).sha256
    assert good["subspace_sha256"] == csulora.Subspace.open(subspace).sha256
    assert good["totals"]["relative_change"] > 0
    assert "NaN" in bad["reason"]


def test_every_way_of_the_hook_wants_a_signature_that_is_required(
    adapter: Path, subspace: Path, tmp_path: Path
) -> None:
    signing = pytest.importorskip("signing")
    private, public = signing.key_pair(tmp_path, "key")
    path = tmp_path / "adapter"
    shutil.copytree(adapter, path)

    with pytest.raises(csulora.RefusedError, match="is not signed"):
        hook.load(llama(), path, subspace, POLICY, require_signature=public)
    with hook.guard(subspace, POLICY, require_signature=public):
        with pytest.raises(csulora.RefusedError, match="is not signed"):
            PeftModel.from_pretrained(llama(), path)
        signing.sign(path, private)
        assert PeftModel.from_pretrained(llama(), path)
    assert hook.load(llama(), path, subspace, POLICY, require_signature=public)
