"""Models that are spread over devices, or quantised: the same policy, and what is missing for it is named."""

import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import csulora
import factories
import tiny_model
from csulora.cli import app as cli
from csulora.errors import InputError
from csulora.tuning import loading, probes
from csulora.tuning.language_model import LanguageModel
from csulora.tuning.loading import Loading
from csulora.tuning.options import Options
from csulora.tuning.probes import Message
from csulora.tuning.replies import divergences
from csulora.tuning.request import Request
from csulora.tuning.tune import subspace_path, tune

pytestmark = pytest.mark.usefixtures("one_thread")
# accelerate keeps the second part in its file, and has it in memory only for as long as a product takes.
TWO_PARTS: Mapping[str, str | int] = {
    "model.embed_tokens": "cpu",
    "model.layers.0": "cpu",
    "model.rotary_emb": "cpu",
    "model.layers.1": "disk",
    "model.norm": "disk",
    "lm_head": "disk",
}


def request(place: tiny_model.Place, loading: Loading, adapters: int = 1) -> Request:
    return Request(
        model=str(place.aligned),
        adapters=[csulora.load_adapter(path) for path in place.adapters[:adapters]],
        subspace=csulora.Subspace.open(place.subspace),
        task=[probes.read(place.task)] * adapters,
        safety=probes.read(place.safety),
        loading=loading,
        longest_reply=tiny_model.REPLY,
        options=Options(steps=5),
        task_weights=(1.0,),
    )


