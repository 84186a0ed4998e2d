import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import csulora
import factories
from csulora.errors import InputError, RefusedError
from csulora.extraction import extract as extraction
from csulora.native import _core
from csulora.subspace.module_subspace import ModuleSubspace
from csulora.subspace.subspace import Subspace

pytestmark = pytest.mark.usefixtures("one_thread")

Q = "model.layers.0.self_attn.q_proj"
EMBEDDING = "model.embed_tokens"


@pytest.fixture
def models(tmp_path: Path) -> tuple[Path, Path]:
    return factories.model_pair(tmp_path)


def assert_same(one: Subspace, other: Subspace) -> None:
    assert list(one) == list(other)
    for name in one:
        for factor in ("u", "s", "v"):
            assert torch.equal(getattr(one[name], factor), getattr(other[name], factor))
        assert one[name].record() == other[name].record()


def test_every_module_is_what_the_core_makes_of_its_matrices(models: tuple[Path, Path]) -> None:
    weights = factories.llama_weights()
    aligned = factories.moved(weights)
    subspace = csulora.extract(*models, rank=5, dtype="f32")
    assert len(subspace) == 14
    options = _core.ExtractOptions()
    options.rank, options.factor_dtype = 5, torch.float32
    for name, module in subspace.items():
        expected = _core.extract_subspace(weights[f"{name}.weight"], aligned[f"{name}.weight"], options)
        assert torch.equal(module.u, expected.u)
        assert torch.equal(module.s, expected.s)
        assert torch.equal(module.v, expected.v)
        assert module.certificate.captured_energy == expected.certificate.captured_energy


def test_names_decide_and_not_files_or_their_order(tmp_path: Path, models: tuple[Path, Path]) -> None:
    base, aligned = factories.model_pair(tmp_path / "sharded", shards=3)
    assert_same(csulora.extract(*models, rank=4), csulora.extract(base, aligned, rank=4))
    assert_same(csulora.extract(*models, rank=4), csulora.extract(models[0], aligned, rank=4))


def test_says_what_it_was_made_from(models: tuple[Path, Path]) -> None:
    subspace = csulora.extract(*models, rank=4, seed=7, modules=["q_proj"])
    provenance = subspace.provenance
    assert (provenance.csulora, provenance.base, provenance.aligned) == (csulora.__version__, "base", "aligned")
    assert provenance.options["rank"] == 4
    assert provenance.options["seed"] == 7
    assert provenance.options["modules"] == ["q_proj"]
    base, aligned = (factories.llama_weights(), factories.moved(factories.llama_weights()))
    assert subspace[Q].base_sha256 == factories.sha256(base[f"{Q}.weight"])
    assert subspace[Q].aligned_sha256 == factories.sha256(aligned[f"{Q}.weight"])


def test_embedding_and_head_come_on_request(models: tuple[Path, Path]) -> None:
    subspace = csulora.extract(*models, rank=4, modules=["embed_tokens", "lm_head"])
    assert list(subspace) == ["lm_head", EMBEDDING]
    assert subspace.aliases == {}


def test_the_head_of_a_tied_model_is_an_alias(tmp_path: Path) -> None:
    weights = {name: weight for name, weight in factories.llama_weights().items() if name != "lm_head.weight"}
    tied = {"tie_word_embeddings": True}
    base = factories.save_checkpoint(tmp_path / "base", weights, tied)
    aligned = factories.save_checkpoint(tmp_path / "aligned", factories.moved(weights), tied)
    subspace = csulora.extract(base, aligned, rank=4, modules=["lm_head"])
    assert list(subspace) == [EMBEDDING]
    assert subspace.aliases == {"lm_head": EMBEDDING}
    assert csulora.extract(base, aligned, rank=4).aliases == {}


@pytest.mark.parametrize("model_type", ["gpt2", "vision-encoder-decoder", None])
def test_conv1d_is_extracted_as_the_linear_layer_it_is(tmp_path: Path, model_type: str | None) -> None:
    stored = {"h.0.attn.c_attn.weight": factories.gaussian(12, 36, seed=0)}
    moved = factories.moved(stored)
    config = {"model_type": model_type}
    base = factories.save_checkpoint(tmp_path / "base", stored, config)
    aligned = factories.save_checkpoint(tmp_path / "aligned", moved, config)
    module = csulora.extract(base, aligned, rank=3, dtype="f32")["h.0.attn.c_attn"]
    assert module.shape == (36, 12)
    options = _core.ExtractOptions()
    options.rank, options.factor_dtype = 3, torch.float32
    name = "h.0.attn.c_attn.weight"
    expected = _core.extract_subspace(stored[name].t().contiguous(), moved[name].t().contiguous(), options)
    assert torch.equal(module.u, expected.u)
    assert torch.equal(module.v, expected.v)


