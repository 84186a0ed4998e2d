"""What public reports of 2024 to 2026 tell of, by command, exit code and message; the advice is followed."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import csulora
import factories
from commands import Run
from model_families import FAMILIES, built, move

pytestmark = pytest.mark.usefixtures("one_thread")

Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"
MODULES = {Q: (48, 48), DOWN: (48, 64)}
PREFIX = "base_model.model."


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, with a model pair, a subspace file and a plain adapter."""
    monkeypatch.chdir(tmp_path)
    factories.model_pair(tmp_path)
    csulora.extract("base", "aligned", rank=4, output="subspace")
    factories.save_adapter(tmp_path / "adapter", MODULES, base_model_name_or_path="org/small")
    return tmp_path


CORRECT = "correct {} --subspace subspace --policy csulora -o out"


def renamed(path: Path, change: Callable[[str], str]) -> None:
    weights = path / "adapter_model.safetensors"
    save_file({change(name): factor for name, factor in load_file(weights).items()}, weights)


# Adapters that are common and valid.


@pytest.mark.parametrize("family", ["Gemma 3", "Qwen 2.5 VL", "Mistral 3", "Llama 3.2 Vision"])
def test_an_adapter_of_a_multimodal_model_is_corrected_in_full(family: str, run: Run, tmp_path: Path) -> None:
    model = built(FAMILIES[family])
    shapes = {name: tuple(module.weight.shape) for name, module in model.named_modules() if name.endswith("q_proj")}
    model.save_pretrained(tmp_path / "base")
    move(model, seed=1000)
    model.save_pretrained(tmp_path / "aligned")
    language = {name: shape for name, shape in shapes.items() if "language_model" in name}
    factories.save_adapter(tmp_path / "adapter", language)
    text_only = {name.replace("language_model.", ""): shape for name, shape in language.items()}
    factories.save_adapter(tmp_path / "text", text_only)

    assert run(f"extract {tmp_path}/base {tmp_path}/aligned -o {tmp_path}/subspace --rank 4").code == 0
    for adapter in ("adapter", "text"):
        command = (
            f"correct {tmp_path}/{adapter} --subspace {tmp_path}/subspace --policy csulora -o {tmp_path}/{adapter}2"
        )
        result = run(command)
        assert result.code == 0
        assert f"a PEFT directory: {len(language)} of {len(language)} modules" in result.out
        assert "uncorrected" not in result.out


def test_an_adapter_of_mlx_lm_arrives_in_a_multimodal_model_of_peft(run: Run, tmp_path: Path) -> None:
    model = built(FAMILIES["Gemma 3"])
    model.save_pretrained(tmp_path / "base")
    move(model, seed=1000)
    model.save_pretrained(tmp_path / "aligned")
    found = (name for name, _ in model.named_modules() if "language_model" in name and name.endswith("q_proj"))
    names = {name: tuple(model.get_submodule(name).weight.shape) for name in found}
    factories.save_adapter(tmp_path / "adapter", names)
    csulora.save_adapter(csulora.load_adapter(tmp_path / "adapter"), tmp_path / "mlx", "mlx")
    assert not names.keys() & csulora.load_adapter(tmp_path / "mlx").modules.keys()

    assert run(f"extract {tmp_path}/base {tmp_path}/aligned -o {tmp_path}/subspace --rank 4").code == 0
    again = f"--subspace {tmp_path}/subspace --policy none"
    assert run(f"correct {tmp_path}/mlx {again} --format peft -o {tmp_path}/peft").code == 0
    assert csulora.load_adapter(tmp_path / "peft").modules.keys() == names.keys()
    assert run(f"verify {tmp_path}/peft {tmp_path}/mlx {tmp_path}/subspace").code == 0
    assert run(f"correct {tmp_path}/mlx {again} -o {tmp_path}/same").code == 0
    assert (
        csulora.load_adapter(tmp_path / "same").modules.keys() == csulora.load_adapter(tmp_path / "mlx").modules.keys()
    )


def test_what_a_subspace_file_lacks_is_named_and_advice_on_it_works(work: Path, run: Run) -> None:
    assert run("extract base aligned -o partial --rank 4 --modules *.q_proj").code == 0
    result = run("correct adapter --subspace partial --policy csulora -o out")
    assert result.code == 3
    assert f"does not cover module {DOWN}; extract it too (--modules '*' takes all)" in result.err
    assert not (work / "out").exists()

    assert run(f"extract base aligned -o whole --rank 4 --modules *.q_proj --modules {DOWN}").code == 0
    assert run("correct adapter --subspace whole --policy csulora -o out").code == 0
    result = run(f"correct adapter --subspace partial --policy csulora -o kept --keep-uncovered {DOWN}")
    assert result.code == 0
    assert "of |dW|^2 passes uncorrected" in result.out