@pytest.mark.parametrize(
    ("source", "named"),
    [
        ("org/name", {}),
        ("org/name@v1", {"revision": "v1"}),
        ("org/name@v1:sub/folder", {"revision": "v1", "subfolder": "sub/folder"}),
    ],
)
def test_a_hub_id_may_name_a_revision_and_a_folder(
    source: str, named: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sub" / "folder").mkdir(parents=True)
    asked = []

    def from_pretrained(name: str, **options: str) -> None:
        asked.append((name, options))
        raise OSError("nothing is loaded here")

    monkeypatch.setattr("csulora.io.hub.snapshot_download", lambda repo, **_: tmp_path)
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", from_pretrained)
    with pytest.raises(InputError, match="nothing is loaded here"):
        loading.load(source, Loading("cpu"))
    assert asked == [("org/name", named)]


@pytest.mark.parametrize("adapters", [1, 2])
def test_a_model_in_two_parts_gives_the_same_policy(place: tiny_model.Place, tmp_path: Path, adapters: int) -> None:
    whole, parts = tmp_path / "whole.toml", tmp_path / "parts.toml"
    one = tune(request(place, Loading("cpu"), adapters), whole)
    other = tune(request(place, Loading(device_map=TWO_PARTS), adapters), parts)
    assert one == other
    assert whole.read_bytes() == parts.read_bytes()
    if subspace_path(whole).exists():
        assert subspace_path(whole).read_bytes() == subspace_path(parts).read_bytes()


def test_an_offloaded_module_has_no_device_of_its_own(place: tiny_model.Place) -> None:
    language_model = LanguageModel.open(str(place.aligned), Loading(device_map=TWO_PARTS), tiny_model.REPLY)
    name = "model.layers.1.mlp.up_proj"
    assert language_model.model.get_submodule(name).weight.device.type == "meta"
    assert language_model.device_of(name) == language_model.device == torch.device("cpu")


@pytest.mark.parametrize("device_map", ["auto", "balanced", "balanced_low_0", "sequential"])
def test_accelerate_may_choose_the_parts(place: tiny_model.Place, device_map: str) -> None:
    language_model = LanguageModel.open(str(place.aligned), Loading(device_map=device_map), tiny_model.REPLY)
    assert len(language_model.replies([(Message("user", "w1 w2"),)])) == 1


def test_a_device_that_is_not_there_is_refused(place: tiny_model.Place) -> None:
    nowhere = Loading(device_map={**TWO_PARTS, "lm_head": "nowhere"})
    with pytest.raises(InputError, match="does not load this model"):
        LanguageModel.open(str(place.aligned), nowhere, tiny_model.REPLY)


def test_a_device_and_a_map_exclude_each_other() -> None:
    with pytest.raises(InputError, match="'cpu' and a device map exclude each other"):
        Loading("cpu", device_map="auto")
    with pytest.raises(InputError, match=r"load_in '3bit': use 8bit or 4bit"):
        Loading(load_in="3bit")


@pytest.mark.parametrize("options", [[], ["--device", "auto"]])
def test_the_command_takes_a_device_or_a_map(
    place: tiny_model.Place,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
) -> None:
    files = [
        "--subspace",
        place.subspace,
        "--task",
        place.task,
        "--safety",
        place.safety,
        "-o",
        tmp_path / "policy.toml",
    ]
    few = ["--steps", 1, "--tokens", 2, "--task-weight", 1, "--device-map", "auto"]
    command = ["csulora", "tune", place.aligned, place.adapters[0], *files, *few, *options]
    monkeypatch.setattr(sys, "argv", [str(argument) for argument in command])
    with pytest.raises(SystemExit) as exit:
        cli.main()
    assert exit.value.code == (2 if options else 0)
    assert ("exclude each other" in capsys.readouterr().err) is bool(options)


@pytest.mark.parametrize(
    ("wanted", "missing", "option"),
    [
        (Loading(device_map="auto"), "accelerate", "--device-map"),
        (Loading(load_in="8bit"), "bitsandbytes", "--load-in 8bit"),
        (Loading(load_in="4bit"), "accelerate", "--load-in 4bit"),
    ],
)
def test_what_is_not_installed_is_named(
    place: tiny_model.Place, monkeypatch: pytest.MonkeyPatch, wanted: Loading, missing: str, option: str
) -> None:
    monkeypatch.setattr(loading, "find_spec", lambda package: None if package == missing else object())
    with pytest.raises(InputError, match=f"^{option} needs {missing}, .* pip install {missing}$"):
        LanguageModel.open(str(place.aligned), wanted, tiny_model.REPLY)


def test_another_number_of_bits_is_another_run(place: tiny_model.Place) -> None:
    identities = [request(place, Loading(load_in=bits)).identity for bits in (None, "8bit", "4bit")]
    assert all(one != other for at, one in enumerate(identities) for other in identities[:at])
    spread = replace(request(place, Loading()), loading=Loading(device_map="auto"))
    assert spread.identity == identities[0]


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose matrices have whole blocks of 64 weights, as 4-bit products want them."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(tiny_model.tokenizer()), initializer_range=0.1, **sizes)
    path = tmp_path_factory.mktemp("wide")
    LlamaForCausalLM(config).save_pretrained(path)
    tiny_model.tokenizer().save_pretrained(path)
    return path


def gradient(language_model: LanguageModel, a: Tensor) -> Tensor:
    """Of a divergence, with respect to the b of an update of the first layer: it passes all that comes after."""
    (reply,) = language_model.replies([(Message("user", "w1 w2 w3"),)])
    b = torch.zeros(64, len(a), requires_grad=True)
    shifted = factories.gaussian(64, 1, seed=3), factories.gaussian(1, 128, seed=4)
    with language_model.adapted({"model.layers.0.self_attn.q_proj": (b, a), "model.layers.1.mlp.down_proj": shifted}):
        divergences([reply], language_model.logits([reply.tokens], [reply.start])).sum().backward()
    assert b.grad is not None
    return b.grad


# Activations, too, have 8 bits in 8-bit products; 4-bit products are those of the weights that are there.
@pytest.mark.parametrize(("load_in", "tolerance"), [("8bit", 0.1), ("4bit", 1e-4)])
def test_gradients_pass_quantised_layers(wide: Path, load_in: str, tolerance: float) -> None:
    pytest.importorskip("bitsandbytes")
    a = factories.gaussian(2, 64, seed=1)
    quantised = LanguageModel.open(str(wide), Loading("cpu", load_in=load_in), tiny_model.REPLY)
    assert quantised.model.get_submodule("model.layers.1.mlp.down_proj").weight.dtype != torch.float32
    found = gradient(quantised, a)
    quantised.model.dequantize()
    wanted = gradient(quantised, a)
    assert wanted.norm() > 0
    assert (found - wanted).norm() <= tolerance * wanted.norm()


def test_a_policy_is_fitted_to_a_quantised_model(place: tiny_model.Place, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    frontier = tune(request(place, Loading("cpu", load_in="8bit")), tmp_path / "policy.toml")
    assert "measured on the model in 8bit" in frontier.verdict
    adapter, subspace = csulora.load_adapter(place.adapters[0]), csulora.Subspace.open(place.subspace)
    csulora.correct(adapter, subspace, csulora.Policy.load(tmp_path / "policy.toml"))
