"""Which checkpoint of a subspace file's pair a model is."""

from pathlib import Path

import pytest
from gguf import GGMLQuantizationType

import csulora
import factories
import gguf_files
from csulora.cli.model_loading import check_aligned
from csulora.errors import InputError
from csulora.models.checkpoint import Checkpoint
from csulora.models.identity import compared, which

pytestmark = pytest.mark.usefixtures("one_thread")


def test_each_checkpoint_is_told_from_the_other_and_from_any_third(tmp_path: Path) -> None:
    base, aligned = factories.model_pair(tmp_path)
    further = factories.save_checkpoint(tmp_path / "further", factories.moved(factories.llama_weights(), size=2.0))
    fewer = factories.save_checkpoint(tmp_path / "fewer", factories.llama_weights(layers=1))
    subspace = csulora.extract(base, aligned, rank=4)
    found = {path.name: which(Checkpoint.open(path), subspace) for path in (base, aligned, further)}
    assert found == {"base": "base", "aligned": "aligned", "further": "another"}
    deeper = csulora.extract(base, aligned, rank=4, modules=["*.layers.1.*"])
    assert which(Checkpoint.open(fewer), deeper) == "another"


def test_a_matrix_that_alignment_left_alone_tells_nothing(tmp_path: Path) -> None:
    weights = factories.llama_weights()
    moved = factories.moved(weights)
    still = "model.layers.0.self_attn.q_proj"
    moved[f"{still}.weight"] = weights[f"{still}.weight"]
    base = factories.save_checkpoint(tmp_path / "base", weights)
    subspace = csulora.extract(base, factories.save_checkpoint(tmp_path / "aligned", moved), rank=4)
    assert subspace[still].rank == 0
    assert compared(subspace) != still
    assert which(Checkpoint.open(base), subspace) == "base"


def test_commands_that_run_a_model_refuse_the_one_before_alignment_and_point_to_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, aligned = factories.model_pair(tmp_path)
    copy = factories.save_checkpoint(tmp_path / "copy", factories.moved(factories.llama_weights(), size=2.0))
    subspace = csulora.extract(base, aligned, rank=4)
    with pytest.raises(InputError, match="base: is the checkpoint before alignment; name the aligned one"):
        check_aligned(str(base), subspace, quiet=True)
    check_aligned(str(aligned), subspace, quiet=False)
    check_aligned(str(tmp_path / "nothing"), subspace, quiet=False)
    check_aligned(str(copy), subspace, quiet=True)
    assert not capsys.readouterr().err
    check_aligned(str(copy), subspace, quiet=False)
    assert f"csulora: {copy}: {compared(subspace)} is not the aligned checkpoint's" in capsys.readouterr().err
    unreadable, weights = {"quantize.imatrix.file": "imatrix.dat"}, factories.llama_weights(width=64)
    gguf_files.save_model(tmp_path / "4.gguf", weights, GGMLQuantizationType.Q4_0, metadata=unreadable)
    check_aligned(str(tmp_path / "4.gguf"), subspace, quiet=False)