def test_a_blanket_word_lets_nothing_pass(work: Path, run: Run) -> None:
    result = run("correct adapter --subspace subspace --policy csulora -o out --uncovered keep")
    assert result.code == 2
    assert "No such option" in result.err


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_factors_of_mixed_types_are_taken(dtype: torch.dtype, work: Path, run: Run) -> None:
    weights = work / "adapter" / "adapter_model.safetensors"
    stored = {n: f.to(dtype) if "lora_A" in n else f for n, f in load_file(weights).items()}
    save_file(stored, weights)
    assert run(CORRECT.format("adapter")).code == 0


def test_weight_tying_without_a_tied_target_is_taken(work: Path, run: Run) -> None:
    factories.save_adapter(work / "flagged", MODULES, ensure_weight_tying=True)
    assert run(CORRECT.format("flagged")).code == 0


def test_shards_without_an_index_are_taken(work: Path, run: Run) -> None:
    for side in ("base", "aligned"):
        weights = load_file(work / side / "model.safetensors")
        factories.save_checkpoint(work / f"{side}-sharded", weights, shards=2)
        (work / f"{side}-sharded" / "model.safetensors.index.json").unlink()
    assert run("extract base-sharded aligned-sharded -o again --rank 4").code == 0


def test_a_suffix_says_that_gguf_is_meant(work: Path, run: Run) -> None:
    result = run("correct adapter --subspace subspace --policy csulora -o x.gguf")
    assert result.code == 2
    assert "--base-model" in result.err
    assert not (work / "x.gguf").exists()


# Adapters that must not pass.


@pytest.mark.parametrize("initialisation", ["lora_ga", "pissa", "olora"])
def test_an_initialisation_that_changes_the_base_is_refused(initialisation: str, work: Path, run: Run) -> None:
    factories.save_adapter(work / "changed", MODULES, init_lora_weights=initialisation)
    result = run(CORRECT.format("changed"))
    assert result.code == 3
    assert "convert the adapter to plain LoRA first" in result.err.replace("\n", " ")


# Mistakes. Each was made in public, and each message says what to do.

NAMES: dict[str, tuple[Callable[[str], str], str]] = {
    "torch.compile": (lambda name: name.replace(PREFIX, f"{PREFIX}_orig_mod."), "save the model itself"),
    "FSDP": (lambda name: name.replace("layers.", "layers._fsdp_wrapped_module."), "gather and unwrap the model first"),
    "DDP": (lambda name: f"module.{name}", "save the model itself: model.module"),
    "a state dictionary": (lambda name: name.replace(".weight", ".default.weight"), "or take it out"),
    "no prefix": (lambda name: name.removeprefix(PREFIX), f"does not start with {PREFIX} once"),
    "a wrapper of one's own": (
        lambda name: name.replace(PREFIX, f"{PREFIX}student."),
        "has the prefix 'student.', under which no class of this model keeps its layers",
    ),
}
UNDONE = {
    "torch.compile": "_orig_mod.",
    "FSDP": "_fsdp_wrapped_module.",
    "DDP": "module.",
    "a state dictionary": "default.",
    "a wrapper of one's own": "student.",
}


@pytest.mark.parametrize("mistake", NAMES)
def test_a_mistake_in_names_is_told_and_its_advice_works(mistake: str, work: Path, run: Run) -> None:
    change, message = NAMES[mistake]
    renamed(work / "adapter", change)
    result = run(CORRECT.format("adapter"))
    assert result.code == 3
    assert message in result.err
    assert not (work / "out").exists()

    take_out = UNDONE.get(mistake)
    renamed(work / "adapter", lambda name: name.replace(take_out, "", 1) if take_out else PREFIX + name)
    assert run(CORRECT.format("adapter")).code == 0


def test_parameters_that_zero_3_has_spread_are_told(work: Path, run: Run) -> None:
    weights = work / "adapter" / "adapter_model.safetensors"
    whole = load_file(weights)
    save_file({name: factor[:0].clone() if "lora_B" in name else factor for name, factor in whole.items()}, weights)
    result = run(CORRECT.format("adapter"))
    assert (result.code, "gather them on saving" in result.err) == (4, True)
    save_file(whole, weights)  # as gathered
    assert run(CORRECT.format("adapter")).code == 0


