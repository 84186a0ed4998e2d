"""Where experts lie in stacked tensors: csulora's exceptions are transformers', and parts are what their names say."""

import re
from pathlib import Path

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

import csulora
import factories
from csulora.models.checkpoint import Checkpoint
from csulora.models.experts import layout_of, parts
from csulora.subspace.expert_layout import ExpertLayout

MODELS = Path(transformers.__file__).parent / "models"
_IMPLEMENTATION = re.compile(r"@use_experts_implementation(?:\((?P<options>[^)]*)\))?\nclass (?P<name>\w+)")
_INPUTS_FIRST = re.compile(r"gate_up_proj = nn\.Parameter\([^\n]*num_experts, self\.hidden_\w+, 2 \*")


def modeling_files() -> dict[str, str]:
    return {path.parent.name: path.read_text() for path in MODELS.glob("*/modeling_*.py")}


def test_transformers_interleaves_gate_and_up_where_the_table_says_so() -> None:
    found = {
        family
        for family, source in modeling_files().items()
        for match in _IMPLEMENTATION.finditer(source)
        if "is_concatenated=False" in (match["options"] or "")
    }
    assert found == {"gpt_oss"}
    assert layout_of(["gpt_oss"]).interleaved
    assert not layout_of(["qwen3_moe"]).interleaved


def test_peft_exchanges_sides_where_a_module_does_not_say_that_inputs_come_first() -> None:
    found = {
        family
        for family, source in modeling_files().items()
        if _INPUTS_FIRST.search(source) and "is_transposed=True" not in source
    }
    assert found == {"llama4"}
    assert layout_of(["llama4", "llama4_text"]).exchanged


@st.composite
def stacks(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, bool, bool]:
    experts, hidden, width = (draw(st.integers(1, 4)) for _ in range(3))
    transposed, interleaved = draw(st.booleans()), draw(st.booleans())
    numbers = torch.arange(experts * 2 * width * hidden, dtype=torch.float32)
    gate_up = numbers.reshape(experts, 2 * width, hidden)
    down = -numbers[: experts * hidden * width].reshape(experts, hidden, width)
    return gate_up, down, transposed, interleaved


@given(stacks())
def test_parts_are_the_rows_of_one_expert(stack: tuple[torch.Tensor, torch.Tensor, bool, bool]) -> None:
    gate_up, down, transposed, interleaved = stack
    stored = {"experts.gate_up_proj": gate_up, "experts.down_proj": down}
    if transposed:
        stored = {name: tensor.transpose(1, 2).contiguous() for name, tensor in stored.items()}
    found = dict(parts({name: tensor.shape for name, tensor in stored.items()}, ExpertLayout(interleaved=interleaved)))
    assert len(found) == 3 * len(gate_up)
    for name, part in found.items():
        matrix = stored[part.tensor][part.expert]
        matrix = (matrix.t() if part.transposed else matrix)[part.rows]
        _, expert, projection = name.split(".")
        whole = (down if projection == "down_proj" else gate_up)[int(expert)]
        if projection != "down_proj":
            halves = (whole[0::2], whole[1::2]) if interleaved else whole.chunk(2)
            whole = halves[projection == "up_proj"]
        assert torch.equal(matrix, whole)
        assert part.shape == tuple(whole.shape)


@pytest.mark.parametrize(
    "shapes",
    [
        {"experts.gate_up_proj": [4, 48, 32]},
        {"experts.gate_up_proj": [4, 48, 32], "experts.down_proj": [3, 32, 24]},
        {"experts.gate_up_proj": [4, 48, 32], "experts.down_proj": [4, 32, 25]},
        {"experts.gate_up_proj": [4, 48, 32], "experts.up_proj": [4, 24, 32], "experts.down_proj": [4, 32, 24]},
        {"adapter.gate_up_proj": [4, 48, 32], "adapter.down_proj": [4, 32, 24]},
    ],
)
def test_tensors_that_do_not_fit_each_other_are_no_experts(shapes: dict[str, list[int]]) -> None:
    assert not list(parts(shapes, ExpertLayout()))


def test_stacked_and_single_experts_are_one_model_pair(tmp_path: Path) -> None:
    experts, width, hidden = 3, 24, 48
    gate_up = factories.gaussian(experts * 2 * width, hidden, seed=1)
    down = factories.gaussian(experts * hidden, width, seed=2)
    gate_up, down = gate_up.reshape(experts, 2 * width, hidden), down.reshape(experts, hidden, width)
    owner, config = "model.layers.0.mlp.experts", {"model_type": "qwen3_moe"}
    stacked = {f"{owner}.gate_up_proj": gate_up, f"{owner}.down_proj": down}
    single = {
        f"{owner}.{expert}.{projection}.weight": matrix.contiguous()
        for expert in range(experts)
        for projection, matrix in (
            ("gate_proj", gate_up[expert, :width]),
            ("up_proj", gate_up[expert, width:]),
            ("down_proj", down[expert]),
        )
    }
    base = factories.save_checkpoint(tmp_path / "base", {name: 0.5 * each for name, each in single.items()}, config)
    one = factories.save_checkpoint(tmp_path / "stacked", stacked, config)
    other = factories.save_checkpoint(tmp_path / "single", single, config)
    assert {name: Checkpoint.open(one).load(name)[1] for name in Checkpoint.open(one).weights} == {
        name: Checkpoint.open(other).load(name)[1] for name in Checkpoint.open(other).weights
    }
    for aligned in (one, other):
        csulora.extract(base, aligned, rank=4, output=tmp_path / f"{aligned.name}.safetensors")
    found, expected = (csulora.Subspace.open(tmp_path / f"{path.name}.safetensors") for path in (one, other))
    assert found.fingerprints == expected.fingerprints
    assert all(torch.equal(found[name].u, expected[name].u) for name in expected)
    assert all(result.holds for result in csulora.verify(found, base, one))
