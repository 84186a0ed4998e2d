from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

import csulora
import factories
from csulora.errors import InputError
from csulora.extraction import verification
from csulora.extraction.verification import Verification
from csulora.subspace.certificate import Certificate
from csulora.subspace.module_subspace import ModuleSubspace
from csulora.subspace.subspace import Subspace

pytestmark = pytest.mark.usefixtures("one_thread")

Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def models(tmp_path: Path) -> tuple[Path, Path]:
    return factories.model_pair(tmp_path)


def replaced(subspace: Subspace, module: ModuleSubspace) -> Subspace:
    """The subspace file with another module for Q."""
    return Subspace(dict(subspace) | {Q: module}, subspace.provenance)


def holds(subspace: Subspace, models: tuple[Path, Path]) -> dict[str, bool]:
    return {result.module: result.holds for result in csulora.verify(subspace, *models)}


@pytest.mark.parametrize(
    "options", [{"rank": 4}, {"rank": 48, "dtype": "f32"}, {"energy": 0.5}, {"rank": 6, "dtype": "bf16"}]
)
def test_the_certificates_of_an_extraction_hold(models: tuple[Path, Path], options: dict[str, object]) -> None:
    subspace = csulora.extract(*models, **options)
    assert holds(subspace, models) == dict.fromkeys(subspace, True)


def test_the_certificate_of_a_module_without_directions_holds(tmp_path: Path) -> None:
    base = factories.llama_weights(dtype=torch.bfloat16)
    aligned = {name: weight.clone() for name, weight in base.items()}
    aligned[f"{Q}.weight"] = factories.moved(base)[f"{Q}.weight"]
    aligned["model.layers.0.self_attn.o_proj.weight"][0, 0] *= 1 + 2**-7
    models = (
        factories.save_checkpoint(tmp_path / "base", base),
        factories.save_checkpoint(tmp_path / "aligned", aligned),
    )
    subspace = csulora.extract(*models, rank=4)
    assert subspace[Q].rank == 4
    assert subspace["model.layers.0.self_attn.k_proj"].rank == 0
    assert subspace["model.layers.0.self_attn.o_proj"].rank == 0
    assert holds(subspace, models) == dict.fromkeys(subspace, True)


def test_the_start_block_is_not_the_extractions(models: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    subspace = csulora.extract(*models, rank=4, modules=["q_proj"])
    certify, seeds = verification._core.certify, []

    def recording_certify(*arguments: object) -> object:
        seeds.append(arguments[3].seed)
        return certify(*arguments)

    monkeypatch.setattr(verification._core, "certify", recording_certify)
    csulora.verify(subspace, *models)
    assert len(seeds) == 2
    for seed in seeds:
        with pytest.raises(InputError):
            csulora.extract(*models, seed=seed)


@pytest.mark.parametrize(
    ("field", "better"),
    [
        ("captured_energy", lambda value: value + 1e-3),
        ("optimal_share", lambda value: value + 0.01),
        ("residual", lambda value: value / 2),
        ("orthonormality", lambda value: 0.0),
        ("next_value", lambda value: value / 2),
        ("subspace_error", lambda value: 0.0),
        ("noise_edge", lambda value: value / 2),
        ("displacement_norm2", lambda value: value * 1.01),
    ],
)
def test_a_certificate_that_claims_more_than_is_true_does_not_hold(
    models: tuple[Path, Path], field: str, better: object
) -> None:
    subspace = csulora.extract(*models, rank=4)
    certificate = subspace[Q].certificate
    claim = Certificate(**asdict(certificate) | {field: better(getattr(certificate, field))})
    result = holds(replaced(subspace, replace(subspace[Q], certificate=claim)), models)
    assert result == dict.fromkeys(subspace, True) | {Q: False}


def test_other_directions_do_not_have_the_certificate(models: tuple[Path, Path]) -> None:
    subspace = csulora.extract(*models, rank=4, dtype="f32")
    random = factories.core_subspace(48, 48, 4, seed=3)
    result = holds(replaced(subspace, replace(subspace[Q], u=random.u, v=random.v)), models)
    assert result == dict.fromkeys(subspace, True) | {Q: False}


def test_a_true_certificate_of_other_weights_does_not_hold() -> None:
    certificate = factories.subspace()[Q].certificate
    assert Verification(Q, certificate, certificate, same_weights=True).holds
    assert not Verification(Q, certificate, certificate, same_weights=False).holds


def test_other_weights_are_told_where_the_displacement_is_the_same(tmp_path: Path, models: tuple[Path, Path]) -> None:
    subspace = csulora.extract(*models, rank=4)
    base = factories.llama_weights()
    aligned = factories.moved(base)
    for weights in (base, aligned):  # both move alike: the displacement stays
        weights[f"{Q}.weight"][0, 0] += 1
    other = (
        factories.save_checkpoint(tmp_path / "other" / "base", base),
        factories.save_checkpoint(tmp_path / "other" / "aligned", aligned),
    )
    results = {result.module: result for result in csulora.verify(subspace, *other)}
    assert [name for name, result in results.items() if not result.same_weights] == [Q]
    assert not results[Q].holds


def test_checkpoints_of_another_model_are_refused(tmp_path: Path, models: tuple[Path, Path]) -> None:
    subspace = csulora.extract(*models, rank=4)
    smaller = factories.model_pair(tmp_path / "smaller", layers=1)
    with pytest.raises(InputError, match=r"base: tensor model\.layers\.1\..*weight is missing"):
        csulora.verify(subspace, *smaller)
    wider = factories.llama_weights(width=64)
    with pytest.raises(InputError, match=r"down_proj\.weight is \[64, 64\], but the subspace file is for \[48, 64\]"):
        csulora.verify(
            subspace,
            factories.save_checkpoint(tmp_path / "wider" / "base", wider),
            factories.save_checkpoint(tmp_path / "wider" / "aligned", factories.moved(wider)),
        )