def test_a_directory_of_checkpoints_is_told(work: Path, run: Run) -> None:
    (work / "run").mkdir()
    (work / "adapter").rename(work / "run" / "checkpoint-20")
    result = run(CORRECT.format("run"))
    assert (result.code, "(checkpoint-20); name one of them" in result.err) == (4, True)
    assert run(CORRECT.format("run/checkpoint-20")).code == 0


def test_a_model_in_place_of_an_adapter_is_told(work: Path, run: Run) -> None:
    result = run(CORRECT.format("aligned"))
    assert (result.code, "it holds a model (config.json)" in result.err) == (4, True)


def test_an_adapter_of_another_size_is_told(work: Path, run: Run) -> None:
    factories.save_adapter(work / "large", {Q: (96, 96)}, base_model_name_or_path="org/large")
    result = run(CORRECT.format("large"))
    assert result.code == 4
    assert "for a model of another size, so use the subspace file of org/large" in result.err

    factories.save_checkpoint(work / "b", {f"{Q}.weight": factories.gaussian(96, 96, seed=1)})
    factories.save_checkpoint(work / "a", {f"{Q}.weight": factories.gaussian(96, 96, seed=2)})
    assert run("extract b a -o its-own --rank 4").code == 0
    assert run("correct large --subspace its-own --policy csulora -o out").code == 0


def test_an_adapter_with_more_layers_is_told(work: Path, run: Run) -> None:
    beyond = "model.layers.12.self_attn.q_proj"
    factories.save_adapter(
        work / "deep", MODULES | {beyond: MODULES[Q]}, base_model_name_or_path="org/deep", layers_to_transform=None
    )
    result = run(CORRECT.format("deep"))
    assert result.code == 3
    assert f"covers other layers, but not module {beyond}; if its model has no such layer" in result.err
    assert "use the subspace file of org/deep" in result.err

    assert run(f"extract base aligned -o first --rank 4 --modules {Q}").code == 0
    result = run("correct adapter --subspace first --policy csulora -o out")
    assert (result.code, "--modules '*'" in result.err) == (3, True)
    assert run("extract base aligned -o every --rank 4 --modules *").code == 0
    assert run("correct adapter --subspace every --policy csulora -o out").code == 0


def test_a_file_of_weights_in_place_of_its_directory_is_told(work: Path, run: Run) -> None:
    result = run(CORRECT.format("adapter/adapter_model.safetensors"))
    assert (result.code, "name the adapter's directory" in result.err) == (4, True)
    result = run("correct adapter --subspace subspace --policy csulora -o out.safetensors")
    assert (result.code, "a directory is written" in result.err) == (2, True)
    assert not (work / "out.safetensors").exists()
    assert run(CORRECT.format("adapter")).code == 0


def test_an_adapter_of_another_family_is_told(work: Path, run: Run) -> None:
    other = "transformer.h.0.attn.c_attn"
    factories.save_adapter(work / "other", {other: (96, 32)}, base_model_name_or_path="org/other")
    result = run(CORRECT.format("other"))
    assert result.code == 3
    assert f"covers none of the adapter's modules, such as {other}; it is of another family" in result.err
    assert "use the subspace file of org/other" in result.err


def test_what_the_host_would_drop_is_told(run: Run, tmp_path: Path) -> None:
    model = built(FAMILIES["Qwen 2.5 VL"])
    model.save_pretrained(tmp_path / "base")
    move(model, seed=1000)
    model.save_pretrained(tmp_path / "aligned")
    assert run(f"extract {tmp_path}/base {tmp_path}/aligned -o {tmp_path}/subspace --rank 4").code == 0
    factories.save_adapter(tmp_path / "adapter", {Q: (32, 32)})
    note = "PEFT 0.21 on transformers 5 drops 1 of 1 modules"

    result = run(f"inspect {tmp_path}/adapter --subspace {tmp_path}/subspace --json {tmp_path}/report.json")
    assert (result.code, note in result.out) == (0, True)
    assert json.loads((tmp_path / "report.json").read_text())["host_notes"][0].startswith(note)
    result = run(f"correct {tmp_path}/adapter --subspace {tmp_path}/subspace --policy csulora -o {tmp_path}/out")
    assert (result.code, note in result.out) == (0, True)
    assert list(csulora.load_adapter(tmp_path / "out").modules) == [Q.replace("model.", "model.language_model.", 1)]
