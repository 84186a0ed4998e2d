from pathlib import Path

import pytest

import csulora
import factories


@pytest.fixture(scope="module")
def subspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The subspace file of a tiny pair."""
    file = tmp_path_factory.mktemp("subspace") / "subspace.safetensors"
    csulora.extract(*factories.model_pair(file.parent), rank=4, output=file)
    return file