def test_keeps_the_fewest_directions_that_capture_the_energy(models: tuple[Path, Path]) -> None:
    subspace = csulora.extract(*models, energy=0.6, max_rank=20)
    assert all(module.certificate.captured_energy >= 0.6 for module in subspace.values())
    fewer = csulora.extract(*models, rank=subspace[Q].rank - 1)
    assert fewer[Q].certificate.captured_energy < 0.6
    assert all(module.rank == 2 for module in csulora.extract(*models, energy=0.99, max_rank=2).values())


def test_every_option_reaches_the_core() -> None:
    options = extraction.ExtractionOptions(rank=3, dtype="bf16", seed=2**63 - 1, keep_noise=True).to_core("q_proj")
    assert (options.rank, options.energy, options.factor_dtype) == (3, None, torch.bfloat16)
    assert (options.seed, options.keep_noise) == (2**63 - 1, True)
    of_experts = extraction.ExtractionOptions(rank=64, expert_rank=5).to_core("mlp.experts.0.up_proj")
    assert of_experts.rank == 5
    options = extraction.ExtractionOptions(rank=3, energy=0.75, max_rank=9).to_core("q_proj")
    assert (options.rank, options.energy, options.above_bulk) == (9, 0.75, False)
    options = extraction.ExtractionOptions(rank="auto", max_rank=9).to_core("q_proj")
    assert (options.rank, options.energy, options.above_bulk) == (9, None, True)


def test_rank_auto_takes_what_stands_out_and_at_most_64_directions(models: tuple[Path, Path]) -> None:
    subspace = csulora.extract(*models, rank="auto")
    assert (subspace.provenance.options["rank"], subspace.provenance.options["max_rank"]) == ("auto", 64)
    few = csulora.extract(*models, rank="auto", max_rank=2)
    assert all(few[name].rank == min(2, subspace[name].rank) for name in few)


def test_reports_progress_in_matrix_entries(models: tuple[Path, Path]) -> None:
    steps: list[tuple[str, int, int]] = []
    csulora.extract(*models, rank=2, modules=["q_proj", "k_proj"], progress=lambda *step: steps.append(step))
    k, q = 24 * 48, 48 * 48
    total = 2 * (k + q)
    names = [f"model.layers.{layer}.self_attn.{kind}_proj" for layer in (0, 1) for kind in ("k", "q")]
    done = [0, k, k + q, 2 * k + q, total]
    assert steps == [(name, before, total) for name, before in zip([*names, ""], done, strict=True)]


def rounded_model_pair(tmp_path: Path) -> tuple[Path, Path]:
    """The same weights in two files, rounded to different grids."""
    weights = factories.llama_weights()
    half = {name: weight.half() for name, weight in weights.items()}
    coarse = {name: weight.bfloat16() for name, weight in weights.items()}
    return factories.save_checkpoint(tmp_path / "half", half), factories.save_checkpoint(tmp_path / "coarse", coarse)


def test_a_pair_that_differs_by_rounding_alone_is_refused(tmp_path: Path) -> None:
    base, aligned = rounded_model_pair(tmp_path)
    with pytest.raises(RefusedError, match="half and coarse differ by no more than storage rounding"):
        csulora.extract(base, aligned, rank=4)
    assert csulora.extract(base, aligned, rank=4, keep_noise=True)[Q].rank == 4


