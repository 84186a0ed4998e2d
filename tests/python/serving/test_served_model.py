from pathlib import Path

import pytest
import torch

import csulora
import factories
import quantised
from csulora.errors import InputError
from csulora.serving.gate import Gate
from csulora.serving.served_model import check_model
from csulora.serving.variables import ANY_MODEL_VARIABLE

pytestmark = pytest.mark.usefixtures("one_thread")

Q = "model.layers.0.self_attn.q_proj"


def gate(base: Path, aligned: Path) -> Gate:
    return Gate.open(csulora.extract(base, aligned, rank=4, modules=[Q]), csulora.Policy.csulora())


def test_the_served_model_is_told_by_codes_and_scales(tmp_path: Path) -> None:
    weights, kind = factories.llama_weights(layers=1), quantised.KINDS["channels"]
    base = factories.save_checkpoint(tmp_path / "base", weights)
    aligned = quantised.save(tmp_path / "aligned", factories.moved(weights, size=2.0), kind)
    check_model(str(aligned), gate(base, aligned))
    with pytest.raises(InputError, match=rf"{Q} is not what the subspace file was made of; serve .*aligned"):
        check_model(str(base), gate(base, aligned))


def test_a_quantised_copy_is_served_only_where_the_operator_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, aligned = factories.model_pair(tmp_path)
    config = {"quantization_config": {"quant_method": "gptq"}}
    copy = factories.save_checkpoint(tmp_path / "copy", {f"{Q}.qweight": torch.zeros(2, 2)}, config)
    with pytest.raises(InputError, match=rf"is quantised with GPTQ, .* or set {ANY_MODEL_VARIABLE}=1 if this is a con"):
        check_model(str(copy), gate(base, aligned))
    monkeypatch.setenv(ANY_MODEL_VARIABLE, "1")
    check_model(str(copy), gate(base, aligned))
