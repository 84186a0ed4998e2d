"""Pairs whose vocabularies differ, and pairs of which one ties its head to its embedding."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import csulora
import factories
import oracle
from csulora.errors import InputError
from csulora.native import _core
from csulora.subspace.module_subspace import ModuleSubspace
from csulora.subspace.subspace import Subspace

pytestmark = pytest.mark.usefixtures("one_thread")

EMBEDDING, HEAD, Q = "model.embed_tokens", "lm_head", "model.layers.0.self_attn.q_proj"
ROWS, WIDTH = 40, 48


def with_rows(weights: dict[str, Tensor], rows: int) -> dict[str, Tensor]:
    """Embedding and head cut to some rows, or extended by random ones."""

    def resized(weight: Tensor) -> Tensor:
        return torch.cat([weight, factories.gaussian(64, weight.shape[1], seed=9)])[:rows].contiguous()

    return {
        name: resized(weight) if name in (f"{EMBEDDING}.weight", f"{HEAD}.weight") else weight
        for name, weight in weights.items()
    }


def pair(directory: Path, base_rows: int, aligned_rows: int) -> tuple[Path, Path]:
    base = factories.llama_weights(width=WIDTH)
    return (
        factories.save_checkpoint(directory / "base", with_rows(base, base_rows)),
        factories.save_checkpoint(directory / "aligned", with_rows(factories.moved(base), aligned_rows)),
    )


@pytest.mark.parametrize(("base_rows", "aligned_rows"), [(40, 43), (43, 40), (40, 40)])
def test_the_rows_that_both_have_count(tmp_path: Path, base_rows: int, aligned_rows: int) -> None:
    models = pair(tmp_path, base_rows, aligned_rows)
    modules = ["embed_tokens", "lm_head"]
    subspace = csulora.extract(*models, rank=5, dtype="f32", modules=modules, output=tmp_path / "subspace")
    base = factories.llama_weights(width=WIDTH)
    options = _core.ExtractOptions()
    options.rank, options.factor_dtype = 5, torch.float32
    for module in (EMBEDDING, HEAD):
        found = subspace[module]
        expected = _core.extract_subspace(base[f"{module}.weight"], factories.moved(base)[f"{module}.weight"], options)
        assert found.shape == (aligned_rows, WIDTH)
        assert torch.equal(found.u[:ROWS], expected.u)
        assert not found.u[ROWS:].any()
        assert torch.equal(found.v, expected.v)
    assert all(result.holds for result in csulora.verify(subspace, *models))


def test_nothing_can_be_hidden_in_the_other_rows(tmp_path: Path) -> None:
    models = pair(tmp_path, 40, 43)
    subspace = csulora.extract(*models, rank=3, dtype="f32", modules=["embed_tokens"])
    module = subspace[EMBEDDING]
    u = module.u.clone()
    u[:, -1] = 0
    u[-1, -1] = 1
    forged = ModuleSubspace(u, module.s, module.v, module.certificate, module.base_sha256, module.aligned_sha256)
    with pytest.raises(InputError, match=r"embed_tokens: the columns of u are not orthonormal"):
        csulora.verify(Subspace({EMBEDDING: forged}, subspace.provenance), *models)


@pytest.mark.parametrize("penalties", [(0.0, 2.0, 2.0), (0.0, float("inf"), float("inf")), (2.0, 2.0, 0.0)])
def test_an_adapter_for_the_longer_embedding_is_corrected(
    tmp_path: Path, penalties: tuple[float, float, float]
) -> None:
    subspace = csulora.extract(*pair(tmp_path, 40, 43), rank=5, dtype="f32", modules=["embed_tokens", "lm_head"])
    adapter = factories.adapter({EMBEDDING: (43, WIDTH), HEAD: (43, WIDTH)})
    policy = csulora.Policy(*penalties, rank="exact")
    fixed, _ = csulora.correct(adapter, subspace, policy)
    for name, module in adapter.modules.items():
        found = subspace[name]
        expected = oracle.closest_safe_update(
            oracle.update(module.b, module.a, module.scale), found.u, found.v, penalties
        )
        ours = fixed.modules[name]
        torch.testing.assert_close(oracle.update(ours.b, ours.a, ours.scale), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("module", [Q, "transformer.wpe"])
def test_rows_of_other_matrices_must_agree(tmp_path: Path, module: str) -> None:
    base, aligned = (
        factories.save_checkpoint(tmp_path / str(rows), {f"{module}.weight": factories.gaussian(rows, 8, seed=0)})
        for rows in (6, 7)
    )
    with pytest.raises(InputError, match=r"weight is \[6, 8\] in base 6 and \[7, 8\] in aligned 7"):
        csulora.extract(base, aligned, modules=[module])


def test_columns_of_an_embedding_must_agree(tmp_path: Path) -> None:
    base, aligned = (
        factories.save_checkpoint(tmp_path / str(width), {f"{EMBEDDING}.weight": factories.gaussian(8, width, seed=0)})
        for width in (6, 7)
    )
    with pytest.raises(InputError, match=r"weight is \[8, 6\] in base 6 and \[8, 7\] in aligned 7"):
        csulora.extract(base, aligned, modules=["embed_tokens"])


def saved(directory: Path, weights: dict[str, Tensor], is_tied: bool) -> Path:
    kept = {name: weight for name, weight in weights.items() if not (is_tied and name == f"{HEAD}.weight")}
    config: dict[str, Any] = {"tie_word_embeddings": is_tied}
    return factories.save_checkpoint(directory, kept, config)


@pytest.mark.parametrize("patterns", [["lm_head"], ["embed_tokens", "lm_head"], ["*"]])
def test_the_head_of_a_base_that_ties_is_its_embedding(tmp_path: Path, patterns: list[str]) -> None:
    base = factories.llama_weights()
    aligned = factories.moved(base | {f"{HEAD}.weight": base[f"{EMBEDDING}.weight"]})
    models = saved(tmp_path / "base", base, True), saved(tmp_path / "aligned", aligned, False)
    subspace = csulora.extract(*models, rank=5, dtype="f32", modules=patterns)
    options = _core.ExtractOptions()
    options.rank, options.factor_dtype = 5, torch.float32
    expected = _core.extract_subspace(base[f"{EMBEDDING}.weight"], aligned[f"{HEAD}.weight"], options)
    assert torch.equal(subspace[HEAD].u, expected.u)
    assert subspace.aliases == {}
    assert (EMBEDDING in subspace) == (patterns != ["lm_head"])
    assert all(result.holds for result in csulora.verify(subspace, *models))


@pytest.mark.parametrize("patterns", [["lm_head"], ["embed_tokens", "lm_head"], ["*"]])
def test_the_head_of_an_aligned_model_that_ties_is_its_embedding(tmp_path: Path, patterns: list[str]) -> None:
    base = factories.llama_weights()
    models = saved(tmp_path / "base", base, False), saved(tmp_path / "aligned", factories.moved(base), True)
    subspace = csulora.extract(*models, rank=5, modules=patterns)
    assert HEAD not in subspace
    assert subspace[EMBEDDING].base_sha256 == factories.sha256(base[f"{EMBEDDING}.weight"])
    assert subspace.aliases == {HEAD: EMBEDDING}
    assert all(result.holds for result in csulora.verify(subspace, *models))


def test_without_patterns_tying_does_not_matter(tmp_path: Path) -> None:
    base = factories.llama_weights()
    models = saved(tmp_path / "base", base, True), saved(tmp_path / "aligned", factories.moved(base), False)
    assert len(csulora.extract(*models, rank=4)) == 14