@pytest.mark.parametrize("keep_noise", [False, True])
def test_a_pair_that_does_not_differ_is_refused(models: tuple[Path, Path], keep_noise: bool) -> None:
    with pytest.raises(RefusedError, match="base and base do not differ in any selected matrix"):
        csulora.extract(models[0], models[0], keep_noise=keep_noise)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank is 0"),
        ({"rank": 2**40}, "rank is"),
        ({"rank": "many"}, "rank is 'many'"),
        ({"rank": "auto", "energy": 0.5}, "give one of them"),
        ({"energy": 0.0}, "energy is 0.0"),
        ({"energy": 1.5}, "energy is 1.5"),
        ({"energy": float("nan")}, "energy is nan"),
        ({"energy": 0.5, "max_rank": 0}, "max_rank is 0"),
        ({"dtype": "f64"}, "dtype is 'f64'"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**64}, "seed is"),
        ({"device": "tpu"}, "device 'tpu'"),
        ({"device": "cuda:99"}, "device 'cuda:99'"),
        ({"modules": "q_proj"}, "modules is the text 'q_proj'"),
        ({"modules": ["q_porj"]}, "no 2-D weight matches the module pattern 'q_porj'"),
    ],
)
def test_options_out_of_range_are_refused_before_anything_is_written(
    tmp_path: Path, models: tuple[Path, Path], options: dict[str, object], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        csulora.extract(*models, output=tmp_path / "subspace", **options)
    assert not list(tmp_path.glob("subspace*"))


@pytest.mark.parametrize("name", ["base/model.safetensors", "aligned/config.json"])
def test_the_checkpoints_are_never_written_to(tmp_path: Path, models: tuple[Path, Path], name: str) -> None:
    before = (tmp_path / name).read_bytes()
    with pytest.raises(InputError, match="lies in what is read"):
        csulora.extract(*models, output=tmp_path / name)
    assert (tmp_path / name).read_bytes() == before


def spoil(aligned: Path, module: str, value: float) -> None:
    weights = factories.moved(factories.llama_weights())
    weights[f"{module}.weight"][3, 5] = value
    (aligned / "model.safetensors").unlink()
    (aligned / "config.json").unlink()
    aligned.rmdir()
    factories.save_checkpoint(aligned, weights)


def test_a_matrix_that_is_not_finite_is_refused_by_name_and_nothing_is_left(
    tmp_path: Path, models: tuple[Path, Path]
) -> None:
    spoil(models[1], "model.layers.1.mlp.up_proj", float("nan"))
    with pytest.raises(InputError, match=r"^model\.layers\.1\.mlp\.up_proj: .*NaN"):
        csulora.extract(*models, output=tmp_path / "subspace", rank=2)
    assert not list(tmp_path.glob("subspace*"))


def test_a_refused_pair_leaves_nothing(tmp_path: Path, models: tuple[Path, Path]) -> None:
    with pytest.raises(RefusedError):
        csulora.extract(models[0], models[0], output=tmp_path / "subspace")
    assert not list(tmp_path.glob("subspace*"))


class Interrupter:
    """Stands in for the extraction of one module: counts, and stops the run before one of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.extracted: list[str] = []
        self.stop_before: int | None = None
        self._extract: Callable[..., ModuleSubspace] = extraction._extract_module
        monkeypatch.setattr(extraction, "_extract_module", self)

    def __call__(self, loaded: object, *options: object) -> ModuleSubspace:
        if len(self.extracted) == self.stop_before:
            raise KeyboardInterrupt
        self.extracted.append(loaded.name)
        return self._extract(loaded, *options)


@pytest.fixture
def interrupter(monkeypatch: pytest.MonkeyPatch) -> Interrupter:
    return Interrupter(monkeypatch)


def interrupt(interrupter: Interrupter, models: tuple[Path, Path], output: Path, after: int, **options: int) -> None:
    interrupter.stop_before = after
    with pytest.raises(KeyboardInterrupt):
        csulora.extract(*models, output=output, rank=4, **options)
    assert not output.exists()
    interrupter.extracted.clear()
    interrupter.stop_before = None


@pytest.mark.parametrize("after", [0, 1, 9, 13])
def test_an_interrupted_run_continues_to_the_same_bytes(
    tmp_path: Path, models: tuple[Path, Path], interrupter: Interrupter, after: int
) -> None:
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    csulora.extract(*models, output=whole, rank=4)
    interrupter.extracted.clear()
    interrupt(interrupter, models, resumed, after)
    csulora.extract(*models, output=resumed, rank=4)
    assert len(interrupter.extracted) == 14 - after
    assert resumed.read_bytes() == whole.read_bytes()
    assert not list(tmp_path.glob("*.partial"))


def test_other_options_do_not_continue(tmp_path: Path, models: tuple[Path, Path], interrupter: Interrupter) -> None:
    interrupt(interrupter, models, tmp_path / "subspace", 9)
    csulora.extract(*models, output=tmp_path / "subspace", rank=4, seed=1)
    assert len(interrupter.extracted) == 14


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_other_checkpoints_do_not_continue(
    tmp_path: Path, models: tuple[Path, Path], interrupter: Interrupter, name: str
) -> None:
    interrupt(interrupter, models, tmp_path / "subspace", 9)
    file = models[1] / name
    copy = file.read_bytes()
    file.unlink()
    file.write_bytes(copy)
    csulora.extract(*models, output=tmp_path / "subspace", rank=4)
    assert len(interrupter.extracted) == 14


def test_a_subspace_in_a_file_is_the_same_as_one_in_memory(tmp_path: Path, models: tuple[Path, Path]) -> None:
    in_file = csulora.extract(*models, output=tmp_path / "subspace", rank=4)
    in_memory = csulora.extract(*models, rank=4)
    assert_same(in_file, in_memory)
    assert in_file.sha256 == in_memory.sha256
    assert sorted(file.name for file in tmp_path.iterdir()) == ["aligned", "base", "subspace"]


def test_the_same_command_twice_gives_the_same_bytes(tmp_path: Path, models: tuple[Path, Path]) -> None:
    for name in ("one", "two"):
        csulora.extract(*models, output=tmp_path / name, rank=4)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_a_weight_is_only_held_while_it_is_needed(models: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing but the task holds the matrices, and extraction lets go of them."""
    held: list[tuple[bool, bool]] = []
    extract_module = extraction._extract_module

    def watch(loaded: extraction.LoadedModule, *options: object) -> ModuleSubspace:
        references = [weakref.ref(matrix) for matrix in (loaded.task.base, loaded.task.aligned)]
        before = all(reference() is not None for reference in references)
        found = extract_module(loaded, *options)
        held.append((before, any(reference() is not None for reference in references)))
        return found

    monkeypatch.setattr(extraction, "_extract_module", watch)
    csulora.extract(*models, rank=2)
    assert set(held) == {(True, False)}
