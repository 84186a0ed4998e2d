import pytest

from csulora.policy.globs import matches

LLAMA = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize("pattern", ["q_proj", "self_attn.q_proj", "*.q_proj", "layers.0.*", "*", LLAMA, "[pq]_proj"])
def test_a_glob_matches_whole_names_and_trailing_parts(pattern: str) -> None:
    assert matches(LLAMA, pattern)


@pytest.mark.parametrize("pattern", ["proj", "q_pro", "layers", "layers.0", "Q_PROJ", "", "model.layers.1.*"])
def test_a_glob_matches_nothing_else(pattern: str) -> None:
    assert not matches(LLAMA, pattern)
